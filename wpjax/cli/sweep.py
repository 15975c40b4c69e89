"""`wpjax sweep`."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wpjax.cli.options import (
    BaseOption,
    BehaviourOption,
    CausalName,
    CausalOption,
    CheckerOption,
    Dtype,
    DtypeOption,
    ExpertOption,
    IgnoreConfigOption,
    JsonOption,
    NewTokensOption,
    OutOption,
    OverwriteOption,
    PromptsOption,
    ResponseTokensOption,
    ResumeOption,
    SeedOption,
    SteeredOption,
)
from wpjax.estimators import check_method, described, find_method, methods

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wpjax.results import Row, SweepResult

EXAMPLE = "Example: wpjax sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --out title.nc"


MARKS = ("anchor_acceptance", "behaviour_differs")
"""Attributes of a result that its ranking must not be read without, beside those of its method."""


class MetricName(enum.StrEnum):
    """What effects are measured on."""

    anchor = "anchor"
    response = "response"
    decision = "decision"
    kl = "kl"
    on_policy = "on_policy"


Method = Literal[tuple(method.name for method in methods())]  # type: ignore[valid-type]


def run(
    base: BaseOption,
    expert: ExpertOption,
    behaviour: BehaviourOption,
    out: OutOption,
    checker: CheckerOption = None,
    anchor: Annotated[Path | None, typer.Option("--anchor", help="From `wpjax anchor`; fitted if absent.")] = None,
    metric: Annotated[
        MetricName,
        typer.Option(
            "--metric",
            help="anchor: has the control state formed? response: log-probability of the expert's own answer. "
            "decision: log-odds where base and expert first part ways. kl: divergence from the expert along its "
            "answer. on_policy: the anchor along each patched model's own answer. All but the first count components "
            "after the anchor too.",
        ),
    ] = MetricName.anchor,
    given_anchor: Annotated[
        Path | None,
        typer.Option(
            "--given-anchor",
            help="From `wpjax anchor`: both models are held at the expert's mean state on it, and what comes after is "
            "swept: which components execute the behaviour? With --metric response, decision or kl.",
        ),
    ] = None,
    n_response: ResponseTokensOption = 0,
    max_new_tokens: NewTokensOption = 32,
    causal: CausalOption = CausalName.require,
    n_steered: SteeredOption = 64,
    kinds: Annotated[
        str,
        typer.Option(
            "--kinds",
            help="Comma-separated: head,kv_group,neuron,attn,mlp,layer,norm,embed,unembed,final_norm (the last two act "
            "on what is said: not on the anchor).",
        ),
    ] = "head,kv_group,neuron",
    components: Annotated[
        str | None, typer.Option("--components", help="Comma-separated names to sweep instead, e.g. L3.head.5,L4.mlp.")
    ] = None,
    method: Annotated[
        Method,
        typer.Option("--method", help=described()),
    ] = "screen+exact",
    top: Annotated[
        int,
        typer.Option("--top", min=1, help="Components of each kind replaced after a screen, or that a race is for."),
    ] = 512,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=0.9999, help="Of a race: that it loses none of the true top.")
    ] = 0.95,
    stratum: Annotated[
        int, typer.Option("--stratum", min=0, help="Random others of each kind replaced too: what did the screen miss?")
    ] = 64,
    n_masks: Annotated[int, typer.Option("--n-masks", min=8, help="Random sets a share, with --method masks.")] = 256,
    set_score: Annotated[
        bool,
        typer.Option(
            "--set-score/--no-set-score",
            help="Also rank components to be patched together, by the secant adjoint of anchor and decision score on "
            "the way from base to expert; `wpjax validate` takes that ranking.",
        ),
    ] = True,
    n_prompts: PromptsOption = 64,
    dtype: DtypeOption = Dtype.float32,
    memory: Annotated[
        float | None,
        typer.Option("--memory-mb", min=1, max=2**30, help="Memory for a chunk of patches; chosen if absent."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="New folder for a JAX profile of the sweep, to open with XProf or Perfetto."),
    ] = None,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    show: Annotated[int, typer.Option("--show", min=1, help="Rows to print.")] = 20,
    ignore_config: IgnoreConfigOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of the behaviour each component's weights carry, and write the result."""
    from wpjax.errors import AnchorRejected, OutputError, WpjaxError
    from wpjax.files import check_output

    check_output(out, overwrite)
    if profile is not None:
        if profile.exists():
            raise OutputError(f"--profile {profile} exists; name a new folder")
        check_output(profile)

    import jax

    import wpjax
    from wpjax import behaviours, sweeps
    from wpjax.anchors import Anchor, fit_anchor
    from wpjax.cli.console import on_interrupt, progress_bars
    from wpjax.components import check_kind
    from wpjax.metrics import ANSWER_METRICS, Metric, decision_metric
    from wpjax.pairs import load_pair
    from wpjax.results import Shards
    from wpjax.steering import Judge, check_behaviour_differs

    names = [k.strip() for k in kinds.split(",") if k.strip()]
    for kind in names:
        check_kind(kind)
    check_method(method, metric != MetricName.on_policy)
    reads_anchor = metric in (MetricName.anchor, MetricName.on_policy)
    if anchor is not None and not reads_anchor:
        raise WpjaxError(
            f"--anchor {anchor} goes with --metric anchor or on_policy, not with --metric {metric.value}; drop one"
        )
    if n_response and (anchor is not None or not reads_anchor):
        raise WpjaxError("--response-tokens is for an anchor that is fitted here; drop it, --anchor or --metric")
    if given_anchor is not None and reads_anchor:
        raise WpjaxError("--given-anchor needs --metric response, decision or kl: the anchor itself is given")
    task = behaviours.behaviour(behaviour, checker)
    pair = load_pair(base, expert, dtype, tuple(ignore_config or ()))
    batch = task.encode(pair.tokenizer, "sweep", n_prompts)

    def fitted() -> Anchor:
        with on_interrupt(lambda: "nothing was written"), progress_bars() as progress:
            return fit_anchor(
                pair,
                task,
                n_response=n_response,
                n_prompts=n_prompts,
                causal=causal.value,
                n_steered=n_steered,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            )

    given, differs, own = None, "", None
    if metric != MetricName.anchor:  # an anchor has causal tests of its own
        judge = Judge(pair, task, batch, max_new_tokens)
        own, differs = judge.answers(pair.expert), "not tested"
        if causal != CausalName.skip:
            task.check_checker()
            try:
                check_behaviour_differs(judge, judge.answers(pair.base), own)
            except AnchorRejected as error:
                if causal == CausalName.require:
                    raise AnchorRejected(f"{error} (--causal report goes on and marks the result)") from error
                differs = str(error)
            else:
                differs = "by the checker"
    what: Anchor | Metric | sweeps.OnPolicy
    if reads_anchor:
        read = Anchor.load(anchor) if anchor else fitted()
        read.check_belongs(pair)
        measured = read.metric(pair, batch)
        what = read if metric == MetricName.anchor else sweeps.OnPolicy(read, max_new_tokens)
    else:
        if given_anchor is not None:
            given = Anchor.load(given_anchor)
            given.check_belongs(pair)
        what = measured = ANSWER_METRICS[metric.value](pair, batch, max_new_tokens, own)
    settings = {
        "versions": [wpjax.__version__, jax.__version__, f"{len(jax.local_devices())} {jax.devices()[0]}"],
        "pair": pair.fingerprints,
        "prompts": batch.texts,
        "metric": [metric.value, measured.digest, max_new_tokens if metric == MetricName.on_policy else None],
        "given": None if given is None else given.metric(pair, batch).digest,
        "kinds": names,
        "components": components,
        "method": method,
        "top": top,
        "stratum": stratum,
        "n_masks": n_masks,
        "confidence": confidence,
        "dtype": dtype,
        "seed": seed,
    }
    shards = Shards(out.with_name(f".{out.name}.sweep"), settings, resume)

    def kept() -> str:
        return "finished parts are kept: go on with --resume" if len(shards) else "nothing was written"

    profiled = contextlib.nullcontext() if profile is None else jax.profiler.trace(str(profile))
    with on_interrupt(kept), profiled, progress_bars() as progress:
        result = sweeps.sweep(
            pair,
            batch,
            what,
            given=given,
            kinds=names,
            components=None if components is None else [c.strip() for c in components.split(",") if c.strip()],
            method=method,
            top=top,
            stratum=stratum,
            n_masks=n_masks,
            confidence=confidence,
            seed=seed,
            budget=None if memory is None else int(memory * 2**20),
            done=shards,
            progress=progress,
        )
    if differs:
        result.dataset.attrs["behaviour_differs"] = differs
    result.to_netcdf(out, overwrite)
    shards.discard()
    if set_score and given_anchor is None:
        with on_interrupt(lambda: f"{out} is written, without a set score"), progress_bars() as progress:
            progress("set score", 0, 1)
            try:
                used = [measured] if reads_anchor or metric == MetricName.decision else []
                if metric != MetricName.decision:
                    used.append(decision_metric(pair, batch, max_new_tokens))
                result = sweeps.add_set_score(pair, result, used)
            except (WpjaxError, MemoryError, jax.errors.JaxRuntimeError) as error:
                print("no set score: " + " ".join(str(error).split()), file=sys.stderr)
            else:
                result.to_netcdf(out, overwrite=True)
            progress("set score", 1, 1)
    print_result(result, show, as_json)
    if not as_json:
        print(f"\nwrote {out}; for the pictures: wpjax report {out} --out {out.with_suffix('.html')}")


def print_result(result: SweepResult, n: int, as_json: bool) -> None:
    """The ranked table, with the gap, the noise floor and the coverage."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.columns import EFFECT, find_column

    data, attrs = result.dataset, result.dataset.attrs
    method = find_method(str(attrs.get("method")))
    by = result.ranking
    rows, exact, column = result.top(n, by=by), by == EFFECT, find_column(by)
    coverage = dict(
        zip(result.dataset["swept_kind"].values.tolist(), result.dataset["coverage_joint"].values.tolist(), strict=True)
    )
    if as_json:
        print_json(
            {"ranked_by": by, "top": [r._asdict() for r in rows], "coverage": {**coverage, "all": attrs["coverage"]}}
            | {name: result.attribute(name) for name in (*MARKS, *(method.marks if method else ())) if name in attrs}
        )
        return
    bounds, tested = (column.bounds, column.is_tested) if column else ((), False)
    place = {name: i for i, name in enumerate(data["name"].values.tolist())}

    def line(r: Row) -> Iterator[str]:
        yield from (r.name, f"{r.value:+.4f}")
        if bounds:
            low, high = (float(data[bound].values[place[r.name]]) for bound in bounds)
            yield f"[{low:+.4f}, {high:+.4f}]"
        if tested:
            yield f"{r.q_value:.2g}"
        if exact:
            yield "below the noise floor" if r.below_noise_floor else ""

    print_table(
        f"{attrs['behaviour']}: {attrs['base']} -> {attrs['expert']}, {attrs['metric']} metric"
        + (
            f" at layer {attrs['metric_layer']}" if attrs["metric"] in (MetricName.anchor, MetricName.on_policy) else ""
        ),
        ("component", by, *["95 % interval"][: bool(bounds)], *["q"][:tested], *[""][:exact]),
        [tuple(line(r)) for r in rows],
    )
    at_once = ", ".join(f"{kind} {n}" for kind, n in json.loads(attrs["rows_per_program"]).items())
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in coverage.items())
    print(
        f"\ngap {attrs['gap_mean']:.3g} [{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}] on "
        f"{attrs['n_prompts']} prompts; recovered jointly: {parts}, together {attrs['coverage']:.0%}"
        + (f"; noise floor {attrs['noise_floor']:.1e}; patches at once: {at_once}" if exact else "")
        + (f"\n{method.note(result)}" if method and method.note else "")
        + (f"\nthe anchor's causal tests: {attrs['anchor_acceptance']}" if "anchor_acceptance" in attrs else "")
        + (f"\ndo base and expert differ: {attrs['behaviour_differs']}" if "behaviour_differs" in attrs else "")
    )
