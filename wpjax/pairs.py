"""Pairs: a base and an expert, two checkpoints of one architecture and one vocabulary of ordinary tokens."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.behaviours import BUILT_IN, PromptBatch, behaviour, prompt_ids
from wpjax.checkpoints.checkpoint import (
    PRECISIONS,
    Checkpoint,
    check_adapter,
    fingerprint,
    load_checkpoint,
    local_path,
)
from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.checkpoints.hf_config import with_changes
from wpjax.checkpoints.placing import Place
from wpjax.checkpoints.rewrite import open_model
from wpjax.checkpoints.tokenizer import load_tokenizer
from wpjax.components import KINDS, LEAVES, Component, indices
from wpjax.errors import BehaviourError, CheckpointError, PairError
from wpjax.models.config import ModelConfig, Rope
from wpjax.models.decoder import Params
from wpjax.models.rotary import frequencies
from wpjax.models.sharding import choose_placement, described, leaf_places, place
from wpjax.runtime.files import recover
from wpjax.runtime.placement import Placement, check_devices, placement_for, read_mesh

LARGEST_WEIGHT = 1e9
"""No trained model has a larger weight; sums of their squares would be infinite."""


class DiffNorm(NamedTuple):
    """How much the expert changed the parameters of one unit, over all layers.

    Attributes:
        unit: name of the unit.
        n_params: number of parameters that it owns.
        n_changed: number of these that differ between base and expert.
        delta: Frobenius norm of expert - base.
        base: Frobenius norm of the base.
    """

    unit: str
    n_params: int
    n_changed: int
    delta: float
    base: float


class Division(NamedTuple):
    """How a pair was divided into directions (`directions.by_directions`).

    Attributes:
        rank: number of directions of each matrix that was asked for; None: the default.
        fingerprints: hashes of base and expert before that.
        n_directions: number of directions in the model.
        n_parameters: number of numbers that they hold together.
        kept: module -> share of the energy of its change, in all layers together, that its directions hold.
        kept_together: the same of all these modules together.
    """

    rank: int | None
    fingerprints: tuple[str, str]
    n_directions: int
    n_parameters: int
    kept: dict[str, float]
    kept_together: float

    @property
    def record(self) -> dict[str, Any]:
        """What a result says of it, as JSON; the fingerprints stand in the result anyway."""
        return {name: value for name, value in self._asdict().items() if name != "fingerprints"}

    def __str__(self) -> str:
        by_module = ", ".join(f"{module} {share:.0%}" for module, share in self.kept.items())
        share = f"{self.kept_together:.1%} of its energy ({by_module})"
        return (
            f"the change of the matrices of {', '.join(self.kept)} is divided into {self.n_directions:,} directions "
            f"with {self.n_parameters:,} parameters; they hold {share if self.kept_together < 0.9999 else 'all of it'}"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Pair:
    """A base and an expert with one configuration and one tokenizer.

    Attributes:
        cfg: the architecture of both.
        base: parameters of the base.
        expert: parameters of the expert.
        tokenizer: the tokenizer of the expert if it has a chat template, otherwise that of the base; or the one that
            was asked for.
        base_checkpoint: the base as it was loaded, cut to what the two have in common (see `make_pair`).
        expert_checkpoint: the expert, likewise.
        notes: in words, what differs in the two and may.
        division: how its changes were divided into directions; None if they are not.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> pair
    Pair('tiny:base' -> 'tiny:expert', llama of 8 layers, float32)
    >>> pair.base["blocks"]["attn"]["W_Q"].shape == pair.expert["blocks"]["attn"]["W_Q"].shape
    True
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    tokenizer: Any
    base_checkpoint: Checkpoint
    expert_checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    division: Division | None = None

    def __repr__(self) -> str:
        models = f"{self.base_checkpoint.source!r} -> {self.expert_checkpoint.source!r}"
        return f"Pair({models}, {self.cfg.family} of {self.cfg.n_layers} layers, {self.dtype})"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, of either model."""
        return tuple(sorted({*self.base_checkpoint.stop_tokens, *self.expert_checkpoint.stop_tokens}))

    @property
    def dtype(self) -> str:
        """The precision of the weights and of products with them, a key of `checkpoint.PRECISIONS`."""
        weights = str(self.base["embed"]["W_E"].dtype)
        return weights if self.cfg.activation_splits == 1 else f"{weights}x{self.cfg.activation_splits}"

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Hashes of base and expert (see `checkpoint.fingerprint`), of a divided pair those before it was divided."""
        if self.division is not None:
            return self.division.fingerprints
        return fingerprint(self.cfg, self.base), fingerprint(self.cfg, self.expert)

    @property
    def placement(self) -> Placement:
        """The devices that the models stand on, and that everything done with them is divided among."""
        return Placement.of(self.base)

    def on(self, mesh: str | Placement) -> Pair:
        """The same pair on other devices.

        Args:
            mesh: sizes of a mesh, such as "patch=4,model=2", or a placement.

        Raises:
            WpjaxError: the mesh does not divide the devices.

        >>> import wpjax as wp
        >>> str(wp.load_pair("tiny:base", "tiny:expert").on("patch=1,model=1").placement)
        'patch=1,model=1'
        """
        placement = placement_for(read_mesh(mesh)) if isinstance(mesh, str) else mesh
        base, expert = place(placement, self.base, self.expert)
        base_checkpoint = dataclasses.replace(self.base_checkpoint, params=base)
        expert_checkpoint = dataclasses.replace(self.expert_checkpoint, params=expert)
        return dataclasses.replace(
            self, base=base, expert=expert, base_checkpoint=base_checkpoint, expert_checkpoint=expert_checkpoint
        )

    def mesh_note(self, mesh: str | None) -> str:
        """The mesh of devices in words, for the plan of a run; empty if there is one device, and no mesh was asked for.

        Args:
            mesh: the mesh that was asked for, if any.
        """
        if mesh is None and self.placement.n_devices == 1:
            return ""
        how = "chosen from memory" if mesh is None else "as asked"
        return described(self.placement, self.cfg, self.base["embed"]["W_E"].dtype, how)

    def check_prompts(self, batch: PromptBatch) -> None:
        """Refuse prompts that the pair cannot take.

        Args:
            batch: the prompts.

        Raises:
            BehaviourError: a prompt is longer than the context, or holds a token that a model has no row for; or the
                tokenizer makes the same tokens of all prompts.
            PairError: the tokenizers of base and expert split a prompt differently, and none was asked for.
        """
        batch.check_fits(self.cfg.n_ctx, self.cfg.d_vocab, self.cfg.longer_context)
        if len(np.unique(batch.queries)) < 2:
            raise BehaviourError(
                f"{batch.behaviour}: all {len(batch)} prompts have the same tokens, e.g. {batch.texts[0][:40]!r}; the "
                "tokenizer does not know their words, or belongs to another model"
            )
        first, second = self.base_checkpoint.tokenizer, self.expert_checkpoint.tokenizer
        if first is None or second is None or first is second:
            return
        names = f"the tokenizers of {self.base_checkpoint.source} and {self.expert_checkpoint.source}"
        choose = "say which is right: --tokenizer base or --tokenizer expert"
        texts = list(dict.fromkeys(text for p in batch.pairs for text in (p.with_instruction, p.without)))
        apart = _split_apart(first, second, texts, bool(getattr(self.tokenizer, "chat_template", None)))
        if apart:
            raise PairError(
                f"{names} split {len(apart)} of {len(texts)} prompts differently, e.g. {apart[0][:40]!r}; {choose}"
            )
        # The chat template may write added tokens, which need not be the same in both.
        vocabularies = [{str(t): i for i, t in tok.added_tokens_decoder.items()} for tok in (first, second)]
        moved = [t for t, i in vocabularies[0].items() if vocabularies[1].get(t, i) != i]
        ids = np.unique(batch.with_instruction.ids)
        read = [token for token in moved if self.tokenizer.convert_tokens_to_ids(token) in ids]
        if read:
            raise PairError(f"{names} give {_some(read)} different ids, and the prompts hold it; {choose}")

    def diff_norms(self) -> list[DiffNorm]:
        """What the expert changed, unit by unit, in the order of `components.KINDS`."""
        ours, theirs = flatten(self.base), flatten(self.expert)
        units = dict.fromkeys(unit for kind in KINDS.values() for unit in kind.units)
        rows = []
        for unit in units:
            paths = [path for path in ours if LEAVES[path].unit == unit]
            if not paths:
                continue
            deltas = [np.asarray(theirs[p], np.float32) - np.asarray(ours[p], np.float32) for p in paths]
            rows.append(
                DiffNorm(
                    unit,
                    sum(d.size for d in deltas),
                    sum(int(np.count_nonzero(d)) for d in deltas),
                    float(np.sqrt(sum(np.square(d, dtype=np.float64).sum() for d in deltas))),
                    float(np.sqrt(sum(float(jnp.square(ours[p].astype(jnp.float32)).sum()) for p in paths))),
                )
            )
        return rows

    def delta_norms(self, components: Sequence[Component]) -> Float[np.ndarray, " C"]:
        """Frobenius norm of expert - base over the parameters of each of C components."""
        squares: dict[str, np.ndarray] = {}  # unit -> sums of squares, of the shape of the unit's mask
        ours, theirs = flatten(self.base), flatten(self.expert)
        for path, leaf in ours.items():
            unit, axis = LEAVES[path]
            stacked = path.startswith("blocks/")
            mask_axes = {0} if stacked else set()
            mask_axes |= {axis + stacked} if axis is not None else set()
            rest = tuple(i for i in range(leaf.ndim) if i not in mask_axes)
            square = squared_change(leaf, theirs[path], rest)
            squares[unit] = np.asarray(squares.get(unit, 0.0) + np.asarray(square, np.float64))
        by_kind = {kind: _component_sums(self.cfg, squares, kind) for kind in {c.kind for c in components}}
        return np.sqrt([by_kind[c.kind][max(c.layer, 0)][c.index] for c in components])


@functools.partial(jax.jit, static_argnames="over")
def squared_change(base: Array, expert: Array, over: tuple[int, ...]) -> Array:
    """Sum of the squared changes of a leaf, over some of its axes.

    It is one compiled program, so that no copy of a leaf in float32 stays in memory.

    Args:
        base: a leaf of the base.
        expert: the same leaf of the expert.
        over: axes to sum over (static).

    Returns:
        float32, with the axes that are left.
    """
    return jnp.square(expert.astype(jnp.float32) - base.astype(jnp.float32)).sum(over)


def _component_sums(cfg: ModelConfig, squares: dict[str, np.ndarray], kind: str) -> Float[np.ndarray, "L n"]:
    """Sums of each component of a kind, by layer and index, from the sums of each unit."""
    entry = KINDS[kind]
    if entry.opens == "part":  # a norm that the model lacks gets zeros, so that the others keep their indices
        any_part = next(squares[unit] for unit in entry.units if unit in squares)
        return np.stack([squares.get(unit, np.zeros_like(any_part)) for unit in entry.units], axis=1)
    if entry.opens == "piece":  # units side by side, channel by channel; what a model lacks gets zeros
        n_layers, most = cfg.n_layers, 1 + max(indices(cfg, kind)) // len(entry.units)
        sums = np.zeros((n_layers, most, len(entry.units)))
        for i, unit in enumerate(entry.units):
            if unit in squares:
                sums[:, : squares[unit].shape[1], i] = squares[unit]
        return sums.reshape(n_layers, -1)
    units = [squares[unit] for unit in entry.units if unit in squares]
    if entry.opens == "channel":
        return units[0]
    if entry.opens == "block":
        return units[0].reshape(len(units[0]), cfg.n_experts, -1).sum(2)
    if not entry.in_layer:
        return np.array([[sum(units)]])
    return np.sum([g.reshape(len(g), -1).sum(1) for g in units], axis=0)[:, None]


def load_model(
    source: str | Path,
    dtype: str = "float32",
    ignore_config: tuple[str, ...] = (),
    base: Checkpoint | None = None,
    place: Place | None = None,
    mesh: str | None = None,
) -> Checkpoint:
    """Load one model: any source of `load_checkpoint`, or a tiny model inside the package.

    Args:
        source: folder, `.gguf` file or hub id; or "tiny:base", "tiny:expert" or "tiny:planted".
        dtype: "float32", "bfloat16" or "bfloat16x2" (see `load_checkpoint`).
        ignore_config: attributes of config.json that you know not to matter.
        base: what it was trained from, and a PEFT adapter is applied to (see `load_checkpoint`).
        place: where each leaf is to stand (see `load_checkpoint`).
        mesh: instead of `place`: sizes of a mesh, such as "model=4", among whose devices the weights are cut.

    Raises:
        CheckpointError: the source cannot be read.
        WpjaxError: the mesh does not divide the devices.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> model.cfg.family, model.source
    ('llama', 'tiny:base')
    """
    source = str(source)
    check_devices()
    if mesh is not None:
        place = leaf_places(placement_for(read_mesh(mesh)))
    if not source.startswith("tiny:"):
        recover(Path(source).expanduser())  # a folder that a killed `finetune --overwrite` was about to replace
        return load_checkpoint(source, dtype, ignore_config, base, place)
    model = load_checkpoint(source, dtype, base=base, place=place)
    # The base's folder alone holds the tokenizer, which all of them share.
    tokenizer = model.tokenizer or load_tokenizer(local_path("tiny:base"))
    return dataclasses.replace(model, tokenizer=tokenizer)


def planted_components() -> tuple[str, ...]:
    """Names of the components that "tiny:planted" was trained in: the truth that its sweep should find."""
    text = (resources.files("wpjax") / "assets" / "tiny" / "planted" / "planted.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["components"])


TokenizerOf: TypeAlias = Literal["base", "expert"]
"""Whose tokenizer makes the prompts of a pair."""


def load_pair(
    base: str | Path | Checkpoint,
    expert: str | Path,
    dtype: str = "float32",
    ignore_config: tuple[str, ...] = (),
    tokenizer: TokenizerOf | None = None,
    mesh: str | None = None,
) -> Pair:
    """Load two checkpoints and check that they fit each other.

    An array whose bytes are equal in both is kept once: it is one array in both parameter trees. Layers of all blocks
    are one array, so it is shared only if no layer of it differs.

    Args:
        base: source of the base, as `load_model` takes it; or a model in memory, which stays where it stands.
        expert: source of the expert, likewise; or a PEFT folder with an adapter of the base, or its hub id.
        dtype: "float32", "bfloat16" or "bfloat16x2" (see `load_checkpoint`).
        ignore_config: attributes of config.json that you know not to matter.
        tokenizer: as for `make_pair`.
        mesh: sizes of the mesh of devices, such as "patch=4,model=2": patches are divided among the rows of the mesh,
            and each row holds both models, cut into as many parts as "model" says. None: all devices, with the weights
            cut into as few parts as their memory allows.

    Raises:
        PairError: the two differ in architecture or vocabulary, or have equal weights. The message says how.
        CheckpointError: a source cannot be read, or no config.json can say what the two have in common.
        WpjaxError: the mesh does not divide the devices, or no mesh of these devices holds the models.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> [norm.unit for norm in pair.diff_norms() if norm.n_changed][:3]
    ['head', 'kv_group', 'neuron']
    """
    n_models = 1 if check_adapter(expert) else 2
    if isinstance(base, Checkpoint):
        placement, model = Placement.of(base.params), base
    else:
        placement = _placement(base, dtype, ignore_config, mesh, n_models)
        model = load_model(base, dtype, ignore_config, place=leaf_places(placement))
    pair = make_pair(model, load_model(expert, dtype, ignore_config, model, leaf_places(placement)), tokenizer)
    return pair.on(placement)  # again, as what was cut to what the two have in common may stand elsewhere


def _placement(
    base: str | Path, dtype: str, ignore_config: tuple[str, ...], mesh: str | None, n_models: int
) -> Placement:
    """The devices for a pair, before weights are read; see `load_pair` and `choose_placement`."""
    check_devices()
    if mesh is not None:
        return placement_for(read_mesh(mesh))
    if not str(base).startswith("tiny:"):
        recover(Path(base).expanduser())
    try:
        cfg = open_model(base, ignore_config).cfg
    except CheckpointError:  # loading it will say what is wrong
        return Placement.single()
    weights, _ = PRECISIONS.get(dtype, (dtype, 1))
    return choose_placement(cfg, weights, n_models)


def make_pair(base: Checkpoint, expert: Checkpoint, tokenizer: TokenizerOf | None = None) -> Pair:
    """A pair of two models in memory.

    Some differences are allowed; `Pair.notes` names them. Of two context lengths the smaller is used. Of two
    vocabularies the common rows are used, as when a fine-tune added tokens at the end. If one model alone is tied, the
    head of the other is compared with its embedding. Tokens that were added to a tokenizer may differ. The prompts of
    both models are rendered by one chat template. Weights may be stored in other types of numbers: a quantised file and
    its original are a pair. One arithmetic may be said in other words, as by a Mistral without a window and a Llama.

    Args:
        base: the base.
        expert: the expert.
        tokenizer: whose tokenizer to use. None for the expert's if it has a chat template, otherwise the base's; then
            prompts that the two split differently are refused.

    Raises:
        PairError: as `load_pair`.
        ConfigError: no config.json can say what the two have in common.
    """
    if tokenizer not in (None, *typing.get_args(TokenizerOf)):
        raise PairError(f"tokenizer={tokenizer!r}: there are base and expert")
    names = f"{base.source} and {expert.source}"
    base, expert, no_window = _within_the_window(base, expert)
    expert, reworded = _in_words_of(base, expert)
    shared: dict[str, Any] = {
        "n_ctx": min(base.cfg.n_ctx, expert.cfg.n_ctx),
        "d_vocab": min(base.cfg.d_vocab, expert.cfg.d_vocab),
        "tied": base.cfg.tied and expert.cfg.tied,
    }
    cfg, other = (dataclasses.replace(model.cfg, **shared) for model in (base, expert))
    differences = cfg.differences(other)
    if differences:  # others than those
        raise PairError(f"{names} are not one architecture: {'; '.join(differences)}")
    notes = [*base.notes, *expert.notes, *no_window, *reworded, *_named_differences(base, expert)]
    chosen, about = _common_tokenizer(base, expert, names, tokenizer)
    base, expert = (_fitted(model, cfg) for model in (base, expert))
    ours, theirs = flatten(base.params), flatten(expert.params)
    for checkpoint, leaves in ((base, ours), (expert, theirs)):
        for path, leaf in leaves.items():
            _check_size(checkpoint.source, path, leaf)
    if all(ours[path] is theirs[path] or bool(jnp.array_equal(ours[path], theirs[path])) for path in ours):
        raise PairError(f"{names} have equal weights; name a base and an expert that was trained from it")
    if tokenizer is not None:
        base, expert = (dataclasses.replace(model, tokenizer=chosen) for model in (base, expert))
    return Pair(cfg, base.params, expert.params, chosen, base, expert, (*notes, *about))


def _within_the_window(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Base and expert, where one alone has a sliding window as models without it, for prompts up to its size.

    There a window changes nothing. llama.cpp's converter leaves out that of Mistral and StarCoder2, for example. A
    model whose layers with a window rotate in another way stays as it is.
    """
    models = [base, expert]
    having = [i for i, model in enumerate(models) if model.cfg.window is not None and model.cfg.local_rope is None]
    if len(having) != 1 or models[1 - having[0]].cfg.window is not None:
        return base, expert, []
    model = models[having[0]]
    window = model.cfg.window
    assert window is not None
    cfg = dataclasses.replace(model.cfg, window=None, sliding=(), n_ctx=min(window, model.cfg.n_ctx))
    raw = with_changes(model.hf_config, model.cfg, cfg, model.source)
    models[having[0]] = dataclasses.replace(model, cfg=cfg, hf_config=raw)
    note = f"{model.source} alone has a sliding window, of {window} tokens: to no more tokens, it makes no difference"
    return models[0], models[1], [note]


def _in_words_of(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The expert, with the configuration in the base's words where it says the same in others; and what is to be said.

    It may name another `model_type` that has the same arithmetic here, or write the same rotary embedding otherwise.
    """
    cfg = expert.cfg
    for field in ("rope", "local_rope"):
        ours, theirs = getattr(base.cfg, field), getattr(cfg, field)
        if ours and theirs and ours != theirs and _rotate_equally(ours, theirs, cfg.d_head):
            cfg = dataclasses.replace(cfg, **{field: ours})
    as_base = dataclasses.replace(cfg, n_ctx=base.cfg.n_ctx, d_vocab=base.cfg.d_vocab, tied=base.cfg.tied)
    notes = []
    differing = [difference.split(":")[0] for difference in base.cfg.differences(as_base)]
    if differing == ["family"]:
        notes = [f"a {base.cfg.family} and a {cfg.family}, whose arithmetic is the same"]
        cfg = dataclasses.replace(cfg, family=base.cfg.family)
    elif differing or cfg == expert.cfg:
        return expert, []
    special = {name: expert.hf_config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shorter = dataclasses.replace(cfg, n_ctx=min(cfg.n_ctx, base.cfg.n_ctx))  # the context that the pair will have
    raw = {**with_changes(base.hf_config, base.cfg, shorter, expert.source), **special}
    return dataclasses.replace(expert, cfg=cfg, hf_config=raw), notes


def _rotate_equally(one: Rope, other: Rope, d_head: int) -> bool:
    """Whether two rotary embeddings are the same at every length, so that one can be written in the other's words.

    `frequencies` tells those up to the context. Longrope and dynamic scaling have others beyond it, by their options.
    """
    if one.scaling != other.scaling or one.fraction != other.fraction or one.scaling == "dynamic":
        return False
    if one.scaling == "longrope":  # these two make no more than the scale, which is compared below
        a, b = ({k: v for k, v in r.options if k not in ("factor", "attention_factor")} for r in (one, other))
        if a != b:
            return False
    (f, scale), (g, scale_other) = (frequencies(rope, d_head) for rope in (one, other))
    return f.shape == g.shape and np.allclose(f, g, rtol=1e-6, atol=0) and bool(np.isclose(scale, scale_other, 1e-6))


def _named_differences(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """What differs in two architectures and may, in words."""
    a, b, notes = base.cfg, expert.cfg, []
    if a.rope is not None and a.rope.is_long:
        notes.append("rotary positions by the long factors, as for prompts that exceed the original context")
    if base.stored != expert.stored and base.stored and expert.stored:
        first, second = (", ".join(model.stored) for model in (base, expert))
        notes.append(f"weights stored as {first} and as {second}: what rounding changed counts as a change")
    if a.n_ctx != b.n_ctx:
        notes.append(f"contexts of {a.n_ctx} and {b.n_ctx} tokens: the smaller is used")
    if a.d_vocab != b.d_vocab:
        notes.append(
            f"vocabularies of {a.d_vocab} and {b.d_vocab} rows: the {min(a.d_vocab, b.d_vocab)} common are used"
        )
        lost = [t for model in (base, expert) for t in model.stop_tokens if t >= min(a.d_vocab, b.d_vocab)]
        if lost:
            notes.append(f"the end tokens {lost} are among the rows left out: answers that want them end at the limit")
    if a.tied != b.tied:
        tied, own = (base, expert) if a.tied else (expert, base)
        notes.append(f"{own.source} has a head of its own; that of {tied.source} is its embedding")
    return notes


def _fitted(model: Checkpoint, cfg: ModelConfig) -> Checkpoint:
    """A model cut to the context and the vocabulary of a pair, and untied if the other model is.

    Its functions on prompts of the pair stay the same, but for the logits of tokens that are cut off.
    """
    if model.cfg == cfg:
        return model
    flat = flatten(model.params)
    if model.cfg.tied and not cfg.tied:
        flat["unembed/W_U"] = flat["embed/W_E"].T  # [V, D] -> [D, V]
    sizes = {"embed/W_E": (0, cfg.d_vocab), "unembed/W_U": (1, cfg.d_vocab), "embed/W_pos": (0, cfg.n_ctx)}
    for path, (axis, n) in sizes.items():
        if path in flat and flat[path].shape[axis] > n:  # one that fits stays the array that the two may share
            flat[path] = jax.lax.slice_in_dim(flat[path], 0, n, axis=axis)
    raw = with_changes(model.hf_config, model.cfg, cfg, model.source)  # so that the model can be saved again
    return dataclasses.replace(model, cfg=cfg, params=unflatten(flat), hf_config=raw)


@jax.jit
def _too_large(leaf: Array) -> Array:
    return (~(jnp.abs(leaf) <= LARGEST_WEIGHT)).any()  # so written, NaN is too large


def _check_size(source: str, path: str, leaf: Array) -> None:
    """Refuse weights that are not finite, or so large that what is computed from them would not be.

    Raises:
        CheckpointError: names the parameter, and the layer.
    """
    if not _too_large(leaf):
        return
    at = np.unravel_index(int(np.argmax(np.nan_to_num(np.abs(np.asarray(leaf, np.float32)), nan=np.inf))), leaf.shape)
    layer, rest = (f" of layer {at[0]}", at[1:]) if path.startswith("blocks/") else ("", at)
    value = float(np.asarray(leaf[tuple(int(i) for i in at)], np.float32))
    raise CheckpointError(
        f"{source}: {path.removeprefix('blocks/')}{layer} is {value:g} at [{', '.join(map(str, rest))}]; no trained "
        "weight is so large, so the checkpoint is damaged: download or train it again"
    )


def _common_tokenizer(
    base: Checkpoint, expert: Checkpoint, names: str, choice: TokenizerOf | None
) -> tuple[Any, list[str]]:
    """The tokenizer of a pair (see `Pair.tokenizer`), and what is to be said of the two.

    Raises:
        PairError: there is none, one belongs to another model, or the two give ordinary tokens different ids.
    """
    first, second = base.tokenizer, expert.tokenizer
    if first is None and second is None:
        raise PairError(f"{names}: neither has a tokenizer; put tokenizer.json beside the weights of one")
    notes = [note for model in (base, expert) if model.tokenizer is not None for note in _beyond(model)]
    if first is None or second is None:
        return first or second, notes
    notes += differing_tokens(first, second, names)
    use_second = choice == "expert" if choice else bool(getattr(second, "chat_template", None))
    chosen, of = (second, expert.source) if use_second else (first, base.source)
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (first, second)]
    if templates[0] != templates[1]:
        how = f"by that of {of}" if getattr(chosen, "chat_template", None) else f"without one, as {of} has none"
        notes.append(f"the chat templates differ: prompts of both models are rendered {how}")
    questions = [pair.without for pair in behaviour(BUILT_IN[0]).select("sweep")]
    questions = list(dict.fromkeys(questions))
    n_apart = len(_split_apart(first, second, questions, bool(getattr(chosen, "chat_template", None))))
    if n_apart:
        notes.append(
            f"the two tokenizers split {n_apart} of {len(questions)} questions differently: that of {of} is used"
        )
    return chosen, notes


def _beyond(model: Checkpoint) -> list[str]:
    """What to say of tokens for which a model has no row.

    Raises:
        PairError: one of them is an ordinary token.
    """
    added = {str(token) for token in model.tokenizer.added_tokens_decoder.values()}
    beyond = sorted((t for t, i in model.tokenizer.get_vocab().items() if i >= model.cfg.d_vocab), key=str)
    if any(token not in added for token in beyond):
        raise PairError(
            f"{model.source}: the tokenizer has {len(model.tokenizer)} tokens, the model {model.cfg.d_vocab}; it "
            "belongs to another model"
        )
    return [f"{model.source} has no row for {_some(beyond)}: no prompt may hold such a token"] if beyond else []


def differing_tokens(first: Any, second: Any, names: str) -> list[str]:
    """What to say of added tokens in which two tokenizers differ.

    Raises:
        PairError: they differ in an ordinary token.
    """
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours == theirs:
        return []
    mine, other = ({str(token) for token in t.added_tokens_decoder.values()} for t in (first, second))
    differ = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    # A token is added if each tokenizer that has it says so. No ordinary text becomes such a token.
    ordinary = [t for t in differ if not ((t not in ours or t in mine) and (t not in theirs or t in other))]
    if ordinary:
        moved = [t for t in ordinary if t in ours and t in theirs]
        only = [t for t in ordinary if t not in ours or t not in theirs]
        parts = [
            f"{len(tokens)} tokens {what} (e.g. {', '.join(map(repr, tokens[:3]))})"
            for what, tokens in (("with different ids", moved), ("in only one of them", only))
            if tokens
        ]
        raise PairError(f"{names} do not share a vocabulary: {'; '.join(parts)}")
    return [f"{len(differ)} added tokens differ, in name or id: {_some(sorted(differ))}"]


def _some(tokens: Sequence[str]) -> str:
    """A few tokens of a list, in quotes."""
    return ", ".join(map(repr, tokens[:4])) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")


def _split_apart(first: Any, second: Any, texts: Sequence[str], templated: bool) -> list[str]:
    """The texts that two tokenizers split differently.

    Args:
        first: a tokenizer of transformers.
        second: another.
        texts: what users say, without a chat template.
        templated: whether a chat template will stand around them. It then writes the special tokens.
    """
    rows = [[prompt_ids(tokenizer, text, templated) for text in texts] for tokenizer in (first, second)]
    return [text for text, a, b in zip(texts, *rows, strict=True) if a != b]
