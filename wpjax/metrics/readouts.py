"""Readouts: how the residual stream at some positions becomes numbers. A new one is a class here.

Written with the operations of `models.ops` it serves the secant adjoint as well.
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
    """How the residual stream at the positions that are read becomes numbers; a pytree."""

    @property
    def reads_logits(self) -> bool:
        """Whether final norm and unembedding take part."""
        ...

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """One number a position."""
        ...

    def take(self, rows: Int[Array, " N"]) -> Readout:
        """The readout of some of the prompts."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Projection on a direction, in full float32 on every device.

    Attributes:
        vector: [D].
    """

    vector: Float[Array, " D"]

    @property
    def reads_logits(self) -> bool:
        """No."""
        return False

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """<r, v>, in the units of the residual stream."""
        return ops.linear(lambda a: jnp.matmul(a, self.vector, precision=jax.lax.Precision.HIGHEST), resid)

    def take(self, rows: Int[Array, " N"]) -> Projection:
        """The same for every prompt."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProb:
    """Log-probability, in nats, of a token.

    Attributes:
        tokens: [B, S], the token that follows each position.
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

    def take(self, rows: Int[Array, " N"]) -> LogProb:
        """The tokens of some prompts."""
        return LogProb(self.tokens[rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogOdds:
    """Log-odds, in nats, of one token against another; the vocabulary is never multiplied out.

    Attributes:
        tokens: [B, S], the token that counts for it.
        foils: [B, S], the token that counts against it.
    """

    tokens: Int[Array, "B S"]
    foils: Int[Array, "B S"]

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """<norm(r), W_U[:, token] - W_U[:, foil]>, see `Decoder.log_odds`."""
        return decoder(cfg, params).log_odds(resid, self.tokens, self.foils)

    def take(self, rows: Int[Array, " N"]) -> LogOdds:
        """The tokens of some prompts."""
        return LogOdds(self.tokens[rows], self.foils[rows])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens"], meta_fields=["margin"])
@dataclasses.dataclass(frozen=True)
class TokensUnchanged:
    """Whether a token is surely the first choice; without a slope.

    Attributes:
        tokens: [B, S], the token that follows each position.
        margin: by how much, in nats, its logit must exceed every other (static).
    """

    tokens: Int[Array, "B S"]
    margin: float

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """1 or 0."""
        logits = decoder(cfg, params).logits(resid)
        mine = jnp.arange(logits.shape[-1]) == self.tokens[..., None]
        best, other = (jnp.where(some, logits, -jnp.inf).max(-1) for some in (mine, ~mine))
        return (best > other + self.margin).astype(jnp.float32)

    def take(self, rows: Int[Array, " N"]) -> TokensUnchanged:
        """The tokens of some prompts."""
        return TokensUnchanged(self.tokens[rows], self.margin)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Divergence:
    """How near next-token distributions are to those of a reference model, in nats; 0 is equal.

    Attributes:
        resid: [B, S, D], the reference's residual stream after its last layer.
        params: the reference's parameters; its final norm and unembedding are used.
    """

    resid: Float[Array, "B S D"]
    params: Params

    @property
    def reads_logits(self) -> bool:
        """Yes."""
        return True

    def __call__(self, cfg: ModelConfig, params: Params, resid: Float[Value, "B S D"]) -> Float[Value, "B S"]:
        """-KL(reference || model)."""
        log_p = ops.log_softmax(decoder(cfg, self.params).logits(self.resid))
        log_q = ops.log_softmax(decoder(cfg, params).logits(resid))
        return -(jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    def take(self, rows: Int[Array, " N"]) -> Divergence:
        """The reference on some prompts."""
        return Divergence(self.resid[rows], self.params)
