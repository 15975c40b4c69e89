"""The sentences of a verdict (`results.verdict`). Each says one thing; a warning stands before what it is about."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.columns import EFFECT, effect_estimates, find_column, title_of
from wpjax.methods.metrics import MetricEntry, metric_entries
from wpjax.results.answers import Answers
from wpjax.results.origin import Origin
from wpjax.results.reach import LEVEL, Reach
from wpjax.results.sweep_result import SweepResult
from wpjax.results.words import KIND_NAMES, counted, enumerated

FEW_PROMPTS = 12
"""With fewer prompts than this, a difference of one or two answers is called chance."""

_USUAL = ("head", "kv_group", "neuron", "norm", "embed")
"""Kinds that together own all weights, as good as."""

_WITHIN = {
    "attn": ("head", "kv_group"),
    "mlp": ("neuron",),
    "layer": ("head", "kv_group", "neuron", "norm"),
    "delta_direction": ("head", "kv_group", "neuron"),
}
"""Kind -> the kinds that it holds, or (directions) that are not swept beside it."""

_LAYERS_SHOWN, _LEAST_SHOWN = 4, 0.1
"""Layers that are named with their share, at most; and the smallest share that is named."""

ANCHOR_SAYS = {
    "accepted": "The direction that was measured, the anchor, passed its tests{reason}: held at the expert's state on "
    "it, the base shows the behaviour, and held at the base's state the expert loses it. So the shares below are of "
    "something that causes the behaviour.",
    "undecided": "It is not shown that the direction that was measured, the anchor, causes the behaviour{reason}. The "
    "shares below may be shares of something else: a first guess, until more prompts or `wpjax validate` decide.",
    "rejected": "Warning: the direction that was measured, the anchor, failed its tests{reason}. The places below are "
    "not shown to carry the behaviour. Measure what the model says instead (--metric decision), or validate.",
    "not tested": "Nothing has tested whether the direction that was measured, the anchor, causes the behaviour: it "
    "tells base and expert apart, no more. `wpjax validate` asks the checker.",
}
"""Outcome of the anchor's tests -> what it means."""

CHECKER_SAYS = {
    "accepted": "The checker finds the behaviour in the expert's answers surely more often than in the base's, so "
    "there is something to find. Whether these components bring it back, `wpjax validate` tells.",
    "undecided": "It is not certain that base and expert differ in the behaviour{reason}: a first guess, until more "
    "prompts decide.",
    "rejected": "Warning: base and expert do not surely differ in the behaviour{reason}. The shares below are of some "
    "other difference: check the pair, the prompts and the checker.",
    "not tested": "Nothing has tested whether base and expert differ in the behaviour. `wpjax validate` asks the "
    "checker.",
}
"""Outcome of the test of base and expert -> what it means."""


def what_it_does(result: SweepResult) -> str:
    """What base and expert do: on how many prompts they show the behaviour, and one prompt with both answers."""
    attrs, answers = result.dataset.attrs, result.answers
    told = [f"The behaviour is {attrs['behaviour']}."]
    if answers is None:
        return told[0]
    n, (by_base, _, by_expert) = len(answers.prompts), answers.passes
    if np.isfinite(answers.passes).all():
        kept = "and served nothing else" if attrs.get("split") != "all" else "and served to find it, too"
        chance = " So few prompts: a difference of one or two is chance." if n < FEW_PROMPTS else ""
        told.append(
            f"On {n} prompts that ask for it {kept}, the base shows it on {by_base.sum():.0f} and the expert on "
            f"{by_expert.sum():.0f}.{chance}"
        )
    asked, base, _, expert = (quoted(text[_shown(answers)]) for text in (answers.prompts, *answers.texts))
    told.append(f"Asked {asked}, the base says {base}, the expert {expert}.")
    if isinstance(length := attrs.get("max_new_tokens"), int | np.integer):
        told.append(f"(Answers end after {length} tokens.)")
    return " ".join(told)


def _shown(answers: Answers) -> int:
    """Number of the prompt that is shown: the first on which base and expert part, or else the first."""
    by_base, _, by_expert = np.nan_to_num(answers.passes)
    return int(np.argmax(by_expert - by_base))


def quoted(text: str, most: int = 160) -> str:
    """The beginning of a text in quotes.

    >>> quoted("one two three", 7)
    '“one two ...”'
    """
    return f"“{text if len(text) <= most else text[:most].rstrip() + ' ...'}”"


def what_was_measured(result: SweepResult) -> str:
    """The metric, the gap, and which components were replaced."""
    data, attrs = result.dataset, result.dataset.attrs
    entry: MetricEntry | None = next((m for m in metric_entries() if m.name == attrs["metric"]), None)
    name = str(attrs["metric"]) if entry is None else entry.label
    at = f", at layer {attrs['metric_layer']}" if entry is not None and entry.reads_anchor else ""
    n, n_exact = int(data.sizes["component"]), int(data["exact"].values.sum())
    if n_exact == n:
        how = f"{_were(n)} swept: each was put into the base alone."
    elif n_exact:
        how = f"{_were(n)} swept: {n_exact:,} of them put into the base alone, the others estimated"
        how += f" ({shown})." if (shown := _estimate(result)) else "."
    elif adds_up(result):
        how = f"{_were(n)} swept: all are estimated ({title_of(result.ranking)}), none was put in alone."
    else:
        how = f"{_were(n)} swept, and no weights put in alone: what is ranked is the {title_of(result.ranking)}."
    return (
        f"The gap: how far the expert stands above the base by the metric, the {name}{at}: {attrs['gap_mean']:.3g} "
        f"[{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}], on {attrs['n_prompts']} prompts. Shares below are of "
        f"it; 95 % intervals stand in brackets. {how}"
    )


def _estimate(result: SweepResult) -> str:
    """What figures call the estimate that stands in for effects that were not measured; empty if there is none."""
    return next((title_of(name) for name in effect_estimates() if name in result.dataset), "")


def adds_up(result: SweepResult) -> bool:
    """Whether a result is ranked by the effect of weights, or an estimate of it: such values may be added up.

    A norm is no share of the gap. Effects of activations, or in company, are shares of it, but no parts.
    """
    return result.ranking in (EFFECT, *effect_estimates())


def _were(n: int) -> str:
    """How many components, and the verb: "1 component was", "2 components were"."""
    return "1 component was" if n == 1 else f"{n:,} components were"


def where(result: SweepResult, values: Float[np.ndarray, " C"], layers: tuple[int, int] | None) -> str:
    """Which kinds and layers hold the effects, and the largest of them.

    Args:
        result: what was swept.
        values: [C], effects or their estimates.
        layers: the narrowest range of layers with half of the positive ones; None if there are none.
    """
    data, coverage = result.dataset, float(result.dataset.attrs["coverage"])
    kinds = zip(data["swept_kind"].values.astype(str), data["coverage_joint"].values.tolist(), strict=True)
    alone = _by_kind(dict(kinds), "recover")
    n = int(data.sizes["component"])
    together = "The one component that was swept recovers" if n == 1 else f"Put in together, all {n:,} of them recover"
    told = [f"{together} {coverage:.0%} of it."]
    if data.sizes["swept_kind"] > 1:
        told.append(f"Kind by kind, {alone}; these need not add up.")
    if 0 <= coverage < 0.5:
        told.append(_elsewhere(result))
    is_share = adds_up(result)
    if layers is not None and is_share:
        told.append(f"{_swept_layers(result)}{_held(result, values, layers)}.")
    order = [i for i in np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:3].tolist() if values[i] > 0]
    if order:
        by = "" if is_share else f" by {title_of(result.ranking)}"
        told.append(f"The largest single ones{by}: {', '.join(_single(result, values, i) for i in order)}.")
        if (
            layers is not None
            and is_share
            and not any(layers[0] <= data["layer"].values[i] <= layers[1] for i in order)
        ):
            told.append("These stand outside that range, which holds many small ones.")
    return " ".join(told)


def _elsewhere(result: SweepResult) -> str:
    """What to sweep where most of the gap is not in what was swept."""
    swept = result.dataset["swept_kind"].values.astype(str).tolist()
    held = {*swept, *(kind for whole in swept for kind in _WITHIN.get(whole, ()))}
    lacking = [kind for kind in _USUAL if kind not in held]
    if not lacking:
        return "Most of it lies elsewhere: in components or layers that were not swept, or in what needs both."
    return f"Most of it lies elsewhere: sweep more kinds, say --kinds {','.join([*swept, *lacking])}."


def _swept_layers(result: SweepResult) -> str:
    """Which layers were swept, if not all; as the beginning of a sentence."""
    swept = result.dataset["layer"].values[result.dataset["layer"].values >= 0]
    n, first, last = int(result.dataset.attrs["n_layers"]), int(swept.min()), int(swept.max())
    if (first, last) == (0, n - 1):
        return f"Of layers 0 to {n - 1}, "
    only = f"layer {first} of 0 to {n - 1} was" if first == last else f"layers {first} to {last} of 0 to {n - 1} were"
    return f"Only {only} swept, the others were not looked at; of these, "


def _held(result: SweepResult, values: Float[np.ndarray, " C"], layers: tuple[int, int]) -> str:
    """What a range of layers holds of the positive single effects; and the layers that hold most, in brackets."""
    of_each = result.dataset["layer"].values
    counts: Bool[np.ndarray, " C"] = result.finest & (values > 0) & (of_each >= 0)
    sums = np.bincount(of_each[counts], values[counts])
    shares = sums / sums.sum()
    first, last = layers
    share = f"{shares[first : last + 1].sum():.0%} of all positive single effects"
    most = [i for i in np.argsort(-shares, kind="stable")[:_LAYERS_SHOWN] if shares[i] >= _LEAST_SHOWN]
    others = ", ".join(f"layer {i}: {shares[i]:.0%}" for i in most if (i, i) != layers)
    place = f"layer {first} holds" if first == last else f"layers {first} to {last} hold"
    return f"{place} {share}" + (f" ({others})" if others else "")


def _half(layers: tuple[int, int]) -> str:
    first, last = layers
    return f"layer {first} holds half" if first == last else f"layers {first} to {last} hold half"


def _single(result: SweepResult, values: Float[np.ndarray, " C"], i: int) -> str:
    """A component and its effect, with its interval where it was replaced."""
    data = result.dataset
    name = str(data["name"].values[i])
    if result.ranking == "delta_norm":
        return f"{name} ({values[i]:.3g})"
    is_exact = bool(np.isfinite(data[EFFECT].values[i]))
    column = find_column(EFFECT if is_exact else result.ranking)
    ends = [float(data[end].values[i]) for end in column.bounds if end in data] if column else []
    if ends and np.isfinite(ends).all():
        return f"{name} {_percent(values[i])} [{_percent(ends[0])}, {_percent(ends[1])}]"
    return f"{name} {_percent(values[i])}" + (" (estimated)" if adds_up(result) and not is_exact else "")


def _percent(share: float) -> str:
    """A share in per cent, with a digit after the point, or two digits where it is small."""
    return f"{share:.1%}" if abs(share) >= 0.001 else f"{100 * share:.2g}%"


def where_they_part(result: SweepResult, layers: tuple[int, int] | None) -> str:
    """Which kinds and layers hold the gap where the answers of the two part ways (`set_share`); empty if not known.

    Args:
        result: the whole result, with the components that were ranked for sets only.
        layers: the narrowest range of layers with half of the positive shares.
    """
    data = result.dataset
    if "set_share" not in data or layers is None:
        return ""
    ranked = np.isfinite(data["set_share"].values) & result.finest
    kinds, shares = data["kind"].values[ranked].astype(str), data["set_share"].values[ranked]
    of_kind = {kind: float(shares[kinds == kind].sum()) for kind in dict.fromkeys(kinds)}
    told = f"By the set score, over all layers: of the log-odds where the two answers part, {_by_kind(of_kind, 'hold')}"
    rest = 1 - sum(of_kind.values())
    told += f" (the other {rest:.0%}: weights that were not ranked)" if rest > 0.01 else ""
    told += f"; {_half(layers)}."
    joint = dict(zip(data["swept_kind"].values.astype(str), data["coverage_joint"].values, strict=True))
    if len(joint) > 1 and max(joint, key=joint.__getitem__) != max(of_kind, key=of_kind.__getitem__):
        told += " The two measures do not agree on which kind holds most, so do not rank the kinds."
    return told


def _by_kind(shares: dict[str, float], verb: str) -> str:
    """Shares of kinds as one phrase: "heads recover 40%, KV groups 10% and neurons 50%"."""
    first, *rest = [(KIND_NAMES.get(kind, kind), f"{share:.0%}") for kind, share in shares.items()]
    return enumerated([f"{first[0]} {verb} {first[1]}", *(f"{name} {share}" for name, share in rest)])


def how_concentrated(
    result: SweepResult, values: Float[np.ndarray, " C"], n_half: int | None, n_most: int | None
) -> str:
    """How many of the largest single effects make up what all components recover together.

    Args:
        result: what was swept.
        values: [C], effects or their estimates of the components that may be added up; NaN at the others.
        n_half: how many make half of it; None if all do not.
        n_most: how many make 90 % of it; None if all do not.
    """
    coverage, n = float(result.dataset.attrs["coverage"]), int(np.isfinite(values).sum())
    if result.ranking == "delta_norm":
        return "Not known: nothing but the size of the changes was measured."
    if not adds_up(result):
        return "Not known: what single weights do was not measured."
    if not coverage > 0:
        return "Not known: together the components recover nothing."
    reached = float(values[values > 0].sum()) / coverage
    if n_half is None:
        return (
            f"The positive single effects of all {n:,} components add up to {reached:.0%} of what all recover "
            "together: most of it shows only when several are put in at once."
        )
    largest = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:n_half]
    these = counted(result.dataset["kind"].values[largest].astype(str))
    effects, make = (
        ("largest single effect", "makes") if n_half == 1 else (f"{n_half:,} largest single effects", "make")
    )
    told = f"Added up, the {effects} of {n:,} ({these}) {make} half of what all recover together"
    if n_most is not None:
        return f"{told}, and 90%." if n_most == n_half else f"{told}, and {n_most:,} make 90%."
    return f"{told}. All positive ones make {reached:.0%}; the rest shows only when several are put in at once."


def judged_answers(result: SweepResult) -> Answers | None:
    """The answers of a result, if the checker judged all of them and the result ranks by what chose their set."""
    answers = result.answers
    known = answers is not None and np.isfinite(answers.passes).all() and answers.by in result.dataset
    return answers if known else None


def a_set(result: SweepResult, layers: tuple[int, int] | None) -> str:
    """The set of components whose answers the result holds, and what it did; empty without answers.

    Args:
        result: the whole result.
        layers: the narrowest range of layers with half of the components of the set.
    """
    answers = judged_answers(result)
    if answers is None:
        return ""
    n, n_all = answers.n_components, int(np.isfinite(result.values(answers.by)).sum())
    kinds = [kind for kind, _ in set_members(result)]
    by_base, by_patched, by_expert = answers.passes.sum(1)
    shows = f"the base shows the behaviour on {by_patched:.0f} of {len(answers.prompts)} prompts (alone on "
    shows += f"{by_base:.0f}; the expert on {by_expert:.0f})"
    tried = enumerated([f"{m:,}" for m in answers.tried])
    is_divided = Origin.of(result.dataset.attrs).is_divided
    of_all = " of all directions" if is_divided else ""
    if n >= n_all:
        told = f"With all that were ranked ({n_all:,}), {shows}."
        told += f" With the best {tried} it does so on too few." if tried else ""
    else:
        size = "" if np.isnan(answers.share) else f", {answers.share:.1%} of the parameters{of_all}"
        place = f"; {_half(layers)} of them" if layers is not None else ""
        told = f"With the {n:,} best by {title_of(answers.by)}, of {n_all:,} that were ranked ({counted(kinds)}{size}"
        told += f"{place}), {shows}."
        told += f" With the best {tried}, on too few." if tried else ""
    i = _shown(answers)
    mark = "passes" if answers.passes[1, i] else "fails"
    besides = "" if is_divided else "; `wpjax extract` measures what a set does besides"  # it takes no directions
    return (
        f"{told} Asked as above, it says {quoted(answers.texts[1][i])}, which {mark}. `wpjax validate` compares sets "
        f"of all sizes with random ones, and takes them out of the expert{besides}."
    )


def what_the_set_says(result: SweepResult) -> str:
    """Whether a set of components brought the behaviour back, as evidence beside the tests; empty if not known."""
    answers = judged_answers(result)
    if answers is None:
        return ""
    n, n_all = answers.n_components, int(np.isfinite(result.values(answers.by)).sum())
    by_base, by_patched, by_expert = answers.passes.sum(1)
    if n >= n_all and not answers.tried:
        return ""  # no set was tried that is small
    if n < n_all and by_patched >= max(by_expert - 1, by_base + 2):
        return (
            f"What speaks for the places: the {n:,} best components alone bring the behaviour back on {by_patched:.0f} "
            f"of {len(answers.prompts)} prompts."
        )
    if n < n_all and by_patched >= by_expert > by_base:
        return (
            f"The {n:,} best components alone bring the behaviour back as often as the expert shows it, but on so few "
            "prompts that it may be chance."
        )
    return "No small set that was tried brings the behaviour back as often as the expert shows it."


def set_members(result: SweepResult) -> list[tuple[str, int]]:
    """Kind and layer of each component of the set whose answers the result holds; empty without answers."""
    answers, data = judged_answers(result), result.dataset
    if answers is None:
        return []
    kinds, layers = data["kind"].values.astype(str), data["layer"].values
    position = {str(name): i for i, name in enumerate(data["name"].values)}
    best = [position[row.name] for row in result.top(answers.n_components, by=answers.by)]
    return [(str(kinds[i]), int(layers[i])) for i in best]


def noise(result: SweepResult, reach: Reach | None) -> str:
    """What rounding does, and how many effects are surely not 0."""
    data = result.dataset
    exact = data["exact"].values.astype(bool)
    found = int((data["q_value"].values < LEVEL).sum())
    # Where one is found, so are all of so small a p: then no large effect was missed for want of queries.
    about_q = f" {reach}".rstrip() if reach is not None and not found else ""
    if not exact.any():
        what = ": the ranking is an estimate." if adds_up(result) else "."
        return f"No component's weights were replaced alone, so there is no noise floor{what}{about_q}"
    above = int((exact & ~data["below_noise_floor"].values.astype(bool)).sum())
    sure = f"{found:,} effects on the metric are surely not 0: they have"
    sure = "1 effect on the metric is surely not 0: it has" if found == 1 else sure
    sure = "no effect on the metric is surely not 0: none has" if not found else sure
    return (
        f"Rounding alone makes effects up to {float(data.attrs['noise_floor']):.1e}; {above:,} of {int(exact.sum()):,} "
        f"replaced components are above it. Tested query by query, {sure} q < {LEVEL:g}.{about_q}"
    )


def about_pair(attrs: Any) -> tuple[tuple[str, str], ...]:
    """What is worth knowing of base and expert; nothing where nothing is recorded."""
    notes = attrs.get("pair_notes")
    return (("The pair", f"{notes}."),) if isinstance(notes, str) and notes else ()


def layers_of_half(layers: Int[np.ndarray, " C"], values: Float[np.ndarray, " C"]) -> tuple[int, int] | None:
    """The narrowest range of layers with half of all positive values; of equally narrow ones the fullest.

    >>> layers_of_half(np.array([0, 1, 2, 3]), np.array([0.1, 0.5, 0.4, -2.0]))
    (1, 1)
    """
    counts: Bool[np.ndarray, " C"] = (values > 0) & (layers >= 0)
    if not counts.any():
        return None
    sums = np.bincount(layers[counts], values[counts])
    for width in range(1, len(sums) + 1):
        held = np.convolve(sums, np.ones(width), "valid")  # sum of each range of this width
        if held.max() >= 0.5 * sums.sum() * (1 - 1e-9):
            return int(held.argmax()), int(held.argmax()) + width - 1
    return None
