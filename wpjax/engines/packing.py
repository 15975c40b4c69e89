"""Prompts packed into one sequence, so that a patch computes no token twice and hardly any padding
(docs/method.md, "Suffix replay"; ours).

    prompts      s s s a a a        packed      s s s | a a a | b b c | ...
                 s s s b b
                 s s s c            shared once, then the rest of each prompt in bins of one width

Three facts make this exact and cheap:

- Prompts often begin with the same tokens: a system prompt or a template. A causal model does the same at these tokens
  for every prompt, whichever component is patched. So they stand once.
- Tokens after the last one that is read cannot change the metric. They are dropped.
- The rest of each prompt goes into bins of one width, so that shapes are few. A bin may hold several prompts. Its width
  is the longest rest, or up to twice that if fewer slots then stay empty.

Letters: B prompts, R positions read of each, S packed tokens, N rows (one for each patch), C keys of a bin.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.metrics.metric import Metric
from wpjax.models.layers import Attention
from wpjax.models.layouts import Packed, Window

COST_OF_KEY = 1 / 2000
"""Cost of comparing a token with one more key, in units of what the layer's weights cost a token.

About right for a small model.
"""

N_WIDTHS = 32
"""How many widths of bins are tried, about."""


class Packing(NamedTuple):
    """How the prompts of a metric are packed into one sequence of S tokens.

    Attributes:
        packed: positions of the tokens, and which tokens see each other.
        ids: [1, S], token ids.
        prompt: [S], the prompt that each token comes from.
        token: [S], the position of each token in that prompt.
        bin: [B], the bin of each prompt.
        at: [B, R], the places in the packed sequence at which each prompt is read.
    """

    packed: Packed
    ids: Int[np.ndarray | Array, "1 S"]
    prompt: Int[np.ndarray | Array, " S"]
    token: Int[np.ndarray | Array, " S"]
    bin: Int[np.ndarray | Array, " B"]
    at: Int[np.ndarray | Array, "B R"]

    @property
    def n_tokens(self) -> int:
        """S, empty slots included."""
        return self.ids.shape[1]

    @property
    def n_empty(self) -> int:
        """Number of empty slots, which fill up bins."""
        return int((np.asarray(self.packed.segments) < 0).sum())

    @property
    def n_keys(self) -> int:
        """Number of keys that a token is compared with: the shared ones and those of its bin."""
        return self.packed.n_shared + self.packed.segments.shape[1]

    def gather(self, x: Float[np.ndarray | Array, "A B T D"]) -> Float[np.ndarray | Array, "A 1 S D"]:
        """Pack values that stand prompt by prompt: from [A, B, T, D] to [A, 1, S, D]."""
        return x[:, np.asarray(self.prompt), np.asarray(self.token)][:, None]

    def pick(self, x: Float[Array, "N S *n"]) -> Float[Array, "N B R *n"]:
        """The values at the positions that are read."""
        return x[:, self.at]

    def seen(self, window: Window | None = None) -> Bool[Array, "B R C"]:
        """True where a position that is read sees a key of its bin; see `Packed.visible`."""
        width = self.packed.segments.shape[1]
        offset = self.at - self.packed.n_shared - self.bin[:, None] * width
        return self.packed.visible(window)[self.bin[:, None], offset]

    def where_read(self, n_rows: int) -> WhereRead:
        """The layout of the layer that is read, for N rows; see `WhereRead`."""
        return WhereRead(self, n_rows)

    def by_prompt(self, x: Float[Array, "NB R *n"]) -> Float[Array, "N B R *n"]:
        """Undo the layout of `where_read`: from [N B, R, ...] to [N, B, R, ...]."""
        return x.reshape(-1, *self.at.shape, *x.shape[2:])


class WhereRead(NamedTuple):
    """The layout of the layer that is read: keys and values of every token, output only at the positions that are read.

    The stream that enters is [N, S, D], packed. The output is [N B, R, ...]: one row for each prompt of each patch.

    Attributes:
        packing: the packing of the prompts.
        n_rows: N, rows of the stream (static).
    """

    packing: Packing
    n_rows: int

    @property
    def positions(self) -> Int[Array, "1 S"]:
        """Positions of the packed tokens in their prompts."""
        return self.packing.packed.positions

    @property
    def query_positions(self) -> Int[Array, "NB R"]:
        """Positions that are read, counted in their prompts."""
        read = jnp.asarray(self.positions)[0][self.packing.at]
        return jnp.tile(read, (self.n_rows, 1))

    def pick(self, x: Float[Array, "N S *n"]) -> Float[Array, "NB R *n"]:
        """The values at the positions that are read."""
        picked = self.packing.pick(x)
        return picked.reshape(-1, *picked.shape[2:])

    def extend(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Keys and values of each prompt's bin, [N B, C, K, Dh] each."""
        by_prompt = (self.packing.packed.keys(x)[:, self.packing.bin] for x in (keys, values))
        k, v = (x.reshape(-1, *x.shape[2:]) for x in by_prompt)
        return k, v

    def attend(
        self, attn: Attention, queries: Array, keys: Array, values: Array, window: Window | None
    ) -> Float[Array, "NB R H Dh"]:
        """Each position that is read sees the shared tokens, itself and those before it in its own prompt."""
        return attn.mix(queries, keys, values, jnp.tile(self.packing.seen(window), (self.n_rows, 1, 1)))


def first_fit(sizes: Int[np.ndarray, " B"], width: int) -> Int[np.ndarray, "B 2"]:
    """Put items into bins of one width: the largest item first, each into the first bin that has room.

    Args:
        sizes: size of each item, at most `width`.
        width: width of the bins.

    Returns:
        [B, 2], the bin of each item and its offset there.

    >>> first_fit(np.array([2, 3, 1]), width=3).tolist()  # 3 fills bin 0; 2 and 1 share bin 1
    [[1, 0], [0, 0], [1, 2]]
    """
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
    """The shape of packed prompts. Sets of prompts that are packed into one shape share a compiled program.

    Attributes:
        shared: number of tokens that stand once, before all bins.
        width: number of tokens of a bin.
        n_bins: number of bins; some may be empty.
    """

    shared: int
    width: int
    n_bins: int

    @property
    def cost(self) -> float:
        """Cost of one pass, in units of what a layer's weights cost a token: every slot, and the keys it sees."""
        return (self.shared + self.width * self.n_bins) * (1 + COST_OF_KEY * (self.shared + self.width))


def common_shape(*metrics: Metric) -> Shape:
    """The cheapest shape into which the prompts of every one of these metrics can be packed."""
    spans = [_span(metric) for metric in metrics]
    shared = min(n for n, _, _ in spans)
    return _cheapest(shared, tuple(tuple((length - shared).tolist()) for _, _, length in spans))


@functools.lru_cache(maxsize=256)  # sets are scored batch after batch on the same prompts
def _cheapest(shared: int, rests: tuple[tuple[int, ...], ...]) -> Shape:
    """The cheapest shape for several sets of prompts, given the number of tokens of each that are not shared."""
    longest = max(max(rest) for rest in rests)

    def shape(width: int) -> Shape:
        return Shape(shared, width, 1 + max(int(first_fit(np.array(rest), width)[:, 0].max()) for rest in rests))

    return min(map(shape, range(longest, 2 * longest, -(-longest // N_WIDTHS))), key=lambda candidate: candidate.cost)


def shared_tokens(metric: Metric) -> int:
    """Number of tokens that all prompts of a metric begin with, not beyond the first position that is read."""
    return _span(metric)[0]


def _counts(metric: Metric) -> Bool[np.ndarray, "B S"]:
    """Which positions of `metric.at` count. If a prompt has none that does, all do: it must be packed all the same."""
    counts = np.asarray(metric.weight) != 0
    return counts | ~counts.any(1, keepdims=True)


def _span(metric: Metric) -> tuple[int, Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """The number of shared tokens; the first position that is read of each prompt; and the tokens it needs, its length.

    The shared tokens end before the first one that is read, and before the first one at which a state is held.
    """
    ids, at, counts = np.asarray(metric.tokens.ids), np.asarray(metric.at), _counts(metric)
    first, length = np.where(counts, at, ids.shape[1]).min(1), np.where(counts, at, -1).max(1) + 1
    limit = int(first.min()) if metric.held is None else int(min(first.min(), np.asarray(metric.held.start).min()))
    same = (ids == ids[:1]).all(0)[:limit]
    return 0 if len(ids) == 1 else int(np.argmin(same)) if not same.all() else limit, first, length


def pack(metric: Metric, shape: Shape | None = None) -> Packing:
    """Pack the prompts of a metric.

    Args:
        metric: whose prompts, and which positions of them are read.
        shape: shape to pack them into (see `common_shape`); None for the cheapest.

    Three prompts that begin with the same two tokens, each read at its last one:

    >>> from wpjax.behaviours import Tokens
    >>> from wpjax.metrics.readouts import Projection
    >>> tokens = Tokens(np.array([[7, 8, 1, 2], [7, 8, 3, 0], [7, 8, 4, 0]]), np.array([4, 3, 3]))
    >>> metric = Metric(tokens, jnp.asarray(tokens.last)[:, None], jnp.ones((3, 1)), Projection(jnp.ones(16)), 0, "a")
    >>> packing = pack(metric)
    >>> packing.ids.tolist(), packing.at.tolist()  # shared, then bins of two tokens; where each prompt is read
    ([[7, 8, 1, 2, 3, 4]], [[3], [4], [5]])
    """
    shared, width, n_bins = common_shape(metric) if shape is None else shape
    ids, at, (_, first, length) = np.asarray(metric.tokens.ids), np.asarray(metric.at), _span(metric)
    rest = length - shared
    where = first_fit(rest, width)  # bin and offset of each prompt's rest
    segments = np.full((n_bins, width), -1, np.int32)
    prompt, token = np.zeros((2, shared + segments.size), int)
    token[:shared] = np.arange(shared)
    start = shared + where[:, 0] * width + where[:, 1]  # of each prompt's own tokens
    for b, (bin_, offset) in enumerate(where):
        segments[bin_, offset : offset + rest[b]] = b
        slots = slice(start[b], start[b] + rest[b])
        prompt[slots], token[slots] = b, shared + np.arange(rest[b])
    # A position that does not count has weight 0 and may lie beyond what is packed; it is read at one that is there.
    read = start[:, None] + np.where(_counts(metric), at, first[:, None]) - shared
    packed = Packed(jnp.asarray(token[None], jnp.int32), jnp.asarray(segments))
    arrays = (ids[prompt, token][None], prompt, token, where[:, 0], read)
    return Packing(packed, *(jnp.asarray(a, jnp.int32) for a in arrays))
