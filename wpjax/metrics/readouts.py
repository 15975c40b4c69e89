"""Readouts: how the residual stream at a position becomes a number. A new readout is a class here.

Write it with the operations of `models.ops`; then the secant adjoint works for it too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wpjax.models import ops
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder
from wpjax.models.secant import Value


@runtime_checkable
class Readout(Protocol):
    """Turns the residual stream at each position that is read into a number; a pytree."""

    @property
    def reads_logits(self) -> bool:
        """Whether the readout uses the final norm and the unembedding."""
        ...

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """One number for each position.

        Args:
            cfg: architecture of the model.
            params: parameters of the model that is read; only readouts of logits use them.
            resid: [B, S, D], residual stream at the positions that are read.
        """
        ...

    def take(self, rows: Int[Array, " N"]) -> Readout:
        """The same readout for some of the prompts."""
        ...

    @property
    def to_learn(self) -> Readout:
        """What a mask is learned to raise: the readout itself, or one that stops growing where nothing is left to win.

        (docs/method.md, "Learned masks")
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Projection on a direction, in full float32 on every device.

    Attributes:
        vector: [D], the direction; `Anchor` uses a unit vector.
    """

    vector: Float[Array, " D"]

    @property
    def reads_logits(self) -> bool:
        """No."""
        return False

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """<r, v>, in the units of the residual stream."""
        # Accelerators multiply float32 in lower precision by default; small effects would drown in that.
        return ops.linear(lambda a: jnp.matmul(a, self.vector, precision=jax.lax.Precision.HIGHEST), resid)

    @property
    def to_learn(self) -> Projection:
        """Itself."""
        return self

    def take(self, rows: Int[Array, " N"]) -> Projection:
        """Itself: the direction is the same for every prompt."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProb:
    """Log-probability, in nats, of the next token.

    Attributes:
        tokens: [B, S], token after each position.
    """

    tokens: Int[Array, "B S"]

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """log softmax(logits)[token]."""
        log_p = ops.log_softmax(decoder(cfg, params).logits(resid))
        return ops.linear(lambda a: jnp.take_along_axis(a, self.tokens[..., None], axis=-1)[..., 0], log_p)

    @property
    def to_learn(self) -> LogProb:
        """Itself."""
        return self

    def take(self, rows: Int[Array, " N"]) -> LogProb:
        """The tokens of some prompts."""
        return LogProb(self.tokens[rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogOdds:
    """Log-odds, in nats, of one next token against another.

    The difference of two log-probabilities is the difference of two logits, so only those two are computed and never
    the logits of the whole vocabulary.

    Attributes:
        tokens: [B, S], token whose log-probability counts positively.
        foils: [B, S], token whose log-probability counts negatively.
    """

    tokens: Int[Array, "B S"]
    foils: Int[Array, "B S"]

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """<norm(r), W_U[:, token] - W_U[:, foil]>; see `Decoder.log_odds`."""
        return decoder(cfg, params).log_odds(resid, self.tokens, self.foils)

    @property
    def to_learn(self) -> LogChoice:
        """The log-probability of the choice. The log-odds themselves grow long after the token is chosen."""
        return LogChoice(self.tokens, self.foils)

    def take(self, rows: Int[Array, " N"]) -> LogOdds:
        """Tokens and foils of some prompts."""
        return LogOdds(self.tokens[rows], self.foils[rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogChoice:
    """Log-probability, in nats, of choosing one next token of two: log sigmoid(log-odds).

    It is near 0 once the token is surely chosen, and falls like the log-odds where the other one is.

    Attributes:
        tokens: [B, S], token whose choice is measured.
        foils: [B, S], the other token.
    """

    tokens: Int[Array, "B S"]
    foils: Int[Array, "B S"]

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """log(p_token / (p_token + p_foil))."""
        odds = decoder(cfg, params).log_odds(resid, self.tokens, self.foils)
        two = ops.linear(lambda a: jnp.stack([a, jnp.zeros_like(a)], axis=-1), odds)
        return ops.linear(lambda a: a[..., 0], ops.log_softmax(two))

    @property
    def to_learn(self) -> LogChoice:
        """Itself."""
        return self

    def take(self, rows: Int[Array, " N"]) -> LogChoice:
        """Tokens and foils of some prompts."""
        return LogChoice(self.tokens[rows], self.foils[rows])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens"], meta_fields=["margin"])
@dataclasses.dataclass(frozen=True)
class TokensUnchanged:
    """Whether a model would surely choose a token greedily: 1 or 0, so its gradient is zero.

    Attributes:
        tokens: [B, S], token after each position.
        margin: amount, in nats, by which the token's logit must exceed every other logit (static).
    """

    tokens: Int[Array, "B S"]
    margin: float

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """1 where the token is chosen with the margin, otherwise 0."""
        logits = decoder(cfg, params).logits(resid)
        is_token = jnp.arange(logits.shape[-1]) == self.tokens[..., None]  # [B, S, V]
        own, other = (jnp.where(chosen, logits, -jnp.inf).max(-1) for chosen in (is_token, ~is_token))
        return (own > other + self.margin).astype(jnp.float32)

    @property
    def to_learn(self) -> TokensUnchanged:
        """Itself."""
        return self

    def take(self, rows: Int[Array, " N"]) -> TokensUnchanged:
        """The tokens of some prompts."""
        return TokensUnchanged(self.tokens[rows], self.margin)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Divergence:
    """Minus the KL divergence of the model's next-token distribution from a reference model's, in nats.

    It is 0 where the two are equal, and negative elsewhere.

    Attributes:
        resid: [B, S, D], residual stream of the reference after its last layer.
        params: parameters of the reference, whose final norm and unembedding are used.
    """

    resid: Float[Array, "B S D"]
    params: Params

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """-KL(reference || model) = -sum_v p_v (log p_v - log q_v); p: reference, q: model."""
        log_p = ops.log_softmax(decoder(cfg, self.params).logits(self.resid))
        log_q = ops.log_softmax(decoder(cfg, params).logits(resid))
        return -(jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    @property
    def to_learn(self) -> Divergence:
        """Itself."""
        return self

    def take(self, rows: Int[Array, " N"]) -> Divergence:
        """The reference's residual stream on some prompts."""
        return Divergence(self.resid[rows], self.params)
