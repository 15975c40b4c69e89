"""A study: one sweep from its models to its file, with everything that makes its result worth reading.

The behaviour is checked to differ between base and expert, or an anchor is fitted and tried causally; what is to be
measured is made; the sweep keeps its finished parts, so that it can go on after an interruption; sets are ranked too;
and the file is written once, whole. `wpjax sweep` is this and a table.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax

import wpjax
from wpjax.arguments import SweepConfig
from wpjax.behaviours import Behaviour, PromptBatch, behaviour
from wpjax.components import check_kind
from wpjax.engines.on_policy import OnPolicy
from wpjax.errors import AnchorRejected, WpjaxError
from wpjax.estimators.sets import add_set_score
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.methods.metrics import check_metric
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import decision_metric
from wpjax.metrics.metric import Measure, Metric
from wpjax.models.generate import Generation
from wpjax.pairs import Pair, load_pair
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import Shards


class Study(NamedTuple):
    """What a study made.

    Attributes:
        result: as it stands in the file.
        no_set_score: why it has no set score; empty if it has one, or none was asked for.
    """

    result: SweepResult
    no_set_score: str = ""


class Measured(NamedTuple):
    """What a study measures.

    Attributes:
        measure: what `sweep` takes.
        metric: the metric of fixed words that it reads, or that the anchor has where words are not fixed.
        given: the anchor whose state both models are held at; None for none.
        differs: whether base and expert differ in the behaviour, in words; empty for an anchor, which has tests of its
            own.
    """

    measure: Measure
    metric: Metric
    given: Anchor | None
    differs: str


def run_study(config: SweepConfig, progress: Progress = silent) -> Study:
    """Sweep a pair as a config says, and write the result.

    Where it is interrupted, the parts that are finished stay in `parts_folder(config.out)`, and `resume` goes on with
    them.

    Args:
        config: all arguments.
        progress: called as work gets done.

    Raises:
        WpjaxError: arguments that cannot work; one of its subclasses says which.
        AnchorRejected: the anchor, or the behaviour, does not pass its tests.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "title.nc"
    >>> config = SweepConfig(
    ...     "tiny:base", "tiny:expert", "tiny:title", out, components=("L2.head.0", "L4.mlp"), method="exact",
    ...     n_prompts=4, causal="skip", set_score=False,
    ... )
    >>> study = run_study(config)
    >>> out.exists(), [row.name for row in study.result.top()]
    (True, ['L4.mlp', 'L2.head.0'])
    """
    config.check()
    for kind in config.kinds:
        check_kind(kind)
    task = behaviour(config.behaviour, config.checker)
    pair = load_pair(config.base, config.expert, config.dtype, config.ignore_config)
    batch = task.encode(pair.tokenizer, "sweep", config.n_prompts)
    measured = _measured(config, pair, task, batch, progress)
    shards = Shards(parts_folder(config.out), _identity(config, pair, batch, measured), config.resume)
    with contextlib.nullcontext() if config.profile is None else jax.profiler.trace(str(config.profile)):
        result = sweep(
            pair,
            batch,
            measured.measure,
            given=measured.given,
            budget=None if config.memory_mb is None else int(config.memory_mb * 2**20),
            done=shards,
            progress=progress,
            **config.of_sweep,
        )
    if measured.differs:
        result.dataset.attrs["behaviour_differs"] = measured.differs
    study = Study(result)
    if config.set_score and measured.given is None:
        progress("set score", 0, 1)
        study = _with_set_score(config, pair, batch, measured.metric, result)
        progress("set score", 1, 1)
    study.result.to_netcdf(config.out, config.overwrite)
    shards.discard()
    return study


def parts_folder(out: Path) -> Path:
    """Where a study keeps its finished parts until its result is written."""
    return out.with_name(f".{out.name}.sweep")


def _measured(config: SweepConfig, pair: Pair, task: Behaviour, batch: PromptBatch, progress: Progress) -> Measured:
    own, differs, entry = None, "", check_metric(config.metric)
    if not (entry.reads_anchor and entry.has_fixed_words):  # an anchor has causal tests of its own
        own, differs = _differing(config, pair, task, batch)
    if entry.make is None:
        anchor = Anchor.load(config.anchor) if config.anchor else _fitted(config, pair, task, progress)
        anchor.check_belongs(pair)
        measure = anchor if entry.has_fixed_words else OnPolicy(anchor, config.max_new_tokens)
        return Measured(measure, anchor.metric(pair, batch), None, differs)
    given = None if config.given_anchor is None else Anchor.load(config.given_anchor)
    if given is not None:
        given.check_belongs(pair)
    metric = entry.make(pair, batch, config.max_new_tokens, own)
    return Measured(metric, metric, given, differs)


def _differing(config: SweepConfig, pair: Pair, task: Behaviour, batch: PromptBatch) -> tuple[Generation, str]:
    """The expert's own answers, and whether they differ from the base's in the behaviour."""
    judge = Judge(pair, task, batch, config.max_new_tokens)
    own = judge.answers(pair.expert)
    if config.causal == "skip":
        return own, "not tested"
    task.check_checker()
    try:
        check_behaviour_differs(judge, judge.answers(pair.base), own)
    except AnchorRejected as error:
        if config.causal == "require":
            raise AnchorRejected(f"{error} (--causal report goes on and marks the result)") from error
        return own, str(error)
    return own, "by the checker"


def _fitted(config: SweepConfig, pair: Pair, task: Behaviour, progress: Progress) -> Anchor:
    return fit_anchor(
        pair,
        task,
        n_response=config.response_tokens,
        n_prompts=config.n_prompts,
        causal=config.causal,
        n_steered=config.n_steered,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        progress=progress,
    )


def _identity(config: SweepConfig, pair: Pair, batch: PromptBatch, measured: Measured) -> dict[str, object]:
    """Everything that finished parts depend on."""
    said = None if check_metric(config.metric).has_fixed_words else config.max_new_tokens
    return {
        "versions": [wpjax.__version__, jax.__version__, f"{len(jax.local_devices())} {jax.devices()[0]}"],
        "pair": pair.fingerprints,
        "prompts": batch.texts,
        "metric": [config.metric, measured.metric.digest, said],
        "given": None if measured.given is None else measured.given.metric(pair, batch).digest,
        "dtype": config.dtype,
        **config.of_sweep,
    }


def _with_set_score(config: SweepConfig, pair: Pair, batch: PromptBatch, metric: Metric, result: SweepResult) -> Study:
    """The result with a ranking of sets, or why it has none: a sweep is not lost with it."""
    try:
        used = [metric] if config.reads_anchor or config.metric == "decision" else []
        if config.metric != "decision":
            used.append(decision_metric(pair, batch, config.max_new_tokens))
        return Study(add_set_score(pair, result, used))
    except (WpjaxError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return Study(result, " ".join(str(error).split()))
