"""PEFT adapters: a folder of small tensors that makes an expert of a base.

The changes are added to the base's weights, tensor by tensor, as PEFT's `merge_and_unload` does (peft 0.21,
`tuners/lora/layer.py` and `variants.py`). With A [r, in], B [out, r] and a weight W [out, in]:

    LoRA    W' = W + s B A                      s = alpha / r, of rsLoRA alpha / sqrt(r)
    DoRA    W' = m (W + s B A) / |W + s B A|    m [out]; |.| is the norm of each row
    saved   W' = what the file holds            `modules_to_save`, embeddings saved along, biases, rows of tokens

Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732), Liu et al. 2024 (arXiv:2402.09353).

All leaves that are not changed are the base's own arrays, so an expert takes only the memory of what it changed. Sums
are taken in float64 and rounded once: so weights, and with them fingerprints, do not depend on the order in which a
processor adds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wpjax.checkpoints.convert import (
    OTHER_HEADS,
    edit_tensors,
    flatten,
    leaf_factors,
    tensor_name,
    tensor_names,
    tensor_shapes,
    unflatten,
)
from wpjax.checkpoints.expert_adapter import ExpertFactors, collect, expert_edits
from wpjax.checkpoints.folder import ADAPTER, SafetensorsFolder, how_to_merge, read_json
from wpjax.checkpoints.placing import Place, finite_floats
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.families import FAMILIES
from wpjax.models.families.vision_language import LEFT_OUT, TOWER

_USED = frozenset(
    "peft_type base_model_name_or_path r lora_alpha use_rslora use_dora rank_pattern alpha_pattern init_lora_weights "
    "modules_to_save trainable_token_indices ensure_weight_tying target_modules target_parameters exclude_modules "
    "layers_to_transform layers_pattern".split()
)
# How the adapter was trained and stored. The tensors say the rest: which biases there are, and which way matrices lie.
_NO_MATTER = frozenset(
    "task_type peft_version auto_mapping revision inference_mode lora_dropout bias lora_bias fan_in_fan_out "
    "megatron_core runtime_config qalora_group_size loftq_config eva_config corda_config lora_ga_config".split()
)
# Ways to begin that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its weights.
_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
_LISTED: Mapping[type, str] = {str: "names", int: "layers"}

_FACTORS = {"lora": ("A", "B"), "embedding": ("embedding_A", "embedding_B")}
# Ending of a tensor's name, longer ones first -> (what it is to a parameter of its module, which parameter).
_ENDINGS = {
    ".lora_A.weight": ("A", "weight"),
    ".lora_B.weight": ("B", "weight"),
    ".lora_B.bias": ("B_bias", "bias"),
    ".lora_embedding_A": ("embedding_A", "weight"),
    ".lora_embedding_B": ("embedding_B", "weight"),
    ".lora_magnitude_vector": ("magnitude", "weight"),
    ".lora_magnitude_vector.weight": ("magnitude", "weight"),
    ".token_adapter.trainable_tokens_delta": ("rows", "weight"),
    ".token_adapter.base_layer.weight": ("whole", "weight"),
    # Where an embedding grew, its trained copy may stand twice in the file, and beside it the one that is not used.
    ".modules_to_save.weight": ("copy", "weight"),
    ".original_module.weight": ("unused", "weight"),
    ".base_layer.weight": ("whole", "weight"),
    ".base_layer.bias": ("whole", "bias"),
    ".weight": ("whole", "weight"),
    ".bias": ("whole", "bias"),
}
_OF_EXPERTS = (".gate_up_proj", ".down_proj", ".gate.weight")
_ANOTHER_BASE = "the adapter was trained over another base"

_CHUNK = 2**22
"""Numbers of a weight that are added at a time: 32 MiB of float64."""


class Adapted(NamedTuple):
    """What an adapter makes of a base.

    Attributes:
        cfg: the architecture of the expert. It is the base's, but for the size of the vocabulary if the adapter brings
            an embedding of another size, and for `tied` if it changes only one of embedding and head.
        params: parameters of the expert. Leaves that are not changed are the base's own arrays.
        left_out: what of the file was not read: heads for other tasks, towers for images.
        notes: in words, what the adapter changes, and which base it names.
    """

    cfg: ModelConfig
    params: Params
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


class Edits(NamedTuple):
    """What an adapter does to the tensors of a base.

    Attributes:
        cfg: the architecture of the expert, as in `Adapted`.
        edits: HF name of a tensor that changes -> function from the base's tensor, in HF's layout, to the expert's.
        left_out: as in `Adapted`.
        notes: as in `Adapted`.
    """

    cfg: ModelConfig
    edits: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass
class _Change:
    """What the file holds for one tensor of the base.

    Attributes:
        path: the module that the tensor belongs to, as the file names it.
        parts: what a tensor of the file is (see `_ENDINGS`) -> its name there.
    """

    path: str
    parts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def factors(self) -> tuple[str, str] | None:
        """The names of A and B; None if there are none."""
        found = [(self.parts[a], self.parts[b]) for a, b in _FACTORS.values() if a in self.parts]
        return found[0] if found else None


class Adapter:
    """A LoRA adapter in a PEFT folder.

    Args:
        folder: the folder, with adapter_config.json and adapter_model.safetensors.
        source: its name, as the user wrote it.

    Raises:
        CheckpointError: it is damaged, a pickle, or of a kind that cannot be merged into a base.
    """

    def __init__(self, folder: Path, source: str):
        self.where, self.source, self._folder = str(folder), source, folder
        self.config = read_json(folder / ADAPTER)
        self._check_config()
        pickle = folder / "adapter_model.bin"
        if pickle.exists() and not list(folder.glob("adapter_model*.safetensors")):
            raise CheckpointError(
                f"{pickle}: a pickle, which is never read; save the adapter as safetensors: "
                f"PeftModel.from_pretrained(BASE, {folder.name!r}).save_pretrained(NEW_FOLDER)"
            )
        self._tensors = SafetensorsFolder(folder, "adapter_model")

    def _check_config(self) -> None:
        """Refuse other kinds of adapters, and attributes that may change the weights and are not known.

        Raises:
            CheckpointError: names the attribute.
        """
        where, config = self._folder / ADAPTER, self.config
        kind, init = config.get("peft_type"), config.get("init_lora_weights", True)
        if kind != "LORA":
            raise CheckpointError(
                f"{where}: peft_type={kind!r} is not implemented, only 'LORA'; "
                f"if PEFT can, {how_to_merge(self._folder)}"
            )
        if str(init).lower() not in _INITS:
            raise CheckpointError(
                f"{where}: init_lora_weights={init!r} changes the base before training, so that the adapter does not "
                "fit the base as it is; save it as a plain adapter (save_pretrained with "
                f"path_initial_model_for_weight_conversion), or {how_to_merge(self._folder)}"
            )
        for name, value in config.items():
            if name not in _USED | _NO_MATTER and value:
                raise CheckpointError(
                    f"{where}: {name}={value!r} is not implemented; if PEFT can, {how_to_merge(self._folder)}"
                )
        for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            values = config.get(patterns) or {}
            if not isinstance(values, dict):
                raise CheckpointError(f"{where}: {patterns}={values!r} is not a table of numbers; correct it")
            for value in (config.get(name, _DEFAULTS[name]), *values.values()):
                if not _is_number(value) or (name == "r" and not (isinstance(value, int) and value > 0)):
                    raise CheckpointError(f"{where}: {value!r} is no {name}; correct it")
        for name in (
            "modules_to_save",
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
        ):
            value, kind = config.get(name) or [], int if name == "layers_to_transform" else str
            one = isinstance(value, kind) and name != "modules_to_save"
            if not one and not (isinstance(value, list) and all(isinstance(entry, kind) for entry in value)):
                raise CheckpointError(f"{where}: {name}={value!r} is not a list of {_LISTED[kind]}; correct it")

    def apply(self, cfg: ModelConfig, params: Params, base: str, place: Place | None = None) -> Adapted:
        """The expert that the adapter makes of a base.

        Args:
            cfg: the base's architecture.
            params: the base's parameters, which stay as they are. Changes are added to the weights as they are here. If
                they were rounded to bfloat16, the sum is rounded to it once more.
            base: the base's name, as the user wrote it.
            place: where new leaves are to stand; None for the default device.

        Raises:
            CheckpointError: the adapter is of another base; the message names the tensor, and what differs.
        """
        found = self.edits(cfg, base)
        if cfg.tied and not found.cfg.tied:
            flat = flatten(params)
            cfg = dataclasses.replace(cfg, tied=False)
            params = unflatten({**flat, "unembed/W_U": flat["embed/W_E"].T})  # [V, D] -> [D, V]
        params = edit_tensors(cfg, params, found.edits, found.cfg, place)
        return Adapted(found.cfg, params, found.left_out, found.notes)

    def edits(self, cfg: ModelConfig, base: str) -> Edits:
        """What the adapter makes of each tensor of a base, without the base's weights.

        Args:
            cfg: the base's architecture.
            base: the base's name, as the user wrote it.

        Raises:
            CheckpointError: as `apply`.
        """
        family, untied = FAMILIES[cfg.family], dataclasses.replace(cfg, tied=False)
        shapes = tensor_shapes(untied)
        embedding, head = (tensor_name(untied, leaf) for leaf in ("embed/W_E", "unembed/W_U"))
        changes, of_experts, left_out = self._changes(cfg, shapes, head, base)
        if left_out and not changes and not of_experts:
            raise CheckpointError(f"{self.where}: changes nothing that says the next token, only {', '.join(left_out)}")
        self._check_complete(shapes, changes, base)
        experts = expert_edits(cfg, of_experts, self._read, self._expert_scale, merged, self.where)
        self._check_experts(cfg, experts)
        notes = self._notes(changes, base, [factors.layer for factors in of_experts.values()])
        tied = cfg.tied and self._stays_tied(changes, embedding, head)
        if tied:
            changes.pop(head, None)
        elif cfg.tied:
            _share_saved(changes, embedding, head)
        rows = {name: self._rows(changes.get(name), cfg.d_vocab) for name in (embedding, head)[: 1 if tied else 2]}
        if len(set(rows.values())) > 1:
            raise CheckpointError(
                f"{self.where}: {' and '.join(f'{name} would have {n} rows' for name, n in rows.items())}, and they "
                f"must have as many; {_ANOTHER_BASE}"
            )
        for name, change in changes.items():
            shape = (rows[name], cfg.d_model) if name in rows else shapes[name]
            self._check_shapes(change, shape, name.endswith(family.transposed), base)
        new = dataclasses.replace(cfg, tied=tied, d_vocab=rows[embedding])
        edits = {name: self._edit(change, name.endswith(family.transposed)) for name, change in changes.items()}
        return Edits(new, edits | experts, left_out, tuple(notes))

    def factors(self, cfg: ModelConfig, base: str) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """The changes that the adapter makes by two factors alone, s B A, of matrices of attention and MLPs.

        Left out is what is no such product: DoRA, weights that are saved whole, and routed experts.

        Args:
            cfg: the base's architecture.
            base: the base's name, as the user wrote it.

        Returns:
            path of a leaf -> layer -> (p, q) of `convert.leaf_factors`, in float64 and with s in q.

        Raises:
            CheckpointError: as `apply`.
        """
        untied = dataclasses.replace(cfg, tied=False)
        changes, _, _ = self._changes(cfg, tensor_shapes(untied), tensor_name(untied, "unembed/W_U"), base)
        found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        for name, change in changes.items():
            layer = _layer(change.path)
            if change.factors is None or layer is None or {"magnitude", "whole", "embedding_A"} & change.parts.keys():
                continue
            if name.endswith(".mlp.gate.weight") and cfg.n_experts:  # a router
                continue
            a, b = (self._read(factor).astype(np.float64) for factor in change.factors)
            for path, (p, q) in leaf_factors(untied, name, a, self._scale(change.path) * b).items():
                found.setdefault(path, {})[layer] = (p, q)
        return found

    def _changes(
        self, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], head: str, base: str
    ) -> tuple[dict[str, _Change], dict[str, ExpertFactors], tuple[str, ...]]:
        """What the file holds, by the names of the base's tensors; factors of routed experts; and what is not read.

        Raises:
            CheckpointError: a tensor belongs to no weight of the base.
        """
        family = FAMILIES[cfg.family]
        changes: dict[str, _Change] = {}
        of_experts: dict[str, ExpertFactors] = {}
        heads: list[str] = []
        towers: dict[str, int] = {}
        for name in self._tensors.names():
            stem = name.removeprefix("base_model.model.")
            tower = stem.removeprefix("model.").split(".")[0]
            if tower in LEFT_OUT:
                towers[tower] = towers.get(tower, 0) + 1
                continue
            if stem.startswith(OTHER_HEADS):
                heads.append(stem)
                continue
            if stem.endswith(family.skipped) or collect(cfg, name, stem, of_experts):
                continue
            ending = max((e for e in _ENDINGS if stem.endswith(e)), key=len, default="")
            part, parameter = _ENDINGS.get(ending, ("", ""))
            path = stem.removesuffix(ending)
            # The model may have been wrapped without its head, or with a tower for images around it.
            own = path.replace(TOWER, "", 1)
            paths = [own, family.prefix + own]
            if own == "lm_head":  # some families name it otherwise in their files
                paths.append(head.removesuffix(".weight"))
            layer = _layer(own)
            if cfg.n_experts and own.endswith(".mlp.gate") and layer is not None and layer < cfg.n_layers:  # likewise
                paths.append(tensor_name(cfg, "blocks/mlp/W_router", layer).removesuffix(".weight"))
            target = next((f"{p}.{parameter}" for p in paths if f"{p}.{parameter}" in shapes), None)
            if target is None or not ending:
                raise CheckpointError(f"{self.where}: tensor {name} {self._astray(cfg, path, part, base)}")
            parts = changes.setdefault(target, _Change(path)).parts
            if part in parts:
                raise CheckpointError(f"{self.where}: {name} and {parts[part]} are the same tensor; remove one")
            parts[part] = name
        for change in changes.values():
            change.parts.pop("unused", "")
            if copy := change.parts.pop("copy", ""):
                change.parts.setdefault("whole", copy)
        changes = {target: change for target, change in changes.items() if change.parts}
        return changes, of_experts, (*(f"{part} ({n} tensors)" for part, n in towers.items()), *sorted(heads))

    @staticmethod
    def _astray(cfg: ModelConfig, path: str, part: str, base: str) -> str:
        """What is wrong with a tensor that belongs to no weight of the base, in words."""
        layer = _layer(path)
        if layer is not None and layer >= cfg.n_layers:
            return f"is of layer {layer}, and {base} has {cfg.n_layers} layers; {_ANOTHER_BASE}"
        if part == "B_bias":
            return f"is a bias, and its module has none in {base}, so that it cannot be merged; train without lora_bias"
        return f"belongs to no weight of {base}; {_ANOTHER_BASE}, or it is no adapter that PEFT saved"

    def _check_complete(self, shapes: Mapping[str, tuple[int, ...]], changes: Mapping[str, _Change], base: str) -> None:
        """Refuse factors without their partner, and modules of the base that should have been changed and are not.

        Raises:
            CheckpointError: names the tensor or the module.
        """
        for change in changes.values():
            for pair in _FACTORS.values():
                there = [part for part in pair if part in change.parts]
                if len(there) == 1:
                    raise CheckpointError(
                        f"{self.where}: {change.parts[there[0]]} is there, and its partner lora_"
                        f"{next(part for part in pair if part not in there)} is not; save the adapter again"
                    )
            scaled = bool(self.config.get("use_dora") and change.factors)
            if scaled != ("magnitude" in change.parts):
                raise CheckpointError(
                    f"{self.where}: {change.path} {'lacks' if scaled else 'has'} a magnitude, and {ADAPTER} says "
                    f"use_dora={self.config.get('use_dora')!r}; the two files do not belong together"
                )
        # Names of modules in the file and here differ if the model was wrapped in another way.
        factored = [(n, c) for n, c in changes.items() if c.factors and n.endswith(f"{c.path}.weight")]
        shift = next((name.removesuffix(".weight").removesuffix(change.path) for name, change in factored), "")
        for name, shape in shapes.items():
            if not name.startswith(shift) or not name.endswith(".weight"):
                continue
            path, here = name.removeprefix(shift).removesuffix(".weight"), changes.get(name)
            if self._is_saved(path):
                if here is None or "whole" not in here.parts:
                    raise CheckpointError(
                        f"{self.where}: modules_to_save names {path}, which the file does not hold; save it again"
                    )
            elif len(shape) == 2 and self._is_targeted(path) and not (here and here.parts):
                raise CheckpointError(
                    f"{self.where}: target_modules names {path} of {base}, for which the file holds nothing; "
                    f"{_ANOTHER_BASE}, or the file is not whole"
                )

    def _check_experts(self, cfg: ModelConfig, edits: Mapping[str, Any]) -> None:
        """Refuse a file without the factors of routed experts that `target_parameters` names, and other names there.

        Raises:
            CheckpointError: names the tensor of all experts, as PEFT knows it.
        """
        targets = self.config.get("target_parameters") or []
        if any(not cfg.n_experts or not f".{t}".endswith(_OF_EXPERTS) for t in targets):
            raise CheckpointError(
                f"{self._folder / ADAPTER}: target_parameters={targets!r} is not implemented but for routed experts "
                f"and routers; if PEFT can, {how_to_merge(self._folder)}"
            )
        for layer in range(cfg.n_layers if cfg.n_experts else 0):
            for what, leaf in (("gate_up_proj", "W_in"), ("down_proj", "W_out")):
                path = f"model.layers.{layer}.mlp.experts.{what}"
                is_target = any(path == target or path.endswith(f".{target}") for target in targets)
                if is_target and tensor_names(cfg, f"blocks/mlp/{leaf}", layer)[0] not in edits:
                    raise CheckpointError(
                        f"{self.where}: target_parameters names {path}, for which the file holds nothing; "
                        f"{_ANOTHER_BASE}, or the file is not whole"
                    )

    def _is_saved(self, path: str) -> bool:
        """Whether a module is trained as a whole (`_set_trainable` of PEFT)."""
        return any(path.endswith(entry) for entry in self.config.get("modules_to_save") or [])

    def _is_targeted(self, path: str) -> bool:
        """Whether a module with a matrix has factors, as PEFT chooses modules (`check_target_module_exists`)."""
        config = self.config
        excluded, targets = config.get("exclude_modules") or [], config.get("target_modules") or []
        if isinstance(excluded, str) and self._matches(excluded, path):
            return False
        if isinstance(excluded, list) and any(path == e or path.endswith(f".{e}") for e in excluded):
            return False
        if isinstance(targets, str):
            if targets.lower() == "all-linear":  # but for the head, and embeddings are not linear
                return _layer(path) is not None
            return self._matches(targets, path)
        if path in targets:
            return True
        if not any(path.endswith(f".{target}") for target in targets):
            return False
        only = config.get("layers_to_transform")
        if only is None or only == []:
            return True
        patterns = config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [re.match(rf"(?:^|.*?\.){self._pattern(p)}\.(\d+)\.", path) for p in patterns]
        layer = next((int(match[1]) for match in found if match), None) if patterns else _layer(path)
        return layer in (only if isinstance(only, list) else [only])

    def _pattern(self, pattern: str) -> str:
        """A regular expression of the configuration, if it is one.

        Raises:
            CheckpointError: it is not.
        """
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self._folder / ADAPTER}: {pattern!r} is not a regular expression ({error}); correct it"
            ) from error
        return pattern

    def _matches(self, pattern: str, path: str) -> bool:
        return re.fullmatch(self._pattern(pattern), path) is not None

    def _setting(self, name: str, patterns: str, path: str) -> float:
        """r or alpha of a module, as PEFT finds it (`get_pattern_key`)."""
        values: dict[str, float] = self.config.get(patterns) or {}
        for pattern, value in values.items():
            if self._matches(rf"(.*\.)?({self._pattern(pattern)})", path):
                return value
        return self.config.get(name, _DEFAULTS[name])

    def _scale(self, path: str) -> float:
        """The factor s of a module."""
        rank = self._setting("r", "rank_pattern", path)
        return self._setting("lora_alpha", "alpha_pattern", path) / (
            math.sqrt(rank) if self.config.get("use_rslora") else rank
        )

    def _expert_scale(self, path: str, rank: int) -> float:
        """The factor s of a tensor of all experts, whose factors have this rank.

        Raises:
            CheckpointError: the configuration says another rank.
        """
        if rank != self._setting("r", "rank_pattern", path):
            raise CheckpointError(
                f"{self.where}: the factors of {path} are of rank {rank}, and {ADAPTER} says "
                f"{self._setting('r', 'rank_pattern', path)}; the two files do not belong together"
            )
        return self._scale(path)

    def _stays_tied(self, changes: Mapping[str, _Change], embedding: str, head: str) -> bool:
        """Whether embedding and head of a tied base are one tensor after the change, too.

        PEFT computes with two tensors where it changes one of them by factors, or trains a copy of it.
        """
        ours, theirs = changes.get(embedding), changes.get(head)
        if ours is None or theirs is None:
            alone = ours or theirs
            if alone is None or (self.config.get("ensure_weight_tying") and ours):
                return True
            # What is left: rows of tokens, and an embedding that was saved along as it is.
            return ours is not None and not alone.factors and not self._is_saved(alone.path)
        if self.config.get("ensure_weight_tying"):
            return True
        if ours.factors or theirs.factors or ours.parts.keys() != theirs.parts.keys():
            return False
        return all(np.array_equal(self._read(ours.parts[p]), self._read(theirs.parts[p])) for p in ours.parts)

    def _rows(self, change: _Change | None, d_vocab: int) -> int:
        """Number of rows of an embedding or a head after a change."""
        shape = () if change is None or "whole" not in change.parts else self._tensors.shape(change.parts["whole"])
        return shape[0] if len(shape) == 2 else d_vocab

    def _check_shapes(self, change: _Change, shape: tuple[int, ...], transposed: bool, base: str) -> None:
        """Refuse tensors that do not fit the weight that they change.

        Args:
            change: names of the tensors.
            shape: shape of the weight after the change.
            transposed: whether the weight lies as [in, out].
            base: the base's name.

        Raises:
            CheckpointError: names the tensor, and both shapes.
        """
        expected: dict[str, tuple[int, ...]] = {"whole": shape, "B_bias": shape}
        if len(shape) == 2:
            rank = int(self._setting("r", "rank_pattern", change.path))
            out, n_in = shape[::-1] if transposed else shape
            expected |= {"A": (rank, n_in), "B": (out, rank), "magnitude": (out,)}
            expected |= {"embedding_A": (rank, shape[0]), "embedding_B": (shape[1], rank)}
            if "embedding_A" in change.parts:
                expected["magnitude"] = (shape[1],)
            if "rows" in change.parts:
                expected["rows"] = (len(self._tokens(change, shape[0])), shape[1])
        for part, name in change.parts.items():
            found = self._tensors.shape(name)
            if found != expected.get(part):
                raise CheckpointError(
                    f"{self.where}: tensor {name} has shape {found}, and fits {base} only with "
                    f"{expected.get(part, 'another weight')} (the rank is that of {ADAPTER}); {_ANOTHER_BASE}"
                )

    def _tokens(self, change: _Change, d_vocab: int) -> list[int]:
        """The tokens whose rows of an embedding are replaced.

        Raises:
            CheckpointError: the configuration does not say, or names none that the base has.
        """
        tokens = self.config.get("trainable_token_indices")
        if isinstance(tokens, dict):
            tokens = next((of for name, of in tokens.items() if change.path.endswith(name)), None)
        if not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < d_vocab for t in tokens):
            raise CheckpointError(
                f"{self._folder / ADAPTER}: trainable_token_indices={tokens!r} of {change.path} are no tokens of the "
                f"{d_vocab} of the base; {_ANOTHER_BASE}"
            )
        return tokens

    def _read(self, name: str) -> np.ndarray:
        return finite_floats(self.where, name, self._tensors.read(name))

    def _edit(self, change: _Change, transposed: bool) -> Callable[[np.ndarray], np.ndarray]:
        """The change of a tensor, as a function from the base's tensor to the expert's."""

        def edit(tensor: np.ndarray) -> np.ndarray:
            parts = change.parts
            if "whole" in parts:
                tensor = self._read(parts["whole"])
            if change.factors:
                a, b = (self._read(name) for name in change.factors)
                magnitude = self._read(parts["magnitude"]) if "magnitude" in parts else None
                # An embedding [V, D] is the matrix of a map from V tokens to D numbers, transposed.
                lies = transposed or "embedding_A" in parts
                tensor = merged(tensor.T if lies else tensor, a, b, self._scale(change.path), magnitude)
                tensor = tensor.T if lies else tensor
            if "B_bias" in parts:
                shift = self._scale(change.path) * self._read(parts["B_bias"]).astype(np.float64)
                tensor = (tensor.astype(np.float64) + shift).astype(np.float32)
            if "rows" in parts:
                tensor = tensor.astype(np.float32)
                tensor[self._tokens(change, len(tensor))] = self._read(parts["rows"])
            return tensor

        return edit

    def _notes(self, changes: Mapping[str, _Change], base: str, expert_layers: list[int]) -> list[str]:
        """What the adapter changes, and what base it names if that is another."""
        factored = [change for change in changes.values() if change.factors]
        ranks = sorted({self._setting("r", "rank_pattern", change.path) for change in factored})
        kind = "DoRA" if self.config.get("use_dora") else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        said = []
        if factored:
            rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            said.append(f"{kind} of rank {rank} on {_modules(factored)}")
        others = {
            "saved whole": [c for name, c in changes.items() if "whole" in c.parts and name.endswith(".weight")],
            "rows of tokens": [c for c in changes.values() if "rows" in c.parts],
            "biases": [c for name, c in changes.items() if name.endswith(".bias")],
        }
        for what, those in others.items():
            those = [change for change in those if not change.factors]  # what was saved below factors did not change
            if those:
                said.append(f"{what}: {_modules(those)}")
        if expert_layers:
            said.append(f"factors of routed experts{_in_layers(expert_layers)}")
        notes = [f"{self.source} is an adapter: {'; '.join(said) or 'it changes nothing'}"]
        named = self.config.get("base_model_name_or_path")
        if isinstance(named, str) and Path(named).name != Path(base.partition("@")[0]).name:
            quantised = re.search(r"(?<![a-z])([48].?bit|gptq|awq|int[48]|fp8)", Path(named).name, re.IGNORECASE)
            notes.append(
                f"it names {named!r} as its base, "
                + ("which is quantised; over other weights it does a little else" if quantised else f"not {base}")
            )
        return notes


def merged(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray | None = None
) -> np.ndarray:
    """A weight with a low-rank change, W + s B A; with a magnitude, each row scaled to it (DoRA).

    Args:
        weight: [out, in].
        a: [r, in].
        b: [out, r].
        scale: s.
        magnitude: [out], the norms of the rows of the result.

    Returns:
        [out, in] in float32, rounded once from float64.

    >>> w, a, b = np.eye(2, dtype=np.float32), np.array([[1.0, 0.0]]), np.array([[0.0], [2.0]])
    >>> merged(w, a, b, 0.5).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    result = np.empty_like(weight, np.float32)  # laid out as the weight is, so that a transpose stays one
    a, b = a.astype(np.float64), b.astype(np.float64)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        at = slice(start, start + step)
        rows = weight[at].astype(np.float64) + scale * (b[at] @ a)
        if magnitude is not None:
            with np.errstate(all="ignore"):  # a row of zeros has no direction; that it is not finite is found later
                rows *= (magnitude[at].astype(np.float64) / np.linalg.norm(rows, axis=1))[:, None]
        result[at] = rows
    return result


def _share_saved(changes: dict[str, _Change], embedding: str, head: str) -> None:
    """Give the embedding of a tied base to the head too, or the other way, if it was saved below the factors of one."""
    for one, other in ((embedding, head), (head, embedding)):
        if one in changes and other not in changes and changes[one].factors and "whole" in changes[one].parts:
            changes[other] = _Change(other.removesuffix(".weight"), {"whole": changes[one].parts["whole"]})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _layer(path: str) -> int | None:
    """The number of the layer that a module stands in; None if it stands in none."""
    found = re.search(r"\.(\d+)\.", f".{path}")
    return int(found[1]) if found else None


def _modules(changes: list[_Change]) -> str:
    """Modules in words: their own names, and the layers that they stand in."""
    names = dict.fromkeys(change.path.split(".")[-1] for change in changes)
    found = [layer for change in changes if (layer := _layer(change.path)) is not None]
    return f"{', '.join(names)}{_in_layers(found)}"


def _in_layers(numbers: list[int]) -> str:
    """Layers in words, " in layers 0-2, 5"; empty if there are none."""
    layers = sorted(set(numbers))
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f" in layer{'s' if len(layers) > 1 else ''} {', '.join(spans)}" if layers else ""
