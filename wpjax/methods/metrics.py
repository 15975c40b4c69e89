"""What a sweep can measure: one entry a metric, with its help, its label and how it is made.

The command line, the page and `validate` read these entries, so a new metric is a function that makes it and one call
of `register_metric`. Nothing here imports JAX (see `registry.lazily`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from wpjax.errors import WpjaxError
from wpjax.methods.registry import lazily


@dataclasses.dataclass(frozen=True)
class MetricEntry:
    """One thing that can be measured.

    Attributes:
        name: what `--metric` takes.
        help: the question that it answers.
        label: what figures call it.
        make: a function of (pair, batch, max_new_tokens, answers of the expert) that returns the `Metric`; None for
            what is read along an anchor.
        has_fixed_words: it reads every model along the same words.
    """

    name: str
    help: str
    label: str
    make: Callable[..., Any] | None = None
    has_fixed_words: bool = True

    @property
    def reads_anchor(self) -> bool:
        """Whether it is read along an anchor."""
        return self.make is None


_metrics: dict[str, MetricEntry] = {}


def register_metric(entry: MetricEntry) -> MetricEntry:
    """Add a metric: `--metric` takes its name from now on, and `validate` shows it.

    Raises:
        ValueError: there is another metric of this name.
    """
    if _metrics.setdefault(entry.name, entry) != entry:
        raise ValueError(f"there is another metric {entry.name!r} already; choose another name")
    return entry


def metric_entries() -> tuple[MetricEntry, ...]:
    """All metrics, in the order in which they were registered."""
    return tuple(_metrics.values())


def answer_metrics() -> dict[str, Callable[..., Any]]:
    """By name, the functions that make metrics of an answer: of (pair, batch, max_new_tokens, answers)."""
    return {entry.name: entry.make for entry in metric_entries() if entry.make is not None}


def reads_anchor(name: str) -> bool:
    """Whether a metric of a name is read along an anchor; not, if someone made one that is not registered."""
    return name in _metrics and _metrics[name].reads_anchor


def check_metric(name: str) -> MetricEntry:
    """A metric by its name.

    Raises:
        WpjaxError: there is no such metric; with those that there are.
    """
    if name not in _metrics:
        raise WpjaxError(f"unknown metric {name!r}; metrics: {', '.join(_metrics)}")
    return _metrics[name]


def metrics_described() -> str:
    """All metrics and what they answer, in a sentence each."""
    return " ".join(f"{entry.name}: {entry.help}" for entry in metric_entries())


register_metric(MetricEntry("anchor", "has the control state formed?", "anchor score"))
register_metric(
    MetricEntry(
        "response",
        "log-probability of the expert's own answer.",
        "log-probability of the expert's answer",
        lazily("wpjax.metrics.answers", "response_metric"),
    )
)
register_metric(
    MetricEntry(
        "decision",
        "log-odds where base and expert first part ways.",
        "log-odds where they part",
        lazily("wpjax.metrics.answers", "decision_metric"),
    )
)
register_metric(
    MetricEntry(
        "kl",
        "divergence from the expert along its answer.",
        "nearness to the expert (KL)",
        lazily("wpjax.metrics.answers", "kl_metric"),
    )
)
register_metric(
    MetricEntry(
        "on_policy",
        "the anchor along each patched model's own answer. All but the first count components after the anchor too.",
        "anchor score in its own answer",
        has_fixed_words=False,
    )
)
