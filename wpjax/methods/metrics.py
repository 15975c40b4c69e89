"""The metrics that a sweep can measure: one entry each, with its help, its label and the function that makes it.

The command line, the page and `validate` read these entries. So a new metric is a function that makes it, and one call
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
    """One metric that a sweep can measure.

    Attributes:
        name: name that users give to `--metric`.
        help: what the metric is, for the help of the command line; it goes on after "NAME: ".
        label: what figures call the metric.
        make: function of (pair, batch, max_new_tokens, answers) that returns the `Metric`; `answers` are the expert's
            (`metrics.answers.ExpertAnswers`), or None. None for metrics that read an anchor.
        has_fixed_words: True if every model is read along the same words, False if along what it says itself.
    """

    name: str
    help: str
    label: str
    make: Callable[..., Any] | None = None
    has_fixed_words: bool = True

    @property
    def reads_anchor(self) -> bool:
        """Whether the metric reads an anchor."""
        return self.make is None


_metrics: dict[str, MetricEntry] = {}


def register_metric(entry: MetricEntry) -> MetricEntry:
    """Add a metric. From now on `--metric` takes its name; if it has a function `make`, `validate` measures it, too.

    Returns:
        the entry.

    Raises:
        ValueError: there is a different metric of the same name.
    """
    if _metrics.setdefault(entry.name, entry) != entry:
        raise ValueError(f"there is another metric {entry.name!r} already; choose another name")
    return entry


def metric_entries() -> tuple[MetricEntry, ...]:
    """All metrics, in the order in which they were registered."""
    return tuple(_metrics.values())


def answer_metrics() -> dict[str, Callable[..., Any]]:
    """Name -> function that makes the metric, for all metrics that read an answer; see `MetricEntry.make`."""
    return {entry.name: entry.make for entry in metric_entries() if entry.make is not None}


def reads_anchor(name: str) -> bool:
    """Whether the metric of a name reads an anchor; False for a name that is not registered."""
    return name in _metrics and _metrics[name].reads_anchor


def check_metric(name: str) -> MetricEntry:
    """The metric of a name.

    Raises:
        WpjaxError: there is no such metric; the message lists those that there are.

    >>> from wpjax.methods.metrics import check_metric
    >>> check_metric("kl").label
    'nearness to the expert (KL)'
    """
    if name not in _metrics:
        raise WpjaxError(f"unknown metric {name!r}; metrics: {', '.join(_metrics)}")
    return _metrics[name]


def metrics_help() -> str:
    """The help of `--metric`: every metric with its help."""
    return " ".join(f"{entry.name}: {entry.help}" for entry in metric_entries())


# Each help stands by itself, whatever the order of the entries.

register_metric(
    MetricEntry("anchor", "projection on the anchor: has the behaviour's control state formed?", "anchor score")
)
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
        "log-odds of the expert's token against the base's, where the two first part ways.",
        "log-odds where they part",
        lazily("wpjax.metrics.answers", "decision_metric"),
    )
)
register_metric(
    MetricEntry(
        "instructed",
        "the same log-odds, where the instruction first makes the two part ways.",
        "log-odds where the instruction parts them",
        lazily("wpjax.metrics.answers", "instructed_metric"),
    )
)
register_metric(
    MetricEntry(
        "partings",
        "the same log-odds, the mean over all places of the expert's answer where the two part.",
        "log-odds wherever they part",
        lazily("wpjax.metrics.answers", "partings_metric"),
    )
)
register_metric(
    MetricEntry(
        "kl",
        "minus the divergence from the expert, along the expert's own answer.",
        "nearness to the expert (KL)",
        lazily("wpjax.metrics.answers", "kl_metric"),
    )
)
register_metric(
    MetricEntry(
        "on_policy",
        "projection on the anchor along each patched model's own answer. Every metric but anchor counts components "
        "after the anchor, too.",
        "anchor score in its own answer",
        has_fixed_words=False,
    )
)
