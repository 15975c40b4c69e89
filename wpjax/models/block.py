"""One layer: how its parts are wired to the residual stream. This is the only place that says so.

    attn_input = norm(resid_pre)              attn_proj = z W_O + b_O, all heads together
    resid_mid  = resid_pre + attn_out         attn_out  = attn_proj                (its norm in post-norm families)
    mlp_input  = norm(resid_mid)              mlp_proj  = neuron W_out + b_out             (neuron: `layers.MLP`)
    resid_post = resid_mid + mlp_out          mlp_out   = mlp_proj                 (its norm in post-norm families)

attn_out and mlp_out are multiplied by `ModelConfig.resid_scale` (Granite).
In families with a parallel residual the MLP reads `resid_pre` in place of `resid_mid`; in some of them one norm serves
both modules, and `mlp_input` is `attn_input` (`ModelConfig.shared_norm`). In families without pre-norms
both modules read the stream itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from wpjax.models.config import ModelConfig
from wpjax.models.edits import Edit, apply
from wpjax.models.layers import MLP, Attention, Norm
from wpjax.models.layouts import Layout, Window
from wpjax.models.secant import Secant, Value
from wpjax.models.sites import Site

NORMS: Mapping[Site, str] = MappingProxyType(
    {
        Site.ATTN_INPUT: "norm_attn",
        Site.ATTN_OUT: "norm_attn_out",
        Site.MLP_INPUT: "norm_mlp",
        Site.MLP_OUT: "norm_mlp_out",
    }
)
"""Site -> name of the norm that makes its value, in families with a norm there."""


class LayerNumber(nnx.Variable):
    """The number of a layer. It is data, not a parameter: a compiled program may serve all layers."""


class Block(nnx.Module):
    """The parts of one layer: attention, MLP and norms. Call it on a stream to get a `LayerPass`.

    Args:
        cfg: the model.
        layer: number of the layer. In some families layers differ by more than their weights: in their window, say.
    """

    def __init__(self, cfg: ModelConfig, layer: Int[Array, ""] | int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.number = LayerNumber(jnp.asarray(layer))
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        if cfg.pre_norm:
            self.norm_attn = Norm(cfg, cfg.d_model)
            if not cfg.shared_norm:
                self.norm_mlp = Norm(cfg, cfg.d_model)
        if cfg.post_norm:
            self.norm_attn_out, self.norm_mlp_out = (Norm(cfg, cfg.d_model) for _ in range(2))

    def __call__(
        self,
        resid_pre: Float[Value, "*n D"],
        layout: Layout,
        *,
        known: Mapping[Site, Value] | None = None,
        edits: Sequence[Edit] = (),
    ) -> LayerPass:
        """Set up a pass through the layer. A value is computed when it is asked for, not before.

        Args:
            resid_pre: [B, S, D], the stream that enters.
            layout: how the tokens of the stream are laid out.
            known: values of some sites. They are used as they are, neither computed nor edited.
            edits: changes on the way.

        >>> import jax, jax.numpy as jnp
        >>> from wpjax.models.decoder import block, init_params, take_layer
        >>> from wpjax.models.layouts import Causal
        >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, 2 KV heads
        >>> params = init_params(cfg, jax.random.key(0))
        >>> one = block(cfg, take_layer(params["blocks"], 0), 0)(jnp.ones((1, 5, 16)), Causal.of(5))
        >>> one.z.shape, one.neuron.shape, one.resid_post.shape
        ((1, 5, 4, 4), (1, 5, 32), (1, 5, 16))
        """
        return LayerPass(self, resid_pre, layout, known, edits)

    @property
    def layer(self) -> Int[Array, ""]:
        """Number of the layer; it may be traced."""
        return self.number.get_value()

    @property
    def window(self) -> Window | None:
        """The window of attention. None: no layer of the model has one."""
        if self.cfg.window is None:
            return None
        return Window(self.cfg.window, jnp.asarray(self.cfg.sliding)[self.layer])

    def normed(self, site: Site, x: Float[Value, "*n D"]) -> Float[Value, "*n D"]:
        """The value at a site, made of x: x after the norm there, or x itself in families without one.

        What is added to the stream is multiplied by `ModelConfig.resid_scale`.
        """
        y = getattr(self, NORMS[site])(x) if self.has_norm(site) else x
        is_added = site in (Site.ATTN_OUT, Site.MLP_OUT)
        return y * self.cfg.resid_scale if is_added and self.cfg.resid_scale != 1.0 else y

    def has_norm(self, site: Site) -> bool:
        """Whether this family has a norm at a site."""
        return hasattr(self, NORMS[site])

    @property
    def mlp_reads_attention(self) -> bool:
        """Whether the MLP reads the stream after attention of the same layer has written to it."""
        return not self.cfg.parallel

    @property
    def mlp_made_of(self) -> Site:
        """The site that `mlp_input` is made of."""
        return Site.ATTN_INPUT if self.cfg.shared_norm else Site.RESID_PRE if self.cfg.parallel else Site.RESID_MID

    def residual_site(self, site: Site) -> Site:
        """The furthest site at which a change at `attn_proj` or `mlp_proj` can simply be added.

        That is the stream; but if a norm or a factor stands between, it is the site itself.
        """
        in_the_stream = {Site.ATTN_PROJ: Site.RESID_MID, Site.MLP_PROJ: Site.RESID_POST}
        return site if self.cfg.post_norm or self.cfg.resid_scale != 1.0 else in_the_stream[site]

    def attn_proj_slope(
        self, slope: Float[Array, "*n D"], ours: Float[Array, "*n D"], theirs: Float[Array, "*n D"]
    ) -> Float[Array, "*n D"]:
        """Take a slope from `attn_out` back to `attn_proj`, exactly for the difference of two passes.

        Returns g with <slope, attn_out' - attn_out> = <g, attn_proj' - attn_proj>. Without a post-norm g is the
        slope, times the family's factor. With one it is taken back through the norm's secant between the two passes
        (docs/method.md, "Following an effect").

        Args:
            slope: slope of a metric by `attn_out`.
            ours: `attn_proj` of one pass.
            theirs: `attn_proj` of the other.
        """
        if not self.cfg.post_norm:
            return self.normed(Site.ATTN_OUT, slope)  # which is the factor alone

        def change(d: Array) -> Array:  # linear in d, so its transpose takes a slope back
            attn_proj: Any = Secant(ours, theirs, d)
            return self.normed(Site.ATTN_OUT, attn_proj).change  # type: ignore[attr-defined]

        return jax.linear_transpose(change, ours)(slope)[0]


def _site(make: Callable[[LayerPass], Value]) -> property:
    """A property of `LayerPass`: the value at the site that the function is named after.

    `LayerPass.value` calls the function if the value is not known.
    """
    site = Site(make.__name__)

    @functools.wraps(make)
    def value(self: LayerPass) -> Value:
        return self.value(site, make)

    return property(value)


class LayerPass:
    """One pass of a residual stream through a layer.

    Every site is a property, which is computed when it is first asked for. Shapes: S tokens enter; the output of T of
    them is wanted, which the layout picks.

    `Block.__call__` makes it and explains the arguments. There is one more, `origin`: the pass that this one is a
    version of (see `replaced`), or None.
    """

    def __init__(
        self,
        block: Block,
        resid_pre: Value,
        layout: Layout,
        known: Mapping[Site, Value] | None = None,
        edits: Sequence[Edit] = (),
        origin: LayerPass | None = None,
    ):
        self.block, self.layout, self.edits = block, layout, tuple(edits)
        self._entering, self._origin = resid_pre, origin
        self._known, self._made = dict(known or {}), dict[Site, Value]()
        # Sites whose values may differ from those of `origin`.
        self._changed = {after for site in self._known for after in downstream(site, block.mlp_made_of)}

    @_site
    def resid_pre(self) -> Value:
        """The stream that enters, [B, S, D]."""
        return self._entering

    @_site
    def attn_input(self) -> Value:
        """What attention reads, [B, S, D]."""
        return self.block.normed(Site.ATTN_INPUT, self.resid_pre)

    @_site
    def q(self) -> Value:
        """Queries, [B, T, H, Dh]."""
        x = self.layout.pick(self.attn_input)
        return self.block.attn.queries(x, self.layout.query_positions, self.block.layer)

    @_site
    def k(self) -> Value:
        """Keys, [B, S, K, Dh]."""
        return self.block.attn.keys(self.attn_input, self.layout.positions, self.block.layer)

    @_site
    def v(self) -> Value:
        """Values, [B, S, K, Dh]."""
        return self.block.attn.values(self.attn_input)

    @functools.cached_property
    def seen(self) -> tuple[Value, Value]:
        """Keys and values of this pass that queries may see. A layout with a cache adds those from before."""
        return self.layout.extend(self.k, self.v)

    @_site
    def z(self) -> Value:
        """Each head's mix of values, [B, T, H, Dh]."""
        return self.layout.attend(self.block.attn, self.q, *self.seen, self.block.window)

    @_site
    def attn_proj(self) -> Value:
        """What all heads write together, [B, T, D]."""
        return self.block.attn.out(self.z)

    @_site
    def attn_out(self) -> Value:
        """What attention adds to the stream, [B, T, D]."""
        return self.block.normed(Site.ATTN_OUT, self.attn_proj)

    @_site
    def resid_mid(self) -> Value:
        """The stream with attention added, [B, T, D]."""
        return self.layout.pick(self.resid_pre) + self.attn_out

    @_site
    def mlp_input(self) -> Value:
        """What the MLP reads, [B, T, D]."""
        if self.block.cfg.shared_norm:
            return self.layout.pick(self.attn_input)
        return self.block.normed(Site.MLP_INPUT, self.mlp_reads)

    @_site
    def neuron(self) -> Value:
        """Activations, [B, T, F]."""
        return self.block.mlp.neurons(self.mlp_input)

    @_site
    def mlp_proj(self) -> Value:
        """What all neurons write together, [B, T, D]."""
        # The MLP as one call is cheaper for masked weights. It is split only if somebody changes its neurons.
        by_neuron = Site.NEURON in self._known or any(edit.site == Site.NEURON for edit in self.edits)
        return self.block.mlp.out(self.neuron) if by_neuron else self.block.mlp(self.mlp_input)

    @_site
    def mlp_out(self) -> Value:
        """What the MLP adds to the stream, [B, T, D]."""
        return self.block.normed(Site.MLP_OUT, self.mlp_proj)

    @_site
    def resid_post(self) -> Value:
        """The stream with the MLP added, [B, T, D]."""
        return self.resid_mid + self.mlp_out

    @property
    def mlp_reads(self) -> Value:
        """The stream that the MLP reads, before its norm."""
        return self.resid_mid if self.block.mlp_reads_attention else self.layout.pick(self.resid_pre)

    def at(self, site: Site) -> Value:
        """The value at a site."""
        return getattr(self, site)

    def value(self, site: Site, make: Callable[[LayerPass], Value]) -> Value:
        """The value at a site: the known one if there is one; otherwise computed by `make` and then edited."""
        if site in self._known:
            return self._known[site]
        if self._origin is not None and site not in self._changed:
            return self._origin.at(site)
        if site not in self._made:
            # These four sites hold all S tokens that enter, the others the T whose output is wanted.
            reads_stream = site in (Site.RESID_PRE, Site.ATTN_INPUT, Site.K, Site.V)
            positions = self.layout.positions if reads_stream else self.layout.query_positions
            self._made[site] = apply(self.edits, site, make(self), self.block.layer, positions)
        return self._made[site]

    def replaced(self, values: Mapping[Site, Value]) -> LayerPass:
        """This pass with other values at some sites, and with all values that follow from them.

        Values that do not follow from them are shared with this pass, so they are not computed again.
        """
        return LayerPass(self.block, self._entering, self.layout, values, self.edits, origin=self)

    def shifted(self, site: Site, change: Value) -> LayerPass:
        """This pass with a change added at a site.

        Args:
            site: `attn_proj` or `mlp_proj`.
            change: [*n, B, T, D], added to the value there; its leading axes lead all values that follow.
        """
        added_at = self.block.residual_site(site)
        return self.replaced({added_at: self.at(added_at) + change})


@functools.cache
def downstream(site: Site, mlp_made_of: Site) -> frozenset[Site]:
    """The sites of a layer whose values depend on the value at a site.

    Args:
        site: the site.
        mlp_made_of: the site that the MLP's input is made of (`Block.mlp_made_of`).

    >>> sorted(downstream(Site.MLP_PROJ, Site.RESID_MID))
    [<Site.MLP_OUT: 'mlp_out'>, <Site.RESID_POST: 'resid_post'>]
    """
    reads = {  # site -> the sites that its value is made of
        Site.ATTN_INPUT: (Site.RESID_PRE,),
        **dict.fromkeys((Site.Q, Site.K, Site.V), (Site.ATTN_INPUT,)),
        Site.Z: (Site.Q, Site.K, Site.V),
        Site.ATTN_PROJ: (Site.Z,),
        Site.ATTN_OUT: (Site.ATTN_PROJ,),
        Site.RESID_MID: (Site.RESID_PRE, Site.ATTN_OUT),
        Site.MLP_INPUT: (mlp_made_of,),
        Site.NEURON: (Site.MLP_INPUT,),
        Site.MLP_PROJ: (Site.NEURON,),
        Site.MLP_OUT: (Site.MLP_PROJ,),
        Site.RESID_POST: (Site.RESID_MID, Site.MLP_OUT),
    }
    depending: set[Site] = set()
    for after, before in reads.items():  # in the order of a forward pass, so that one loop is enough
        if any(b == site or b in depending for b in before):
            depending.add(after)
    return frozenset(depending)
