"""A history: the sweeps of all checkpoints of one fine-tuning, or of stages of training, with one ruler.

1. Order the checkpoints, and read each once: does it fit, are its prompts the same? So what is wrong is said first.
2. Make the metric on the base and the last expert (`wpjax.study`). It is the ruler of all steps: one direction or one
   list of words, the same prompts, and the final gap that all effects are shares of.
3. Sweep every step. Of a line of checkpoints the last comes first: what its screen chooses is replaced at all steps.
   Of stages, each chooses for itself, as what one stage changed another may have left alone.
4. Join the sweeps, and write result and figure.

No more than two models are in memory at a time (three with the metric kl, which is read against the last expert). The
programs that replace components take both models as arguments, so they are compiled once for all steps.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from wpjax.arguments import SweepConfig, as_command
from wpjax.behaviours import Behaviour, PromptBatch, behaviour
from wpjax.checkpoints.checkpoint import Checkpoint, check_adapter, local_path, model_and_adapter
from wpjax.checkpoints.line import check_different, in_order
from wpjax.checkpoints.rewrite import open_model
from wpjax.components import check_kind
from wpjax.errors import CheckpointError, PairError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.forecast import Forecast
from wpjax.metrics.metric import Metric, expect_finite, expect_positive_gap, scores
from wpjax.pairs import Pair, load_pair
from wpjax.report.history import write_history
from wpjax.results.files import CHECKSUM, netcdf_bytes
from wpjax.results.history import History, Step, joined
from wpjax.results.origin import asked_for
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.files import discard
from wpjax.runtime.progress import Progress, Schedule, Tell, silent, untold
from wpjax.runtime.shards import Shards, parts_folder
from wpjax.study import Setting, measure, prepare, versions


def run_history(
    config: SweepConfig,
    progress: Progress = silent,
    *,
    tell: Tell = untold,
    planned: Callable[[Schedule], None] | None = None,
) -> History:
    """Sweep several experts with one ruler, and write the result and its figure.

    The experts, `config.expert` and `config.more_experts`, are checkpoints of one fine-tuning, in any order; or, with
    `config.stages`, stages of training in the order in which they were made. The set score and answers to read are not
    made: they are of one pair.

    If it is interrupted, finished steps and parts of steps stay in a folder beside its result file. The same config
    with `resume=True` goes on with them; checkpoints before the last may have come meanwhile.

    Args:
        config: all arguments.
        progress: called as work gets done.
        tell: called with each note, before the long work.
        planned: called once, when the checkpoints are read, with the phases and how long each will take.

    Raises:
        WpjaxError: arguments that cannot work, or a checkpoint that does not fit the others. The message says which.
        AnchorRejected: the anchor, or the behaviour, does not pass its tests.

    >>> import tempfile
    >>> import wpjax as wp
    >>> folder, pair = Path(tempfile.mkdtemp()), wp.load_pair("tiny:base", "tiny:expert")
    >>> early = wp.materialize(pair.base, pair.expert, wp.PatchMask.of(pair.cfg, ["L4.mlp"]))
    >>> for step, params in ((90, early), (100, pair.expert)):
    ...     model = dataclasses.replace(pair.expert_checkpoint, params=params)
    ...     wp.save_checkpoint(folder / f"checkpoint-{step}", model)
    >>> config = SweepConfig(
    ...     "tiny:base", f"{folder}/checkpoint-*", "tiny:title", folder / "line.nc", components=("L2.head.0", "L4.mlp"),
    ...     method="exact", n_prompts=4, causal="skip",
    ... )
    >>> history = wp.run_history(config)
    >>> [(course.name, history.labels[course.since]) for course in history.courses()]
    [('L4.mlp', '90'), ('L2.head.0', '100')]
    >>> again = wp.open_result(folder / "line.nc")
    >>> again.dataset["effect"].dims, again.at(0).top(1)[0].name  # a step, as the result of a sweep
    (('step', 'component'), 'L4.mlp')
    """
    if not config.is_history:
        raise WpjaxError("one expert has no history: name several, or make a study of it: wp.run_study(config)")
    config.check()
    steps = _steps(config)
    _check_headers(config, steps)
    config = config.resolved
    for kind in config.kinds:
        check_kind(kind)
    models = _Models(config)
    progress("reading the checkpoints", 0, len(steps))
    task = behaviour(config.behaviour, config.checker, config.split)
    fingerprints, batch = [], None
    for i, step in enumerate(steps):
        try:
            pair = models.pair(step.base, step.expert)
        except PairError as error:  # as a checkpoint-0, which is the base
            raise PairError(f"{error}; or leave {step.expert} out") from error
        batch = _same_prompts(config, task, pair, batch, step)
        fingerprints.append(pair.fingerprints)
        del pair  # before the next is read
        progress("reading the checkpoints", i + 1, len(steps))
    # The ruler: the base and the last expert.
    pair = models.pair(config.base, steps[-1].expert)
    single = dataclasses.replace(config, expert=steps[-1].expert, more_experts=(), stages=False)
    setting = prepare(single, progress, tell, pair)
    order = [*range(len(steps))] if config.stages else [len(steps) - 1, *range(len(steps) - 1)]
    schedule = None
    if planned is not None:
        layer = None if setting.loaded is None else setting.loaded.layer
        labels = [_long(steps[i], config.stages) for i in order]
        schedule = Forecast(pair, task, config.max_new_tokens).history(single, setting.batch, layer, labels)
        planned(schedule)
        progress = schedule.watching(progress)
        setting = setting._replace(progress=progress)
    ruler = _ruler(setting)
    del pair, setting  # two models are enough
    identity = {
        "versions": ruler.versions,
        "ruler": [*ruler.fingerprints],
        "stages": config.stages,
        "prompts": ruler.batch.texts,
        "tokenizer": config.tokenizer,
        "metric": [config.metric, ruler.metric.digest],
        "dtype": config.dtype,
        **config.sweep_arguments,
    }
    with Shards(config.output, "sweep", identity, config.resume) as parts:
        found: dict[int, _Swept] = {}
        for i in order:
            like = None if config.stages or i == order[0] else found[order[0]].result
            found[i] = _of_step(config, ruler, models, steps[i], fingerprints[i], parts, like, progress)
        gaps = np.stack([found[i].gap for i in range(len(steps))])
        attributes = ruler.attributes | asked_for(
            config.behaviour, config.checker, config.max_new_tokens, config.ignore_config, config.tokenizer
        )
        attributes["command"] = as_command(dataclasses.replace(config, mesh=None, memory_mb=None))
        if config.quick:
            attributes["quick"] = "a first look, at few prompts and components (--quick)"
        sweeps = [found[i].result for i in range(len(steps))]
        history = joined(steps, sweeps, gaps, stages=config.stages, columns=ruler.columns, attributes=attributes)
        if schedule is not None:
            schedule.finish()
        write_history(history, config.output, config.overwrite)
        parts.discard()
        discard(parts_folder(config.output, "anchor"), config.output.name)
    return history


def _steps(config: SweepConfig) -> list[Step]:
    """The steps in their order."""
    experts = config.experts
    check_different(config.base, experts)
    if not config.stages:
        return [Step(step, str(step), config.base, source) for step, source in in_order(experts)]
    # A first stage that is an adapter is, over the base, the base of the second.
    first = f"{config.base}+{experts[0]}" if _is_adapter(experts[0]) else experts[0]
    bases = (config.base, first, *experts[1:-1])
    return [
        Step(i + 1, label, base, expert)
        for i, (label, base, expert) in enumerate(zip(_short(experts), bases, experts, strict=True))
    ]


def _is_adapter(source: str) -> bool:
    """Whether a name is that of an adapter alone, in a folder or on the hub."""
    return model_and_adapter(source) is None and check_adapter(local_path(source))


def _short(sources: Sequence[str]) -> list[str]:
    """Short names of models: the last parts of their paths, or all of them where two end alike."""
    names = [Path(source).name or source for source in sources]
    return names if len({*names}) == len(names) else list(sources)


def _long(step: Step, stages: bool) -> str:
    """What a step is called in a plan."""
    return f"stage {step.number} ({step.label})" if stages else f"step {step.label}"


def _check_headers(config: SweepConfig, steps: Sequence[Step]) -> None:
    """Refuse steps that are of another architecture or vocabulary, before any weight is read.

    Raises:
        CheckpointError: one is no checkpoint, or an adapter of the wrong place.
        PairError: two differ; or the base of stages has another vocabulary.
    """
    base = open_model(config.base, config.ignore_config)
    first = None
    for i, step in enumerate(steps):
        if config.stages and i and _is_adapter(step.expert):
            raise CheckpointError(
                f"{step.expert}: an adapter, whose base is the stage before it: name both, {step.base}+{step.expert}"
            )
        found = open_model(step.expert, config.ignore_config, base)
        first = found if first is None else first
        if config.stages and found.cfg.d_vocab != base.cfg.d_vocab:  # each pair would be cut to its own
            raise PairError(
                f"vocabularies of {base.cfg.d_vocab} rows in {base.source} and {found.cfg.d_vocab} in {found.source}: "
                "one metric cannot read all stages; name others, or sweep each stage by itself, without --stages"
            )
        if differences := first.cfg.differences(found.cfg):
            raise PairError(
                f"{first.source} and {found.source} are not of one training: {'; '.join(differences)}; leave one out"
            )


def _same_prompts(
    config: SweepConfig, task: Behaviour, pair: Pair, batch: PromptBatch | None, step: Step
) -> PromptBatch:
    """The prompts of a step, which are those of the step before.

    Raises:
        PairError: its tokenizer, or its chat template, makes other tokens of them.
        BehaviourError: the models cannot take them.
    """
    own = task.encode(pair.tokenizer, "sweep", config.n_prompts)
    pair.check_prompts(own)
    if batch is not None and not np.array_equal(batch.with_instruction.ids, own.with_instruction.ids):
        raise PairError(
            f"{step.expert}: its tokenizer or chat template makes other tokens of the prompts than those of the "
            "checkpoints before it; say whose to use for all: --tokenizer base"
        )
    return own if batch is None else batch


class _Models:
    """The models of a history, one pair in memory at a time."""

    def __init__(self, config: SweepConfig):
        self._load = functools.partial(
            load_pair,
            dtype=config.dtype,
            ignore_config=config.ignore_config,
            tokenizer=config.tokenizer,
            mesh=config.mesh,
        )
        self._ignore = config.ignore_config
        self._named = ("", "")
        self._pair: Pair | None = None

    def pair(self, base: str, expert: str) -> Pair:
        """A pair by the names of its models; what was in memory goes, but for the base if it stays the same."""
        if self._pair is not None and self._named == (base, expert):
            return self._pair
        at: str | Checkpoint = base
        if self._pair is not None and self._named[0] == base:
            at = self._pair.base_checkpoint
            whole = open_model(base, self._ignore).cfg
            if (at.cfg.d_vocab, at.cfg.n_ctx, at.cfg.tied) != (whole.d_vocab, whole.n_ctx, whole.tied):
                at = base  # the pair cut it to what its two models have in common
        self._pair = None  # before the next expert is read
        self._pair, self._named = self._load(at, expert), (base, expert)
        return self._pair


class Ruler(NamedTuple):
    """What all steps are measured by.

    Attributes:
        batch: the prompts.
        metric: the metric of the last expert.
        gap: [B], its gap from the base.
        columns: variables that describe it.
        attributes: attributes that describe it.
        fingerprints: of the base and the last expert.
        versions: what rounding depends on.
    """

    batch: PromptBatch
    metric: Metric
    gap: Float[np.ndarray, " B"]
    columns: Mapping[str, tuple[str, Any]]
    attributes: dict[str, Any]
    fingerprints: tuple[str, str]
    versions: list[str]


def _ruler(setting: Setting) -> Ruler:
    """Make the metric of the base and the last expert.

    Raises:
        MetricRejected: their gap may be zero, or a score is not finite.
        WpjaxError: as of `study.measure`.
    """
    pair, batch = setting.pair, setting.batch
    measured = measure(setting, {})
    prepared = measured.measure.prepare(pair, batch)
    ends = _score(pair, prepared.metric, "base"), _score(pair, prepared.metric, "expert")
    gap = (ends[1] - ends[0]).astype(np.float64)
    name = f"the {prepared.metric.name} metric of {batch.behaviour}"
    expect_positive_gap(gap, batch.queries, name, setting.config.seed)
    attributes = dict(prepared.attributes)
    if measured.differs:
        attributes["behaviour_differs"] = measured.differs
    return Ruler(batch, prepared.metric, gap, prepared.columns, attributes, pair.fingerprints, versions(pair))


def _score(pair: Pair, metric: Metric, of: str) -> Float[np.ndarray, " B"]:
    """The metric of one model of a pair."""
    params, checkpoint = (pair.base, pair.base_checkpoint) if of == "base" else (pair.expert, pair.expert_checkpoint)
    found = scores(pair.cfg, params, metric)
    expect_finite(pair.cfg, params, metric, found, checkpoint.source)
    return found


class _Own(MutableMapping[str, np.ndarray]):
    """The finished parts of one step among those of all: keys begin with the fingerprints of its models."""

    def __init__(self, parts: MutableMapping[str, np.ndarray], models: str):
        self._parts, self._models = parts, f"{models}-"

    def __getitem__(self, key: str) -> np.ndarray:
        return self._parts[self._models + key]

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        self._parts[self._models + key] = value

    def __delitem__(self, key: str) -> None:
        del self._parts[self._models + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._models) for key in self._parts if key.startswith(self._models))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Swept(NamedTuple):
    """One step that is swept.

    Attributes:
        result: its sweep, with effects as shares of the final gap.
        gap: [B], metric of its expert minus that of its base.
    """

    result: SweepResult
    gap: Float[np.ndarray, " B"]


WHOLE, GAP = "whole-step", "step-gap"
"""Names of the finished parts that hold the sweep of a step, and its gap."""


def _of_step(
    config: SweepConfig,
    ruler: Ruler,
    models: _Models,
    step: Step,
    fingerprints: tuple[str, str],
    parts: MutableMapping[str, np.ndarray],
    like: SweepResult | None,
    progress: Progress,
) -> _Swept:
    """Sweep one step, unless it is finished already.

    Raises:
        CheckpointError: its models are no longer those of these fingerprints, by which its parts are kept.
    """
    label, kept = _long(step, config.stages), _Own(parts, "-".join(fingerprints))

    def own(what: str, done: int, total: int) -> None:
        progress(f"{label}: {what}", done, total)

    if WHOLE not in kept or GAP not in kept:
        pair = models.pair(step.base, step.expert)
        for source, now, before in zip((step.base, step.expert), pair.fingerprints, fingerprints, strict=True):
            if now != before:
                raise CheckpointError(
                    f"{source}: changed while it was swept; run again with --resume once nothing writes to it"
                )
        kept[GAP] = (_score(pair, ruler.metric, "expert") - _score(pair, ruler.metric, "base")).astype(np.float64)
        budget = None if config.memory_mb is None else int(config.memory_mb * 2**20)
        arguments = {"budget": budget, "done": kept, "progress": own, **config.sweep_arguments}
        result = sweep(pair, ruler.batch, ruler.metric, gap=ruler.gap, like=like, **arguments)
        dataset = result.dataset.drop_vars([name for name in ("flow", "target") if name in result.dataset.variables])
        kept[WHOLE] = np.frombuffer(netcdf_bytes(dataset), np.uint8)
        own("joint patches", 1, 1)
    # Read back, so that a step is the same whether it was finished now or before an interruption.
    with warnings.catch_warnings(action="ignore"):  # about HDF5 that is not netCDF
        read = xr.load_dataset(io.BytesIO(kept[WHOLE].tobytes()), engine="h5netcdf")
    del read.attrs[CHECKSUM]  # of one step
    return _Swept(SweepResult(read), np.asarray(kept[GAP], np.float64))
