"""The verdict of a sweep in words: where the behaviour stands, how concentrated it is, how far to trust it, what next.

It is made from the numbers of the result alone, and says nothing that is not in them.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.columns import EFFECT, effect_estimates, title_of
from wpjax.methods.metrics import reads_anchor
from wpjax.results.origin import Origin
from wpjax.results.reach import LEVEL, Reach
from wpjax.results.sweep_result import SweepResult
from wpjax.results.words import KIND_NAMES, enumerated

Status = Literal["accepted", "undecided", "rejected", "not tested"]
Shape = Literal["concentrated", "in between", "diffuse", "in company"]

FEW, MANY = 0.02, 0.1
"""Half of the joint effect in at most this share of the components is concentrated; in more than that, diffuse."""

_ANCHOR_SAYS = {
    "accepted": "The anchor is accepted: held at the expert's state on it, the base shows the behaviour, and held at "
    "the base's state the expert loses it. So the effects are shares of something that causes the behaviour.",
    "undecided": "The anchor is undecided{reason}: whether the direction that was measured causes the behaviour is "
    "open. The effects on it are real; take the ranking as a first guess until more prompts, or `wpjax validate`, "
    "decide.",
    "rejected": "The anchor is rejected{reason}. The effects are shares of a direction that was not shown to cause the "
    "behaviour: do not read them as where it lives. Measure what the model says instead, or validate.",
    "not tested": "Nothing has tested whether the anchor causes the behaviour: the ranking is of a direction that "
    "tells base and expert apart, no more. `wpjax validate` asks the checker.",
}
_CHECKER_SAYS = {
    "accepted": "The checker finds the behaviour in the expert's answers surely more often than in the base's, so "
    "there is something to find. Whether these components bring it back, `wpjax validate` tells.",
    "undecided": "Whether base and expert differ in the behaviour is undecided{reason}. Take the ranking as a first "
    "guess until more prompts decide.",
    "rejected": "Base and expert do not surely differ in the behaviour{reason}. The effects are shares of some other "
    "difference: check the pair, the prompts and the checker.",
    "not tested": "Nothing has tested whether base and expert differ in the behaviour. `wpjax validate` asks the "
    "checker.",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a sweep found, in words and in the figures behind them.

    Attributes:
        status: what the tests say of what was measured: of the anchor, or (for other metrics) of the behaviour.
        shape: how the effect is spread over components; "in company" if single effects do not add up to half of what
            the components recover together.
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
    result = result.swept
    data, attrs = result.dataset, result.dataset.attrs
    values = result.best() if result.ranking in (EFFECT, *effect_estimates()) else result.values(result.ranking)
    finest = result.finest
    coverage = float(attrs["coverage"])
    is_share = result.ranking != "delta_norm"  # a norm is no share of the gap: it cannot be added up to one
    n_half, n_most = (n_reaching(values[finest], share * coverage) if is_share else None for share in (0.5, 0.9))
    shape = _shape(n_half, int(finest.sum()))
    layers = _layers(data["layer"].values[finest], values[finest])
    status, about = _status(attrs)
    reach = _reach(result)
    points = (
        ("Where", _where(result, values, layers)),
        ("How concentrated", _spread(result, values[finest], shape, n_half, n_most, coverage)),
        ("How much", _covered(int(data.sizes["component"]), coverage)),
        ("How far to trust it", about),
        ("Noise", _noise(result, reach)),
        *_about_pair(attrs),
    )
    commands = () if path is None else _commands(attrs, Path(path), status)
    smallest_q = float("nan") if reach is None else reach.smallest_q
    return Verdict(status, shape, layers, n_half, n_most, int(finest.sum()), coverage, smallest_q, points, commands)


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


def _layers(layers: Int[np.ndarray, " C"], values: Float[np.ndarray, " C"]) -> tuple[int, int] | None:
    """The narrowest range of layers with half of all positive values; of equally narrow ones the fullest."""
    counted: Bool[np.ndarray, " C"] = (values > 0) & (layers >= 0)
    if not counted.any():
        return None
    sums = np.bincount(layers[counted], values[counted])
    for width in range(1, len(sums) + 1):
        held = np.convolve(sums, np.ones(width), "valid")  # sum of each range of this width
        if held.max() >= 0.5 * sums.sum() * (1 - 1e-9):
            return int(held.argmax()), int(held.argmax()) + width - 1
    return None


def _status(attrs: Any) -> tuple[Status, str]:
    """What the tests say, and what that means."""
    anchored = "anchor_acceptance" in attrs or reads_anchor(str(attrs["metric"]))
    says = attrs.get("anchor_acceptance" if anchored else "behaviour_differs", "not tested")
    status, reason = _outcome(str(says))
    about = (_ANCHOR_SAYS if anchored else _CHECKER_SAYS)[status].format(reason=f" ({reason})" if reason else "")
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


def _where(result: SweepResult, values: Float[np.ndarray, " C"], layers: tuple[int, int] | None) -> str:
    data = result.dataset
    kinds = zip(data["swept_kind"].values.astype(str), data["coverage_joint"].values.tolist(), strict=True)
    by_kind = _listed([f"{KIND_NAMES.get(kind, kind)} {share:.0%}" for kind, share in kinds])
    sentences = [f"Patched together, {by_kind} of the gap."]
    if layers is not None and result.ranking != "delta_norm":
        first, last = layers
        place = f"layer {first}" if first == last else f"layers {first} to {last}"
        every = f"0 to {int(data.attrs['n_layers']) - 1}"
        sentences.insert(0, f"Half of all single effects stand in {place} (of {every}).")
    order = [i for i in np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:3] if values[i] > 0]
    if order:
        names = data["name"].values.astype(str)
        sentences.append(f"The largest alone: {', '.join(f'{names[i]} ({values[i]:+.3g})' for i in order)}.")
    return " ".join(sentences)


def _spread(
    result: SweepResult,
    values: Float[np.ndarray, " C"],
    shape: Shape,
    n_half: int | None,
    n_most: int | None,
    coverage: float,
) -> str:
    if result.ranking == "delta_norm":
        return "Not known: nothing but the size of the changes was measured."
    if not coverage > 0:
        return "Not known: together the components recover nothing."
    reached = float(values[values > 0].sum()) / coverage
    how = "Counted by adding up single effects, the largest first" + _by_estimates(result)
    if n_half is None:
        return (
            f"Largely in company: added up, all positive single effects of {len(values):,} components make "
            f"{reached:.0%} of what the components recover together. The rest appears only where they are patched "
            "together."
        )
    most = (
        f"{n_most:,} reach 90%"
        if n_most is not None
        else f"all positive ones reach {reached:.0%}, the rest appears only in company"
    )
    rule = {
        "concentrated": "Concentrated",
        "in between": "Neither concentrated nor diffuse",
        "diffuse": "Diffuse",
    }[shape]
    components = "components reaches" if n_half == 1 else "components reach"
    return (
        f"{rule}: {n_half:,} of {len(values):,} {components} half of what all recover together, {most}. {how}. (Up "
        f"to {FEW:.0%} of the components for the half is called concentrated, above {MANY:.0%} diffuse.)"
    )


def _by_estimates(result: SweepResult) -> str:
    """What stands in for effects that were not measured, as the rest of a sentence."""
    if not np.isnan(result.dataset[EFFECT].values).any():
        return ""
    shown = next((name for name in effect_estimates() if name in result.dataset), result.ranking)
    some = "where a component was not replaced" if result.dataset["exact"].values.any() else "for all components"
    return f" (by the estimate {title_of(shown)} {some})"


def _covered(n: int, coverage: float) -> str:
    told = f"All {n:,} components that were swept, patched together, recover {coverage:.0%} of the gap."
    if coverage < 0.5:
        told += " Most of it lies elsewhere: sweep more kinds, say --kinds head,kv_group,neuron,norm,embed."
    return told


def _about_pair(attrs: Any) -> tuple[tuple[str, str], ...]:
    """What is worth knowing of base and expert; nothing where nothing is recorded."""
    notes = attrs.get("pair_notes")
    return (("The pair", f"{notes}."),) if isinstance(notes, str) and notes else ()


def _reach(result: SweepResult) -> Reach | None:
    """What q-values the sweep can have; None if nothing was tested."""
    data, attrs = result.dataset, result.dataset.attrs
    n_tested = int(np.isfinite(data["q_value"].values).sum())
    if not n_tested:
        return None
    seed = attrs.get("seed", 0)
    seed = int(seed) if isinstance(seed, int | np.integer) and 0 <= seed < 2**32 else 0
    return Reach.of(int(attrs["n_queries"]), int(data.sizes["component"]), n_tested, seed)


def _noise(result: SweepResult, reach: Reach | None) -> str:
    data = result.dataset
    exact = data["exact"].values.astype(bool)
    found = int((data["q_value"].values < LEVEL).sum())
    # Where one is found, so are all of so small a p: then no large effect was missed for want of queries.
    about_q = f" {reach}".rstrip() if reach is not None and not found else ""
    if not exact.any():
        return "No component was replaced alone, so there is no noise floor: the ranking is an estimate." + about_q
    above = int((exact & ~data["below_noise_floor"].values.astype(bool)).sum())
    return (
        f"Rounding alone makes effects up to {float(data.attrs['noise_floor']):.1e}; {above:,} of {int(exact.sum()):,} "
        f"replaced components are above it, and {found:,} have q < {LEVEL:g}.{about_q}"
    )


def _listed(parts: list[str]) -> str:
    """Shares of kinds as one phrase: "heads 40%, KV groups 10% and neurons 50%", with its verb."""
    first = parts[0].rpartition(" ")
    parts = [f"{first[0]} recover {first[2]}", *parts[1:]]
    return enumerated(parts)


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
