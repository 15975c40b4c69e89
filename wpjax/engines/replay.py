"""Suffix replay: the exact effect of single components, without a full forward pass for each
(docs/method.md, "Suffix replay"; ours).

A component of layer l changes nothing before layer l. So:

1. The host runs once, and its residual stream before every layer is kept.
2. A patch recomputes only what the component itself adds inside layer l (`engines.contributions`).
3. The rest of layer l and all later layers run with the host's weights. All patches share each matrix product. The run
   stops at the layer that the metric reads, and there it computes only the positions that are read.

Prompts are packed, so that no token is computed twice (`engines.packing`). The number of the layer is traced, so one
compiled program a kind serves every layer. For a knock-out, a component of the base in the expert, swap host and donor.

The same pass follows the effect on its way through the later heads and MLPs, if asked to (`engines.flow`).

Letters: N rows of the stream, one for each of P patches and perhaps one for the host; B prompts; S packed tokens;
R positions read of each prompt; G = H + 1 targets of a layer, its heads and then its MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from wpjax.components import KINDS
from wpjax.engines.contributions import Rows, Run, Side, layer_patch, layer_rows
from wpjax.engines.flow import FlowReader, add_flow, own_change
from wpjax.engines.memory import groups
from wpjax.engines.packing import Packing
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.block import Block
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, take_layer
from wpjax.models.sites import Site
from wpjax.patching import PatchMask, patch
from wpjax.runtime.placement import Placement


def run_packed(cfg: ModelConfig, params: Params, metric: Metric, packing: Packing, with_flow: bool = True) -> Run:
    """Run a model once, up to the layer that the metric reads, and pack what `replay` needs of that run.

    Args:
        cfg: the model.
        params: its parameters.
        metric: what is measured.
        packing: the packing of the metric's prompts.
        with_flow: whether to follow effects too; this adds `slope` and `written` to the run.

    >>> import jax, jax.numpy as jnp
    >>> from wpjax.behaviours import Tokens
    >>> from wpjax.engines.packing import pack
    >>> from wpjax.metrics.readouts import Projection
    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, 2 KV groups
    >>> tokens, last = Tokens(jnp.arange(8).reshape(2, 4), jnp.array([4, 4])), jnp.full((2, 1), 3)
    >>> metric = Metric(tokens, last, jnp.ones((2, 1)), Projection(jnp.ones(16) / 4), 1, "anchor")  # reads layer 1
    >>> run = run_packed(cfg, init_params(cfg, jax.random.key(0)), metric, pack(metric))
    >>> run.resid_pre.shape, run.score.shape  # [A, 1, S, D] and [B]
    ((2, 1, 8, 16), (2,))
    """
    sites, score = over_prompts(metric, unpacked_run, cfg, params, axis=1)  # a few prompts at a time
    packed = {site: packing.gather(x) for site, x in sites.items()}
    packed, score, metric, packing = Placement.of(params).replicate((packed, score[0], metric, packing))
    run = Run(jnp.asarray(packed.pop(Site.RESID_PRE)), jnp.asarray(score), kept=jax.tree.map(jnp.asarray, packed))
    return add_flow(cfg, params, metric, packing, run) if with_flow else run


@functools.partial(jax.jit, static_argnames="cfg")
def unpacked_run(
    cfg: ModelConfig, params: Params, metric: Metric
) -> tuple[dict[Site, Float[Array, "A B T D"]], Float[Array, "1 B"]]:
    """A model's residual stream before and after every layer up to the one that is read, and the metric.

    Prompts are not packed here. The metric has a first axis of 1, so that prompts are axis 1 of everything returned.
    """
    out = metric.run(cfg, params, sites=(Site.RESID_PRE, Site.RESID_POST))
    return dict(out.sites), metric.read(cfg, params, metric.pick(out.resid))[None]


Carry: TypeAlias = tuple[Array, Array | None]
"""Rows of the stream in groups, [groups, rows a group, ...], and the flow that was read so far (None: none is read)."""


@jax.named_scope("suffix")
def suffix(
    cfg: ModelConfig,
    blocks: Params,
    resid: Float[Array, "N S D"],
    start: Int[Array, ""],
    last: int,
    packing: Packing,
    reader: FlowReader | None = None,
    *,
    mlp_first: bool = False,
) -> tuple[Float[Array, "N B R D"], Float[Array, "N B L G"] | None]:
    """Run layers `start` to `last` with the host's weights on N versions of the residual stream.

    Args:
        cfg: the model (static).
        blocks: the host's layers, stacked.
        resid: the packed stream before layer `start`, one row a patch.
        start: the first layer to run (traced); `last + 1` if none is left to run.
        last: the layer whose `resid_post` is read (static).
        packing: the packing of the prompts.
        reader: reads the flow on the way; None for no flow.
        mlp_first: whether `resid` is the `resid_mid` of layer `start - 1` instead (static). The MLP of that layer then
            runs first.

    Returns:
        the stream after layer `last` at the positions that are read, and the flow by layer and target, 0 for targets
        that did not run (None without a reader).
    """
    packed, pick = packing.packed, packing.pick
    # On a CPU, rows run in groups that fit its cache. The last group is filled up with copies of the last row.
    n_groups, size = groups(cfg, packing, len(resid))
    filled = jnp.minimum(jnp.arange(n_groups * size), len(resid) - 1).reshape(n_groups, size)

    # Four ways to run one layer. Each returns the stream after it, and what the reader reads.
    def whole(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """All of a layer, at all tokens."""
        one = b(x, packed)
        return one.resid_post, reader(one, layer, pick) if reader else None

    def where_read(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """All of a layer, with its output only at the positions that are read."""
        one = b(x, packing.where_read(len(x)))
        return packing.by_prompt(one.resid_post), reader(one, layer, packing.by_prompt) if reader else None

    def mlp(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """The MLP of a layer, at all tokens; x is `resid_mid`."""
        one = b(x, packed, known={Site.RESID_MID: x})
        return one.resid_post, reader(one, layer, pick, heads=False) if reader else None

    def mlp_where_read(b: Block, layer: Array | int, x: Float[Array, "n S D"]) -> tuple[Array, Array | None]:
        """The MLP of a layer, only at the positions that are read; x is `resid_mid`."""
        one = b(x, packed, known={Site.RESID_MID: pick(x)})
        return one.resid_post, reader(one, layer, lambda x: x, heads=False) if reader else None

    def through(
        run: Callable[[Block, Array | int, Array], tuple[Array, Array | None]], layer: Array | int, carry: Carry
    ) -> Carry:
        """One layer for all groups. Its weights are fetched once."""
        x, writes = carry
        one = functools.partial(run, block(cfg, take_layer(blocks, layer), layer), layer)
        out, added = jax.tree.map(lambda a: a[None], one(x[0])) if n_groups == 1 else jax.lax.map(one, x)
        return out, None if writes is None else writes.at[..., layer, :].set(added)

    def flat(x: Float[Array, "G g *n"]) -> Float[Array, " N *n"]:  # here G counts groups; what fills up is cut off
        return x.reshape(-1, *x.shape[2:])[: len(resid)]

    writes = None
    if reader is not None:
        writes = jnp.zeros((n_groups, size, len(packing.at), last + 1, cfg.n_heads + 1), jnp.float32)
    x = resid[None] if n_groups == 1 else resid[filled]

    def layers_left(carry: Carry) -> Carry:
        if mlp_first:
            carry = through(mlp, start - 1, carry)
        return through(where_read, last, jax.lax.fori_loop(start, last, functools.partial(through, whole), carry))

    def none_left(carry: Carry) -> Carry:
        """The patch is in layer `last` itself."""
        if mlp_first:
            return through(mlp_where_read, last, carry)
        return jax.vmap(pick)(carry[0]), carry[1]

    picked, writes = jax.lax.cond(start <= last, layers_left, none_left, (x, writes))
    return flat(picked), None if writes is None else flat(writes)


class Replayed(NamedTuple):
    """What P patches of one program do.

    Attributes:
        change: [P, B], change of the metric of each prompt, in its units.
        flow: [P, U], the part of that change that arrives by way of each of `flow_targets`, mean over prompts. None:
            the host's run does not follow the flow.
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
    """How the host's metric changes when one component at a time is replaced; P components of one kind and layer.

    Args:
        cfg: the model (static).
        kind: kind of all P components (static).
        host: parameters that receive the patches, shared by all of them.
        donor: parameters that the components come from.
        runs: the packed runs (`run_packed`) of the host and, if `inputs` is "donor", of the donor.
        metric: what is measured.
        packing: the packing of the metric's prompts.
        layer: layer of the components (traced). Of no meaning for kinds outside the layers.
        step: 0 for a patch. For a sham, the relative step by which every entry of the patched stream is moved, up or
            down at random.
        index: which components of the layer.
        seeds: random seeds of the shams, one a patch.
        weights: whose weights a component takes (static).
        inputs: whose input it sees (static).
        with_reference: whether to run the host itself as one more row of the program and to take changes from that
            row. Rounding depends on the shape of a batch, so the host's run in a program of its own may differ
            (static).

    `engines.exact.exact_changes` is the way to call it, with an example.
    """
    run = runs[0]
    # Three cases say what `rows` are, the streams with a patch, and from where on the host's layers run:
    # after the embedding, after a state that is given, or after (or halfway in) the layer of the components.
    contributed, site = Rows(), Site.RESID_POST
    if not KINDS[kind].in_layer:
        giver = donor if weights == "donor" else host
        patched = patch(host, giver, PatchMask.of(cfg, kind))
        if metric.held is None:  # start from the (patched) embedding: the tokens are the only input
            after, unpatched = jnp.asarray(0), run.resid_pre[0]
            rows = decoder(cfg, patched).embed(jnp.asarray(packing.ids), packing.packed.positions)[None]
        else:  # a state is given: only final norm and unembedding count, and they act at the readout, in `patched`
            after, unpatched = jnp.asarray(metric.layer), run.resid_pre[metric.layer]
            rows = unpatched[None]
    else:
        patched, after = host, layer + 1
        at = layer_patch(cfg, host, donor, runs, layer, weights, inputs, packing.packed)
        with jax.named_scope(f"{kind} rows"):
            contributed = layer_rows(cfg, kind, at, (host, donor), layer, index)
        site, rows, unpatched = contributed.handoff(at)
    rows = jax.lax.cond(step > 0, functools.partial(_jittered, seeds, step), lambda rows: rows, rows)
    if with_reference:
        rows = jnp.concatenate([rows, unpatched[None]])
    reader = None if run.slope is None or run.written is None else FlowReader(run.slope, run.written)
    picked, writes = suffix(
        cfg, host["blocks"], rows[:, 0], after, metric.layer, packing, reader, mlp_first=site is Site.RESID_MID
    )
    # Logits of the whole vocabulary take much memory, so they are read for one patch at a time.
    at_once = 1 if metric.readout.reads_logits else len(index)
    n = len(index) if KINDS[kind].in_layer else 1  # a component of the model is one row, however many indices
    with jax.named_scope("read"):
        scores = jax.lax.map(lambda x: metric.read(cfg, patched, x), picked[:n], batch_size=at_once)
        change = scores - (metric.read(cfg, host, picked[-1]) if with_reference else run.score)
    if reader is None or writes is None:
        return Replayed(change, None)
    before = writes[-1] if with_reference else 0.0  # what rounding in this program alone makes of the host
    # Only targets that ran after the patch count: [L, 1], or [L, H + 1] where a layer's MLP ran without its heads.
    later = jnp.arange(metric.layer + 1)[:, None] >= after
    if site is Site.RESID_MID:
        later = later.repeat(cfg.n_heads + 1, 1).at[layer, -1].set(True)
    through = jnp.where(later, writes[:n] - before, 0.0).mean(1)  # [P, L, H + 1]
    own = own_change(reader, packing, rows[:n], unpatched)
    # Norms: their rows have gone through the layer's MLP already. What the MLP makes of it is that target's, not own.
    if contributed.mid is not None and contributed.post is not None:
        direct = own_change(reader, packing, contributed.mid, at.host.resid_mid)
        through = through.at[:, layer, -1].set(own - direct)
        own = direct
    flow = jnp.concatenate([own[:, None], through.reshape(n, -1)], axis=1)  # in the order of `flow_targets`
    if metric.readout.reads_logits:
        flow = jnp.concatenate([flow, change.mean(1, keepdims=True) - flow.sum(1, keepdims=True)], axis=1)
    return Replayed(change, flow)


def _jittered(seeds: Array, step: Array, rows: Float[Array, "N 1 S D"]) -> Float[Array, "N 1 S D"]:
    """Rows with every entry moved up or down by a relative step, at random: what a sham measures."""
    signs = jax.vmap(lambda seed: jax.random.rademacher(jax.random.key(seed), rows.shape[1:], jnp.float32))(seeds)
    return rows * (1 + step * signs)
