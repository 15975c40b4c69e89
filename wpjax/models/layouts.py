"""Layouts: how the tokens of a forward pass stand, and which of them attend to which.

    Causal     prompts side by side, padded on the right
    Packed     prompts as one sequence, shared tokens once
    Cached     one new token a prompt, and the keys and values of those before it

A layer asks a layout for the positions of its tokens, for the tokens whose output is wanted, and for attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from wpjax.models.secant import Value

if TYPE_CHECKING:
    from wpjax.models.layers import Attention


@runtime_checkable
class Layout(Protocol):
    """How tokens stand; S tokens are in the stream, and the output of T of them is wanted."""

    @property
    def positions(self) -> Int[Array, "#B S"]:
        """Of the tokens in their prompts."""
        ...

    @property
    def query_positions(self) -> Int[Array, "#B T"]:
        """Of the tokens whose output is wanted."""
        ...

    def pick(self, x: Value) -> Value:
        """What belongs to the tokens whose output is wanted: [B, S, ...] to [B, T, ...]."""
        ...

    def extend(self, keys: Value, values: Value) -> tuple[Value, Value]:
        """Keys and values that queries may see: [B, S, K, Dh] each, and those from before."""
        ...

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value) -> Value:
        """Each head's mix of values, [B, T, H, Dh], from queries and what `extend` gives."""
        ...


class AllTokens:
    """Of layouts in which the output of every token is wanted, and nothing came before."""

    @property
    def query_positions(self) -> Int[Array, "#B T"]:
        """All of them."""
        return self.positions  # type: ignore[attr-defined, no-any-return]

    def pick(self, x: Value) -> Value:
        """All of it."""
        return x

    def extend(self, keys: Value, values: Value) -> tuple[Value, Value]:
        """Nothing is added."""
        return keys, values


class _Causal(NamedTuple):
    positions: Int[Array, "#B T"]


class Causal(_Causal, AllTokens):
    """Prompts side by side, padded on the right, where causal attention never looks.

    Attributes:
        positions: [#B, T].
    """

    @classmethod
    def of(cls, n_tokens: int) -> Causal:
        """Prompts of one length, from position 0 on."""
        return cls(jnp.arange(n_tokens)[None])

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value) -> Value:
        """Each token sees itself and those before it."""
        return attn.mix(queries, keys, values)


class Cached(NamedTuple):
    """One new token a prompt, and the keys and values of the tokens before it.

    Attributes:
        at: [B], position of the new token.
        k_cache: [B, C, K, Dh], keys by position; those from `at` on are not there yet.
        v_cache: [B, C, K, Dh], values likewise.
    """

    at: Int[Array, " B"]
    k_cache: Float[Array, "B C K Dh"]
    v_cache: Float[Array, "B C K Dh"]

    @property
    def positions(self) -> Int[Array, "B 1"]:
        """Of the new tokens."""
        return self.at[:, None]

    @property
    def query_positions(self) -> Int[Array, "B 1"]:
        """Of the new tokens."""
        return self.positions

    def pick(self, x: Value) -> Value:
        """All of it."""
        return x

    def extend(self, keys: Value, values: Value) -> tuple[Value, Value]:
        """The caches with the new tokens' keys and values, each at its own position."""
        rows = jnp.arange(len(self.at))
        return self.k_cache.at[rows, self.at].set(keys[:, 0]), self.v_cache.at[rows, self.at].set(values[:, 0])

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value) -> Value:
        """The new token sees itself and those before it."""
        seen = (jnp.arange(keys.shape[1]) <= self.at[:, None])[:, None]
        return attn.mix(queries, keys, values, seen)


class _Packed(NamedTuple):
    positions: Int[Array, "1 S"]
    segments: Int[Array, "G W"]


class Packed(_Packed, AllTokens):
    """Prompts laid out as one sequence: the tokens that they share, once, then the rest of each, in bins of one width.

    Attributes:
        positions: [1, S], the position that each token has in its prompt; the first c = S - G W are shared.
        segments: [G, W], the prompt that each of the others belongs to, -1 to fill up. A bin may hold several.
    """

    @classmethod
    def side_by_side(cls, n_prompts: int, n_tokens: int, n_shared: int) -> Packed:
        """Prompts padded to one length, of which all begin with the same tokens, each in a bin of its own."""
        own = jnp.broadcast_to(jnp.arange(n_prompts)[:, None], (n_prompts, n_tokens - n_shared))
        rest = jnp.tile(jnp.arange(n_shared, n_tokens), n_prompts)
        return cls(jnp.concatenate([jnp.arange(n_shared), rest])[None], own)

    def lay(self, x: Shaped[Array, "G T *n"]) -> Shaped[Array, "1 S *n"]:
        """What belongs to prompts that stand side by side, packed; `keys` takes it apart again."""
        own = x[:, self.n_shared :]
        return jnp.concatenate([x[0, : self.n_shared], own.reshape(-1, *x.shape[2:])])[None]

    @property
    def n_shared(self) -> int:
        """How many tokens all prompts share."""
        return self.positions.shape[1] - self.segments.size

    @property
    def visible(self) -> Bool[Array, "G W C"]:
        """Which of a bin's keys (the shared tokens, then its own) each of its tokens attends to."""
        n_bins, width = self.segments.shape
        own = (self.segments[:, :, None] == self.segments[:, None, :]) & jnp.tri(width, dtype=bool)
        return jnp.concatenate([jnp.ones((n_bins, width, self.n_shared), bool), own], axis=-1)

    def bins(self, x: Float[Array, "N S *n"]) -> Float[Array, "N G W *n"]:
        """What belongs to the tokens that are not shared."""
        return x[:, self.n_shared :].reshape(len(x), *self.segments.shape, *x.shape[2:])

    def keys(self, x: Float[Array, "N S *n"]) -> Float[Array, "N G C *n"]:
        """Of each bin: what belongs to the shared tokens, as keys and values do, then to its own."""
        own = self.bins(x)
        shared = jnp.broadcast_to(x[:, None, : self.n_shared], (*own.shape[:2], self.n_shared, *own.shape[3:]))
        return jnp.concatenate([shared, own], axis=2)

    def attend(self, attn: Attention, queries: Value, keys: Value, values: Value) -> Value:
        """Each token sees the shared ones, itself and those before it in its own prompt."""
        c, n = self.n_shared, len(queries)
        own, ks, vs = (x.reshape(-1, *x.shape[2:]) for x in (self.bins(queries), self.keys(keys), self.keys(values)))
        z = attn.mix(own, ks, vs, jnp.tile(self.visible, (n, 1, 1)))
        z = z.reshape(n, -1, *z.shape[2:])
        return jnp.concatenate([attn.mix(queries[:, :c], keys[:, :c], values[:, :c]), z], axis=1) if c else z
