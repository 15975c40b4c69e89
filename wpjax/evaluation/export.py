"""Writes a patched model as a Hugging Face folder, with a model card, and the patch as a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wpjax.behaviours import encode_texts
from wpjax.checkpoints.folder import MARKER
from wpjax.checkpoints.rewrite import open_model
from wpjax.errors import WpjaxError
from wpjax.evaluation.validation import anchor_of, check_same_pair
from wpjax.metrics.metric import scores
from wpjax.metrics.reading import first_answers
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.patchfiles.apply import apply_patches
from wpjax.patchfiles.card import model_card
from wpjax.patchfiles.stack import stack
from wpjax.patchfiles.write import save_patch
from wpjax.patching import PatchMask, materialize
from wpjax.results.sweep_result import Row, SweepResult
from wpjax.runtime.files import check_output


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


def patch_path(folder: Path) -> Path:
    """Where the patch of an exported folder is written: beside it.

    >>> patch_path(Path("top100")).name
    'top100.safetensors'
    """
    return folder.with_name(f"{folder.name}.safetensors")


def export(
    pair: Pair,
    result: SweepResult,
    rows: Sequence[Row],
    path: str | Path,
    *,
    by: str | None = None,
    knockout: bool = False,
    overwrite: bool = False,
    ignore_config: tuple[str, ...] = (),
) -> None:
    """Write the base with some components of the expert, as an HF folder that transformers can load.

    It is in the dtype in which the base is stored. Beside the folder stands the patch (`patch_path`), which names the
    components, and undoes what was done (docs/patches.md).

    Args:
        pair: the models that were swept.
        result: the sweep.
        rows: the components, as `choose` gives them.
        path: the folder to write.
        by: name of the ranking that they were chosen by; None for the result's `set_ranking`.
        knockout: the reverse: the expert with these components of the base.
        overwrite: whether to replace a model folder, and a patch, that are there.
        ignore_config: attributes of config.json that you know not to matter.

    Raises:
        WpjaxError: the result is of another pair.
        OutputError: the folder or the patch exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:title")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="exact")
    >>> from wpjax.patchfiles import load_patch
    >>> folder = Path(tempfile.mkdtemp()) / "patched"
    >>> export(pair, result, choose(result, 2), folder)
    >>> load_patch(patch_path(folder)).info.components == tuple(row.name for row in result.top(2))
    True
    """
    check_same_pair(pair, result)
    folder, by, names = Path(path), by or result.set_ranking, [row.name for row in rows]
    host, donor = (pair.expert, pair.base) if knockout else (pair.base, pair.expert)
    model = open_model(pair.base_checkpoint.source, ignore_config)
    if knockout:
        model = open_model(pair.expert_checkpoint.source, ignore_config, model)
    check_output(folder, overwrite, MARKER, inputs=[model.path])
    together = joint_effect(pair, result, materialize(host, donor, PatchMask.of(pair.cfg, names)), knockout)
    attrs, lines = result.dataset.attrs, []
    if together is not None:
        lines.append(
            f"Effect: together these components {'take away' if knockout else 'bring back'} {together:.0%} of the gap"
        )
    tests = attrs.get("anchor_acceptance", attrs.get("behaviour_differs", "not tested"))
    lines += [
        f"Metric of the sweep: {attrs['metric']}, on {attrs['n_prompts']} prompts",
        f"Tests of the anchor, or of the behaviour: {tests}",
        f"All components that were swept, patched together, recover {float(attrs['coverage']):.0%} of the gap",
        "Effects of single components do not add up to the effect of the set",
    ]
    patch = save_patch(
        patch_path(folder),
        pair,
        names,
        behaviour=attrs["behaviour"],
        measured={} if together is None else {"share of the gap on the sweep's prompts": together},
        ranked_by=by,
        knockout=knockout,
        overwrite=overwrite,
        ignore_config=ignore_config,
    )
    columns = {
        by: [f"{row.value:+.4f}" for row in rows],
        "effect alone (95 % interval)": [_interval(row) for row in rows],
    }
    card = model_card(model.source, stack(model.cfg, [patch]), about=lines, values=columns)
    try:
        apply_patches(model, [patch], folder, card=card, overwrite=overwrite)
    except BaseException:
        patch_path(folder).unlink()
        raise


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


def _interval(row: Row) -> str:
    if row.effect != row.effect:  # it was not replaced alone
        return "not measured"
    return f"{row.effect:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
