"""What the engine is meant to reach, beside what the results of a folder say: met, missed or not measured.

python -m experiments.bench.goals experiments/bench
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.records import table

WHOLE, CACHED = "torch, whole forward", "torch, cached prefix"

Report = dict[str, Any]


class Goal(NamedTuple):
    """One figure that is wanted.

    Attributes:
        what: it is of.
        of: name of the result that has it.
        on: "cpu" or "gpu".
        figure: from a result; None where that one does not have it.
        limit: what is wanted.
        at_least: whether more is better.
        unit: of figure and limit.
    """

    what: str
    of: str
    on: str
    figure: Callable[[Report], float | None]
    limit: float
    at_least: bool
    unit: str


def speed_up(rival: str) -> Callable[[Report], float | None]:
    """How many times as long a rival's sweep of heads takes, in float32."""
    return lambda r: r["speed_up"][rival] if r["dtype"] == "float32" else None


def share(dtype: str) -> Callable[[Report], float | None]:
    """Of the ceiling, in a sweep of neurons."""
    return lambda r: r["exact"]["neuron"]["share"] if r["dtype"] == dtype else None


def all_neurons(n_prompts: int) -> Callable[[Report], float | None]:
    """Seconds of a sweep of every neuron up to the anchor."""

    def figure(report: Report) -> float | None:
        swept = report["exact"]["neuron"]
        is_whole = swept["components"] == swept["of"] and report["prompts"] >= n_prompts
        return swept["seconds"] if is_whole else None

    return figure


def screens(report: Report) -> float:
    """Of components of every kind, in forward passes."""
    return report["screen"]["forwards"]["components of every kind"]


def programs(report: Report) -> float | None:
    """Compiled for a kind, at most, whatever the depth."""
    if "compilation" not in report:
        return None
    return max(c["programs"] / c["kinds"] for c in report["compilation"].values())


def two_devices(report: Report) -> float | None:
    """Throughput of an exact sweep on a CPU that is divided into two devices, against the CPU as one."""
    return report["devices"]["1"] / report["devices"]["2"] if "devices" in report else None


def sets(begins: tuple[str, ...]) -> Callable[[Report], float | None]:
    """The most forward passes that a set costs, of some rows."""
    return lambda r: max(n for name, n in r["joint"]["forwards"].items() if name.startswith(begins))


def waited(name: str, what: str = "median") -> Callable[[Report], float | None]:
    """Seconds that a command makes one wait: for its end or, of a sweep, for one of its milestones."""
    return lambda r: r["seconds"].get(name, r.get("sweeps", {}).get(name, {})).get(what)


def compiled_again(report: Report) -> float | None:
    """Compilation of a command that is run a second time, as a share of the first time's."""
    return report["compiling"]["second"] / report["compiling"]["first"] if "compiling" in report else None


def merging_memory(report: Report) -> float:
    """What merging takes beside its plan, as a share of the base and a tensor of each expert."""
    return report["tensors_MiB"] / (report["base_MiB"] + report["experts"] * report["largest_tensor_MiB"])


def step(figure: str) -> Callable[[Report], float | None]:
    """Of a step of a learned mask, by the divergence from the expert."""
    return lambda r: r["steps"]["kl, 1 run"][figure]


SWEEP, QUICK = "`wpjax sweep`", "`wpjax sweep --quick`"
LARGER, EMBEDDED = "engine.smollm2", "engine.tiny"
EVERY_SET, FEW = sets(("arbitrary", "sets within")), sets(("sets within 4%",))
GOALS = (
    Goal("`wpjax demo`", "startup", "cpu", waited("`wpjax demo`"), 30, False, "s"),
    Goal("sweep of SmolLM2: first line", "startup", "cpu", waited(SWEEP, "first line"), 3, False, "s"),
    Goal("sweep of SmolLM2: plan", "startup", "cpu", waited(SWEEP, "plan"), 20, False, "s"),
    Goal("sweep of SmolLM2: ranking", "startup", "cpu", waited(SWEEP, "ranking"), 300, False, "s"),
    Goal("sweep of SmolLM2: end, tests included", "startup", "cpu", waited(SWEEP, "end"), 480, False, "s"),
    Goal("sweep of SmolLM2: longest silence", "startup", "cpu", waited(SWEEP, "longest silence"), 5, False, "s"),
    Goal("first look at SmolLM2 (`--quick`): end", "startup", "cpu", waited(QUICK, "end"), 90, False, "s"),
    Goal("compiling at the second start, of the first", "startup", "cpu", compiled_again, 0.2, False, ""),
    Goal("heads, against whole forwards in torch", "heads", "cpu", speed_up(WHOLE), 6, True, "times"),
    Goal("heads, against a cached prefix in torch", "heads", "cpu", speed_up(CACHED), 1.7, True, "times"),
    Goal("neurons of SmolLM2, share of the ceiling", LARGER, "cpu", share("float32"), 0.75, True, ""),
    Goal("all neurons of the embedded pair", EMBEDDED, "cpu", all_neurons(16), 20, False, "s"),
    Goal("first-order scores of everything, SmolLM2", LARGER, "cpu", screens, 5, False, "forward passes"),
    Goal("two devices, against one with the same cores", EMBEDDED, "cpu", two_devices, 0.9, True, "times"),
    Goal("programs a kind, at any depth", EMBEDDED, "cpu", programs, 1, False, ""),
    Goal("a set, whichever, SmolLM2", LARGER, "cpu", EVERY_SET, 2.2, False, "forward passes"),
    Goal("a set, whichever, embedded pair", EMBEDDED, "cpu", EVERY_SET, 2.2, False, "forward passes"),
    Goal("a set that touches few channels, SmolLM2", LARGER, "cpu", FEW, 1.2, False, "forward passes"),
    Goal("a set that touches few channels, embedded pair", EMBEDDED, "cpu", FEW, 1.2, False, "forward passes"),
    Goal("TIES of SmolLM2, against mergekit", "merging", "cpu", lambda r: r["speed_up"], 5, True, "times"),
    Goal("its memory, of the base and a tensor an expert", "merging", "cpu", merging_memory, 1, False, ""),
    Goal("a step of a learned mask, SmolLM2", "relax.smollm2", "cpu", step("forwards"), 4.5, False, "forward passes"),
    Goal("200 steps of it, SmolLM2", "relax.smollm2", "cpu", step("minutes"), 20, False, "CPU minutes"),
    Goal("heads, against whole forwards in torch", "heads", "gpu", speed_up(WHOLE), 30, True, "times"),
    Goal("heads, against a cached prefix in torch", "heads", "gpu", speed_up(CACHED), 15, True, "times"),
    Goal("neurons of SmolLM2, share of the ceiling in bfloat16", LARGER, "gpu", share("bfloat16"), 0.5, True, ""),
    Goal("all neurons of SmolLM2, 16 prompts", LARGER, "gpu", all_neurons(16), 60, False, "s"),
    Goal("all neurons at the shape of Llama-3.1-8B", "shape.llama-3.1-8b", "gpu",
         lambda r: r["every_seconds"] / 60, 30, False, "min"),
)  # fmt: skip


def load(folder: Path) -> dict[str, Report]:
    """Every result of a folder by its name: `heads`, and `heads.gpu` of an accelerator."""
    return {path.name.removesuffix(".json"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("*.json"))}  # fmt: skip


def judge(goal: Goal, results: dict[str, Report]) -> tuple[str, str]:
    """The figure, and whether it is what is wanted."""
    report = results.get(goal.of if goal.on == "cpu" else f"{goal.of}.{goal.on}")
    figure = goal.figure(report) if report is not None and report["device"].startswith(goal.on) else None
    if report is None or figure is None:
        return "", "not measured"
    on = f" ({report['device_kind']})" if goal.on == "gpu" else ""
    met = figure >= goal.limit if goal.at_least else figure <= goal.limit
    return f"{figure:.3g}{on}", "met" if met else "missed"


def markdown(folder: Path) -> str:
    """One line a goal."""
    results = load(folder)
    rows = [
        [f"{goal.what}, {'one H100' if goal.on == 'gpu' else 'CPU'}",
         f"{'≥' if goal.at_least else '≤'} {goal.limit:g} {goal.unit}".rstrip(), *judge(goal, results)]
        for goal in GOALS
    ]  # fmt: skip
    return table(["goal", "wanted", "measured", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the results")
    print(markdown(parser.parse_args().folder))


if __name__ == "__main__":
    main()
