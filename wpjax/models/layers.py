"""The parts of a decoder in Flax NNX: norm, attention, MLP, embedding. `models.block` wires them into a layer.

All families share them; families differ in their `ModelConfig` only. Axes are named B batch, T tokens, D model,
H query heads, K KV heads, Dh head width, F neurons, E routed experts, V vocabulary, L layers. Heads have an axis of
their own in weights:

    W_Q [D, H, Dh]   W_K, W_V [D, K, Dh]   W_O [H, Dh, D]   W_gate, W_in [D, F]   W_out [F, D]
    W_router [D, E]  W_E [V, D]            W_pos [n_ctx, D]      W_U [D, V]

The change of a matrix may stand beside it, divided into directions (`Delta`).

Parameters are a plain nested dict of arrays or other leaves (`models.leaves`). Those under "blocks" are stacked: they
have a leading axis of layers. The residual stream is float32, whatever the dtype of the weights.

Inputs may be arrays or `Secant`s (`Value`). `*n` in a shape stands for any number of axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wpjax.models import ops, relevance
from wpjax.models.config import ModelConfig
from wpjax.models.experts import Weights, routed_products
from wpjax.models.leaves import Blend, Form, Leaf, base_of, expert_of, lookup, project, project_both, resolve
from wpjax.models.rotary import rotate
from wpjax.models.secant import Value

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
    """A random normal weight of a given standard deviation."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def _leaf(param: nnx.Param) -> Leaf:
    """What a parameter holds: an array or a `CustomLeaf`."""
    return param.get_value()


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axes, computed in float32.

    Args:
        cfg: the model.
        shape: lengths of these axes: D; of the norms of queries and keys Dh, or heads and Dh for all heads together.
    """

    def __init__(self, cfg: ModelConfig, *shape: int):
        self.cfg = cfg
        self.axes = tuple(range(-len(shape), 0))
        self.scale = nnx.Param(jnp.ones(shape))
        if cfg.norm == "layer" and cfg.norm_bias:
            self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Float[Value, "*n"]) -> Float[Value, "*n"]:
        """Normalise each vector, then scale it: x (offset + scale) / sqrt(mean(x^2) + eps).

        LayerNorm subtracts the mean of x before that, and adds a bias after it, if it has one.
        """
        if self.cfg.norm == "layer":
            x = x - x.mean(self.axes, keepdims=True)
        factor = ops.rsqrt((x * x).mean(self.axes, keepdims=True) + self.cfg.norm_eps)
        x = x * (factor if self.cfg.backward == "gradient" else relevance.frozen(factor))
        scale = resolve(_leaf(self.scale))
        x = x * (scale + self.cfg.norm_offset if self.cfg.norm_offset else scale)
        return x + resolve(_leaf(self.bias)) if hasattr(self, "bias") else x


class Delta(nnx.Module):
    """The change of a matrix, divided into r directions: W + sum_i s_i u_i v_i, with u_i [*in] and v_i [*out].

    Base and expert have the same u and v. In the base all s are 0. So a mask of the s alone says which directions are
    patched, and a direction costs one dot product and one outer product (`directions.by_directions`).

    Args:
        n: r.
        n_in: lengths of the axes of the matrix's input.
        n_out: those of its output.
    """

    def __init__(self, n: int, n_in: tuple[int, ...], n_out: tuple[int, ...]):
        self.n_in = len(n_in)
        self.U, self.S, self.V = (nnx.Param(jnp.zeros(shape)) for shape in ((*n_in, n), (n,), (n, *n_out)))

    def __call__(self, x: Float[Value, "*n"], at: Int[Array, " P"] | None = None) -> Float[Value, "*m"]:
        """What the change adds to the output of the matrix.

        Args:
            x: the matrix's input.
            at: [P], the outputs that are wanted; None for all.
        """
        inner = project(x, _leaf(self.U), n_in=self.n_in) * resolve(_leaf(self.S))
        v = _leaf(self.V)
        return project(inner, v if at is None else jnp.asarray(v)[..., at])


def _add_deltas(module: nnx.Module, cfg: ModelConfig, **shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Give attention or an MLP the `Delta`s that the model has.

    Args:
        module: gets an attribute `delta_q` and so on.
        cfg: the model.
        **shapes: by name of the matrix, the lengths of its input's and its output's axes.
    """
    for name, (n_in, n_out) in shapes.items():
        if n := max(cfg.n_directions(name), default=0):
            setattr(module, f"delta_{name}", Delta(n, n_in, n_out))


def _changed(module: nnx.Module, name: str, x: Value, y: Value, at: Array | None = None) -> Value:
    """The output y of a matrix on the input x, with what its `Delta` adds, if it has one; `at` as there."""
    delta = getattr(module, f"delta_{name}", None)
    return y if delta is None else y + delta(x, at)


class Attention(nnx.Module):
    """Causal self-attention with grouped KV heads.

    It has three steps, and a patch can change what passes between them: queries, keys and values of the input; their
    mix for each head; what the heads write.
    """

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
        if cfg.qk_norm:
            self.norm_q, self.norm_k = Norm(cfg, dh), Norm(cfg, dh)
        if cfg.joint_qk_norm:
            self.joint_norm_q, self.joint_norm_k = Norm(cfg, h, dh), Norm(cfg, k, dh)
        _add_deltas(self, cfg, q=((d,), (h, dh)), k=((d,), (k, dh)), v=((d,), (k, dh)), o=((h, dh), (d,)))

    def queries(
        self, x: Float[Value, "B T D"], positions: Int[Array, "#B T"], layer: Int[Array, ""] | int
    ) -> Float[Value, "B T H Dh"]:
        """Queries of every head, after their norm and rotary positions if the family has these.

        Args:
            x: what attention reads.
            positions: positions of the tokens in their prompts.
            layer: number of the layer, as some families rotate in two ways.
        """
        return self.queries_of(self.projected_queries(x), positions, layer)

    def projected_queries(self, x: Float[Value, "B T D"]) -> Float[Value, "B T H Dh"]:
        """Queries of every head before norms and positions: each head's own weights make its own."""
        q = _changed(self, "q", x, project(x, _leaf(self.W_Q), splits=self.cfg.activation_splits))
        return q + resolve(_leaf(self.b_Q)) if self.cfg.qkv_bias else q

    def queries_of(
        self, q: Float[Value, "B T H Dh"], positions: Int[Array, "#B T"], layer: Int[Array, ""] | int
    ) -> Float[Value, "B T H Dh"]:
        """Queries from `projected_queries`, with norms and rotary positions if the family has these."""
        if self.cfg.qk_norm:
            q = self.norm_q(q)
        if self.cfg.joint_qk_norm:
            q = self.joint_norm_q(q)
        q = self._clipped(q)
        q = rotate(self.cfg, q, positions, layer) if self.cfg.rope else q
        if self.cfg.query_growth is None:
            return q
        beta, n = self.cfg.query_growth
        return q * (1 + beta * jnp.log1p((positions // n).astype(jnp.float32)))[..., None, None]

    def keys(
        self, x: Float[Value, "B T D"], positions: Int[Array, "#B T"], layer: Int[Array, ""] | int
    ) -> Float[Value, "B T K Dh"]:
        """Keys of every KV head, after their norm and rotary positions if the family has these; as `queries`."""
        return self.keys_of(self.projected_keys(x), positions, layer)

    def projected_keys(self, x: Float[Value, "B T D"]) -> Float[Value, "B T K Dh"]:
        """Keys of every KV head before norms and positions; as `projected_queries`."""
        k = _changed(self, "k", x, project(x, _leaf(self.W_K), splits=self.cfg.activation_splits))
        return k + resolve(_leaf(self.b_K)) if self.cfg.qkv_bias else k

    def keys_of(
        self, k: Float[Value, "B T K Dh"], positions: Int[Array, "#B T"], layer: Int[Array, ""] | int
    ) -> Float[Value, "B T K Dh"]:
        """Keys from `projected_keys`, with norms and rotary positions if the family has these."""
        if self.cfg.qk_norm:
            k = self.norm_k(k)
        if self.cfg.joint_qk_norm:
            k = self.joint_norm_k(k)
        k = self._clipped(k)
        return rotate(self.cfg, k, positions, layer) if self.cfg.rope else k

    def values(self, x: Float[Value, "B T D"]) -> Float[Value, "B T K Dh"]:
        """Values of every KV head."""
        v = _changed(self, "v", x, project(x, _leaf(self.W_V), splits=self.cfg.activation_splits))
        return self._clipped(v + resolve(_leaf(self.b_V)) if self.cfg.qkv_bias else v)

    def _clipped(self, x: Float[Value, "*n"]) -> Float[Value, "*n"]:
        """x within the bounds of the family, if it has these."""
        bound = self.cfg.qkv_clip
        return x if bound is None else ops.elementwise(lambda a: jnp.clip(a, -bound, bound), x)

    @jax.named_scope("attention")
    def mix(
        self,
        q: Float[Value, "B T H Dh"],
        k: Float[Value, "B S K Dh"],
        v: Float[Value, "B S K Dh"],
        seen: Bool[Array, "#B T S"] | None = None,
    ) -> Float[Value, "B T H Dh"]:
        """Each head's mix of values: softmax(scale q k) v; arguments as in `ops.attention`."""
        rules = self.cfg.backward
        if rules != "gradient":  # what becomes of the slopes by queries and keys
            q, k = (relevance.frozen(x) if rules == "relp" else relevance.halved(x) for x in (q, k))
        z = ops.attention(q, k, v, seen, self.cfg.score_scale, self.cfg.attn_softcap, self._dtype)
        return relevance.halved(z) if rules == "attnlrp" else z

    @jax.named_scope("attention")
    def mix_in_parts(
        self, q: Float[Array, "B T H Dh"], parts: Sequence[tuple[Array, Array]], seen: Bool[Array, "#B T S"]
    ) -> Float[Array, "B T H Dh"]:
        """`mix` with keys and values in several arrays; arguments as in `ops.attention_in_parts`."""
        return ops.attention_in_parts(q, parts, seen, self.cfg.score_scale, self.cfg.attn_softcap, self._dtype)

    @property
    def _dtype(self) -> jnp.dtype:
        """Dtype of the products of scores and mixes."""
        # Two numbers an activation (bfloat16x2) are for precision, so attention is in float32 there.
        return jnp.dtype(jnp.float32) if self.cfg.activation_splits > 1 else _leaf(self.W_O).dtype

    @jax.named_scope("attn_proj")
    def out(self, z: Float[Value, "*n H Dh"]) -> Float[Value, "*n D"]:
        """What the heads write together, bias included."""
        o = _changed(self, "o", z, project(z, _leaf(self.W_O), n_in=2, splits=self.cfg.activation_splits))
        return o + resolve(_leaf(self.b_O)) if self.cfg.out_bias else o


class MLP(nnx.Module):
    """Gated or plain MLP: `neurons` makes activations, `out` writes them to the stream.

    With routed experts (`ModelConfig.n_experts`), each activation is multiplied by the weight that the router gives to
    the neuron's expert at that token, and that is 0 for all but the few experts that it chooses:

        r = top_k_softmax(x W_router)        neuron = r[expert of the neuron] act(x W_gate) * (x W_in)
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        d, f = cfg.d_model, cfg.d_mlp
        if cfg.n_experts:
            self.W_router = _weight(rngs, (d, cfg.n_experts), d**-0.5)
        if cfg.gated:
            self.W_gate = _weight(rngs, (d, f), d**-0.5)
        self.W_in = _weight(rngs, (d, f), d**-0.5)
        self.W_out = _weight(rngs, (f, d), (f * 2 * cfg.n_layers) ** -0.5)
        if cfg.mlp_bias:
            if cfg.gated:
                self.b_gate = nnx.Param(jnp.zeros(f))
            self.b_in = nnx.Param(jnp.zeros(f))
            self.b_out = nnx.Param(jnp.zeros(d))
        _add_deltas(self, cfg, gate=((d,), (f,)), up=((d,), (f,)), down=((f,), (d,)))
        self.is_divided = any(hasattr(self, f"delta_{name}") for name in ("gate", "up", "down"))

    def routing(self, x: Float[Value, "*n D"]) -> Float[Value, "*n E"] | None:
        """The weight of every routed expert, 0 for those that are not chosen; None in models without experts.

        Args:
            x: what the MLP reads.
        """
        if not self.cfg.n_experts:
            return None
        logits = project(x, _leaf(self.W_router), splits=self.cfg.activation_splits)
        return ops.top_k_softmax(logits, self.cfg.n_active, self.cfg.norm_routing)

    def neurons(
        self,
        x: Float[Value, "*n D"],
        of: Callable[[Leaf], Leaf] = lambda leaf: leaf,
        at: Int[Array, " P"] | None = None,
        routing: Float[Value, "*n E"] | None = None,
    ) -> Float[Value, "*n P"]:
        """Activations of the neurons: act(x W_gate) * (x W_in), or act(x W_in) without a gate, as they are routed.

        Args:
            x: what the MLP reads.
            of: applied to each weight and bias of neurons before it is used, for example to pick one side of a `Blend`.
            at: [P], the neurons that `of` picks; None: it leaves all of them.
            routing: the weights of the experts; None for those that `routing` gives.
        """
        act, by_rules = activation(self.cfg), self.cfg.backward != "gradient"
        activated = relevance.proportional if by_rules else ops.elementwise
        inner = _changed(self, "up", x, project(x, of(_leaf(self.W_in)), splits=self.cfg.activation_splits), at)
        if self.cfg.mlp_bias:
            inner = inner + resolve(of(_leaf(self.b_in)))
        if not self.cfg.gated:
            return self._routed(activated(act, inner), x, at, routing)
        gate = _changed(self, "gate", x, project(x, of(_leaf(self.W_gate)), splits=self.cfg.activation_splits), at)
        if self.cfg.mlp_bias:
            gate = gate + resolve(of(_leaf(self.b_gate)))
        product = activated(act, gate) * inner
        return self._routed(relevance.halved(product) if by_rules else product, x, at, routing)

    def _routed(self, a: Value, x: Value, at: Array | None, routing: Value | None) -> Float[Value, "*n P"]:
        """Activations times the weights of their experts; arguments as in `neurons`."""
        routing = self.routing(x) if routing is None else routing
        if routing is None:
            return a
        if self.cfg.backward != "gradient":  # by the rules of relevance, weights that choose are constants
            routing = jax.lax.stop_gradient(routing)
        expert = (jnp.arange(self.cfg.d_mlp) if at is None else at) // self.cfg.d_expert
        return a * ops.linear(lambda r: r[..., expert], routing)

    def out(self, a: Float[Value, "*n F"]) -> Float[Value, "*n D"]:
        """What the neurons write together, bias included."""
        o = project(a, _leaf(self.W_out), splits=self.cfg.activation_splits)
        return self._biased(_changed(self, "down", a, o))

    def _biased(self, o: Float[Value, "*n D"]) -> Float[Value, "*n D"]:
        """o plus the output bias, if there is one."""
        return o + resolve(_leaf(self.b_out)) if self.cfg.mlp_bias else o

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Value, "*n D"]) -> Float[Value, "*n D"]:
        """What the neurons write together, bias included, from what the MLP reads."""
        w, splits = _leaf(self.W_out), self.cfg.activation_splits
        if isinstance(w, Blend) and w.mask.dtype == jnp.bool_ and not self.is_divided:
            # Under a 0/1 mask all weights of a neuron come from one model. So base and expert neurons are computed
            # apart, and the choice is made once, at W_out; `neurons` would choose at every input weight.
            routing = self.routing(x)
            ours = self.neurons(x, base_of, routing=routing)

            def both(form: Form) -> Float[Array, "*n D"]:
                leaf = form(w)
                at = leaf.channels if isinstance(leaf, Blend) else None
                theirs = self.neurons(x, lambda w: expert_of(form(w)), at, routing)
                return project_both(ours, theirs, leaf, splits=splits)

            return self._biased(w.by_breadth(lambda: project(ours, w.base, splits=splits), both))
        routing, weights = self.routing(x), self._of_experts()
        if routing is not None and weights is not None and isinstance(x, jax.Array):
            return routed_products(self.cfg, activation(self.cfg), x, routing, weights)
        return self.out(self.neurons(x, routing=routing))

    def _of_experts(self) -> Weights | None:
        """The weights of routed experts, if these are arrays, all that they have, and slopes are gradients."""
        if not self.cfg.n_experts or not self.cfg.gated or self.cfg.mlp_bias or self.cfg.backward != "gradient":
            return None
        leaves = [_leaf(param) for param in (self.W_gate, self.W_in, self.W_out)]
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return Weights(*arrays) if len(arrays) == len(leaves) else None


class Embed(nnx.Module):
    """Token embedding, plus learned positions in families without rotary embedding."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.W_E = _weight(rngs, (cfg.d_vocab, cfg.d_model), 0.02)
        if cfg.rope is None:
            self.W_pos = _weight(rngs, (cfg.n_ctx, cfg.d_model), 0.02)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]) -> Float[Value, "B T D"]:
        """The residual stream before the first layer."""
        x = lookup(_leaf(self.W_E), tokens)
        if self.cfg.embed_scale != 1.0:
            x = x * self.cfg.embed_scale
        return x + lookup(_leaf(self.W_pos), positions) if hasattr(self, "W_pos") else x


class Unembed(nnx.Module):
    """Projection to the vocabulary, in models where it is not the embedding transposed."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.W_U = _weight(rngs, (cfg.d_model, cfg.d_vocab), cfg.d_model**-0.5)

    def __call__(self, x: Float[Value, "*n D"]) -> Float[Value, "*n V"]:
        """Logits from the stream after the final norm."""
        return project(x, _leaf(self.W_U), splits=self.cfg.activation_splits)
