"""Layouts: how the tokens of prompts are laid out in an array, and which of them attend to which.

    Causal     prompts side by side, one a row, padded on the right
    Packed     all prompts in one row, the tokens that they share once
    Cached     new tokens of each prompt, with the keys and values of those before them

A layer asks its layout three things: the positions of its tokens, which of them need an output, and attention. It says
how far back its tokens see (`Window`). Letters: B rows; S tokens in a row of the stream; T tokens of a row that need an
output; C keys that a token may see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from wpjax.models.ops import heads_first
from wpjax.models.secant import Value

if TYPE_CHECKING:
    from wpjax.models.layers import Attention


class Window(NamedTuple):
    """The sliding window of a layer: how far back its tokens see.

    Attributes:
        size: number of tokens that a token sees, itself included (static). Tokens are counted in their prompt.
        slides: whether this layer has the window; if not, its tokens see all those before them. It may be traced.
    """

    size: int
    slides: Bool[Array, ""]


def within(
    window: Window | None, queries: Int[Array, "#B T"], keys: Int[Array, "#B C"]
) -> Bool[Array, "#B T C"] | None:
    """Which keys a layer's window reaches. None: it reaches all of them, so there is nothing to leave out.

    Args:
        window: the layer's window; None if it has none.
        queries: positions of the tokens that look back.
        keys: positions of all the tokens that may be seen: those of one prompt from 0 on, and perhaps others.

    The last of four tokens sees the last two:

    >>> at = jnp.arange(4)[None]
    >>> within(Window(2, jnp.array(True)), at, at)[0, -1].tolist()
    [False, False, True, True]
    """
    if window is None or keys.shape[-1] <= window.size:  # a prompt of that many tokens fits into the window
        return None
    return (queries[:, :, None] - keys[:, None, :] < window.size) | ~window.slides


@runtime_checkable
class Layout(Protocol):
    """What a layer asks of a layout. S tokens are in a row of the stream, and T of them need an output."""

    @property
    def positions(self) -> Int[Array, "#B S"]:
        """Positions of the tokens in their prompts."""
        ...

    @property
    def query_positions(self) -> Int[Array, "#B T"]:
        """Positions of the tokens that need an output."""
        ...

    def pick(self, x: Value) -> Value:
        """The values at the tokens that need an output: from [B, S, ...] to [B, T, ...]."""
        ...

    def extend(self, keys: Value, values: Value) -> tuple[Value, Value]:
        """The keys and values that queries may see, of those of this pass.

        Args:
            keys: [B, S, K, Dh], of this pass.
            values: [B, S, K, Dh], of this pass.
        """
        ...

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value, window: Window | None) -> Value:
        """Each head's mix of values, [B, T, H, Dh].

        Args:
            attn: attention of the layer.
            queries: [B, T, H, Dh].
            keys: from `extend`.
            values: from `extend`.
            window: how far back tokens see; None for no bound.
        """
        ...


class AllTokens:
    """A part of layouts in which every token needs an output."""

    @property
    def query_positions(self) -> Int[Array, "#B T"]:
        """Positions of all tokens."""
        return self.positions  # type: ignore[attr-defined, no-any-return]

    def pick(self, x: Value) -> Value:
        """All of x."""
        return x

    def extend(self, keys: Value, values: Value) -> tuple[Value, Value]:
        """The keys and values as they are."""
        return keys, values


class _Causal(NamedTuple):
    positions: Int[Array, "#B T"]


class Causal(_Causal, AllTokens):
    """Prompts side by side, one a row. Padding on the right is never seen: attention is causal.

    Attributes:
        positions: [#B, T], positions of the tokens.

    >>> Causal.of(4).positions.tolist()
    [[0, 1, 2, 3]]
    """

    @classmethod
    def of(cls, n_tokens: int) -> Causal:
        """Rows of so many tokens, with positions from 0 on."""
        return cls(jnp.arange(n_tokens)[None])

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value, window: Window | None) -> Value:
        """Each token sees itself and those before it."""
        near = within(window, self.positions, self.positions)
        seen = None if near is None else near & jnp.tri(near.shape[-1], dtype=bool)
        return attn.mix(queries, keys, values, seen)


class _Cached(NamedTuple):
    positions: Int[Array, "B T"]
    n_prompt: Int[Array, " B"]
    prompt: tuple[Float[Array, "B K P Dh"], Float[Array, "B K P Dh"]]
    n_new: Int[Array, ""] | int
    new: tuple[Float[Array, "B K N Dh"], Float[Array, "B K N Dh"]]


class Cached(_Cached, AllTokens):
    """New tokens of each prompt, with the keys and values of the tokens before them.

    Those of the prompts stand apart from those of new tokens: they are never written to or copied, and many versions of
    a model that go on from one reading of the prompts share them.

    Attributes:
        positions: [B, T], positions of the new tokens that are run now.
        n_prompt: [B], number of tokens of each prompt that stand before all new ones.
        prompt: keys and values of the prompts by position, each [B, K, P, Dh].
        n_new: number of new tokens that were run before.
        new: their keys and values in their order, each [B, K, N, Dh]. Those from `n_new` on are of no meaning.
    """

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value, window: Window | None) -> Value:
        """Each new token sees itself and those before it."""
        n_places, n_rooms, n_own = self.prompt[0].shape[2], self.new[0].shape[2], queries.shape[1]
        shape, starts = (len(queries), n_own), self.n_prompt[:, None]
        prompt, new = jnp.arange(n_places)[None], jnp.arange(n_rooms)[None]
        seen = [prompt < starts, jnp.broadcast_to(new < self.n_new, (len(starts), n_rooms))]
        is_there = jnp.broadcast_to(jnp.concatenate(seen, axis=1)[:, None], (*shape, n_places + n_rooms))
        before = jnp.broadcast_to(jnp.tri(n_own, dtype=bool), (*shape, n_own))
        is_seen = jnp.concatenate([is_there, before], axis=2)
        at = [jnp.broadcast_to(prompt, (len(starts), n_places)), starts + new, self.positions]
        near = within(window, self.positions, jnp.concatenate(at, axis=1))
        parts = [self.prompt, *([self.new] if n_rooms else []), (heads_first(keys), heads_first(values))]
        return attn.mix_in_parts(queries, parts, is_seen if near is None else is_seen & near)


class _Packed(NamedTuple):
    positions: Int[Array, "1 S"]
    segments: Int[Array, "G W"]


class Packed(_Packed, AllTokens):
    """Prompts in one row: first the tokens that all of them share, then the rest of each prompt, in G bins of width W.

    Attributes:
        positions: [1, S], the position of each token in its prompt. The first S - G W tokens are the shared ones.
        segments: [G, W], the prompt of each token in the bins, -1 for empty slots. A bin may hold several prompts.

    Two prompts of four tokens that share the first two:

    >>> packed = Packed.side_by_side(n_prompts=2, n_tokens=4, n_shared=2)
    >>> packed.positions.tolist(), packed.segments.tolist()
    ([[0, 1, 2, 3, 2, 3]], [[0, 0], [1, 1]])
    """

    @classmethod
    def side_by_side(cls, n_prompts: int, n_tokens: int, n_shared: int) -> Packed:
        """The layout of prompts of one (padded) length, each in a bin of its own.

        Args:
            n_prompts: number of prompts.
            n_tokens: tokens of each.
            n_shared: tokens that all prompts begin with.
        """
        own = jnp.broadcast_to(jnp.arange(n_prompts)[:, None], (n_prompts, n_tokens - n_shared))
        rest = jnp.tile(jnp.arange(n_shared, n_tokens), n_prompts)
        return cls(jnp.concatenate([jnp.arange(n_shared), rest])[None], own)

    def lay(self, x: Shaped[Array, "G T *n"]) -> Shaped[Array, "1 S *n"]:
        """Pack values that stand prompt by prompt, as `side_by_side` lays them out; `keys` undoes it."""
        own = x[:, self.n_shared :]
        return jnp.concatenate([x[0, : self.n_shared], own.reshape(-1, *x.shape[2:])])[None]

    @property
    def n_shared(self) -> int:
        """Number of tokens that all prompts share."""
        return self.positions.shape[1] - self.segments.size

    def visible(self, window: Window | None = None) -> Bool[Array, "G W C"]:
        """True where a token of a bin sees a key of it. The keys are the shared tokens, then the bin's own W.

        A token sees the shared tokens, and those before it in its own prompt; of these, what its window reaches.
        """
        n_bins, width = self.segments.shape
        own = (self.segments[:, :, None] == self.segments[:, None, :]) & jnp.tri(width, dtype=bool)
        seen = jnp.concatenate([jnp.ones((n_bins, width, self.n_shared), bool), own], axis=-1)
        near = within(window, self.bins(self.positions)[0], self.keys(self.positions)[0])
        return seen if near is None else seen & near

    def bins(self, x: Shaped[Array, "N S *n"]) -> Shaped[Array, "N G W *n"]:
        """The values at the tokens in the bins."""
        return x[:, self.n_shared :].reshape(len(x), *self.segments.shape, *x.shape[2:])

    def keys(self, x: Shaped[Array, "N S *n"]) -> Shaped[Array, "N G C *n"]:
        """The values of each bin: those of the shared tokens (a copy for every bin), then those of its own."""
        own = self.bins(x)
        shared = jnp.broadcast_to(x[:, None, : self.n_shared], (*own.shape[:2], self.n_shared, *own.shape[3:]))
        return jnp.concatenate([shared, own], axis=2)

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value, window: Window | None) -> Value:
        """Each token sees the shared ones, itself and those before it in its own prompt."""
        c, n = self.n_shared, len(queries)
        # Bins do not see each other, so they run as rows of a batch: [N, G, ...] becomes [N G, ...].
        own, ks, vs = (x.reshape(-1, *x.shape[2:]) for x in (self.bins(queries), self.keys(keys), self.keys(values)))
        z = attn.mix(own, ks, vs, jnp.tile(self.visible(window), (n, 1, 1)))
        z = z.reshape(n, -1, *z.shape[2:])  # [N, G W, H, Dh]
        if not c:
            return z
        shared = Causal(self.positions[:, :c])
        return jnp.concatenate([shared.attend(attn, queries[:, :c], keys[:, :c], values[:, :c], window), z], axis=1)
