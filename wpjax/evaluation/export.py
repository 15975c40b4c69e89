"""Writes a patched model as a Hugging Face folder, with a model card and the names of what was patched."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

import wpjax
from wpjax.behaviours import encode_texts
from wpjax.checkpoints.checkpoint import MARKER, save_checkpoint
from wpjax.components import n_parameters
from wpjax.errors import WpjaxError
from wpjax.evaluation.validation import anchor_of, check_same_pair
from wpjax.metrics.metric import scores
from wpjax.metrics.reading import first_answers
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, components_of, materialize
from wpjax.results.sweep_result import Row, SweepResult
from wpjax.runtime.cards import one_line, public_name
from wpjax.runtime.files import atomic_output

PATCH = "patch.json"
"""Name of the file that says which components were patched, and into what. The way back is a patch, too."""

N_LISTED = 50
"""Components in the table of the model card, at most; `PATCH` names all of them."""


def choose(result: SweepResult, top: int, *, by: str | None = None, kinds: tuple[str, ...] | None = None) -> list[Row]:
    """The best components of a sweep, to be patched together.

    Args:
        result: the sweep.
        top: number of components.
        by: name of the ranking; None for the result's `set_ranking`.
        kinds: kinds of components to take; None for all that were swept.

    Raises:
        WpjaxError: the result has no such ranking, no such kind, or fewer components with a number.
    """
    by = by or result.set_ranking
    swept = result.dataset["swept_kind"].values.astype(str).tolist()
    absent = [kind for kind in kinds or () if kind not in swept]
    if absent:
        raise WpjaxError(f"kind {absent[0]!r} was not swept, only {', '.join(swept)}")
    rows = result.top(top, by=by, kinds=kinds)
    if len(rows) < top:
        raise WpjaxError(f"the ranking {by} has {len(rows)} components, {top} were asked for; ask for fewer")
    return rows


def export(
    pair: Pair,
    result: SweepResult,
    rows: Sequence[Row],
    path: str | Path,
    *,
    by: str | None = None,
    knockout: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the base with some components of the expert, as an HF folder that transformers can load.

    Beside the model stand README.md, the model card, and `PATCH`, which names the components. The patched model, the
    base and these names give the base back: `materialize(patched, base, PatchMask.of(cfg, names))`.

    Args:
        pair: the models that were swept.
        result: the sweep.
        rows: the components, as `choose` gives them.
        path: the folder to write.
        by: name of the ranking that they were chosen by, for the card; None for the result's `set_ranking`.
        knockout: the reverse: the expert with these components of the base.
        overwrite: whether to replace a model folder that is there.

    Raises:
        WpjaxError: the result is of another pair.
        OutputError: the folder exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:title")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="exact")
    >>> folder = Path(tempfile.mkdtemp()) / "patched"
    >>> export(pair, result, choose(result, 2), folder)
    >>> json.loads((folder / "patch.json").read_text())["components"] == [row.name for row in result.top(2)]
    True
    """
    check_same_pair(pair, result)
    by, names = by or result.set_ranking, [row.name for row in rows]
    host, donor = (pair.expert, pair.base) if knockout else (pair.base, pair.expert)
    checkpoint = pair.expert_checkpoint if knockout else pair.base_checkpoint
    mask = PatchMask.of(pair.cfg, names)
    params = materialize(host, donor, mask)
    patched = dataclasses.replace(checkpoint, params=params, tokenizer=pair.tokenizer)
    patch = _patch(pair, result, names, by, knockout)
    # Components may overlap, as an attention module does with its heads: what the mask opens is counted once.
    n_patched = sum(n_parameters(pair.cfg, c) for c in components_of(pair.cfg, mask))
    together = joint_effect(pair, result, params, knockout)
    card = model_card(result, rows, by, n_patched, patch["date"], together, knockout)
    with atomic_output(Path(path), overwrite, MARKER) as folder:
        save_checkpoint(folder, patched)
        (folder / PATCH).write_text(json.dumps(patch, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


def joint_effect(pair: Pair, result: SweepResult, params: Params, knockout: bool = False) -> float | None:
    """The share of the gap that a patched model brings back (of a knock-out: loses), on the prompts of the sweep.

    Args:
        pair: the models that were swept.
        result: the sweep.
        params: the patched model.
        knockout: whether it is the expert with components of the base.

    Returns:
        the ratio of means; None unless the sweep was of the anchor, whose direction the result holds.
    """
    anchor, attrs = anchor_of(result), result.dataset.attrs
    if anchor is None or attrs["metric"] != "anchor" or int(attrs["given_layer"]) >= 0:
        return None
    prompts = encode_texts(pair.tokenizer, [str(text) for text in result.dataset["prompt"].values])
    metric = anchor.metric_along(prompts, first_answers(pair, prompts, anchor.n_response))
    base, expert, patched = (scores(pair.cfg, p, metric).mean() for p in (pair.base, pair.expert, params))
    return float((expert - patched if knockout else patched - base) / (expert - base))


def _patch(pair: Pair, result: SweepResult, names: Sequence[str], by: str, knockout: bool) -> dict[str, object]:
    attrs = result.dataset.attrs
    ends = {end: {"name": public_name(attrs[end]), "fingerprint": attrs[f"{end}_fingerprint"]} for end in ENDS}
    host, donor = reversed(ENDS) if knockout else ENDS
    return {
        "wpjax_version": wpjax.__version__,
        **ends,
        "into": host,
        "from": donor,
        "behaviour": one_line(attrs["behaviour"]),
        "ranked_by": by,
        "dtype": pair.dtype,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "components": list(names),
    }


ENDS = ("base", "expert")


def model_card(
    result: SweepResult,
    rows: Sequence[Row],
    by: str,
    n_parameters: int,
    date: object,
    together: float | None = None,
    knockout: bool = False,
) -> str:
    """The text of a model card: what was patched into what, for which behaviour, and what was measured of it.

    Args:
        result: the sweep.
        rows: the components that were patched.
        by: name of the ranking that they were chosen by.
        n_parameters: number of weights that they own.
        date: when the model was made.
        together: share of the gap that the model brings back, or loses (`joint_effect`); None if it is not known.
        knockout: whether components of the base were put into the expert.
    """
    attrs = result.dataset.attrs
    base, expert = (public_name(attrs[end]) for end in ENDS)
    host, donor = (expert, base) if knockout else (base, expert)
    behaviour = one_line(attrs["behaviour"])
    tests = attrs.get("anchor_acceptance", attrs.get("behaviour_differs", "not tested"))
    head = ["---", "library_name: transformers", "tags: [wpjax, weight-patching]"]
    if "/" in host:  # a hub id; other names mean nothing to others
        head.append(f"base_model: {json.dumps(host)}")
    listed = [f"| `{one_line(row.name)}` | {row.value:+.4f} | {_interval(row)} |" for row in rows[:N_LISTED]]
    if len(rows) > N_LISTED:
        listed.append(f"| and {len(rows) - N_LISTED:,} more, in `{PATCH}` | | |")
    role, moved = ("knock-out", "take away") if knockout else ("restoration", "bring back")
    effect = [] if together is None else [f"- Effect: together these components {moved} {together:.0%} of the gap"]
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# `{host}` with {len(rows):,} components of `{donor}`",
            "",
            f"The weights of `{host}`, but for {len(rows):,} components ({n_parameters:,} weights), which are those of "
            f"`{donor}` ({role}). They were chosen as the best for the behaviour `{behaviour}`, of which `{base}` is "
            f"the base and `{expert}` the expert. No weight was trained.",
            "",
            f"- Behaviour: `{behaviour}`",
            *effect,
            f"- Metric of the sweep: {attrs['metric']}, on {attrs['n_prompts']} prompts",
            f"- Tests of the anchor, or of the behaviour: {one_line(tests)}",
            f"- All components that were swept, patched together, recover {float(attrs['coverage']):.0%} of the gap",
            f"- Made by wpjax {wpjax.__version__}, {date}",
            "",
            "The effect of a component is the share of the gap between base and expert that its weights bring back "
            "alone. Effects of single components do not add up to the effect of the set.",
            "",
            f"| component | {by} | effect alone (95 % interval) |",
            "|---|---|---|",
            *listed,
            "",
            f"`{PATCH}` names all of them. With the {'expert' if knockout else 'base'} at hand, these names undo the "
            "patch.",
            "",
        ]
    )


def _interval(row: Row) -> str:
    if row.effect != row.effect:  # it was not replaced alone
        return "not measured"
    return f"{row.effect:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
