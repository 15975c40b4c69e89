"""Directions: the change of each matrix written as a sum of pieces of rank one, so that these can be patched.

    W_E - W_B = sum_i s_i u_i v_i + rest,    s_1 >= s_2 >= ...,  u_i and v_i unit vectors        (singular values; ours)

W is one matrix of one layer: of queries, keys, values, of what heads write, or one of an MLP's. A piece is a component
of the kind `delta_direction`; L3.delta_direction.q.0 is the largest of W_Q in layer 3. A patch of it is W_B + s u v.

The pieces b_i a_i of a LoRA's own factors (B A, arXiv 2106.09685) are not used: with any invertible r x r matrix M,
(B M) (M^-1 A) is the same change by other pieces. Singular directions are the same whichever factors a change has, but
for signs and equal s. Those of a LoRA are computed from its factors, P Q with P [in, r] and Q [r, out]:

    P = Q_1 R_1,   Q^T = Q_2 R_2,   R_1 R_2^T = X S Y^T  (r x r)      u = Q_1 X,   v = Q_2 Y

So no large matrix is decomposed, and nothing is lost. Of a full fine-tune the largest pieces are taken, and what they
leave over stays in the expert: |W_E - W_B|^2 = sum_i s_i^2 + |rest|^2. The share of the s_i^2 is the *energy kept*.

**How it is built.** A divided pair is a pair of another architecture: beside each matrix stands a `layers.Delta` with
leaves U [in, r], S [r], V [r, out]. Both models hold the same U and V; S is 0 in the base, and s in the expert. So a
direction is a channel of the small leaf S. Masks, `vmap`, gradients, the secant adjoint, joint patches and suffix
replay need no rule of their own for it, and a patch is one dot product and one outer product more.

- The divided base is the base, and the divided expert is the expert, up to rounding; so the gap is the pair's own.
  In bfloat16 rounding would be as large as the changes themselves: only float32 weights are divided.
- A head or a neuron of a divided pair owns only the rest of its change, so such kinds are not swept beside directions.
- Of a LoRA nothing is left over. Its expert then holds the base's own matrices, not the merged ones: a sweep holds the
  base and the factors.
- Routed experts are not divided: their matrices stand in one array, and each of them would have directions of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

from wpjax.checkpoints.adapter import Adapter
from wpjax.checkpoints.checkpoint import local_path
from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.checkpoints.folder import ADAPTER
from wpjax.checkpoints.placing import host_rows
from wpjax.components import enumerate_components, n_parameters
from wpjax.errors import CheckpointError, PairError
from wpjax.models.decoder import Params
from wpjax.models.parameters import MATRICES, delta_path, n_inputs
from wpjax.models.sharding import place
from wpjax.pairs import Division, Pair

DEFAULT_RANK = 16
"""Directions of each matrix of a full fine-tune, unless another number is asked for. A LoRA's are all taken."""

FEW = 0.2
"""If fewer than this share of a matrix's singular values are wanted, Lanczos finds them sooner than a whole SVD."""

NOTHING = 1e-10
"""A share of the energy that is rounding."""

Factors = tuple[np.ndarray, np.ndarray]
"""A change of low rank as a product: [in, r] and [r, out]."""


class Spectrum(NamedTuple):
    """The largest singular values of a matrix, with their vectors.

    Attributes:
        u: [in, r], columns of length 1.
        s: [r], the largest first.
        v: [r, out], rows of length 1.
        energy: the sum of all squared singular values, those that are left out too.
    """

    u: Float[np.ndarray, "I r"]
    s: Float[np.ndarray, " r"]
    v: Float[np.ndarray, "r O"]
    energy: float

    def first(self, n: int, floor: float = 0.0) -> Spectrum:
        """The n largest, at most; those that are 0 up to rounding, or no larger than a floor, are left out."""
        n = min(n, int(((self.s > floor) & (self.s**2 > NOTHING**2 * self.energy)).sum()))
        return Spectrum(self.u[:, :n], self.s[:n], self.v[:n], self.energy)

    @property
    def product(self) -> Float[np.ndarray, "I O"]:
        """The matrix that these singular values make."""
        return (self.u * self.s) @ self.v


def spectrum_of_product(p: Float[np.ndarray, "I r"], q: Float[np.ndarray, "r O"]) -> Spectrum:
    """All singular values of a product of two small factors; the product itself is not formed.

    Args:
        p: the left factor.
        q: the right factor.

    >>> spectrum = spectrum_of_product(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0]]))  # |p| |q| = 5 x 2
    >>> spectrum.s.round(6).tolist(), round(spectrum.energy, 6)
    ([10.0], 100.0)
    """
    (q1, r1), (q2, r2) = np.linalg.qr(p), np.linalg.qr(q.T)
    x, s, y = np.linalg.svd(r1 @ r2.T)
    n = len(s)
    return _signed(q1 @ x[:, :n], s, y[:n] @ q2.T, float((s**2).sum()))


def spectrum_of(change: Float[np.ndarray, "I O"], rank: int) -> Spectrum:
    """The largest singular values of a matrix.

    Args:
        change: the matrix, in float64.
        rank: how many are wanted.

    >>> spectrum_of(np.diag([1.0, 3.0, 2.0]), 2).s.round(6).tolist()
    [3.0, 2.0]
    """
    energy = float(np.square(change).sum())
    if rank < FEW * min(change.shape) and energy:
        start = np.random.default_rng(0).standard_normal(min(change.shape))  # so that it is the same every time
        u, s, v = scipy.sparse.linalg.svds(change, k=rank, v0=start)
        order = np.argsort(-s)
        return _signed(u[:, order], s[order], v[order], energy)
    u, s, v = scipy.linalg.svd(change, full_matrices=False)
    return _signed(u[:, :rank], s[:rank], v[:rank], energy)


def _signed(u: np.ndarray, s: np.ndarray, v: np.ndarray, energy: float) -> Spectrum:
    """A spectrum of which the sign of each pair of vectors is settled: the largest entry of u is positive."""
    largest = np.take_along_axis(u, np.abs(u).argmax(0)[None], 0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return Spectrum(u * signs, s, v * signs[:, None], energy)


def by_directions(pair: Pair, rank: int | None = None) -> Pair:
    """The same pair with the changes of its matrices divided into directions, components of the kind `delta_direction`.

    Args:
        pair: base and expert.
        rank: directions of each matrix, those of the largest singular values. None: of an adapter's LoRA all of them,
            of any other change `DEFAULT_RANK`.

    Returns:
        the divided pair. `Pair.division` says how much of the change the directions hold.

    Raises:
        PairError: the weights are not float32, no matrix of attention or of an MLP has changed, a rank is asked for
            that the matrices or the adapter do not have, or the pair is divided already.

    >>> import wpjax as wp
    >>> pair = wp.by_directions(wp.load_pair("tiny:base", "tiny:expert"), rank=2)
    >>> [c.name for c in wp.enumerate_components(pair.cfg, ["delta_direction"])][:3]
    ['L0.delta_direction.q.0', 'L0.delta_direction.k.0', 'L0.delta_direction.v.0']
    >>> mask = wp.PatchMask.of(pair.cfg, ["L3.delta_direction.q.0", "L5.delta_direction.down.1"])
    >>> patched = wp.patch(pair.base, pair.expert, mask)
    """
    if pair.division is not None:
        raise PairError("the pair is divided into directions already; divide the pair that was loaded")
    if rank is not None and rank < 1:
        raise PairError(f"rank={rank}: ask for at least one direction of each matrix")
    ours, theirs, factors = flatten(pair.base), flatten(pair.expert), _factors(pair)
    dtypes = {leaf.dtype.name for path, leaf in ours.items() if path in MATRICES.values()}
    if dtypes != {"float32"}:
        raise PairError(
            f"the weights are {', '.join(sorted(dtypes))}, whose rounding is as large as a fine-tune's changes: load "
            "the pair in float32 (--dtype float32) to divide it into directions"
        )
    modules = [m for m, path in MATRICES.items() if path in ours and not (pair.cfg.n_experts and "/mlp/" in path)]
    _check_rank(pair, modules, factors, rank)
    base, expert = dict(ours), dict(theirs)
    numbers: dict[str, tuple[int, ...]] = {}
    energies: dict[str, tuple[float, float]] = {}  # module -> energy that is kept, and that of the whole change
    for module in modules:
        path = MATRICES[module]
        if ours[path] is theirs[path]:
            continue
        divided = list(_divided(ours[path], theirs[path], factors.get(path, {}), n_inputs(module), rank))
        kept = [one.spectrum for one in divided]
        if all(one.rest is None for one in divided):
            expert[path] = ours[path]
        else:
            bases = (host_rows(ours[path], i, i + 1)[0] for i in range(len(divided)))
            rests = [own if one.rest is None else one.rest for one, own in zip(divided, bases, strict=True)]
            expert[path] = jnp.asarray(np.stack(rests))
        if not any(len(spectrum.s) for spectrum in kept):
            continue
        numbers[module] = tuple(len(spectrum.s) for spectrum in kept)
        energies[module] = sum(float((k.s**2).sum()) for k in kept), sum(k.energy for k in kept)
        leaves = _leaves(kept, ours[path].shape[1:], n_inputs(module))
        for part, leaf in leaves.items():
            base[delta_path(module, part)] = jnp.zeros_like(leaf) if part == "S" else leaf
            expert[delta_path(module, part)] = leaf
    if not numbers:
        raise PairError(
            f"{pair.expert_checkpoint.source} has the matrices of {pair.base_checkpoint.source} in attention and MLPs "
            "(those of routed experts are not divided), so there is no change to divide into directions; `wpjax "
            "inspect` says what it changed"
        )
    cfg = dataclasses.replace(pair.cfg, directions=tuple(numbers.items()))
    new_base, new_expert = place(pair.placement, unflatten(base), unflatten(expert))
    directions = enumerate_components(cfg, ["delta_direction"])
    division = Division(
        rank,
        pair.fingerprints,
        len(directions),
        sum(n_parameters(cfg, c) for c in directions),
        {module: kept / whole for module, (kept, whole) in energies.items()},
        sum(kept for kept, _ in energies.values()) / sum(whole for _, whole in energies.values()),
    )
    return dataclasses.replace(
        pair,
        cfg=cfg,
        base=new_base,
        expert=new_expert,
        base_checkpoint=dataclasses.replace(pair.base_checkpoint, cfg=cfg, params=new_base),
        expert_checkpoint=dataclasses.replace(pair.expert_checkpoint, cfg=cfg, params=new_expert),
        notes=(*pair.notes, str(division)),
        division=division,
    )


class _Layer(NamedTuple):
    """One layer of a matrix, divided.

    Attributes:
        spectrum: the directions of its change.
        rest: the expert's matrix without them, in the shape and dtype of the leaf; None if that is the base's.
    """

    spectrum: Spectrum
    rest: np.ndarray | None


def _divided(ours: Any, theirs: Any, factors: Mapping[int, Factors], n_in: int, rank: int | None) -> Iterator[_Layer]:
    """Each layer of a matrix, divided.

    Args:
        ours: the base's leaf, [L, *in, *out].
        theirs: the expert's.
        factors: layer -> the factors of its change, if it is known to have these.
        n_in: number of axes of the input.
        rank: as of `by_directions`.
    """
    for layer in range(len(ours)):
        new = host_rows(theirs, layer, layer + 1)[0]
        was = host_rows(ours, layer, layer + 1)[0].astype(np.float64)
        change = (new.astype(np.float64) - was).reshape(math.prod(was.shape[:n_in]), -1)
        whole: Spectrum | None = None
        if layer in factors and _made_of(change, factors[layer], new):
            whole = spectrum_of_product(*factors[layer])
            spectrum = whole.first(len(whole.s) if rank is None else rank)
        else:
            wanted = min(rank or DEFAULT_RANK, *change.shape)
            # Rounding of the expert's weights is a change too: of entries of this size, and with these singular values.
            size = float(jnp.finfo(jnp.float32).eps) * float(np.sqrt(np.square(new.astype(np.float64)).mean()))
            floor = size * sum(np.sqrt(change.shape))
            spectrum = spectrum_of(change, wanted).first(wanted, floor)
        if spectrum.energy - float((spectrum.s**2).sum()) <= NOTHING * spectrum.energy:
            yield _Layer(spectrum, None)
        else:
            rest = was + (change - spectrum.product).reshape(was.shape)
            yield _Layer(spectrum, rest.astype(new.dtype))


def _made_of(change: Float[np.ndarray, "I O"], factors: Factors, new: np.ndarray) -> bool:
    """Whether a change is the product of two factors, up to the rounding of the expert's weights."""
    p, q = factors
    step = float(jnp.finfo(new.dtype).eps)
    return bool(np.abs(change - p @ q).max() <= 4 * step * float(np.abs(new.astype(np.float64)).max()))


def _leaves(kept: list[Spectrum], shape: tuple[int, ...], n_in: int) -> dict[str, Any]:
    """The leaves U, S and V of all layers; those of layers with fewer directions are filled up with zeros.

    Args:
        kept: the directions of each layer.
        shape: shape of the matrix, [*in, *out].
        n_in: number of axes of the input.
    """
    n = max(len(spectrum.s) for spectrum in kept)
    n_layers, ins, outs = len(kept), shape[:n_in], shape[n_in:]
    u, s, v = (np.zeros(size, np.float32) for size in ((n_layers, *ins, n), (n_layers, n), (n_layers, n, *outs)))
    for layer, spectrum in enumerate(kept):
        r = len(spectrum.s)
        u[layer, ..., :r] = spectrum.u.reshape(*ins, r)
        s[layer, :r] = spectrum.s
        v[layer, :r] = spectrum.v.reshape(r, *outs)
    return {"U": jnp.asarray(u), "S": jnp.asarray(s), "V": jnp.asarray(v)}


def _factors(pair: Pair) -> dict[str, dict[int, Factors]]:
    """Path -> layer -> factors of its change, if the expert is an adapter of the base; empty if not."""
    source = pair.expert_checkpoint.source
    try:
        folder = local_path(source)
        if not (folder / ADAPTER).is_file():
            return {}
    except CheckpointError:  # no place: models that were made in memory, or "MODEL+ADAPTER"
        return {}
    return Adapter(folder, source).factors(pair.cfg, pair.base_checkpoint.source)


def _check_rank(pair: Pair, modules: list[str], factors: Mapping[str, Mapping[int, Factors]], rank: int | None) -> None:
    """Refuse more directions than there can be.

    Raises:
        PairError: names the module.
    """
    if rank is None:
        return
    adapted = [len(q) for by_layer in factors.values() for _, q in by_layer.values()]
    if adapted and rank > max(adapted):
        raise PairError(
            f"rank {rank}: {pair.expert_checkpoint.source} is an adapter of rank {max(adapted)}, so a matrix has "
            f"{max(adapted)} directions at most; leave the rank out for all of them"
        )
    for module in modules:
        shape, n = flatten(pair.base)[MATRICES[module]].shape[1:], n_inputs(module)
        most = min(math.prod(shape[:n]), math.prod(shape[n:]))
        if rank > most:
            raise PairError(f"rank {rank}: the matrices of {module} have at most {most} directions; ask for fewer")


class ModuleSpectrum(NamedTuple):
    """How the change of one module is spread over its directions, in all layers together.

    Attributes:
        module: "q", "k", "v", "o", "gate", "up" or "down".
        n_directions: number of its directions.
        n_params: number of numbers that they hold.
        first: share of the change's energy that the largest direction of each layer holds.
        four: the same of the four largest.
        kept: the same of all that there are.
    """

    module: str
    n_directions: int
    n_params: int
    first: float
    four: float
    kept: float


def spectra(pair: Pair) -> list[ModuleSpectrum]:
    """How the change of each module is spread over its directions.

    Args:
        pair: a pair that `by_directions` divided.

    >>> import wpjax as wp
    >>> pair = wp.by_directions(wp.load_pair("tiny:base", "tiny:expert"), rank=4)
    >>> found = spectra(pair)[0]
    >>> found.module, found.n_directions, found.first < found.four < 1
    ('q', 32, True)
    """
    if pair.division is None:
        raise PairError("the pair is not divided into directions; divide it first: wp.by_directions(pair)")
    rows, every = [], enumerate_components(pair.cfg, ["delta_direction"])
    for module, numbers in pair.cfg.directions:
        squares = np.square(np.asarray(flatten(pair.expert)[delta_path(module, "S")], np.float64))
        own = next(c for c in every if c.name.split(".")[2] == module)
        share = pair.division.kept[module] / squares.sum()
        first, four = (float(squares[:, :n].sum() * share) for n in (1, 4))
        n = sum(numbers)
        rows.append(ModuleSpectrum(module, n, n * n_parameters(pair.cfg, own), first, four, pair.division.kept[module]))
    return rows


def folded(params: Params) -> Params:
    """The parameters of a divided model, perhaps patched, as those of a plain one: W + U S V in place of each matrix.

    Args:
        params: plain arrays, say of `materialize`.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> again = folded(wp.by_directions(pair, rank=2).expert)
    >>> w, expert = again["blocks"]["mlp"]["W_in"], pair.expert["blocks"]["mlp"]["W_in"]
    >>> bool(jnp.allclose(w, expert, atol=1e-5))
    True
    """
    flat = flatten(params)
    for module, path in MATRICES.items():
        parts = [flat.pop(delta_path(module, part), None) for part in "USV"]
        if parts[0] is not None:
            u, s, v = (np.asarray(part, np.float64) for part in parts)
            layers = [
                np.tensordot(u[i] * s[i], v[i], 1) + host_rows(flat[path], i, i + 1)[0].astype(np.float64)
                for i in range(len(s))
            ]
            flat[path] = jnp.asarray(np.stack(layers), flat[path].dtype)
    return unflatten(flat)
