"""The decoder: a forward pass over a parameter tree, and the tree's shapes and random initial values.

There is one decoder for all families. `forward` is the function to call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models import ops, relevance
from wpjax.models.block import Block
from wpjax.models.config import ModelConfig
from wpjax.models.edits import Edit
from wpjax.models.layers import Embed, Norm, Unembed
from wpjax.models.layouts import Causal, Layout
from wpjax.models.leaves import Leaf, lookup, project
from wpjax.models.secant import Value
from wpjax.models.sites import Site

Params: TypeAlias = dict[str, Any]
"""A parameter tree: nested dicts of arrays or other leaves, such as `params["blocks"]["attn"]["W_Q"]`."""


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        resid: [B, T, D], the residual stream after the last layer that ran.
        logits: [B, T, V], float32; None if they were not asked for.
        sites: the values at each requested site, float32: [L, ...], with L the layers that ran and the rest the shape
            of the site (see `Site`).
    """

    resid: Value
    logits: Value | None
    sites: dict[Site, Value]


class Decoder(nnx.Module):
    """Embedding, layers, final norm and unembedding. The layers are one `Block` whose leaves have a leading axis."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=cfg.n_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs, layer: Int[Array, ""]) -> Block:
            return Block(cfg, layer, rngs=rngs)

        self.cfg = cfg
        self.embed = Embed(cfg, rngs=rngs)
        self.blocks = stack(rngs, jnp.arange(cfg.n_layers))
        self.final_norm = Norm(cfg, cfg.d_model)
        if not cfg.tied:
            self.unembed = Unembed(cfg, rngs=rngs)

    def logits(self, resid: Float[Value, "*n D"]) -> Float[Value, "*n V"]:
        """Logits of the next token, from the residual stream after the last layer."""
        x = self.final_norm(resid)
        if self.cfg.tied:
            # This transposes the arrays of a `Blend` too. Its mask is a scalar, and a scalar transposed is itself.
            transposed: Leaf = jax.tree.map(lambda a: a.T, self.embed.W_E.get_value())
            return self._scaled(project(x, transposed, splits=self.cfg.activation_splits))
        return self._scaled(self.unembed(x))

    def log_odds(
        self, resid: Float[Value, "*n D"], tokens: Int[Array, "*n"], foils: Int[Array, "*n"]
    ) -> Float[Value, "*n"]:
        """Log-odds of one token against another, in nats: the difference of their logits.

        The softmax's normaliser cancels. So only two logits are computed, not those of the whole vocabulary.

        Args:
            resid: the residual stream after the last layer.
            tokens: ids of the tokens that count for it.
            foils: ids of the tokens that count against it.
        """
        x, ours, theirs = self.final_norm(resid), self.unembedding(tokens), self.unembedding(foils)
        if self.cfg.logit_softcap is None:
            return self._scaled((x * (ours - theirs)).sum(-1))
        return self._scaled((x * ours).sum(-1)) - self._scaled((x * theirs).sum(-1))

    def _scaled(self, logits: Value) -> Value:
        """Logits after the family's factor and its bound on them, if it has these."""
        scaled = logits if self.cfg.logit_scale == 1.0 else logits * self.cfg.logit_scale
        cap = self.cfg.logit_softcap
        if cap is not None and self.cfg.backward != "gradient":
            return relevance.proportional(lambda x: cap * jnp.tanh(x / cap), scaled)
        return ops.soft_cap(scaled, cap)

    def unembedding(self, tokens: Int[Array, "*n"]) -> Float[Value, "*n D"]:
        """The vector of each token whose product with the normed stream is its logit, before factor and bound."""
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
        """See `forward`. A `layout` says how the tokens are laid out; None for prompts side by side."""
        graphdef, blocks = nnx.split(self.blocks)
        n_layers = self.cfg.n_layers if stop is None else stop
        layout = Causal.of(tokens.shape[1]) if layout is None else layout
        # Edits of all layers have arrays with an axis of layers. The scan cuts these up as it does the weights.
        by_layer = {i: edit for i, edit in enumerate(edits) if edit.layer is None}

        def body(x: Value, layer: tuple[Any, dict[int, Edit]]) -> tuple[Value, dict[Site, Value]]:
            weights, of_layer = layer  # `weights` is a number if only some of the layers run
            layer_edits = [of_layer.get(i, edit) for i, edit in enumerate(edits)]
            block = nnx.merge(graphdef, weights if stop is None else take_layer(blocks, weights))
            one = block(x, layout, edits=layer_edits)
            return one.resid_post, {site: one.at(site) for site in sites}

        # If only the first layers run, each is taken by its number: slicing the stack would copy it.
        per_layer = blocks if stop is None else jnp.arange(n_layers), by_layer
        x = self.embed(tokens, layout.positions)
        resid, read = jax.lax.scan(keep_products(body), x, per_layer, length=n_layers)
        return Output(resid, self.logits(resid) if logits else None, read)


def take_layer(blocks: Any, layer: Int[Array, ""] | int) -> Any:
    """One layer of a tree whose leaves are stacked over layers; `layer` may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), blocks)


def keep_products(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the body of a scan over layers, so that the backward pass finds the matrix products and nothing else.

    Everything else is computed again. Otherwise JAX would also keep the weights that each step takes by index, which
    adds up to a second copy of the model. Matrix products are the expensive part, and none is made twice.
    """
    return jax.checkpoint(layer, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)


@functools.cache
def _graphdef(cfg: ModelConfig, kind: type[Decoder] | type[Block]) -> nnx.GraphDef:
    """The structure of a module without its parameters; made without allocating any."""
    number = () if kind is Decoder else (0,)
    return nnx.split(nnx.eval_shape(lambda: kind(cfg, *number, rngs=nnx.Rngs(0))))[0]


def block(cfg: ModelConfig, layer_params: Any, layer: Int[Array, ""] | int) -> Block:
    """The `Block` with the parameters of one layer.

    Args:
        cfg: the model.
        layer_params: the tree "blocks" without its axis of layers (`take_layer`).
        layer: number of the layer, which may be traced. Layers may differ in more than their weights.
    """
    return nnx.merge(_graphdef(cfg, Block), {**layer_params, "number": jnp.asarray(layer)})


def decoder(cfg: ModelConfig, params: Params) -> Decoder:
    """The `Decoder` with the parameters of a tree; its leaves may be arrays or `CustomLeaf`s."""
    blocks = {**params["blocks"], "number": jnp.arange(cfg.n_layers)}
    return nnx.merge(_graphdef(cfg, Decoder), {**params, "blocks": blocks})


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
    """Run the decoder. It is a pure function, so it composes with `jit`, `vmap` and `grad`.

    Args:
        cfg: the model (static).
        params: parameter tree, as `init_params`, the loaders or `patch` make it.
        tokens: token ids, padded on the right with any id. They are not checked: an id beyond the vocabulary is read
            as the last.
        sites: sites whose values are returned, of every layer that runs.
        stop: number of layers to run (static); None for all. Give `logits=False` with it.
        logits: whether to compute logits.
        edits: changes on the way, made in this order.

    Raises:
        WpjaxError: the model has fewer layers than `stop`, there are more tokens than the context holds, or an edit
            names heads or neurons of a site that has none.

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
        raise WpjaxError(
            f"{tokens.shape[-1]} tokens exceed the context of {cfg.n_ctx}; shorten the prompts{cfg.longer_context}"
        )
    return decoder(cfg, params)(tokens, sites=sites, stop=stop, logits=logits, edits=edits)


def init_params(cfg: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal weights scaled by fan-in, norms of scale 1, biases of 0.

    Args:
        cfg: the model.
        key: random key.
        dtype: dtype of every parameter.

    >>> import jax
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads of width 4
    >>> init_params(cfg, jax.random.key(0))["blocks"]["attn"]["W_Q"].shape  # [L, D, H, Dh]
    (2, 16, 4, 4)
    """
    return _random_params(cfg, key, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))  # compiled once for a model
def _random_params(cfg: ModelConfig, key: Array, dtype: Any) -> Params:
    model = Decoder(cfg, rngs=nnx.Rngs(params=key))
    return jax.tree.map(lambda a: a.astype(dtype), nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@functools.cache
def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree with shapes in place of arrays: float32 `jax.ShapeDtypeStruct`s. Nothing is allocated.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> abstract_params(cfg)["embed"]["W_E"].shape  # [V, D]
    (50, 16)
    """
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param))
