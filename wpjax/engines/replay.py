"""Suffix replay: the exact effect of single components, with the host's weights shared by all patches.

A component of layer l changes nothing before layer l. So the host runs once and its residual stream is kept; a
patch recomputes only the component's own contribution inside layer l (see `engines.contributions`), and what comes
after it, in that layer and the later ones, runs with the host's weights, for all patches x tokens in one matmul, up to
the layer that the metric reads. There, only the positions that are read are computed; no token is computed twice (see
`engines.packing`). One compiled program a kind serves every layer: the layer index is traced. Swap host and donor for
knock-out, a component of the base in the expert.

The stream is the sum of what everything has written, so the change of a metric is followed from the supplier c through
every later head and MLP u on the way (docs/method.md, "Following an effect"; ours):

    dF_c = d_cc + sum_u d_cu + rest_c,    d_cu = <v, o_u(host with c) - o_u(host)>,    v = dF / dr at the host

at the positions that are read. Of a projection v is its direction and nothing is left; of a metric that reads logits
the rest is what its slope does not tell: the curve of the readout, and weights of the readout itself. Where a norm
stands between heads and the stream, o_u is a head's share of what the norm makes, by the norm's secant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from wpjax.components import KINDS
from wpjax.engines.contributions import Rows, Run, Side, Written, layer_patch, layer_rows
from wpjax.engines.memory import groups
from wpjax.engines.packing import Packing
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.metrics.readouts import Projection
from wpjax.models.block import Block, LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, take_layer
from wpjax.models.sites import Site
from wpjax.patching import PatchMask, patch


def run_packed(cfg: ModelConfig, params: Params, metric: Metric, packing: Packing, with_flow: bool = True) -> Run:
    """Run a model once up to the layer that the metric reads, a few prompts at a time, and pack what `replay` takes of
    it; to follow the flow, with the metric's slope and what is written along it.
    """
    sites, score = over_prompts(metric, functools.partial(streams, cfg, params), axis=1)
    packed = {site: jnp.asarray(packing.gather(x)) for site, x in sites.items()}
    run = Run(packed.pop(Site.RESID_PRE), jnp.asarray(score[0]), kept=packed)
    return followed(cfg, params, metric, packing, run) if with_flow else run


@functools.partial(jax.jit, static_argnames="cfg")
def streams(
    cfg: ModelConfig, params: Params, metric: Metric
) -> tuple[dict[Site, Float[Array, "A B T D"]], Float[Array, "1 B"]]:
    """A model's residual stream at every layer up to the one that is read, prompts side by side, and the metric."""
    out = metric.run(cfg, params, sites=(Site.RESID_PRE, Site.RESID_POST))
    return dict(out.sites), metric.read(cfg, params, metric.pick(out.resid))[None]


@functools.partial(jax.jit, static_argnames="cfg")
def followed(cfg: ModelConfig, params: Params, metric: Metric, packing: Packing, run: Run) -> Run:
    """A run with the metric's slope, and what the model's own heads and MLPs write where it reads."""
    assert run.kept is not None
    slope = slope_of(cfg, params, metric, packing.pick(run.kept[Site.RESID_POST][-1])[0])

    def written(layer: Array) -> Written:
        one = block(cfg, take_layer(params["blocks"], layer))(take_layer(run.resid_pre, layer), packing.where_read(1))
        return Written(packing.by_prompt(one.z)[0], along(slope, packing.by_prompt(one.mlp_out))[0])

    return run._replace(slope=slope, written=jax.lax.map(written, jnp.arange(metric.layer + 1)))


def slope_of(cfg: ModelConfig, params: Params, metric: Metric, picked: Float[Array, "B R D"]) -> Float[Array, "B R D"]:
    """Gradient of the metric by the residual stream where it is read; of a projection, its direction times weight."""
    if isinstance(metric.readout, Projection):
        return jnp.asarray(metric.weight)[..., None] * metric.readout.vector

    def one(b: Array) -> Float[Array, "R D"]:  # a vocabulary of logits takes its place for one prompt at a time
        some = metric.take(b[None])
        return jax.grad(lambda x: some.read(cfg, params, x[None])[0])(picked[b])

    return jax.lax.map(one, jnp.arange(len(metric)))


def along(slope: Float[Array, "B R D"], x: Float[Array, "N B R D"]) -> Float[Array, "N B"]:
    """What a change of the stream does to the metric, to first order."""
    return jnp.einsum("nbrd,brd->nb", x, slope, precision=jax.lax.Precision.HIGHEST)


class Tap(NamedTuple):
    """Reads how far heads and MLPs write something else than the host's do, along the metric's slope.

    Attributes:
        slope: [B, R, D], of each prompt at the positions that are read.
        host: what the host's own heads and MLPs write there.
    """

    slope: Float[Array, "B R D"]
    host: Written

    def __call__(
        self, one: LayerPass, layer: Array | int, picked: Callable[[Array], Array], heads: bool = True
    ) -> Float[Array, "N B G"]:
        """Of one layer: its heads, and last what its MLP adds.

        Args:
            one: the layer's pass, of N rows.
            layer: its number.
            picked: from what passes at a site of the pass to [N, B, R, ...], what is read of it.
            heads: whether its heads ran; 0 for them if not.
        """
        host, highest = take_layer(self.host, layer), jax.lax.Precision.HIGHEST
        mlp = (along(self.slope, picked(one.mlp_out)) - host.mlp)[..., None]
        if not heads:
            return jnp.pad(mlp, ((0, 0), (0, 0), (one.block.cfg.n_heads, 0)))
        z, attn = picked(one.z), one.block.attn
        slope, prompts = self.slope, "brhk"
        if one.block.has_norm(Site.ATTN_OUT):  # what a head's change does depends on what the other heads write
            slope, prompts = jnp.broadcast_to(slope, (len(z), *slope.shape)), "nbrhk"
            slope = one.block.attn_proj_slope(slope, jnp.broadcast_to(attn.out(host.z), slope.shape), attn.out(z))
        w_o = attn.W_O.get_value().astype(jnp.float32)
        by_head = jnp.einsum(f"hkd,{prompts[:-2]}d->{prompts}", w_o, slope, precision=highest)
        written = jnp.einsum(f"nbrhk,{prompts}->nbh", z - host.z, by_head, precision=highest)
        return jnp.concatenate([written, mlp], axis=-1)


Carry: TypeAlias = tuple[Array, Array | None]
"""Groups of rows of the residual stream, and what was tapped on their way."""


@jax.named_scope("suffix")
def suffix(
    cfg: ModelConfig,
    blocks: Params,
    resid: Float[Array, "N S D"],
    start: Int[Array, ""],
    last: int,
    packing: Packing,
    tap: Tap | None = None,
    *,
    mlp_first: bool = False,
) -> tuple[Float[Array, "N B R D"], Float[Array, "N B L G"] | None]:
    """The residual stream at each prompt's positions after layer `last`, having entered at layer `start`.

    Args:
        cfg: static.
        blocks: the host's stacked layers.
        resid: the packed stream before layer `start`, one row a patch.
        start: traced; `last + 1` if nothing is left to run.
        last: the layer whose `resid_post` is read, static.
        packing: of the prompts.
        tap: read there how far every head and MLP that runs adds something else than the host's, too; 0 of those that
            do not.
        mlp_first: enter halfway in the layer before, static: `resid` is its `resid_mid`, which its MLP reads first.
    """
    packed, pick = packing.packed, packing.pick
    n_groups, size = groups(cfg, packing, len(resid))
    filled = jnp.minimum(jnp.arange(n_groups * size), len(resid) - 1).reshape(n_groups, size)

    def whole(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """A layer's `resid_post`, and what its parts add along the slope."""
        one = b(x, packed)
        return one.resid_post, tap(one, layer, pick) if tap else None

    def where_read(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """The same at the positions that are read."""
        one = b(x, packing.where_read(len(x)))
        return packing.by_prompt(one.resid_post), tap(one, layer, packing.by_prompt) if tap else None

    def mlp(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """A layer from `resid_mid` on."""
        one = b(x, packed, known={Site.RESID_MID: x})
        return one.resid_post, tap(one, layer, pick, heads=False) if tap else None

    def mlp_where_read(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """The same at the positions that are read."""
        one = b(x, packed, known={Site.RESID_MID: pick(x)})
        return one.resid_post, tap(one, layer, lambda x: x, heads=False) if tap else None

    def through(
        run: Callable[[Block, Array | int, Array], tuple[Array, Array | None]], layer: Array | int, carry: Carry
    ) -> Carry:
        """One layer, group by group; its weights are fetched once for all of them."""
        x, writes = carry
        one = functools.partial(run, block(cfg, take_layer(blocks, layer)), layer)
        out, added = jax.tree.map(lambda a: a[None], one(x[0])) if n_groups == 1 else jax.lax.map(one, x)
        return out, None if writes is None else writes.at[..., layer, :].set(added)

    def flat(x: Float[Array, "G g *n"]) -> Float[Array, " N *n"]:
        return x.reshape(-1, *x.shape[2:])[: len(resid)]

    writes = None
    if tap is not None:
        writes = jnp.zeros((n_groups, size, len(packing.at), last + 1, cfg.n_heads + 1), jnp.float32)
    x = resid[None] if n_groups == 1 else resid[filled]

    def layers_left(carry: Carry) -> Carry:
        if mlp_first:
            carry = through(mlp, start - 1, carry)
        return through(where_read, last, jax.lax.fori_loop(start, last, functools.partial(through, whole), carry))

    def none_left(carry: Carry) -> Carry:
        if mlp_first:
            return through(mlp_where_read, last, carry)
        return jax.vmap(pick)(carry[0]), carry[1]

    picked, writes = jax.lax.cond(start <= last, layers_left, none_left, (x, writes))
    return flat(picked), None if writes is None else flat(writes)


class Replayed(NamedTuple):
    """What a program of patches returns.

    Attributes:
        change: [P, B], of the metric.
        flow: [P, U], mean over prompts of the change of the metric by way of each of `flow_targets`; None where the
            host's run does not follow it.
    """

    change: Float[Array, "P B"]
    flow: Float[Array, "P U"] | None


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "weights", "inputs", "with_reference"))
def replay(
    cfg: ModelConfig,
    kind: str,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    metric: Metric,
    packing: Packing,
    layer: Int[Array, ""],
    step: Float[Array, ""],
    index: Int[Array, " P"],
    seeds: UInt32[Array, " P"],
    *,
    weights: Side = "donor",
    inputs: Side = "host",
    with_reference: bool = False,
) -> Replayed:
    """The change of the host's metric by one component's output at a time replaced.

    Args:
        cfg: static.
        kind: kind of all P components, static.
        host: parameters of the host; shared by all patches.
        donor: parameters of the donor.
        runs: the host's own run on the metric's tokens, packed, and the donor's where its input is asked for.
        metric: what is measured.
        packing: of its prompts.
        layer: their layer, traced.
        step: for a sham, the relative change, up or down at random, of the patched residual stream; 0 for a patch.
        index: which of the layer's components.
        seeds: of shams, one a patch.
        weights: whose weights the component takes, static.
        inputs: whose input it sees, static.
        with_reference: run a row for the host itself too and take the change from it, since rounding depends on the
            batch's shape.
    """
    run = runs[0]
    found, site = Rows(), Site.RESID_POST
    if not KINDS[kind].in_layer:
        giver = donor if weights == "donor" else host
        patched = patch(host, giver, PatchMask.of(cfg, kind))
        if metric.held is None:  # the tokens are the only input
            after, unpatched = jnp.asarray(0), run.resid_pre[0]
            rows = decoder(cfg, patched).embed(jnp.asarray(packing.ids), packing.packed.positions)[None]
        else:  # only readers come after the state that is given
            after, unpatched = jnp.asarray(metric.layer), run.resid_pre[metric.layer]
            rows = unpatched[None]
    else:
        patched, after = host, layer + 1
        at = layer_patch(cfg, host, donor, runs, layer, weights, inputs, packing.packed)
        with jax.named_scope(f"{kind} rows"):
            found = layer_rows(cfg, kind, at, (host, donor), layer, index)
        site, rows, unpatched = found.handed_over(at)
    rows = jax.lax.cond(step > 0, functools.partial(_jittered, seeds, step), lambda rows: rows, rows)
    if with_reference:
        rows = jnp.concatenate([rows, unpatched[None]])
    tap = None if run.slope is None or run.written is None else Tap(run.slope, run.written)
    picked, writes = suffix(
        cfg, host["blocks"], rows[:, 0], after, metric.layer, packing, tap, mlp_first=site is Site.RESID_MID
    )
    # A vocabulary of logits takes its place for one patch at a time.
    at_once = 1 if metric.readout.reads_logits else len(index)
    n = len(index) if KINDS[kind].in_layer else 1
    with jax.named_scope("read"):
        scores = jax.lax.map(lambda x: metric.read(cfg, patched, x), picked[:n], batch_size=at_once)
        change = scores - (metric.read(cfg, host, picked[-1]) if with_reference else run.score)
    if tap is None or writes is None:
        return Replayed(change, None)
    before = writes[-1] if with_reference else 0.0  # rounding of this program, as for the change
    later = jnp.arange(metric.layer + 1)[:, None] >= after
    if site is Site.RESID_MID:
        later = later.repeat(cfg.n_heads + 1, 1).at[layer, -1].set(True)
    through = jnp.where(later, writes[:n] - before, 0.0).mean(1)  # [P, L, H + 1]
    own = _own(tap, packing, rows[:n], unpatched)
    if found.mid is not None and found.post is not None:  # what its MLP makes of a change is not the supplier's own
        direct = _own(tap, packing, found.mid, at.host.resid_mid)
        through = through.at[:, layer, -1].set(own - direct)
        own = direct
    flow = jnp.concatenate([own[:, None], through.reshape(n, -1)], axis=1)
    if metric.readout.reads_logits:
        flow = jnp.concatenate([flow, change.mean(1, keepdims=True) - flow.sum(1, keepdims=True)], axis=1)
    return Replayed(change, flow)


def _jittered(seeds: Array, step: Array, rows: Float[Array, "N 1 S D"]) -> Float[Array, "N 1 S D"]:
    signs = jax.vmap(lambda seed: jax.random.rademacher(jax.random.key(seed), rows.shape[1:], jnp.float32))(seeds)
    return rows * (1 + step * signs)


def _own(tap: Tap, packing: Packing, rows: Float[Array, "P 1 S D"], host: Float[Array, "1 S D"]) -> Float[Array, " P"]:
    """What a change of the stream does to the metric, to first order, mean over prompts."""
    return along(tap.slope, packing.pick(rows[:, 0]) - packing.pick(host)).mean(-1)


def flow_targets(cfg: ModelConfig, metric: Metric) -> list[str]:
    """Names of the columns of `Replayed.flow`: `self`, `L0.head.0` ... `L0.mlp` ... of layers up to the one that is
    read, and `rest` where the metric is no projection.
    """
    parts = [*(f"head.{h}" for h in range(cfg.n_heads)), "mlp"]
    layers = (f"L{layer}.{part}" for layer in range(metric.layer + 1) for part in parts)
    return ["self", *layers, *["rest"][: metric.readout.reads_logits]]
