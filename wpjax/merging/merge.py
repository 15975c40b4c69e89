"""Merging models: from a plan to a Hugging Face folder, one tensor of each model in memory at a time."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wpjax.checkpoints.checkpoint import local_path
from wpjax.checkpoints.convert import tensor_shapes
from wpjax.checkpoints.folder import MARKER
from wpjax.checkpoints.rewrite import rewrite_folder
from wpjax.errors import OutputError
from wpjax.merging.card import (
    MERGEKIT,
    RECIPE,
    masked_card,
    masked_text,
    mergekit_text,
    model_card,
    recipe_text,
)
from wpjax.merging.methods.gated import score_gated
from wpjax.merging.plan import Plan
from wpjax.merging.registry import MergeError
from wpjax.runtime.cards import public_name
from wpjax.runtime.files import atomic_output, check_output
from wpjax.runtime.progress import Progress, silent


def check_merge(plan: Plan, out: Path, overwrite: bool = False, marker: str = MARKER) -> None:
    """Refuse a folder that cannot be written to, or that lies inside a model that is read, before any work is done.

    Args:
        plan: the plan.
        out: the folder.
        overwrite: whether a folder that exists may be replaced.
        marker: a file that such a folder holds.

    Raises:
        OutputError: it is one of these.
    """
    check_output(out, overwrite, marker, inputs=[plan.host.path, *(expert.path for expert in plan.experts)])
    for source, path in ((plan.host.source, plan.host.path), *((e.source, e.path) for e in plan.experts)):
        if path.is_dir() and path.resolve() in out.resolve().parents:
            raise OutputError(f"{out} lies inside the model {source}, which is read; choose a place outside it")


def merged_tensor(plan: Plan, name: str, stored: np.ndarray) -> np.ndarray:
    """One tensor of the merged model.

    Args:
        plan: the plan.
        name: its full HF name.
        stored: the host's tensor of this name.

    Returns:
        the tensor in float32; or `stored` itself, if it stays as it is in the host.
    """
    if plan.values[name] is None:
        return stored
    base, method = plan.base_tensor(name, stored), plan.recipe.method
    arguments = plan.arguments(name)
    if method.random:  # for each tensor anew, so that its numbers do not depend on which others there are
        arguments["rng"] = np.random.default_rng([plan.recipe.seed, zlib.crc32(name.encode())])
    first = None if plan.recipe.base is None or method.base == "none" else base
    return method.merge(first, plan.expert_tensors(name, base), **arguments)


def merge(plan: Plan, out: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
    """Merge models, and write the result as an HF folder that transformers loads.

    Beside the weights stand the tokenizer, README.md (a model card), the recipe, and a recipe for mergekit if it has
    something like the method. Memory holds one tensor of the base and of each expert at a time, and what the method
    makes of them.

    Args:
        plan: the plan.
        out: the folder to write.
        overwrite: whether to replace a model folder that is there.
        progress: called with what is being done, tensors done and all tensors.

    Raises:
        OutputError: the folder exists, lies inside a model that is read, or cannot be written.
        CheckpointError: a tensor cannot be read, or what it became is not finite.

    >>> import tempfile
    >>> from wpjax.merging.plan import make_plan
    >>> from wpjax.merging.recipe import recipe_of
    >>> half = {"model": "tiny:expert", "parameters": {"weight": 0.5}}
    >>> plan = make_plan(recipe_of({"merge_method": "task_arithmetic", "base_model": "tiny:base", "models": [half]}))
    >>> folder = Path(tempfile.mkdtemp()) / "merged"
    >>> merge(plan, folder)
    >>> sorted(path.name for path in folder.iterdir())[:4]
    ['README.md', 'chat_template.jinja', 'config.json', 'merge.yaml']
    """
    out = Path(out)
    check_merge(plan, out, overwrite)
    done = 0

    def change(name: str, stored: np.ndarray) -> np.ndarray:
        nonlocal done
        progress("merging", done, len(plan.values))
        done += 1
        return merged_tensor(plan, name, stored)

    recipe = plan.recipe
    chosen = recipe.tokenizer not in (None, recipe.host)
    rewrite_folder(
        plan.host,
        out,
        change,
        files=_files(plan),
        overwrite=overwrite,
        dtype=recipe.dtype,
        tokenizer=local_path(str(recipe.tokenizer)) if chosen else None,
    )
    progress("merging", done, len(plan.values))


def _files(plan: Plan) -> Mapping[str, str]:
    """The text files beside the weights."""
    files = {"README.md": model_card(plan), RECIPE: recipe_text(plan)}
    for_mergekit = mergekit_text(plan)
    return files if for_mergekit is None else {**files, MERGEKIT: for_mergekit}


def peak_bytes(plan: Plan) -> int:
    """About how much memory merging takes for tensors: of the largest tensor, one of the base and two of each expert.

    The second one of an expert is what the method makes of it.
    """
    largest = max((int(np.prod(shape)) for shape in tensor_shapes(plan.host.cfg).values()), default=0)
    return 4 * largest * (2 + 2 * len(plan.experts))


def masked_experts(plan: Plan, out: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> list[Path]:
    """Write each expert with its gates alone, theta_base + g_k tau_k, as an HF folder, and a recipe for mergekit.

    Task arithmetic of these models is the merge: any tool that can add task vectors makes it, without knowing of heads
    or neurons.

    Args:
        plan: a plan of `score_gated`.
        out: the folder to write, with a folder for each expert in it.
        overwrite: whether to replace such a folder that is there.
        progress: as for `merge`.

    Returns:
        the folders of the experts.

    Raises:
        MergeError: the method has no gates.
        OutputError: as `merge`.
    """
    out, more = Path(out), plan.more
    if more is None:
        raise MergeError(f"{plan.recipe.method.name} has no gates, so there are no masked experts; use score_gated")
    check_merge(plan, out, overwrite, MERGEKIT)
    names = _folder_names(plan)
    done, total = 0, len(plan.values) * len(names)
    with atomic_output(out, overwrite, MERGEKIT) as folder:
        folder.mkdir()
        for k, name in enumerate(names):

            def change(tensor: str, stored: np.ndarray, k: int = k) -> np.ndarray:
                nonlocal done
                progress("masking", done, total)
                done += 1
                if plan.values[tensor] is None:
                    return stored
                base, gates = plan.base_tensor(tensor, stored), more(tensor)["gates"]
                expert = plan.expert_tensor(k, tensor, base)
                return score_gated(base, [expert], weight=[1.0], gates=lambda _: gates(k))

            files = {"README.md": masked_card(plan, k), RECIPE: recipe_text(plan)}
            rewrite_folder(plan.host, folder / name, change, files=files, dtype=plan.recipe.dtype)
        (folder / MERGEKIT).write_text(masked_text(plan, names), encoding="utf-8")
    progress("masking", done, total)
    return [out / name for name in names]


def _folder_names(plan: Plan) -> list[str]:
    """A name for the folder of each expert, which no two share."""
    names: list[str] = []
    for expert in plan.experts:
        name = re.sub(r"[^\w.-]+", "-", public_name(expert.source)).strip(".") or "expert"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names
