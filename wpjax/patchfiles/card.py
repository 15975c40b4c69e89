"""The model card of a patched model, and a patch in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import wpjax
from wpjax.patchfiles.patch import PatchInfo
from wpjax.results.words import counted
from wpjax.runtime.cards import one_line, public_name

if TYPE_CHECKING:
    from wpjax.patchfiles.stack import Stack

N_LISTED = 50
"""Components in the table of a model card, at most; the patch file names all of them."""

N_MEASURED = 24
"""Lines about what was measured, at most."""


def model_card(
    source: str,
    put: Stack,
    undo: bool = False,
    removed: bool = False,
    about: Sequence[str] = (),
    values: Mapping[str, Sequence[str]] | None = None,
    library: str = "transformers",
) -> str:
    """The text of a model card: which components of which model were put into which other one, and what is known of it.

    Args:
        source: the model that was changed.
        put: the patches.
        undo: whether they were taken out.
        removed: whether the model is an expert that got the base's slices.
        about: more lines of a list.
        values: columns of the table of components: title -> a text for each component, patch after patch.
        library: the library that loads the folder.
    """
    host, infos = public_name(source), [patch.info for patch in put.patches]
    n = sum(len(info.components) for info in infos)
    n_weights = sum(info.n_parameters for info in infos)
    components = f"{n:,} {'component' if n == 1 else 'components'}"
    donors = " and ".join(f"`{one_line(info.into if undo or removed else info.origin)}`" for info in infos)
    title = f"`{host}` with {components} of {donors}"
    how = f"The weights of `{host}`, but for {components} ({n_weights:,} weights), which are those of {donors}"
    if undo:
        how += ": patches were taken out, bit for bit"
    elif removed or any(info.knockout for info in infos):
        how += " (knock-out)"
    head = ["---", f"library_name: {library}", "tags: [wpjax, weight-patching]"]
    if "/" in host:  # a hub id; other names mean nothing to others
        head.append(f"base_model: {json.dumps(host)}")
    lines = [*head, "---", "", f"# {title}", "", f"{how}. No weight was trained.", ""]
    for info, scale in zip(infos, put.scales, strict=True):
        scaled = [] if scale == 1 else [f"its change scaled by {scale:g}"]
        lines += [f"- {line}" for line in [*described(info), *scaled]]
    if len(infos) > 1:
        lines.append(f"- Components that two patches bring: {put.on_conflict}")
    lines += [f"- {one_line(line)}" for line in about]
    lines += [f"- Made by wpjax {wpjax.__version__}", ""]
    lines += _table([name for info in infos for name in info.components], values or {})
    return "\n".join([*lines, ""])


def _table(components: Sequence[str], values: Mapping[str, Sequence[str]]) -> list[str]:
    """The table of components, in Markdown."""
    rows = [f"| {' | '.join(['component', *values])} |", f"|{'---|' * (1 + len(values))}"]
    for i, name in enumerate(components[:N_LISTED]):
        rows.append(f"| {' | '.join([f'`{one_line(name)}`', *(of[i] for of in values.values())])} |")
    if len(components) > N_LISTED:
        rows.append(f"| and {len(components) - N_LISTED:,} more |{' |' * len(values)}")
    return rows


def described(info: PatchInfo) -> list[str]:
    """What a patch says of itself, line by line.

    >>> info = PatchInfo(("L3.head.1", "L3.head.2", "embed"), "base", "expert", False, "", "llama", 1280, "capitals")
    >>> for line in described(info):
    ...     print(line)
    Patch: 2 heads and the embedding of `expert`, for `base` (1,280 weights)
    Behaviour: `capitals`
    """
    role = ", a knock-out" if info.knockout else ""
    lines = [
        f"Patch: {counted(map(kind_of, info.components))} of `{one_line(info.origin)}`, for `{one_line(info.into)}` "
        f"({info.n_parameters:,} weights){role}"
    ]
    if info.behaviour:
        lines.append(f"Behaviour: `{one_line(info.behaviour)}`")
    if info.ranked_by:
        lines.append(f"Chosen by: `{one_line(info.ranked_by)}`")
    told = [f"Measured, `{one_line(name)}`: `{one_line(value)}`" for name, value in figures(info.measured)]
    lines += told[:N_MEASURED]
    if len(told) > N_MEASURED:
        lines.append(f"and {len(told) - N_MEASURED:,} more figures, in the patch file")
    if info.encoding != "exact":
        lines.append(
            f"Stored as `{one_line(info.encoding)}`; relative error of the change {info.error:.2g}"
            + (". What was measured is of the exact change" if told else "")
        )
    if info.date:
        lines.append(f"Patch made by `wpjax {one_line(info.wpjax_version)}`, `{one_line(info.date)}`")
    return lines


def figures(measured: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What was measured, figure by figure: its name, and its value with its interval.

    >>> list(figures({"recovery": {"patched": {"mean": 0.9, "low": 0.8, "high": 1.0}}, "prompts": 32}))
    [('recovery patched', '0.9 [0.8, 1]'), ('prompts', '32')]
    """
    if isinstance(measured, Mapping):
        if {"mean", "low", "high"} == set(measured):
            mean, low, high = (_number(measured[name]) for name in ("mean", "low", "high"))
            yield path, f"{mean} [{low}, {high}]"
            return
        for name, value in measured.items():
            yield from figures(value, f"{path} {name}".strip())
    elif isinstance(measured, list | tuple):
        yield path, ", ".join(_number(value) for value in measured)
    elif measured is not None:
        yield path, _number(measured)


def _number(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def kind_of(name: str) -> str:
    """The kind of a component, from its name; "layer" for a whole one.

    >>> kind_of("L3.head.5"), kind_of("L3"), kind_of("embed")
    ('head', 'layer', 'embed')
    """
    head, *rest = name.split(".")
    return rest[0] if rest else "layer" if head[1:].isdigit() else head
