"""All restorations of one fact in one program: what a corrupted run says once a state of it is the clean run's again.

A *cell* is a layer and a set of tokens whose values are restored there. Of its run nothing is computed that is known:
layers before the restored one, and tokens before the first restored one, are those of the corrupted run. So of a cell
only the tokens from that one on run, through the layers that are left:

    sum over cells of (layers left) x (tokens left)    instead of    cells x layers x tokens, about a quarter

The tokens of all cells that start at one layer are rows of the same matrix products (`Suffixes`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, forward, take_layer
from wpjax.models.edits import Add, Edit
from wpjax.models.layers import Attention
from wpjax.models.layouts import AllTokens, Causal, Window
from wpjax.models.sites import Site

MODULES = {"mlp": Site.MLP_OUT, "attn": Site.ATTN_OUT}
"""Name of a module -> where what it adds to the stream is restored, or held."""


class _Suffixes(NamedTuple):
    positions: Int[Array, "1 S"]
    cells: Int[Array, " S"]
    n_cells: int
    keys: Float[Array, "R T K Dh"]
    values: Float[Array, "R T K Dh"]


class Suffixes(_Suffixes, AllTokens):
    """A layout of C versions of each row, each from some token on to the end, one after the other.

    A token sees those of its own version up to itself. Before the first of them it sees the keys and values of the row.

    Attributes:
        positions: [1, S], the position of each token.
        cells: [S], the version that it belongs to; C for tokens that fill the row up, which nobody sees.
        n_cells: C (static).
        keys: [R, T, K, Dh], keys of the rows themselves, in the layer that runs.
        values: [R, T, K, Dh], their values.
    """

    def attend(self, attn: Attention, queries: Array, keys: Array, values: Array, window: Window | None) -> Array:
        """Each token sees itself and those before it in its version."""
        rows, n_tokens = self.keys.shape[:2]

        def whole(x: Array, row: Array) -> Array:  # [R, S, n, Dh] to [R C, T, n, Dh]
            full = jnp.broadcast_to(row[:, None], (rows, self.n_cells, *row.shape[1:]))
            full = full.at[:, self.cells, self.positions[0]].set(x, mode="drop")
            return full.reshape(-1, *row.shape[1:])

        none = jnp.zeros((rows, n_tokens, *queries.shape[2:]), queries.dtype)
        q, k, v = whole(queries, none), whole(keys, self.keys), whole(values, self.values)
        z = Causal.of(n_tokens).attend(attn, q, k, v, window)
        z = z.reshape(rows, self.n_cells, *z.shape[1:])
        return z.at[:, self.cells, self.positions[0]].get(mode="clip")


class Packing(NamedTuple):
    """The tokens that cells run, one cell after the other.

    Attributes:
        positions: [S], the position of each token.
        cells: [S], its cell; C for what fills the row up.
        ends: [C], where the last token of the prompt stands in each cell.
    """

    positions: Int[np.ndarray, " S"]
    cells: Int[np.ndarray, " S"]
    ends: Int[np.ndarray, " C"]


def packing(restored: Bool[np.ndarray, "C T"], n_tokens: int, multiple: int = 16) -> Packing:
    """Lay the tokens of cells out: of each cell those from its first restored token on.

    Args:
        restored: the tokens that each cell restores. Cells that restore none only fill an array up: they do not run.
        n_tokens: tokens of the prompt; those after it are padding.
        multiple: the row is filled up to a multiple of this, so that few programs serve all prompts.

    >>> packing(np.eye(4, dtype=bool)[1:3], 4, multiple=1)
    Packing(positions=array([1, 2, 3, 2, 3]), cells=array([0, 0, 0, 1, 1]), ends=array([2, 4]))
    """
    firsts = restored.argmax(1)
    lengths = np.where(restored.any(1), n_tokens - firsts, 0)
    positions = np.concatenate([np.arange(n_tokens - length, n_tokens) for length in lengths])
    cells = np.repeat(np.arange(len(firsts)), lengths)
    left = -len(cells) % multiple
    ends = np.maximum(np.cumsum(lengths) - 1, 0)
    return Packing(np.pad(positions, (0, left)), np.pad(cells, (0, left), constant_values=len(firsts)), ends)


class Flow(NamedTuple):
    """What restoring does.

    Attributes:
        clean: [], probability of the answer in the clean run.
        corrupted: [R], in each corrupted run.
        restored: [L, C, R], in each corrupted run with the tokens of each cell restored at each layer.
    """

    clean: Float[Array, ""]
    corrupted: Float[Array, " R"]
    restored: Float[Array, "L C R"]


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "window", "severed"))
def flow(
    cfg: ModelConfig,
    params: Params,
    clean: Int[Array, " T"],
    corrupted: Int[Array, "R T"],
    noise: Float[Array, "R T D"],
    restored: Bool[Array, "C T"],
    packed: Packing,
    last: Int[Array, ""],
    answer: Int[Array, ""],
    *,
    kind: str = "stream",
    window: int = 10,
    severed: str | None = None,
) -> Flow:
    """Restore each cell at every layer, in every corrupted run.

    Args:
        cfg: the model (static).
        params: its parameters.
        clean: tokens of the prompt, padded on the right.
        corrupted: tokens of the corrupted prompts; R times the same if noise corrupts them.
        noise: added to their embeddings.
        restored: the tokens that each cell restores.
        packed: these cells as `packing` lays them out.
        last: position of the last token of the prompt.
        answer: the token whose probability is read there.
        kind: "stream": the stream after each layer is restored. "mlp" or "attn": what these modules add to it, in the
            `window` layers from l - window / 2 on, of each layer l (static).
        window: number of layers, for modules (static).
        severed: "mlp" or "attn": at the restored tokens these modules are held at what they add in the corrupted run,
            in every layer (static). Of the stream only.
    """
    n_layers, layers = cfg.n_layers, jnp.arange(cfg.n_layers)
    read = (Site.RESID_PRE, Site.RESID_POST, Site.K, Site.V, *MODULES.values())
    # The clean run is the first row of one forward pass.
    quiet = jnp.concatenate([jnp.zeros_like(noise[:1]), noise])
    edit = Edit(Site.RESID_PRE, Add(quiet), layer=0)
    runs = forward(cfg, params, jnp.concatenate([clean[None], corrupted]), sites=read, logits=False, edits=(edit,))
    good, bad = ({site: x[:, rows] for site, x in runs.sites.items()} for rows in (slice(0, 1), slice(1, None)))
    model = decoder(cfg, params)

    def says(resid: Float[Array, "*n D"]) -> Float[Array, "*n"]:
        return jax.nn.softmax(model.logits(resid))[..., answer]

    at, cells = jnp.asarray(packed.positions), jnp.asarray(packed.cells)
    is_restored = restored.at[cells, at].get(mode="fill", fill_value=False)

    def choose(site: Site, layer: Array, value: Array, run: dict[Site, Array], where: Array) -> Array:
        """The value at a site, where it is to be a run's; [R, S, D]."""
        return jnp.where(where[:, None], run[site][layer][:, at], value)

    def through(layer: Array, x: Float[Array, "R S D"], span: tuple[Array, Array]) -> Float[Array, "R S D"]:
        """All cells through one layer; modules in a span of layers are restored."""
        keys, values = bad[Site.K][layer], bad[Site.V][layer]
        layout = Suffixes(at[None], cells, len(restored), keys, values)
        one = block(cfg, take_layer(params["blocks"], layer), layer)(x, layout)
        if severed is not None:
            site = MODULES[severed]
            one = one.replaced({site: choose(site, layer, one.at(site), bad, is_restored)})
        if kind != "stream":
            site, within = MODULES[kind], (span[0] <= layer) & (layer < span[1])
            one = one.replaced({site: choose(site, layer, one.at(site), good, is_restored & within)})
        return one.resid_post

    def at_layer(layer: Array) -> Float[Array, "C R"]:
        """What all cells say if they are restored at one layer."""
        if kind == "stream":
            x = choose(Site.RESID_POST, layer, bad[Site.RESID_POST][layer][:, at], good, is_restored)
            begin, span = layer + 1, (layer, layer)
        else:
            span = jnp.maximum(0, layer - window // 2), jnp.minimum(n_layers, layer + (window + 1) // 2)
            begin = span[0]
            x = bad[Site.RESID_PRE][begin][:, at]
        x = jax.lax.fori_loop(begin, n_layers, lambda i, x: through(i, x, span), x)
        return says(x[:, packed.ends]).T

    at_the_end = says(runs.resid[:, last])
    return Flow(at_the_end[0], at_the_end[1:], jax.lax.map(at_layer, layers))
