"""Following an effect: by way of which later heads and MLPs does a patch change the metric?
(docs/method.md, "Following an effect"; ours)

The stream is the sum of what everything has written. So the change of the metric F by a patch of c splits over all
later heads and MLPs u:

    dF_c = d_cc + sum_u d_cu + rest_c,    d_cu = <v, o_u(host with c) - o_u(host)>,    v = dF / dr at the host

at the positions that are read. d_cc is what c itself writes, o_u is what u writes, r is the stream.

- If F is a projection, v is its direction and the rest is 0.
- If F reads logits, the rest is what the slope v misses: the curve of the readout, and changes of its own weights.
- If a norm stands between the heads and the stream, o_u is a head's share of the norm's output, by the norm's secant.

Letters: N rows of the stream, one for each of P patches and perhaps one for the host; B prompts; R positions read of
each prompt; U targets, of which each layer has G = H + 1, its heads and then its MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wpjax.engines.contributions import HostWrites, Run
from wpjax.engines.packing import Packing
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.block import LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, take_layer
from wpjax.models.sites import Site


@functools.partial(jax.jit, static_argnames="cfg")
def add_flow(cfg: ModelConfig, params: Params, metric: Metric, packing: Packing, run: Run) -> Run:
    """Add to a run what following the flow needs: `slope` and `written` (see `Run`)."""
    assert run.kept is not None
    slope = slope_of(cfg, params, metric, packing.pick(run.kept[Site.RESID_POST][-1])[0])

    def written(layer: Array) -> HostWrites:
        layer_block = block(cfg, take_layer(params["blocks"], layer), layer)
        one = layer_block(take_layer(run.resid_pre, layer), packing.where_read(1))
        return HostWrites(packing.by_prompt(one.z)[0], first_order_change(slope, packing.by_prompt(one.mlp_out))[0])

    return run._replace(slope=slope, written=jax.lax.map(written, jnp.arange(metric.layer + 1)))


def slope_of(cfg: ModelConfig, params: Params, metric: Metric, picked: Float[Array, "B R D"]) -> Float[Array, "B R D"]:
    """Gradient of the metric by the residual stream, at the positions that are read.

    Args:
        cfg: the model.
        params: its parameters; they matter to metrics that read logits.
        metric: what is measured.
        picked: the model's own stream at these positions.
    """
    if isinstance(metric.readout, Projection):  # linear: its gradient needs no pass
        return jnp.asarray(metric.weight)[..., None] * metric.readout.vector

    def one(b: Array) -> Float[Array, "R D"]:  # prompt by prompt: logits of the whole vocabulary take much memory
        prompt = metric.take(b[None])
        return jax.grad(lambda x: prompt.read(cfg, params, x[None])[0])(picked[b])

    return jax.lax.map(one, jnp.arange(len(metric)))


def first_order_change(slope: Float[Array, "B R D"], x: Float[Array, "N B R D"]) -> Float[Array, "N B"]:
    """The first-order change of the metric, by row and prompt, for changes x of the stream."""
    return jnp.einsum("nbrd,brd->nb", x, slope, precision=jax.lax.Precision.HIGHEST)


class FlowReader(NamedTuple):
    """Reads on the way how much each head and MLP changes the metric by writing something else than in the host.

    Attributes:
        slope: [B, R, D], gradient of the metric by the stream, at the positions that are read.
        host: what the host's own heads and MLPs write there.
    """

    slope: Float[Array, "B R D"]
    host: HostWrites

    def __call__(
        self, one: LayerPass, layer: Array | int, picked: Callable[[Array], Array], heads: bool = True
    ) -> Float[Array, "N B G"]:
        """The terms d_cu of one layer, without those of the host: first its H heads, last its MLP.

        Args:
            one: the pass of N rows through the layer.
            layer: number of the layer.
            picked: a function that picks the positions that are read from a value of the pass: to [N, B, R, ...].
            heads: whether attention ran in this pass. If not, its heads changed nothing and get 0.
        """
        host, highest = take_layer(self.host, layer), jax.lax.Precision.HIGHEST
        mlp = (first_order_change(self.slope, picked(one.mlp_out)) - host.mlp)[..., None]
        if not heads:
            return jnp.pad(mlp, ((0, 0), (0, 0), (one.block.cfg.n_heads, 0)))
        z, attn = picked(one.z), one.block.attn
        slope, prompts = self.slope, "brhk"
        if one.block.has_norm(Site.ATTN_OUT):  # the norm mixes the heads: each row has its own slope before the norm
            slope, prompts = jnp.broadcast_to(slope, (len(z), *slope.shape)), "nbrhk"
            slope = one.block.attn_proj_slope(slope, jnp.broadcast_to(attn.out(host.z), slope.shape), attn.out(z))
        else:  # the same for all rows
            slope = one.block.attn_proj_slope(slope, attn.out(host.z), attn.out(host.z))
        w_o = attn.W_O.get_value().astype(jnp.float32)
        # The slope is taken back through W_O, so that [N, B, R, H, D], what each head writes, is never formed.
        by_head = jnp.einsum(f"hkd,{prompts[:-2]}d->{prompts}", w_o, slope, precision=highest)
        written = jnp.einsum(f"nbrhk,{prompts}->nbh", z - host.z, by_head, precision=highest)
        return jnp.concatenate([written, mlp], axis=-1)


def own_change(
    reader: FlowReader, packing: Packing, rows: Float[Array, "P 1 S D"], host: Float[Array, "1 S D"]
) -> Float[Array, " P"]:
    """The first-order change of the metric by what the rows differ from the host's stream, mean over prompts."""
    return first_order_change(reader.slope, packing.pick(rows[:, 0]) - packing.pick(host)).mean(-1)


def flow_targets(cfg: ModelConfig, metric: Metric) -> list[str]:
    """Names of the columns of `Replayed.flow`.

    `self` is what the component itself writes. Then come the heads and the MLP of each layer up to the one that is
    read: `L0.head.0`, ..., `L0.mlp`, `L1.head.0`, ... If the metric reads logits, the last is `rest`.
    """
    parts = [*(f"head.{h}" for h in range(cfg.n_heads)), "mlp"]
    layers = (f"L{layer}.{part}" for layer in range(metric.layer + 1) for part in parts)
    return ["self", *layers, *["rest"][: metric.readout.reads_logits]]
