"""The one decoder: a forward pass over a parameter tree, and the tree's shapes and initial values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models import ops
from wpjax.models.block import Block
from wpjax.models.config import ModelConfig
from wpjax.models.edits import Edit
from wpjax.models.layers import Embed, Norm, Unembed
from wpjax.models.layouts import Causal, Layout
from wpjax.models.leaves import Leaf, lookup, project
from wpjax.models.secant import Value
from wpjax.models.sites import Site

Params: TypeAlias = dict[str, Any]


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        resid: [B, T, D], the residual stream after the last layer that ran.
        logits: [B, T, V] float32, or None if they were not asked for.
        sites: the requested sites, each [L, ...] float32 with the shape of the site (see `Site`).
    """

    resid: Value
    logits: Value | None
    sites: dict[Site, Value]


class Decoder(nnx.Module):
    """Embedding, a stack of `Block`s along a leading axis, final norm, unembedding."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=cfg.n_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(cfg, rngs=rngs)

        self.cfg = cfg
        self.embed = Embed(cfg, rngs=rngs)
        self.blocks = stack(rngs)
        self.final_norm = Norm(cfg)
        if not cfg.tied:
            self.unembed = Unembed(cfg, rngs=rngs)

    def logits(self, resid: Float[Value, "*n D"]) -> Float[Value, "*n V"]:
        """Next-token logits from the residual stream after the last layer."""
        x = self.final_norm(resid)
        if self.cfg.tied:
            transposed: Leaf = jax.tree.map(lambda a: a.T, self.embed.W_E.get_value())  # a tied unit is a scalar
            return self._capped(project(x, transposed, splits=self.cfg.activation_splits))
        return self._capped(self.unembed(x))

    def log_odds(
        self, resid: Float[Value, "*n D"], tokens: Int[Array, "*n"], foils: Int[Array, "*n"]
    ) -> Float[Value, "*n"]:
        """Log-odds, in nats, of one token against another: the softmax's normaliser cancels, so that the vocabulary is
        never multiplied out.

        Args:
            resid: the residual stream after the last layer.
            tokens: ids of the tokens.
            foils: ids of the others.
        """
        x, ours, theirs = self.final_norm(resid), self.unembedding(tokens), self.unembedding(foils)
        if self.cfg.logit_softcap is None:
            return (x * (ours - theirs)).sum(-1)
        return self._capped((x * ours).sum(-1)) - self._capped((x * theirs).sum(-1))

    def _capped(self, logits: Value) -> Value:
        return ops.soft_cap(logits, self.cfg.logit_softcap)

    def unembedding(self, tokens: Int[Array, "*n"]) -> Float[Value, "*n D"]:
        """The direction of the normed residual stream whose projection is each token's logit."""
        if self.cfg.tied:
            return lookup(self.embed.W_E.get_value(), tokens)
        return lookup(self.unembed.W_U.get_value(), tokens, axis=1)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        sites: tuple[Site, ...] = (),
        stop: int | None = None,
        logits: bool = True,
        edits: Sequence[Edit] = (),
        layout: Layout | None = None,
    ) -> Output:
        """See `forward`. With a `layout`, the tokens stand as it says."""
        graphdef, blocks = nnx.split(self.blocks)
        n_layers = self.cfg.n_layers if stop is None else stop
        layout = Causal.of(tokens.shape[1]) if layout is None else layout
        by_layer = {i: edit for i, edit in enumerate(edits) if edit.layer is None}

        def body(x: Value, layer: tuple[Any, Array, dict[int, Edit]]) -> tuple[Value, dict[Site, Value]]:
            at, number, of_layer = layer
            here = [of_layer.get(i, edit) for i, edit in enumerate(edits)]
            block = nnx.merge(graphdef, at if stop is None else take_layer(blocks, at))
            one = block(x, layout, edits=here, layer=number)
            return one.resid_post, {site: one.at(site) for site in sites}

        # A prefix of the layers is taken by index: slicing the stack would copy it.
        numbers = jnp.arange(n_layers)
        per_layer = blocks if stop is None else numbers, numbers, by_layer
        x = self.embed(tokens, layout.positions)
        resid, read = jax.lax.scan(keep_products(body), x, per_layer, length=n_layers)
        return Output(resid, self.logits(resid) if logits else None, read)


def take_layer(blocks: Any, layer: Int[Array, ""] | int) -> Any:
    """One layer of a tree of stacked leaves; `layer` may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), blocks)


def keep_products(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A scan's layer that keeps its products for the backward pass, which makes everything else again.

    Weights taken by index would else be kept, too: over the layers, a second copy of them. No product is made twice.
    """
    return jax.checkpoint(layer, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)


@functools.cache
def _graphdef(cfg: ModelConfig, kind: type[Decoder] | type[Block]) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: kind(cfg, rngs=nnx.Rngs(0))))[0]


def block(cfg: ModelConfig, layer_params: Any) -> Block:
    """The `Block` of one layer's parameters (the "blocks" tree without its layer axis)."""
    return nnx.merge(_graphdef(cfg, Block), layer_params)


def decoder(cfg: ModelConfig, params: Params) -> Decoder:
    """The `Decoder` of a parameter tree; its leaves may be arrays or `Blend`s."""
    return nnx.merge(_graphdef(cfg, Decoder), params)


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    sites: tuple[Site, ...] = (),
    stop: int | None = None,
    logits: bool = True,
    edits: Sequence[Edit] = (),
) -> Output:
    """Run the decoder; pure, so it composes with `jit`, `vmap` and `grad`. Token ids are not checked.

    Args:
        cfg: static.
        params: nested dict of arrays or other leaves (see `leaves`), as `init_params` and the loaders make it.
        tokens: token ids, padded on the right with any id.
        sites: sites whose values are returned, of every layer that runs.
        stop: number of layers to run (static); None for all. Combine with `logits=False`.
        logits: whether to compute logits.
        edits: what is changed on the way, in this order.

    Raises:
        WpjaxError: more layers than there are, more tokens than the context holds, or an edit of channels that a site
            does not have.

    >>> import jax, jax.numpy as jnp
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, V = 50
    >>> params, tokens = init_params(cfg, jax.random.key(0)), jnp.arange(6)[None]
    >>> out = forward(cfg, params, tokens, sites=(Site.RESID_POST,))
    >>> out.logits.shape, out.sites[Site.RESID_POST].shape
    ((1, 6, 50), (2, 1, 6, 16))
    """
    if stop is not None and not 0 <= stop <= cfg.n_layers:
        raise WpjaxError(f"stop={stop}: the model has {cfg.n_layers} layers; stop is how many of them to run")
    if tokens.shape[-1] > cfg.n_ctx:
        raise WpjaxError(f"{tokens.shape[-1]} tokens exceed the context of {cfg.n_ctx}; shorten the prompts")
    return decoder(cfg, params)(tokens, sites=sites, stop=stop, logits=logits, edits=edits)


def init_params(cfg: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal weights scaled by fan-in, unit norms, zero biases."""

    @jax.jit
    def make(key: Array) -> Params:
        model = Decoder(cfg, rngs=nnx.Rngs(params=key))
        return jax.tree.map(lambda a: a.astype(dtype), nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    return make(key)


@functools.cache
def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes of every parameter (float32 `jax.ShapeDtypeStruct`s), without allocating any."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param))
