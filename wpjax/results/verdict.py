"""The verdict of a sweep in words: where the behaviour stands, how concentrated it is, how far to trust it, what next.

It is made from the numbers of the result alone, and says nothing that is not in them.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from wpjax.methods.metrics import reads_anchor
from wpjax.results.origin import Origin
from wpjax.results.reach import Reach
from wpjax.results.sweep_result import SweepResult
from wpjax.results.telling import (
    ANCHOR_SAYS,
    CHECKER_SAYS,
    a_set,
    about_pair,
    adds_up,
    how_concentrated,
    layers_of_half,
    noise,
    set_members,
    what_it_does,
    what_the_set_says,
    what_was_measured,
    where,
    where_they_part,
)

Status = Literal["accepted", "undecided", "rejected", "not tested"]
Shape = Literal["concentrated", "in between", "diffuse", "in company", "not known"]

FEW, MANY = 0.02, 0.1
"""Half of the joint effect in at most this share of the components is concentrated; in more than that, diffuse."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a sweep found, in words and in the figures behind them.

    Attributes:
        status: what the tests say of what was measured: of the anchor, or (for other metrics) of the behaviour.
        shape: how the effect is spread over components; "in company" if single effects do not add up to half of what
            the components recover together; "not known" if effects of weights were not measured.
        layers: the narrowest range of layers, both ends included, in which half of all positive single effects stand;
            None if there are none.
        n_half: how many components, the largest effects first, add up to half of the coverage; None if none do.
        n_most: the same for 90 %.
        n_components: number of components that these are counted among: those that `SweepResult.finest` marks.
        coverage: share of the gap that all swept components recover as one patch.
        smallest_q: no q-value of this sweep can be smaller, however large an effect is; NaN if nothing was tested.
        points: headings and sentences, in the order in which they are read.
        commands: what to run next, quoted for a shell; empty if the path of the result is not known.
    """

    status: Status
    shape: Shape
    layers: tuple[int, int] | None
    n_half: int | None
    n_most: int | None
    n_components: int
    coverage: float
    smallest_q: float
    points: tuple[tuple[str, str], ...]
    commands: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{heading}: {sentence}" for heading, sentence in self.points]
        return "\n".join([*lines, *(f"Next: {command}" for command in self.commands)])


def verdict(result: SweepResult, path: str | Path | None = None) -> Verdict:
    """What a sweep found, in words.

    How many components reach a share of the joint effect is counted so: positive effects of the finest components are
    added up, the largest first, until they make that share of the coverage. Effects are exact where a component was
    replaced, elsewhere the estimate that chose. Single effects need not add up to the joint one, so the count is a
    description, not a set to patch; `wpjax validate` patches sets.

    Args:
        result: the sweep.
        path: where its file is, for the commands that come next; None to leave them out.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:title")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> found = wp.verdict(wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="exact"), "title.nc")
    >>> found.status, found.commands[0]
    ('not tested', 'wpjax validate title.nc')
    """
    whole, result = result, result.swept
    data, attrs = result.dataset, result.dataset.attrs
    values = result.best() if adds_up(result) else result.values(result.ranking)
    finest = result.finest
    coverage = float(attrs["coverage"])
    is_share = adds_up(result)
    n_half, n_most = (n_reaching(values[finest], share * coverage) if is_share else None for share in (0.5, 0.9))
    shape = _shape(n_half, int(finest.sum())) if is_share else "not known"
    layers = layers_of_half(data["layer"].values[finest], values[finest]) if is_share else None
    status, about = _status(result)
    if status != "accepted":
        about = f"{about} {what_the_set_says(whole)}".rstrip()
    reach = _reach(result)
    single = np.where(finest, values, np.nan)
    points = (
        ("What it does", what_it_does(whole)),
        ("How far to trust it", about),
        ("What was measured", what_was_measured(result)),
        (
            "Where",
            " ".join(filter(None, (where(result, values, layers), where_they_part(whole, _layers_parted(whole))))),
        ),
        ("How concentrated", how_concentrated(result, single, n_half, n_most)),
        *((("A set of them", told),) if (told := a_set(whole, _layers_of_set(whole))) else ()),
        ("Noise", noise(result, reach)),
        *about_pair(attrs),
    )
    commands = () if path is None else _commands(attrs, Path(path), status)
    smallest_q = float("nan") if reach is None else reach.smallest_q
    return Verdict(status, shape, layers, n_half, n_most, int(finest.sum()), coverage, smallest_q, points, commands)


def _layers_parted(result: SweepResult) -> tuple[int, int] | None:
    """The layers that hold half of the gap where answers part ways."""
    if "set_share" not in result.dataset:
        return None
    layers, shares = (result.dataset[name].values[result.finest] for name in ("layer", "set_share"))
    return layers_of_half(layers, shares)


def _layers_of_set(result: SweepResult) -> tuple[int, int] | None:
    """The layers that hold half of the components of the set whose answers the result holds."""
    layers = np.array([layer for _, layer in set_members(result)], int)
    return layers_of_half(layers, np.ones(len(layers)))


def n_reaching(values: Float[np.ndarray, " C"], total: float) -> int | None:
    """How many of the largest positive values add up to a total; None if all of them do not, or there is no total.

    >>> n_reaching(np.array([0.1, 0.5, np.nan, -1.0, 0.3]), 0.8)
    2
    """
    positive = -np.sort(-values[values > 0])
    sums = np.cumsum(positive)
    if not total > 0 or not sums.size or not sums[-1] >= total * (1 - 1e-9):
        return None
    return int(np.searchsorted(sums, total * (1 - 1e-9))) + 1


def _shape(n_half: int | None, n: int) -> Shape:
    if n_half is None:
        return "in company"
    if n_half == 1 or n_half <= FEW * n:
        return "concentrated"
    return "diffuse" if n_half > MANY * n else "in between"


def _status(result: SweepResult) -> tuple[Status, str]:
    """What the tests say, and what that means."""
    attrs = result.dataset.attrs
    anchored = "anchor_acceptance" in attrs or reads_anchor(str(attrs["metric"]))
    says = attrs.get("anchor_acceptance" if anchored else "behaviour_differs", "not tested")
    status, reason = _outcome(str(says))
    reason = reason or (_tests(result) if anchored and status == "accepted" else "")
    about = (ANCHOR_SAYS if anchored else CHECKER_SAYS)[status].format(reason=f" ({reason})" if reason else "")
    differs = _outcome(str(attrs.get("behaviour_differs", "not tested")))
    if anchored and differs[0] in ("undecided", "rejected"):
        about += f" It is not certain that base and expert differ in the behaviour ({differs[1]})."
    if attrs.get("quick"):
        about += " It is a first look (--quick): few prompts, and few components were replaced."
    if attrs.get("split") == "all":
        about += (
            " All prompts served to fit, to sweep and to test (--split none): the figures are of these prompts, and "
            "say little of others."
        )
    return status, about


def _tests(result: SweepResult) -> str:
    """The figures of the anchor's tests; empty if the result does not hold them."""
    data, layer = result.dataset, int(result.dataset.attrs["metric_layer"])
    names = ("steered", "steered_random", "removed", "removed_random")
    if not all(f"anchor_{name}" in data for name in names):
        return ""
    steered, at_random, removed, without_random = (f"{float(data[f'anchor_{n}'].values[layer]):.0%}" for n in names)
    return (
        f"base steered along it: {steered} of the prompts, along random directions {at_random}; expert without it: "
        f"{removed}, without a random direction instead {without_random}"
    )


def _outcome(text: str) -> tuple[Status, str]:
    """Outcome of the tests, and its reason, from the text of an attribute: it begins with the outcome, or is a reason
    for a rejection.
    """
    if text in ("accepted", "by the checker"):
        return "accepted", ""
    for status in ("not tested", "undecided", "rejected", "accepted"):
        if text.startswith(status):
            return status, text.removeprefix(status).lstrip(":,; ")  # type: ignore[return-value]
    return "rejected", text


def _reach(result: SweepResult) -> Reach | None:
    """What q-values the sweep can have; None if nothing was tested."""
    data, attrs = result.dataset, result.dataset.attrs
    n_tested = int(np.isfinite(data["q_value"].values).sum())
    if not n_tested:
        return None
    seed = attrs.get("seed", 0)
    seed = int(seed) if isinstance(seed, int | np.integer) and 0 <= seed < 2**32 else 0
    return Reach.of(int(attrs["n_queries"]), int(data.sizes["component"]), n_tested, seed)


def _commands(attrs: Any, path: Path, status: Status) -> tuple[str, ...]:
    """What to run next, the most useful first."""
    origin, file = Origin.of(attrs), as_argument(path)
    needs = ["--checker", origin.checker] if origin.checker is not None and origin.checker_is_code else []
    if origin.checker is None and origin.behaviour.endswith(".jsonl"):
        needs = ["--checker", "CHECKER"]
    commands = [["validate", file, *needs]]
    quick = bool(attrs.get("quick"))
    if quick or status in ("undecided", "rejected"):
        asked = ["--base", origin.base, "--expert", origin.expert, "--behaviour", origin.behaviour]
        asked += [] if origin.checker is None else ["--checker", origin.checker]
        asked += ["--split", "none"] if origin.split == "none" else []
        asked += [] if origin.tokenizer is None else ["--tokenizer", origin.tokenizer]
        asked += [] if origin.dtype == "float32" else ["--dtype", origin.dtype]
        asked += [part for name in origin.ignore_config for part in ("--ignore-config", name)]
        asked += ["--kinds", "delta_direction"] if origin.is_divided else []
        asked += [] if origin.rank is None else ["--rank", str(origin.rank)]
        if status == "rejected":
            change, name = ["--metric", "decision"], "decision"
        else:  # without --quick it uses more prompts in any case
            change, name = ([], "full") if quick else (["--n-steered", "256"], "more")
        again = ["sweep", *asked, *change, "--out", as_argument(path.with_name(f"{path.stem}-{name}.nc"))]
        commands.insert(0 if status == "rejected" else 1, again)
    commands.append(["report", file, "--out", as_argument(path.with_suffix(".html"))])
    if status != "rejected" and not origin.is_divided:  # a patch file holds no directions
        commands.append(["extract", file, *needs, "--out", as_argument(path.with_suffix(".safetensors"))])
    return tuple(shlex.join(["wpjax", *command]) for command in commands)


def as_argument(path: Path) -> str:
    """A path as an argument of a command: one that begins with a dash would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
