"""Means over facts with their intervals, and probabilities in points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from wpjax.stats import Interval, mean_interval, resample


def over_facts(values: Sequence[float]) -> Interval:
    """The mean over facts, with its 95 % interval. That of one fact has no ends: they are NaN.

    >>> over_facts([0.5]), over_facts([0.5, 0.5])
    (Interval(mean=0.5, low=nan, high=nan), Interval(mean=0.5, low=0.5, high=0.5))
    """
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan)
    return mean_interval(np.asarray(values, float), resample(np.arange(len(values))))


def in_points(of: Interval, unit: str = "") -> str:
    """A probability in points, or a share in per cent, with its interval if it has one.

    >>> in_points(Interval(0.5, 0.25, 0.75), " points"), in_points(over_facts([0.5]))
    ('50.0 points [25.0, 75.0]', '50.0')
    """
    ends = "" if math.isnan(of.low) else f" [{100 * of.low:.1f}, {100 * of.high:.1f}]"
    return f"{100 * of.mean:.1f}{unit}{ends}"


def interval_as_json(of: Interval) -> dict[str, float | None]:
    """An interval as JSON holds it: null for an end that it has not.

    >>> interval_as_json(over_facts([0.5]))
    {'mean': 0.5, 'low': None, 'high': None}
    """
    return {name: None if math.isnan(value) else value for name, value in of._asdict().items()}


ONE_FACT = "One fact: no interval."
"""What is said beside figures of one fact."""
