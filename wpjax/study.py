"""A study: one sweep, from the names of two models to a result file. `wpjax sweep` runs a study and prints a table.

1. Load the pair, and encode the prompts.
2. Make the metric. An anchor is fitted, and accepted by causal tests. For other metrics the checker must say that base
   and expert differ in the behaviour.
3. Sweep. Finished parts are saved on the way, so that an interrupted study can go on.
4. Add the set score, a ranking of components to be patched together.
5. Add answers to read: what base, patched base and expert say to a few held-out prompts.
6. Write the result file, once and whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import wpjax
from wpjax.arguments import SweepConfig, as_command, as_written
from wpjax.behaviours import Behaviour, PromptBatch, behaviour
from wpjax.components import check_kind, check_with_directions, count, count_in, none_of, parse_component
from wpjax.directions import by_directions
from wpjax.engines.on_policy import OnPolicy
from wpjax.errors import AnchorRejected, WpjaxError
from wpjax.estimators.sets import add_set_score, set_metrics
from wpjax.estimators.sweep import check_directions, sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.reading import answers_to_read
from wpjax.forecast import Forecast
from wpjax.methods import check_method
from wpjax.methods.metrics import check_metric
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import ExpertAnswers, answer_of
from wpjax.metrics.diagnostics import diagnostics_kept
from wpjax.metrics.metric import Measure, Metric
from wpjax.models.generate import Generation
from wpjax.pairs import Pair, load_pair
from wpjax.results.origin import asked_for
from wpjax.results.reach import Reach
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.farm import Farm, Part, Unfinished, made
from wpjax.runtime.files import discard
from wpjax.runtime.processes import Together, agree, member_now, together
from wpjax.runtime.progress import Progress, Schedule, Tell, silent, untold
from wpjax.runtime.shards import Shards, digest_of, parts_folder


class Study(NamedTuple):
    """What `run_study` returns.

    Attributes:
        result: the result of the sweep, as written to the file.
        no_set_score: why the result has no set score; empty if it has one, or if none was asked for.
        no_answers: why the result has no answers to read; empty if it has them, or if none were asked for.
    """

    result: SweepResult
    no_set_score: str = ""
    no_answers: str = ""


class Measured(NamedTuple):
    """What a study measures.

    Attributes:
        measure: the metric or the anchor, as `sweep` takes it.
        metric: the same as a metric that reads all models along the same words; for an on-policy sweep, that of its
            anchor. The set score and the identity of finished parts need it.
        given: the anchor at whose expert state both models are held; None if no state is given.
        answers: the expert's answers to the swept prompts.
        differs: what the checker says of base and expert: do they differ in the behaviour? Empty for the metric
            `anchor`, which has causal tests of its own.
    """

    measure: Measure
    metric: Metric
    given: Anchor | None
    answers: ExpertAnswers
    differs: str


def run_study(
    config: SweepConfig,
    progress: Progress = silent,
    *,
    tell: Tell = untold,
    planned: Callable[[Schedule], None] | None = None,
    ranked: Callable[[SweepResult], None] | None = None,
) -> Study:
    """Sweep a pair as a config says, and write the result.

    If the study is interrupted, its finished parts stay in a folder beside its result file
    (`runtime.shards.parts_folder`). The same config with `resume=True` goes on with them.

    With `config.shards`, the sweep was done in parts (`run_part`): they are collected, and only what comes after the
    patches is still to be done.

    Args:
        config: all arguments.
        progress: called as work gets done.
        tell: called with each note, before the long work: what differs in the pair and may, and what so few queries
            cannot show.
        planned: called once, when the pair is loaded, with the phases of the study and how long each will take. The
            schedule follows the work: `schedule.left` says what is left.
        ranked: called once, with the result as soon as components are ranked. Set score and answers are yet to come,
            and nothing is written yet.

    Raises:
        WpjaxError: arguments that cannot work. The subclasses in `wpjax.errors` say what is wrong: the models, the
            behaviour, the components, the place to write to.
        AnchorRejected: the anchor, or the behaviour, does not pass its tests.

    >>> import tempfile
    >>> from pathlib import Path
    >>> out = Path(tempfile.mkdtemp()) / "title.nc"
    >>> config = SweepConfig(
    ...     "tiny:base", "tiny:expert", "tiny:title", out, components=("L2.head.0", "L4.mlp"), method="exact",
    ...     n_prompts=4, causal="skip", set_score=False,
    ... )
    >>> study = run_study(config)
    >>> out.exists(), [row.name for row in study.result.top()]
    (True, ['L4.mlp', 'L2.head.0'])
    """
    _check_one(config)
    config.check(member_now().writes)
    setting = _scheduled(prepare(config, progress, tell), planned)
    config, progress = setting.config, setting.progress
    with _begun(setting) as (measured, parts):
        result = _swept(setting, measured, parts)
        if config.quick:
            result.dataset.attrs["quick"] = "a first look, at few prompts and components (--quick)"
        # On whichever devices it ran, this asks for the same.
        result.dataset.attrs["command"] = as_command(dataclasses.replace(config, mesh=None, memory_mb=None))
        result.dataset.attrs |= asked_for(
            config.behaviour, config.checker, config.max_new_tokens, config.ignore_config, config.tokenizer
        )
        if ranked is not None:
            ranked(result)
        study = Study(result)
        if config.set_score and measured.given is None:
            progress("set score", 0, 1)
            study = _with_set_score(setting.pair, setting.batch, measured.answers, result)
            progress("set score", 1, 1)
        if config.answers:
            progress("answers to read", 0, 1)
            study = _with_answers(config, setting.pair, setting.task, study)
            progress("answers to read", 1, 1)
        if setting.schedule is not None:
            setting.schedule.finish()
        if not member_now().writes:
            return study
        study.result.to_netcdf(config.output, config.overwrite)  # once and whole; the parts go after it
        if isinstance(parts, Shards | Together):
            parts.discard()
            discard(parts_folder(config.output, "anchor"), config.output.name)
    return study


def run_part(
    config: SweepConfig,
    progress: Progress = silent,
    *,
    tell: Tell = untold,
    planned: Callable[[Schedule], None] | None = None,
) -> str:
    """Do one part of a study, `config.part`, and leave its pieces in the folder that all parts share (`config.shards`).

    `run_study` with the same config, but with `out` in place of `part`, collects the pieces of all parts.

    Args:
        config: all arguments.
        progress: as of `run_study`.
        tell: as of `run_study`.
        planned: as of `run_study`.

    Returns:
        how far the work is, in words.

    Raises:
        WpjaxError: as of `run_study`; or the folder holds parts of another sweep.

    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = SweepConfig(
    ...     "tiny:base", "tiny:expert", "tiny:title", components=("L2.head.0", "L4.mlp"), method="exact", n_prompts=4,
    ...     causal="skip", set_score=False, answers=0, shards=folder / "parts",
    ... )
    >>> for part in ("1/2", "2/2"):
    ...     said = run_part(dataclasses.replace(config, part=part))
    >>> study = run_study(dataclasses.replace(config, out=folder / "title.nc"))
    >>> [row.name for row in study.result.top()]
    ['L4.mlp', 'L2.head.0']
    """
    if config.part is None:
        raise WpjaxError("part is missing: say which part of the study to do, such as part='1/8'")
    _check_one(config)
    config.check()
    setting = _scheduled(prepare(config, progress, tell), planned)
    with _begun(setting) as (measured, parts):
        try:
            _swept(setting, measured, parts)
        except Unfinished as reached:  # a sweep in parts ends with it
            return str(reached)
    raise AssertionError("the sweep did not stop where it needs all parts")


def _check_one(config: SweepConfig) -> None:
    """Refuse several experts: a study is of one."""
    if config.is_history:
        raise WpjaxError("several experts are no study of one pair; make their history: wp.run_history(config)")


class Setting(NamedTuple):
    """A study before its long work: what it sweeps, on which prompts.

    Attributes:
        config: all arguments, resolved.
        pair: base and expert.
        task: the behaviour.
        batch: its prompts.
        loaded: the anchor of the file that the config names; None if it names none.
        schedule: the phases of the study; None if nobody asked for them.
        progress: called as work gets done.
    """

    config: SweepConfig
    pair: Pair
    task: Behaviour
    batch: PromptBatch
    loaded: Anchor | None
    schedule: Schedule | None
    progress: Progress


def prepare(config: SweepConfig, progress: Progress, tell: Tell, pair: Pair | None = None) -> Setting:
    """Load the pair and encode the prompts; all that takes long comes after it.

    Args:
        config: all arguments.
        progress: called as work gets done.
        tell: called with each note.
        pair: the pair, if it is in memory already.

    Raises:
        WpjaxError: as of `run_study`.
    """
    config = config.resolved
    for kind in config.kinds:
        check_kind(kind)
    if config.by_directions and config.components is None:
        check_with_directions(config.kinds)  # before anything is read
    task = behaviour(config.behaviour, config.checker, config.split)
    if pair is None:
        progress("reading the pair", 0, 1)
        pair = load_pair(config.base, config.expert, config.dtype, config.ignore_config, config.tokenizer, config.mesh)
        progress("reading the pair", 1, 1)
        if config.by_directions:
            progress("dividing the change", 0, 1)
            pair = by_directions(pair, config.rank)
            progress("dividing the change", 1, 1)
    named = [parse_component(pair.cfg, name).kind for name in config.components or ()]
    check_directions(pair, named or config.kinds, config.method)
    lacking = [] if config.components else [kind for kind in config.kinds if not count(pair.cfg, kind)]
    if lacking and len(lacking) == len(config.kinds):
        raise none_of(lacking)
    if lacking:
        tell(f"this model has no {', '.join(lacking)}")
    loaded = _loaded_anchor(config, pair, task, tell)
    batch = task.encode(pair.tokenizer, "sweep", config.n_prompts)
    pair.check_prompts(batch)
    for note in dict.fromkeys((pair.mesh_note(config.mesh), *pair.notes, _out_of_reach(config, pair, batch, loaded))):
        if note:
            tell(note)
    return Setting(config, pair, task, batch, loaded, None, progress)


def _scheduled(setting: Setting, planned: Callable[[Schedule], None] | None) -> Setting:
    """The study with its schedule, if anybody asked for it."""
    if planned is None:
        return setting
    config, layer = setting.config, None if setting.loaded is None else setting.loaded.layer
    schedule = Forecast(setting.pair, setting.task, config.max_new_tokens).study(config, setting.batch, layer)
    planned(schedule)
    return setting._replace(schedule=schedule, progress=schedule.watching(setting.progress))


@contextlib.contextmanager
def _begun(setting: Setting) -> Iterator[tuple[Measured, MutableMapping[str, np.ndarray]]]:
    """What is measured, and the finished parts of the sweep: in a folder beside its output, or in that of a farm."""
    config = setting.config
    if config.shards is None:
        with together(lambda: contextlib.nullcontext({})) as shared:
            measured = measure(setting, shared)
        identity = _identity(setting, measured)
        # The metric is not compared: machines round differently, and that of process 0 counts.
        agree("sweep", {name: value for name, value in identity.items() if name not in ("metric", "given")})
        with together(lambda: Shards(config.output, "sweep", identity, config.resume)) as parts:
            yield measured, parts
        return
    # What is measured may need much work, which the parts share. So the metric itself is not a part of the identity.
    anchor = setting.loaded
    vector = None if anchor is None else digest_of({"vector": np.asarray(anchor.vector).tolist()})
    identity = {
        **config.shared_arguments,
        "versions": versions(setting.pair),
        "models": setting.pair.fingerprints,
        "prompts": [(p.with_instruction, p.without) for p in setting.task.pairs],
        "anchor": None if anchor is None else [anchor.layer, anchor.n_response, vector],
    }
    asked = {"command": as_command(config), "config": as_written(dataclasses.replace(config, part=None, shards=None))}
    part = None if config.part is None else Part.parse(config.part)
    with Farm(config.shards, part, identity, asked) as farm:
        yield measure(setting, farm), farm


def _swept(setting: Setting, measured: Measured, done: MutableMapping[str, np.ndarray]) -> SweepResult:
    """The sweep itself, with what the checker says of base and expert."""
    config = setting.config
    with contextlib.nullcontext() if config.profile is None else jax.profiler.trace(str(config.profile)):
        result = sweep(
            setting.pair,
            setting.batch,
            measured.measure,
            given=measured.given,
            budget=None if config.memory_mb is None else int(config.memory_mb * 2**20),
            done=done,
            progress=setting.progress,
            **config.sweep_arguments,
        )
    if measured.differs:
        result.dataset.attrs["behaviour_differs"] = measured.differs
    return result


def _loaded_anchor(config: SweepConfig, pair: Pair, task: Behaviour, tell: Tell) -> Anchor | None:
    """The anchor of the file that a config names, after a check that it belongs to this pair and behaviour."""
    path = config.anchor or config.given_anchor
    if path is None:
        return None
    anchor = Anchor.load(path)
    anchor.check_belongs(pair)
    name, expected = anchor.behaviour, config.anchor_behaviour or task.name
    if name != expected:
        raise AnchorRejected(
            f"{path}: an anchor of {name}, not of {expected}; fit one with `wpjax anchor`, or, if you mean this one, "
            f"pass --anchor-behaviour {shlex.quote(name)}"
        )
    if name != task.name:
        return anchor  # meant to be another's; the result says so
    if not anchor.identity:
        tell(
            f"{path} does not say with which prompts, checker, base and tokenizer its anchor was fitted, as an earlier "
            "version wrote it: only the name of its behaviour and its expert are compared"
        )
    differences = anchor.differences(pair, task)
    if not differences:
        return anchor
    what = f"{name} with {', '.join(differences)}"
    if config.anchor_behaviour is None:
        raise AnchorRejected(
            f"{path}: an anchor of {what}; fit one with `wpjax anchor`, or, if you mean this one, pass "
            f"--anchor-behaviour {shlex.quote(name)}"
        )
    return dataclasses.replace(anchor, behaviour=what)  # so that its tests are not taken for tests of this behaviour


def _out_of_reach(config: SweepConfig, pair: Pair, batch: PromptBatch, loaded: Anchor | None) -> str:
    """What q-values so few queries cannot reach, in words; empty if a single component can be found.

    An anchor that is yet to be fitted may be at any layer: then the numbers are those of a sweep of all layers.
    """
    method, metric = check_method(config.method), check_metric(config.metric)
    if not method.cells:
        return ""
    layers = range(pair.cfg.n_layers)
    if loaded is not None and not metric.reads_anchor:  # its state is given, and what comes after it is swept
        layers = layers[loaded.layer + 1 :]
    elif loaded is not None and metric.has_fixed_words:
        layers = layers[: loaded.layer + 1]
    if config.components is None:
        sizes = {kind: count_in(pair.cfg, kind, layers) for kind in config.kinds}
    else:
        sizes = collections.Counter(parse_component(pair.cfg, name).kind for name in {*config.components})
    n_screens = len(method.estimates) * (1 if metric.has_fixed_words else 2)
    most = n_screens * config.top + config.stratum if n_screens else max(sizes.values(), default=0)
    n_replaced = sum(min(size, most) for size in sizes.values())
    if not n_replaced:
        return ""
    return str(Reach.of(len(np.unique(batch.queries)), sum(sizes.values()), n_replaced, config.seed))


def measure(setting: Setting, shared: MutableMapping[str, np.ndarray]) -> Measured:
    """Make the metric that a config names, after the tests that belong to it.

    Args:
        setting: the study.
        shared: what the parts of a farm have made already, and must not differ in; an empty dict outside a farm.

    Raises:
        WpjaxError: the metric, or its anchor, cannot be made here.
        AnchorRejected: the anchor, or the behaviour, does not pass its tests.
    """
    config, pair, batch, loaded = setting.config, setting.pair, setting.batch, setting.loaded
    differs, entry = "", check_metric(config.metric)
    answers = ExpertAnswers(pair, batch.with_instruction, config.max_new_tokens)
    if not (entry.reads_anchor and entry.has_fixed_words):  # the metric `anchor` has causal tests instead
        setting.progress("behaviour check", 0, 1)
        generation = _shared_answers(shared, "expert-answers", lambda: answers.generation)
        answers = dataclasses.replace(answers, given=generation)
        differs = _differing(setting, shared, generation)
        setting.progress("behaviour check", 1, 1)
    if entry.make is None:
        anchor = _fitted(setting, shared) if loaded is None else loaded
        if entry.has_fixed_words:
            return Measured(anchor, anchor.metric(pair, batch), None, answers, differs)
        words = _shared_answers(
            shared, "base-answers", lambda: answer_of(pair, pair.base, batch.with_instruction, config.max_new_tokens)
        )
        on_policy = OnPolicy(anchor, config.max_new_tokens, answers, words)
        return Measured(on_policy, anchor.metric(pair, batch), None, answers, differs)
    metric = entry.make(pair, batch, config.max_new_tokens, answers)
    return Measured(metric, metric, loaded, answers, differs)


def _shared_answers(shared: MutableMapping[str, np.ndarray], key: str, make: Callable[[], Generation]) -> Generation:
    """Answers that the parts of a farm share: tokens, and one more column for the lengths."""

    def as_array() -> np.ndarray:
        tokens, lengths = make()
        return np.concatenate([np.asarray(tokens), np.asarray(lengths)[:, None]], axis=1)

    both = made(shared, key, as_array)
    return Generation(both[:, :-1], both[:, -1])


def _differing(setting: Setting, shared: MutableMapping[str, np.ndarray], by_expert: Generation) -> str:
    """In words, whether the expert's answers differ from the base's in the behaviour."""
    config, pair, task = setting.config, setting.pair, setting.task
    if config.causal == "skip":
        return "not tested"

    def tested() -> str:
        task.check_checker()
        judge = Judge(pair, task, setting.batch, config.max_new_tokens)
        try:
            check_behaviour_differs(judge, judge.answers(pair.base), by_expert)
        except AnchorRejected as error:
            if config.causal == "require":
                raise AnchorRejected(f"{error} (--causal report goes on and marks the result)") from error
            return str(error)
        return "by the checker"

    return made(shared, "behaviour-differs", lambda: np.frombuffer(tested().encode(), np.uint8)).tobytes().decode()


def _fitted(setting: Setting, shared: MutableMapping[str, np.ndarray]) -> Anchor:
    """An anchor that is fitted here, as the config says. If it is rejected, its diagnostics are written to a file."""
    config, pair, task = setting.config, setting.pair, setting.task
    options: dict[str, Any] = {
        "n_response": config.response_tokens,
        "n_prompts": config.n_prompts,
        "n_steered": config.n_steered,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }

    def fitted(done: MutableMapping[str, np.ndarray], beside: Path) -> Anchor:
        setting.progress("anchor", 0, 1)
        with diagnostics_kept(beside):
            return fit_anchor(pair, task, causal=config.causal, done=done, progress=setting.progress, **options)

    if config.shards is not None:  # the first anchor counts for all parts
        folder = config.shards
        return _unpacked(made(shared, "anchor", lambda: _packed(fitted(shared, folder))))
    identity = {
        "versions": versions(pair),
        "pair": pair.fingerprints,
        "prompts": [(p.with_instruction, p.without) for p in task.pairs],
        "dtype": config.dtype,
        "tokenizer": config.tokenizer,
        **options,
    }
    with together(lambda: Shards(config.output, "anchor", identity, config.resume)) as done:
        try:
            return _unpacked(made(shared, "anchor", lambda: _packed(fitted(done, config.output))))
        except AnchorRejected:
            if isinstance(done, Shards | Together):
                done.discard()  # other settings are to be tried next
            raise


def _packed(anchor: Anchor) -> np.ndarray:
    """The bytes of an anchor's file."""
    with tempfile.TemporaryDirectory() as folder:
        anchor.save(Path(folder) / "anchor")
        return np.frombuffer((Path(folder) / "anchor").read_bytes(), np.uint8)


def _unpacked(data: np.ndarray) -> Anchor:
    """The anchor of `_packed`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "anchor").write_bytes(data.tobytes())
        return Anchor.load(Path(folder) / "anchor")


def _identity(setting: Setting, measured: Measured) -> dict[str, object]:
    """Everything that finished parts depend on: parts of another identity are never mixed into a result."""
    config, pair, batch = setting.config, setting.pair, setting.batch
    # A metric's digest covers the words that it reads. On-policy the words are the patched models' own, of this length.
    answer_length = None if check_metric(config.metric).has_fixed_words else config.max_new_tokens
    return {
        "versions": versions(pair),
        "pair": pair.fingerprints,
        "prompts": batch.texts,
        "tokenizer": config.tokenizer,
        "metric": [config.metric, measured.metric.digest, answer_length],
        "given": None if measured.given is None else measured.given.metric(pair, batch).digest,
        "dtype": config.dtype,
        "rank": config.rank,
        **config.sweep_arguments,
    }


def versions(pair: Pair) -> list[str]:
    """What rounding depends on beside the numbers themselves."""
    return [wpjax.__version__, jax.__version__, f"{pair.placement} {jax.devices()[0]}"]


def _with_set_score(pair: Pair, batch: PromptBatch, answers: ExpertAnswers, result: SweepResult) -> Study:
    """The result with a set score, or the reason why there is none: a long sweep is not lost with its set score."""
    try:
        return Study(add_set_score(pair, result, set_metrics(pair, batch, answers=answers)))
    except (WpjaxError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return Study(result, " ".join(str(error).split()))


def _with_answers(config: SweepConfig, pair: Pair, task: Behaviour, study: Study) -> Study:
    """The study with answers to read in its result, or the reason why there are none."""
    try:
        n_prompts, n_new = config.answers, config.max_new_tokens
        answers = answers_to_read(pair, task, study.result, n_prompts=n_prompts, max_new_tokens=n_new)
        data = answers.added_to(study.result.dataset)
        # What later commands let the models say: no less than the checker needs.
        return study._replace(result=SweepResult(data.assign_attrs(max_new_tokens=answers.max_new_tokens)))
    except (WpjaxError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return study._replace(no_answers=" ".join(str(error).split()))
