"""The one decoder: a forward pass over a parameter tree, and the tree's shapes and initial values."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.layers import Block, Embed, Norm, Packed, Unembed
from wpjax.models.leaves import Leaf, lookup, project

Params: TypeAlias = dict[str, Any]


class Site(enum.StrEnum):
    """Where a forward pass can be read or added to; each is [L, B, T, D] over the layers that ran.

    The residual stream before a layer, after its attention and after the layer, and the normed stream that each module
    reads.
    """

    RESID_PRE = "resid_pre"
    ATTN_INPUT = "attn_input"
    RESID_MID = "resid_mid"
    MLP_INPUT = "mlp_input"
    RESID_POST = "resid_post"


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        resid: [B, T, D], the residual stream after the last layer that ran.
        logits: [B, T, V] float32, or None if they were not asked for.
        sites: the requested sites, each [L, B, T, D] float32.
    """

    resid: Array
    logits: Array | None
    sites: dict[Site, Array]


class Scale(NamedTuple):
    """Factors of what single components write, one array a kind over the layers that run; None for 1.

    Attributes:
        heads: of each head before W_O.
        neurons: of each neuron before W_out.
    """

    heads: Float[Array, " L #B H"] | None
    neurons: Float[Array, " L #B F"] | None


class Steer(NamedTuple):
    """Holds one coordinate of the residual stream after one layer: h += (target - <h, read>) write.

    Attributes:
        layer: 0-based (traced: one program serves all layers).
        read: [D], unit.
        write: [D], unit: `read` to steer, another direction for a control that moves the stream as far.
        target: where the coordinate is held.
    """

    layer: Int[Array, ""] | int
    read: Float[Array, " D"]
    write: Float[Array, " D"]
    target: Float[Array, ""] | float

    def __call__(self, resid: Float[Array, "*n D"], layer: Int[Array, ""]) -> Float[Array, "*n D"]:
        """The stream after a layer, moved if it is the one."""
        at = jnp.matmul(resid, self.read, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(layer == self.layer, resid + (self.target - at)[..., None] * self.write, resid)


class Held(NamedTuple):
    """A state that a forward pass is given: one coordinate held from some token on.

    Attributes:
        steer: which, after which layer, and where it is held.
        start: [B], the first token that it is held at.
    """

    steer: Steer
    start: Int[Array, " B"]

    @property
    def layer(self) -> Int[Array, ""] | int:
        """After which it is held."""
        return self.steer.layer

    def __call__(self, resid: Float[Array, "B T D"], layer: Int[Array, ""]) -> Float[Array, "B T D"]:
        """The stream after a layer."""
        here = jnp.arange(resid.shape[1]) >= self.start[:, None]
        return jnp.where(here[..., None], self.steer(resid, layer), resid)

    def take(self, rows: Int[Array, " N"]) -> Held:
        """The state of some prompts."""
        return Held(self.steer, self.start[rows])


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

    def logits(self, resid: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Next-token logits from the residual stream after the last layer."""
        x = self.final_norm(resid)
        if not self.cfg.tied:
            return self.unembed(x)
        transposed: Leaf = jax.tree.map(lambda a: a.T, self.embed.W_E.get_value())  # a tied gate is a scalar
        return project(x, transposed, terms=self.cfg.terms)

    def unembedding(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
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
        add: dict[Site, Array] | None = None,
        scale: Scale | None = None,
        held: Held | None = None,
        packed: Packed | None = None,
    ) -> Output:
        """See `forward`. With `packed`, the tokens are prompts laid out as it says (nothing can be held then)."""
        graphdef, blocks = nnx.split(self.blocks)
        n_layers = self.cfg.n_layers if stop is None else stop
        positions = jnp.arange(tokens.shape[1])[None] if packed is None else packed.positions
        where = positions if packed is None else packed
        add = add or {}

        def body(x: Array, layer: tuple[Any, Array, dict[Site, Array], Scale]) -> tuple[Array, dict[Site, Array]]:
            at, number, extra, (heads, neurons) = layer
            block = nnx.merge(graphdef, at if stop is None else take_layer(blocks, at))
            here: dict[Site, Array] = {}

            def at_site(site: Site, value: Array) -> Array:
                here[site] = value + extra[site] if site in extra else value
                return here[site]

            pre = at_site(Site.RESID_PRE, x)
            attended, _ = block.attn(at_site(Site.ATTN_INPUT, block.norm_attn(pre)), where, heads)
            mid = at_site(Site.RESID_MID, pre + attended)
            post = at_site(Site.RESID_POST, mid + block.mlp(at_site(Site.MLP_INPUT, block.norm_mlp(mid)), neurons))
            here[Site.RESID_POST] = post if held is None else held(post, number)
            return here[Site.RESID_POST], {site: here[site] for site in sites}

        # A prefix of the layers is taken by index: slicing the stack would copy it.
        numbers = jnp.arange(n_layers)
        layers = blocks if stop is None else numbers
        per_layer = layers, numbers, add, scale or Scale(None, None)
        resid, read = jax.lax.scan(keep_products(body), self.embed(tokens, positions), per_layer, length=n_layers)
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
    add: dict[Site, Float[Array, " L #B #T D"]] | None = None,
    scale: Scale | None = None,
    held: Held | None = None,
) -> Output:
    """Run the decoder; pure, so it composes with `jit`, `vmap` and `grad`. Token ids are not checked.

    Args:
        cfg: static.
        params: nested dict of arrays or `Blend`s, as `init_params` and the loaders make it.
        tokens: token ids, padded on the right with any id.
        sites: residual sites to return.
        stop: number of layers to run (static); None for all. Combine with `logits=False`.
        logits: whether to compute logits.
        add: arrays to add to the residual stream at sites, one a layer that runs.
        scale: factors of what heads and neurons write.
        held: a state that the model is given on the way.

    Raises:
        WpjaxError: more layers than there are, or more tokens than the context holds.
    """
    if stop is not None and not 0 <= stop <= cfg.n_layers:
        raise WpjaxError(f"stop={stop}: the model has {cfg.n_layers} layers; stop is how many of them to run")
    if tokens.shape[-1] > cfg.n_ctx:
        raise WpjaxError(f"{tokens.shape[-1]} tokens exceed the context of {cfg.n_ctx}; shorten the prompts")
    return decoder(cfg, params)(tokens, sites=sites, stop=stop, logits=logits, add=add, scale=scale, held=held)


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
