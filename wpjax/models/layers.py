"""The parts of the one decoder, in Flax NNX; families differ only in `ModelConfig`.

Shapes in names of axes: B batch, T tokens, D model, H query heads, K KV heads, Dh head width, F neurons,
V vocabulary, L layers. Weights keep their head and neuron axes explicit:

    W_Q [D, H, Dh]   W_K, W_V [D, K, Dh]   W_O [H, Dh, D]   W_gate, W_in [D, F]   W_out [F, D]
    W_E [V, D]       W_pos [n_ctx, D]      W_U [D, V]

Parameters are a plain nested dict of arrays (or `Blend`s); those under "blocks" carry a leading layer axis. The
residual stream is float32 whatever the dtype of the weights. Sequences are padded on the right, where causal
attention never looks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from wpjax.models.config import ModelConfig
from wpjax.models.leaves import Blend, Leaf, base_of, expert_of, lookup, project, project_both, resolve
from wpjax.models.rotary import rotate

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def activation(cfg: ModelConfig) -> Callable[[Array], Array]:
    """The MLP's activation function."""
    return _ACTIVATIONS[cfg.act]


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def _leaf(param: nnx.Param) -> Leaf:
    return param.get_value()


class Packed(NamedTuple):
    """Prompts laid out as one sequence: the tokens that they share, once, then the rest of each, in bins of one width.

    Attributes:
        positions: [1, S], the position that each token has in its prompt; the first c = S - G W are shared.
        segments: [G, W], the prompt that each of the others belongs to, -1 to fill up. A bin may hold several.
    """

    positions: Int[Array, "1 S"]
    segments: Int[Array, "G W"]

    @classmethod
    def side_by_side(cls, n_prompts: int, n_tokens: int, n_shared: int) -> Packed:
        """Prompts padded to one length, of which all begin with the same tokens, each in a bin of its own."""
        own = jnp.broadcast_to(jnp.arange(n_prompts)[:, None], (n_prompts, n_tokens - n_shared))
        rest = jnp.tile(jnp.arange(n_shared, n_tokens), n_prompts)
        return cls(jnp.concatenate([jnp.arange(n_shared), rest])[None], own)

    def lay(self, x: Shaped[Array, "G T *n"]) -> Shaped[Array, "1 S *n"]:
        """What belongs to prompts that stand side by side, packed; `keys` takes it apart again."""
        own = x[:, self.n_shared :]
        return jnp.concatenate([x[0, : self.n_shared], own.reshape(-1, *x.shape[2:])])[None]

    @property
    def n_shared(self) -> int:
        """How many tokens all prompts share."""
        return self.positions.shape[1] - self.segments.size

    @property
    def visible(self) -> Bool[Array, "G W C"]:
        """Which of a bin's keys (the shared tokens, then its own) each of its tokens attends to."""
        n_bins, width = self.segments.shape
        own = (self.segments[:, :, None] == self.segments[:, None, :]) & jnp.tri(width, dtype=bool)
        return jnp.concatenate([jnp.ones((n_bins, width, self.n_shared), bool), own], axis=-1)

    def bins(self, x: Float[Array, "N S *n"]) -> Float[Array, "N G W *n"]:
        """What belongs to the tokens that are not shared."""
        return x[:, self.n_shared :].reshape(len(x), *self.segments.shape, *x.shape[2:])

    def keys(self, x: Float[Array, "N S *n"]) -> Float[Array, "N G C *n"]:
        """Of each bin: what belongs to the shared tokens, as keys and values do, then to its own."""
        own = self.bins(x)
        shared = jnp.broadcast_to(x[:, None, : self.n_shared], (*own.shape[:2], self.n_shared, *own.shape[3:]))
        return jnp.concatenate([shared, own], axis=2)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over D, computed in float32."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.ones(cfg.d_model))
        if cfg.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(cfg.d_model))

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """Normalise each vector, then scale (and shift) it."""
        if self.cfg.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.cfg.norm_eps)
        x = x * resolve(_leaf(self.scale))
        return x + resolve(_leaf(self.bias)) if self.cfg.norm == "layer" else x


class Attention(nnx.Module):
    """Causal self-attention with grouped KV heads, in the three steps a patch can enter between."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, h, k, dh = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
        self.W_Q = _weight(rngs, (d, h, dh), d**-0.5)
        self.W_K = _weight(rngs, (d, k, dh), d**-0.5)
        self.W_V = _weight(rngs, (d, k, dh), d**-0.5)
        self.W_O = _weight(rngs, (h, dh, d), (h * dh * 2 * cfg.n_layers) ** -0.5)
        if cfg.qkv_bias:
            self.b_Q = nnx.Param(jnp.zeros((h, dh)))
            self.b_K = nnx.Param(jnp.zeros((k, dh)))
            self.b_V = nnx.Param(jnp.zeros((k, dh)))
        if cfg.out_bias:
            self.b_O = nnx.Param(jnp.zeros(d))

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]) -> Float[Array, "B T H Dh"]:
        """Rotated queries of every head."""
        q = project(x, _leaf(self.W_Q), terms=self.cfg.terms)
        if self.cfg.qkv_bias:
            q = q + resolve(_leaf(self.b_Q))
        return rotate(self.cfg, q, positions) if self.cfg.rope else q

    def keys_values(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]:
        """Rotated keys, and values, of every KV head."""
        k, v = project(x, _leaf(self.W_K), terms=self.cfg.terms), project(x, _leaf(self.W_V), terms=self.cfg.terms)
        if self.cfg.qkv_bias:
            k, v = k + resolve(_leaf(self.b_K)), v + resolve(_leaf(self.b_V))
        return (rotate(self.cfg, k, positions) if self.cfg.rope else k), v

    @jax.named_scope("attention")
    def mix(
        self,
        q: Float[Array, "B T H Dh"],
        k: Float[Array, "B S K Dh"],
        v: Float[Array, "B S K Dh"],
        seen: Bool[Array, "#B T S"] | None = None,
    ) -> Float[Array, "B T H Dh"]:
        """Attend; query head h reads KV head h // n_rep.

        Args:
            q: queries.
            k: keys.
            v: values.
            seen: which of the S keys each query sees; None for causal attention with T = S.
        """
        dtype = jnp.float32 if self.cfg.terms > 1 else _leaf(self.W_O).dtype
        # float32 stays float32 on any device; JAX's own function needs implicit promotion for bfloat16. The kernel is
        # what JAX chooses, XLA's: cuDNN's takes plain half precision only, in which small effects drown.
        with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
            z = jax.nn.dot_product_attention(
                q.astype(dtype),
                k.astype(dtype),
                v.astype(dtype),
                is_causal=seen is None,
                mask=None if seen is None else seen[:, None],
            )
        return z.astype(jnp.float32)

    def mix_packed(
        self, q: Float[Array, "N S H Dh"], k: Float[Array, "N S K Dh"], v: Float[Array, "N S K Dh"], packed: Packed
    ) -> Float[Array, "N S H Dh"]:
        """`mix` for packed prompts: each token attends to the shared ones and to what precedes it in its prompt."""
        c, n = packed.n_shared, len(q)
        own, keys, values = (x.reshape(-1, *x.shape[2:]) for x in (packed.bins(q), packed.keys(k), packed.keys(v)))
        z = self.mix(own, keys, values, jnp.tile(packed.visible, (n, 1, 1)))
        z = z.reshape(n, -1, *z.shape[2:])
        return jnp.concatenate([self.mix(q[:, :c], k[:, :c], v[:, :c]), z], axis=1) if c else z

    def out(self, z: Float[Array, "*n H Dh"]) -> Float[Array, "*n D"]:
        """What the heads write together, bias included."""
        o = project(z, _leaf(self.W_O), n_in=2, terms=self.cfg.terms)
        return o + resolve(_leaf(self.b_O)) if self.cfg.out_bias else o

    @jax.named_scope("attend")
    def __call__(
        self, x: Float[Array, "B T D"], where: Int[Array, "#B T"] | Packed, scale: Float[Array, "#B H"] | None = None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """What the module adds to the stream, and its keys and values.

        Args:
            x: the normed stream.
            where: positions of the tokens, or how they are packed.
            scale: factors of what each head writes.
        """
        packed = where if isinstance(where, Packed) else None
        positions = where.positions if isinstance(where, Packed) else where
        q, (k, v) = self.queries(x, positions), self.keys_values(x, positions)
        z = self.mix(q, k, v) if packed is None else self.mix_packed(q, k, v, packed)
        return self.out(z if scale is None else z * scale[:, None, :, None]), (k, v)


class MLP(nnx.Module):
    """Gated or plain MLP, split at its neurons."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, f = cfg.d_model, cfg.d_mlp
        if cfg.gated:
            self.W_gate = _weight(rngs, (d, f), d**-0.5)
        self.W_in = _weight(rngs, (d, f), d**-0.5)
        self.W_out = _weight(rngs, (f, d), (f * 2 * cfg.n_layers) ** -0.5)
        if cfg.mlp_bias:
            if cfg.gated:
                self.b_gate = nnx.Param(jnp.zeros(f))
            self.b_in = nnx.Param(jnp.zeros(f))
            self.b_out = nnx.Param(jnp.zeros(d))

    def neurons(self, x: Float[Array, "*n D"], of: Callable[[Leaf], Leaf] = lambda leaf: leaf) -> Float[Array, "*n F"]:
        """Activations: act(x W_gate) * (x W_in), or act(x W_in); `of` picks what each weight is taken to be."""
        act = activation(self.cfg)
        inner = project(x, of(_leaf(self.W_in)), terms=self.cfg.terms)
        if self.cfg.mlp_bias:
            inner = inner + resolve(of(_leaf(self.b_in)))
        if not self.cfg.gated:
            return act(inner)
        gate = project(x, of(_leaf(self.W_gate)), terms=self.cfg.terms)
        if self.cfg.mlp_bias:
            gate = gate + resolve(of(_leaf(self.b_gate)))
        return act(gate) * inner

    def out(self, a: Float[Array, "*n F"]) -> Float[Array, "*n D"]:
        """What the neurons write together, bias included."""
        return self._biased(project(a, _leaf(self.W_out), terms=self.cfg.terms))

    def _biased(self, o: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return o + resolve(_leaf(self.b_out)) if self.cfg.mlp_bias else o

    @jax.named_scope("feed")
    def __call__(self, x: Float[Array, "*n T D"], scale: Float[Array, "#*n F"] | None = None) -> Float[Array, "*n T D"]:
        """What the module adds to the stream, from the normed stream; `scale`: factors of what each neuron writes."""
        w, terms = _leaf(self.W_out), self.cfg.terms
        if scale is None and isinstance(w, Blend) and w.gate.dtype == jnp.bool_:
            # All weights of a neuron are the host's or the donor's, so that nothing is chosen before it writes.
            ours = self.neurons(x, base_of)
            o = w.by_extent(
                lambda: project(ours, w.base, terms=terms),
                lambda form: project_both(ours, self.neurons(x, lambda w: expert_of(form(w))), form(w), terms=terms),
            )
            return self._biased(o)
        a = self.neurons(x)
        return self.out(a if scale is None else a * scale[..., None, :])


class Block(nnx.Module):
    """One layer: attention, then the MLP, each on a normed copy of the residual stream."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.norm_attn = Norm(cfg)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm_mlp = Norm(cfg)
        self.mlp = MLP(cfg, rngs=rngs)

    def attend(
        self, resid_pre: Float[Array, "B T D"], where: Int[Array, "#B T"] | Packed
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Residual stream after attention, and this layer's keys and values; arguments as `Attention` takes them."""
        added, kv = self.attn(self.norm_attn(resid_pre), where)
        return resid_pre + added, kv

    def feed(self, resid_mid: Float[Array, "*n T D"]) -> Float[Array, "*n T D"]:
        """Residual stream after the MLP."""
        return resid_mid + self.mlp(self.norm_mlp(resid_mid))

    def __call__(self, resid_pre: Float[Array, "B T D"], where: Int[Array, "#B T"] | Packed) -> Float[Array, "B T D"]:
        """Residual stream after the layer; arguments as `attend`."""
        resid_mid, _ = self.attend(resid_pre, where)
        return self.feed(resid_mid)


class Embed(nnx.Module):
    """Token embedding, plus learned positions where there is no rotary embedding."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.W_E = _weight(rngs, (cfg.d_vocab, cfg.d_model), 0.02)
        if cfg.rope is None:
            self.W_pos = _weight(rngs, (cfg.n_ctx, cfg.d_model), 0.02)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """Residual stream before the first layer."""
        x = lookup(_leaf(self.W_E), tokens)
        return x + lookup(_leaf(self.W_pos), positions) if hasattr(self, "W_pos") else x


class Unembed(nnx.Module):
    """Projection to the vocabulary, where it is not the embedding transposed."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.W_U = _weight(rngs, (cfg.d_model, cfg.d_vocab), cfg.d_model**-0.5)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits of a normed residual stream."""
        return project(x, _leaf(self.W_U), terms=self.cfg.terms)
