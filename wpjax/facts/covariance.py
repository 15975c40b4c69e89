"""The second moment of the keys of an MLP: what its down-projection reads, over the tokens of a text of the user's.

    C = mean over tokens of k kᵀ        k [F]: activations of the layer's neurons

It is the metric of a rank-one edit (arXiv 2202.05262, section 3.1): the edit is to change what comes of the key of one
subject, and to leave alone what comes of keys as they usually are. The text is read once, a piece at a time, and C is
kept in a cache.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg import cho_factor, cho_solve, lapack

from wpjax.checkpoints.checkpoint import Checkpoint, fingerprint
from wpjax.errors import FactError
from wpjax.facts.facts import encode
from wpjax.models.block import LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, forward, take_layer
from wpjax.models.layouts import Causal
from wpjax.runtime.files import atomic_output, write_tensors
from wpjax.runtime.progress import Progress, silent

WIDTH = 256
"""Tokens of a piece of text that the model reads at once, unless its context is shorter."""

SMALLEST = 1e-7
"""Smallest reciprocal condition number, after neurons are scaled to size 1: sums are float32, exact to about this."""

ENOUGH = 10
"""Tokens for each neuron below which a moment is said to be over few."""

_ROWS = 8
_CHARACTERS = 2**16


class KeyMoment(NamedTuple):
    """The second moment of the keys of one layer.

    Attributes:
        moment: [F, F], mean of k kᵀ.
        n_tokens: number of tokens that it is the mean of.
        text: hash of the text file that they are from; empty if it is not from a file.
    """

    moment: Float[np.ndarray, "F F"]
    n_tokens: int
    text: str = ""

    @property
    def note(self) -> str:
        """What to know of a moment of few tokens, in a line; empty if there are enough.

        >>> KeyMoment(np.eye(4), 39).note[:49], KeyMoment(np.eye(4), 40).note
        ('the second moment of 4 neurons is over 39 tokens,', '')
        """
        width = len(self.moment)
        if self.n_tokens >= ENOUGH * width:
            return ""
        return (
            f"the second moment of {width:,} neurons is over {self.n_tokens:,} tokens, fewer than {ENOUGH} a neuron: "
            f"edits depend on the text; give a text of {ENOUGH * width:,} tokens or more, and as many --most-tokens"
        )


@functools.partial(jax.jit, static_argnames="cfg")
def read_keys(
    cfg: ModelConfig,
    params: Params,
    stream: Float[Array, "B T D"],
    first: Int[Array, ""],
    layer: Int[Array, ""],
    counted: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Float[Array, "F F"]]:
    """Go on from one layer to another, and sum k kᵀ there; one program serves all layers.

    Args:
        cfg: the model (static).
        params: its parameters.
        stream: the residual stream before the layer `first`.
        first: number of the layer to start at.
        layer: number of the layer whose keys are summed, not before `first`.
        counted: the tokens that count.

    Returns:
        the stream before `layer`, and the sum.
    """
    layout = Causal.of(stream.shape[1])

    def at(number: Array, x: Array) -> LayerPass:
        return block(cfg, take_layer(params["blocks"], number), number)(x, layout)

    stream = jax.lax.fori_loop(first, layer, lambda number, x: at(number, x).resid_post, stream)
    k = at(layer, stream).neuron * counted[..., None].astype(jnp.float32)
    return stream, jnp.einsum("btf,btg->fg", k, k, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="cfg")
def _embedded(cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The stream before the first layer."""
    return forward(cfg, params, tokens, stop=0, logits=False).resid


def key_moment(
    model: Checkpoint,
    layer: int,
    text: str | Path,
    *,
    most_tokens: int = 100_000,
    cache: Path | None = None,
    progress: Progress = silent,
) -> KeyMoment:
    """The second moment of the keys of a layer over a text.

    Args:
        model: the model.
        layer: number of the layer.
        text: a text file in UTF-8, of any length.
        most_tokens: tokens that are read, at most: the first ones.
        cache: folder in which moments are kept, under a hash of model, layer and text; None for none.
        progress: called with the number of tokens that were read.

    Raises:
        FactError: the text cannot be read, or holds no tokens.

    >>> import tempfile
    >>> import wpjax as wp
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("Owls hunt at night. Larks sing at dawn.")
    >>> moment, n_tokens, _ = key_moment(wp.load_model("tiny:base"), 1, path)
    >>> moment.shape[0] == moment.shape[1], bool(np.allclose(moment, moment.T)), n_tokens > 10
    (True, True, True)
    """
    return key_moments(model, [layer], text, most_tokens=most_tokens, cache=cache, progress=progress)[layer]


def key_moments(
    model: Checkpoint,
    layers: Sequence[int],
    text: str | Path,
    *,
    most_tokens: int = 100_000,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[int, KeyMoment]:
    """`key_moment` of several layers, by layer. The text is read once for all of them."""
    path = Path(text)
    of_text, like = _hash_of(path), fingerprint(model.cfg, model.params)
    files = {} if cache is None else {n: cache / _name(model, like, n, of_text, most_tokens) for n in layers}
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FactError(f"{cache}: no folder can be made there ({error.strerror}); name another --cache") from error
    found = {n: kept._replace(text=of_text) for n, file in files.items() if (kept := _kept(file, model.cfg.d_mlp))}
    sums = {n: np.zeros((model.cfg.d_mlp, model.cfg.d_mlp)) for n in sorted(set(layers) - set(found))}
    if not sums:
        return found
    n_tokens = 0
    for tokens, counted in _batches(model, path, most_tokens):
        progress("keys of the text", n_tokens, most_tokens)
        stream, at = _embedded(model.cfg, model.params, jnp.asarray(tokens)), 0
        for n in sums:
            given = stream, jnp.asarray(at), jnp.asarray(n), jnp.asarray(counted)
            (stream, added), at = read_keys(model.cfg, model.params, *given), n
            sums[n] += np.asarray(added, np.float64)
        n_tokens += int(counted.sum())
    if n_tokens == 0:
        raise FactError(f"{path}: holds no text; name a text like those that the model reads")
    progress("keys of the text", n_tokens, n_tokens)
    for n, total in sums.items():
        found[n] = KeyMoment(total / n_tokens, n_tokens, of_text)
        if cache is not None:
            with atomic_output(files[n], overwrite=True) as temporary:
                write_tensors(temporary, {"moment": found[n].moment}, {"n_tokens": str(n_tokens)})
    return found


def _batches(
    model: Checkpoint, path: Path, most_tokens: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """The first tokens of a text as batches of one shape, and which of these count."""
    width, n_tokens = min(WIDTH, model.cfg.n_ctx), 0
    begin = encode(model.tokenizer, "")  # what the tokenizer sets before every text; it is read, and does not count
    pieces = _pieces(model.tokenizer, path, width - len(begin))
    while n_tokens < most_tokens:
        rows = [piece for _, piece in zip(range(_ROWS), pieces, strict=False)]
        if not rows:
            return
        tokens, counted = np.zeros((_ROWS, width), np.int32), np.zeros((_ROWS, width), bool)
        for i, piece in enumerate(rows):
            piece = piece[: most_tokens - n_tokens]
            end, n_tokens = len(begin) + len(piece), n_tokens + len(piece)
            tokens[i, : len(begin)], tokens[i, len(begin) : end] = begin, piece
            counted[i, len(begin) : end] = True
        yield tokens, counted


def check_text(width: int, text: str | Path, most_tokens: int, ridge: float | None) -> None:
    """Refuse a text that is none, or that cannot have as many tokens as a layer has neurons, before the model reads it.

    Args:
        width: number of neurons.
        text: the text file.
        most_tokens: tokens that are read, at most.
        ridge: that of the edit: with one, any text will do.

    Raises:
        FactError: there is no such file, it is not in UTF-8, or it is too short.
    """
    path, decoder = Path(text), codecs.getincrementaldecoder("utf-8")()
    try:
        for part in _parts(path):
            decoder.decode(part)
        decoder.decode(b"", final=True)
    except ValueError as error:
        raise FactError(f"{path}: not text in UTF-8 ({error}); convert it") from error
    most = min(most_tokens, path.stat().st_size)  # a token has a byte or more
    if ridge is None and most < width:
        few = f"at most {most:,} tokens, and {width:,} neurons"
        raise FactError(f"{path}: {few}: their second moment would be singular; give a longer text, or a ridge of 0.01")


def _parts(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a part at a time."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise FactError(f"{path}: no such file; name a text file")
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                yield part
    except OSError as error:
        raise FactError(f"{path}: cannot be read ({error.strerror or error}); name a text file") from error


def _hash_of(path: Path) -> str:
    """A hash of a file (32 hex digits)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(path):
        digest.update(part)
    return digest.hexdigest()


def default_cache() -> Path:
    """The folder of the user's cache in which moments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wpjax" / "keys"


def _name(model: Checkpoint, like: str, layer: int, text: str, most_tokens: int) -> str:
    """The file of a moment: a hash of all that it depends on."""
    tokens = encode(model.tokenizer, "A text, in 12 tokens or so.").tolist()
    settings = f"2 {like} {layer} {most_tokens} {WIDTH} {text} {tokens}"
    return hashlib.blake2b(settings.encode(), digest_size=12).hexdigest() + ".safetensors"


def _kept(file: Path, width: int) -> KeyMoment | None:
    """A moment in the cache; None if there is none, or what is there is damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as content:
            moment, n_tokens = content.get_tensor("moment"), int((content.metadata() or {})["n_tokens"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    good = moment.shape == (width, width) and moment.dtype == np.float64 and np.isfinite(moment).all()
    return KeyMoment(moment, n_tokens) if good and n_tokens > 0 else None


def _pieces(tokenizer: Any, path: Path, width: int) -> Iterator[Int[np.ndarray, " T"]]:
    """The tokens of a text in pieces of a width; a bounded part of it is in memory."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise FactError(f"{path}: no such file; name a text file")
    left: list[int] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            rest = ""
            while part := file.read(_CHARACTERS):
                # A part is cut after a line, so that words are not.
                cut = (rest + part).rfind("\n") + 1 or len(rest + part)
                whole, rest = (rest + part)[:cut], (rest + part)[cut:]
                left += tokenizer(whole, add_special_tokens=False)["input_ids"]
                while len(left) >= width:
                    yield np.asarray(left[:width], np.int32)
                    left = left[width:]
            left += tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
    except OSError as error:
        raise FactError(f"{path}: cannot be read ({error.strerror or error}); name a text file") from error
    except ValueError as error:
        raise FactError(f"{path}: not text in UTF-8 ({error}); convert it") from error
    for first in range(0, len(left), width):
        yield np.asarray(left[first : first + width], np.int32)


def edit_direction(
    moment: KeyMoment, key: Float[np.ndarray, " F"], ridge: float | None = None
) -> Float[np.ndarray, " F"]:
    """u = C⁻¹ k / |C⁻¹ k|: the direction in the keys' space that a rank-one edit writes along.

    Args:
        moment: C.
        key: k.
        ridge: added to C's diagonal, as a share of its mean; None for none.

    Raises:
        FactError: C is singular, or so nearly that rounding decides, and no ridge was asked for.

    >>> u = edit_direction(KeyMoment(np.diag([1.0, 4.0]), 100), np.array([3.0, 4.0]))
    >>> (u * np.sqrt(10)).round(6).tolist()
    [3.0, 1.0]
    """
    c, width = moment.moment, len(key)
    if ridge is not None:
        c = c + ridge * np.diag(c).mean() * np.eye(width)
    elif moment.n_tokens < width:
        raise FactError(_singular(moment, width, f"{moment.n_tokens:,} tokens cannot fill {width:,} neurons"))
    size = np.sqrt(np.diag(c))
    if not (size > 0).all():
        raise FactError(_singular(moment, width, f"{int((size <= 0).sum())} neurons are always 0"))
    # Neurons differ in size by orders; scaled to size 1, what is left is how alike they are.
    scaled = c / np.outer(size, size)
    try:
        factor = cho_factor(scaled, lower=True)
    except np.linalg.LinAlgError as error:
        raise FactError(_singular(moment, width, "it has no inverse")) from error
    rcond, _ = lapack.dpocon(factor[0], np.abs(scaled).sum(0).max(), uplo="L")
    if rcond < SMALLEST:
        raise FactError(_singular(moment, width, f"its reciprocal condition number is {rcond:.1g}"))
    u = cho_solve(factor, np.asarray(key, np.float64) / size) / size
    return u / np.linalg.norm(u)


def _singular(moment: KeyMoment, width: int, why: str) -> str:
    """The message about a moment without an inverse."""
    return (
        f"the second moment of {moment.n_tokens:,} keys of {width:,} neurons is singular: {why}; give a longer and "
        f"more varied text, {ENOUGH * width:,} tokens or more, or a ridge such as 0.01"
    )
