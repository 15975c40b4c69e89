"""Prompts packed into one sequence, so that a patch computes no token twice and hardly any padding
(docs/method.md, "Suffix replay"; ours).

    prompts      s s s a a a        packed      s s s | a a a | b b c | ...
                 s s s b b
                 s s s c            shared once, then the rest of each prompt in bins of one width

What a causal model does at the tokens that all prompts begin with, a system prompt or a template, is the same for all
of them, whichever component is patched. What follows the last token that a prompt is read at does not count. Bins are
as wide as the longest rest, or up to twice that where fewer slots stay empty.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.metrics.metric import Metric
from wpjax.models.layers import Attention
from wpjax.models.layouts import Packed

COST_OF_KEY = 1 / 2000
"""Of one key more that a token is compared with, in units of a layer's weights; about that of a small model."""

N_WIDTHS = 32
"""Widths of bins that are tried."""


class Packing(NamedTuple):
    """How the prompts of a metric are packed; S packed tokens.

    Attributes:
        packed: positions, and which tokens see each other.
        ids: [1, S], token ids.
        prompt: [S], the prompt that each token is taken from.
        token: [S], its position there.
        bin: [B], the bin of each prompt.
        at: [B, R], where in the sequence each prompt is read.
    """

    packed: Packed
    ids: Int[np.ndarray | Array, "1 S"]
    prompt: Int[np.ndarray | Array, " S"]
    token: Int[np.ndarray | Array, " S"]
    bin: Int[np.ndarray | Array, " B"]
    at: Int[np.ndarray | Array, "B R"]

    @property
    def n_tokens(self) -> int:
        """S."""
        return self.ids.shape[1]

    @property
    def n_empty(self) -> int:
        """Of them, how many fill up bins."""
        return int((np.asarray(self.packed.segments) < 0).sum())

    @property
    def n_keys(self) -> int:
        """How many keys a token is compared with."""
        return self.packed.n_shared + self.packed.segments.shape[1]

    def gather(self, x: Float[np.ndarray | Array, "A B T D"]) -> Float[np.ndarray | Array, "A 1 S D"]:
        """A stack of prompts' streams, packed."""
        return x[:, np.asarray(self.prompt), np.asarray(self.token)][:, None]

    def pick(self, x: Float[Array, "N S *n"]) -> Float[Array, "N B R *n"]:
        """What belongs to the positions that are read."""
        return x[:, self.at]

    @property
    def seen(self) -> Array:
        """[B, R, C], which of its bin's keys each position that is read sees."""
        width = self.packed.segments.shape[1]
        offset = self.at - self.packed.n_shared - self.bin[:, None] * width
        return self.packed.visible[self.bin[:, None], offset]

    def where_read(self, n_rows: int) -> WhereRead:
        """The layout in which the output is wanted only where prompts are read, of some rows."""
        return WhereRead(self, n_rows)

    def by_prompt(self, x: Float[Array, "NB R *n"]) -> Float[Array, "N B R *n"]:
        """What belongs to the positions that are read, from how `where_read` lays it."""
        return x.reshape(-1, *self.at.shape, *x.shape[2:])


class WhereRead(NamedTuple):
    """The layout of a layer that is read: keys and values of every token, output where the prompts are read only.

    The stream is [N, S, D], N rows of packed prompts; what is made of it is [N B, R, ...], a prompt a row.

    Attributes:
        packing: of the prompts.
        n_rows: N (static).
    """

    packing: Packing
    n_rows: int

    @property
    def positions(self) -> Int[Array, "1 S"]:
        """Of the packed tokens."""
        return self.packing.packed.positions

    @property
    def query_positions(self) -> Int[Array, "NB R"]:
        """Positions, in their prompts, that are read."""
        read = jnp.asarray(self.positions)[0][self.packing.at]
        return jnp.tile(read, (self.n_rows, 1))

    def pick(self, x: Float[Array, "N S *n"]) -> Float[Array, "NB R *n"]:
        """What belongs to the positions that are read."""
        picked = self.packing.pick(x)
        return picked.reshape(-1, *picked.shape[2:])

    def extend(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Keys and values of each prompt's bin."""
        found = (self.packing.packed.keys(x)[:, self.packing.bin] for x in (keys, values))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in found)
        return k, v

    def attend(self, attn: Attention, queries: Array, keys: Array, values: Array) -> Float[Array, "NB R H Dh"]:
        """Each position that is read sees the shared tokens, itself and those before it in its own prompt."""
        return attn.mix(queries, keys, values, jnp.tile(self.packing.seen, (self.n_rows, 1, 1)))


def first_fit(sizes: Int[np.ndarray, " B"], width: int) -> Int[np.ndarray, "B 2"]:
    """Bin of each thing and where in it, the largest things first, each into the first bin of a width that has room."""
    used: list[int] = []
    where = np.zeros((len(sizes), 2), int)
    for b in np.argsort(-sizes, kind="stable"):
        room = [i for i, n in enumerate(used) if n + sizes[b] <= width]
        if not room:
            used.append(0)
        bin_ = room[0] if room else len(used) - 1
        where[b] = bin_, used[bin_]
        used[bin_] += int(sizes[b])
    return where


class Shape(NamedTuple):
    """Of packed prompts: of one shape, different prompts run in one program.

    Attributes:
        shared: tokens that stand once, before all bins.
        width: tokens of a bin.
        n_bins: bins; some may be empty.
    """

    shared: int
    width: int
    n_bins: int

    @property
    def cost(self) -> float:
        """Tokens, those that fill up included, with what each is compared with."""
        return (self.shared + self.width * self.n_bins) * (1 + COST_OF_KEY * (self.shared + self.width))


def common_shape(*metrics: Metric) -> Shape:
    """The cheapest shape that the prompts of each of some metrics fit in."""
    spans = [_span(metric) for metric in metrics]
    shared = min(n for n, _, _ in spans)
    return _cheapest(shared, tuple(tuple((length - shared).tolist()) for _, _, length in spans))


@functools.lru_cache(maxsize=256)  # sets are scored batch after batch on the same prompts
def _cheapest(shared: int, rests: tuple[tuple[int, ...], ...]) -> Shape:
    longest = max(max(rest) for rest in rests)

    def shape(width: int) -> Shape:
        return Shape(shared, width, 1 + max(int(first_fit(np.array(rest), width)[:, 0].max()) for rest in rests))

    return min(map(shape, range(longest, 2 * longest, -(-longest // N_WIDTHS))), key=lambda found: found.cost)


def shared_tokens(metric: Metric) -> int:
    """How many tokens all prompts of a metric begin with, of those before any that counts."""
    return _span(metric)[0]


def _counts(metric: Metric) -> Bool[np.ndarray, "B S"]:
    """Which positions count; all where none does, as the prompt must stand somewhere."""
    counts = np.asarray(metric.weight) != 0
    return counts | ~counts.any(1, keepdims=True)


def _span(metric: Metric) -> tuple[int, Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """How many tokens all prompts begin with, where each is read first, and where its last token that counts ends."""
    ids, at, counts = np.asarray(metric.tokens.ids), np.asarray(metric.at), _counts(metric)
    first, length = np.where(counts, at, ids.shape[1]).min(1), np.where(counts, at, -1).max(1) + 1
    limit = int(first.min()) if metric.held is None else int(min(first.min(), np.asarray(metric.held.start).min()))
    same = (ids == ids[:1]).all(0)[:limit]
    return 0 if len(ids) == 1 else int(np.argmin(same)) if not same.all() else limit, first, length


def pack(metric: Metric, shape: Shape | None = None) -> Packing:
    """Pack the prompts of a metric, into a shape if one is given (see `common_shape`)."""
    shared, width, n_bins = common_shape(metric) if shape is None else shape
    ids, at, (_, first, length) = np.asarray(metric.tokens.ids), np.asarray(metric.at), _span(metric)
    rest = length - shared
    where = first_fit(rest, width)
    segments = np.full((n_bins, width), -1, np.int32)
    prompt, token = np.zeros((2, shared + segments.size), int)
    token[:shared] = np.arange(shared)
    start = shared + where[:, 0] * width + where[:, 1]  # of each prompt's own tokens
    for b, (bin_, offset) in enumerate(where):
        segments[bin_, offset : offset + rest[b]] = b
        here = slice(start[b], start[b] + rest[b])
        prompt[here], token[here] = b, shared + np.arange(rest[b])
    read = start[:, None] + np.where(_counts(metric), at, first[:, None]) - shared
    packed = Packed(jnp.asarray(token[None], jnp.int32), jnp.asarray(segments))
    arrays = (ids[prompt, token][None], prompt, token, where[:, 0], read)
    return Packing(packed, *(jnp.asarray(a, jnp.int32) for a in arrays))
