"""Diagnostics of an anchor: what its tests found at each layer, and in words whether they pass."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from wpjax.errors import AnchorRejected
from wpjax.runtime.files import atomic_output

MIN_STABILITY = 0.9
"""Smallest split-half cosine at which an anchor is accepted."""


MAX_EXCESS_NLL = 1.0
"""Steered answers that are less likely under the base than the expert's own by more nats per token are degenerate."""

LEAST_SHARE = 0.25
"""An anchor is rejected if its direction surely moves less than this share of what base and expert differ by, both in
the base and in the expert. One of the two alone does not count: a base that lacks what executes the behaviour cannot be
steered into it."""


@dataclasses.dataclass(frozen=True)
class SteeringTest:
    """What happens to answers when the residual stream is moved along a direction: both causal tests at one layer.

    A share is the part of the prompts, from 0 to 1, whose answers pass the checker. Log-likelihoods are always under
    the base. Intervals hold at 95 %, whenever the test stopped (`stats.confidence_sequence`, over queries).

    Attributes:
        layer: 0-based layer after which the stream is moved.
        strength: how far the base was steered, 1 for the expert's own state.
        steered: share of the base, steered along the direction.
        steered_random: share of the base, moved as far along random directions.
        gain_low: lower end of the interval of `steered - steered_random`.
        removed: share of the expert, held at the base's state along the direction.
        removed_random: share of the expert, moved as far along random directions.
        drop_low: lower end of the interval of `removed_random - removed`.
        nll: mean negative log-likelihood of the steered answers, in nats per token.
        nll_expert: the same for the answers of the expert that is not steered.
        nll_removed: the same for the answers of the expert held at the base's state; NaN if not measured.
        gain_high: upper end of the interval of `steered - steered_random`; NaN in files of earlier versions.
        drop_high: upper end of the interval of `removed_random - removed`; NaN likewise.
        difference: share of the expert minus share of the base, neither of them moved; NaN likewise.
        n_queries: number of queries whose prompts were answered; NaN likewise.
        max_new_tokens: length of an answer, in tokens, at most; NaN likewise.
        cut: share of the expert's own answers that this length cut off; NaN likewise.

    >>> from wpjax.metrics.diagnostics import SteeringTest
    >>> test = SteeringTest(4, 1.5, steered=0.8, steered_random=0.1, gain_low=-0.05, removed=0.0, removed_random=0.9,
    ...                     drop_low=0.8, nll=1.2, nll_expert=1.1, gain_high=0.9, drop_high=1, difference=0.9)
    >>> print(test.verdict())
    undecided: steered along it the base passes on 80% of prompts, along a random direction on 10%: not surely more
    """

    layer: int
    strength: float
    steered: float
    steered_random: float
    gain_low: float
    removed: float
    removed_random: float
    drop_low: float
    nll: float
    nll_expert: float
    nll_removed: float = math.nan
    gain_high: float = math.nan
    drop_high: float = math.nan
    difference: float = math.nan
    n_queries: float = math.nan
    max_new_tokens: float = math.nan
    cut: float = math.nan

    @property
    def effect_size(self) -> float:
        """Gain of the steered base times loss of the expert, each beyond its control. The layer is chosen by it."""
        return max(self.steered - self.steered_random, 0.0) * max(self.removed_random - self.removed, 0.0)

    @property
    def outcome(self) -> str:
        """What the tests say: "accepted", "undecided" or "rejected"; `verdict` says why."""
        return self.verdict().split(":")[0] or "accepted"

    def verdict(self) -> str:
        """An empty text if both tests pass, otherwise the outcome and the test that it is due to, with its figures.

        - rejected: in both tests the direction surely moves less than `LEAST_SHARE` of the difference between expert
          and base. Or the answers are degenerate.
        - undecided: one of the tests is not passed.
        """
        steering = (
            f"steered along it the base passes on {self.steered:.0%} of prompts, along a random direction on "
            f"{self.steered_random:.0%}"
        )
        removal = (
            f"without it the expert passes on {self.removed:.0%} of prompts, without a random direction on "
            f"{self.removed_random:.0%}"
        )
        # Comparisons are written so that a figure that is NaN never accepts. `nll_removed` alone may be NaN.
        if not self.nll <= self.nll_expert + MAX_EXCESS_NLL:
            return (
                "rejected: steered answers are degenerate: the base finds them much less likely than the expert's own, "
                f"{self.nll:.2f} nats a token and {self.nll_expert:.2f}"
            )
        least = LEAST_SHARE * self.difference
        if self.gain_high < least and self.drop_high < least:
            return f"rejected: {steering}; {removal}: surely less than {LEAST_SHARE:.0%} of what the two differ by"
        if self.nll_removed > self.nll_expert + MAX_EXCESS_NLL:
            return (
                f"rejected: without it the expert's answers are degenerate: {self.nll_removed:.2f} nats a token under "
                f"the base, before {self.nll_expert:.2f}"
            )
        if not self.gain_low > 0:
            return f"undecided: {steering}: not surely more{self._advice(self.gain_low, self.gain_high)}"
        if not self.drop_low > 0:
            return f"undecided: {removal}: not surely less{self._advice(self.drop_low, self.drop_high)}"
        return ""

    @property
    def queries_needed(self) -> float:
        """About how many queries would decide the tests, to either side; infinite if no number is likely to.

        >>> test = SteeringTest(4, 1.5, steered=0.8, steered_random=0.1, gain_low=0.2, removed=0.8, removed_random=0.9,
        ...                     drop_low=-0.2, nll=1.2, nll_expert=1.1, gain_high=1, drop_high=0.4, n_queries=16,
        ...                     difference=0.9)
        >>> round(test.queries_needed)  # the drop, .1 from the middle to 0, has an interval of half width .3
        144
        """
        ends = ((self.gain_low, self.gain_high), (self.drop_low, self.drop_high))
        least = LEAST_SHARE * self.difference
        accept = max(0.0 if low > 0 else self._needed((low + high) / 2, (high - low) / 2) for low, high in ends)
        reject = max(self._needed(least - (low + high) / 2, (high - low) / 2) for low, high in ends)
        return min(accept, reject)

    def _needed(self, distance: float, half: float) -> float:
        """Queries at which an interval is as far from a value as it is half wide: its width falls with their root."""
        return self.n_queries * (half / distance) ** 2 if distance > 0 else math.inf

    def _advice(self, low: float, high: float) -> str:
        """How many queries would decide a test whose interval is [low, high], in words; empty if it is not known."""
        middle, half = (low + high) / 2, (high - low) / 2
        if not math.isfinite(self.n_queries * half) or not half > 0:
            return ""
        n, tried = self._needed(middle, half), f"{self.n_queries:.0f} queries were tried"
        if not n < 10_000:
            return f"; {tried}"
        return f"; about {math.ceil(n)} queries would decide it, {self.n_queries:.0f} were tried"


@dataclasses.dataclass(frozen=True)
class LayerDiagnostics:
    """Diagnostics of a candidate anchor at one layer.

    F_E and F_B are F of the expert and of the base, G their difference.

    Attributes:
        layer: 0-based layer whose `resid_post` is read.
        stability: mean cosine between directions fitted on random halves of the queries.
        norm: |u|, length of the mean difference that the instruction makes in the expert.
        gap: mean of G over the "sweep" prompts. `gap_low` and `gap_high` are the ends of its 95 % interval.
        gap_sd: standard deviation of G over prompts.
        specific: specific gap, the part of the gap that the instruction makes: the mean of
            [F_E - F_B](x+) - [F_E - F_B](x-), a difference in differences. What the expert moves without the
            instruction (drift) is not in it. `specific_low` and `specific_high` are the ends of its 95 % interval.
        specific_sd: standard deviation of the specific gap over prompts.
        base_trace: mean of F_B(x+) - F_B(x-), as a share of the same mean in the expert.
        strength: this and all later fields are those of `SteeringTest`; NaN if this layer was not steered.
    """

    layer: int
    stability: float
    norm: float
    gap: float
    gap_low: float
    gap_high: float
    gap_sd: float
    specific: float
    specific_low: float
    specific_high: float
    specific_sd: float
    base_trace: float
    strength: float = math.nan
    steered: float = math.nan
    steered_random: float = math.nan
    gain_low: float = math.nan
    removed: float = math.nan
    removed_random: float = math.nan
    drop_low: float = math.nan
    nll: float = math.nan
    nll_expert: float = math.nan
    nll_removed: float = math.nan
    gain_high: float = math.nan
    drop_high: float = math.nan
    difference: float = math.nan
    n_queries: float = math.nan
    max_new_tokens: float = math.nan
    cut: float = math.nan

    @property
    def steering(self) -> SteeringTest | None:
        """The causal tests at this layer; None if they were not made."""
        if math.isnan(self.strength):
            return None
        return SteeringTest(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SteeringTest)})

    @property
    def signal(self) -> float:
        """The specific gap in units of its standard deviation over prompts."""
        return self.specific / max(self.specific_sd, 1e-30)

    def verdict(self) -> str:
        """An empty text if the layer passes the tests of projections, otherwise the first test that it fails."""
        if not self.stability >= MIN_STABILITY:  # written so that NaN fails
            return f"split-half cosine {self.stability:.2f} < {MIN_STABILITY}"
        if not self.gap_low > 0:
            return f"gap {self.gap:.3g} [{self.gap_low:.3g}, {self.gap_high:.3g}] is not positive"
        if not self.specific_low > 0:
            specific = f"{self.specific:.3g} [{self.specific_low:.3g}, {self.specific_high:.3g}]"
            return f"gap {self.gap:.3g} is drift: what the instruction makes of it is {specific}, not positive"
        return ""


@contextlib.contextmanager
def diagnostics_kept(out: Path) -> Iterator[None]:
    """If an anchor is rejected in the body, write what was found at each layer to a file beside an output, and say so.

    The file is JSON, a list with an object for each layer; NaN becomes null. One of an earlier attempt is replaced.

    Args:
        out: the output that will be missing; the file is called as it is, with ".rejected.json" behind.

    Raises:
        AnchorRejected: that of the body, with the name of the file.
        OutputError: the file cannot be written.
    """
    try:
        yield
    except AnchorRejected as error:
        if not error.diagnostics:
            raise
        path = out.with_name(f"{out.name}.rejected.json")
        layers = [
            dataclasses.asdict(d) | {"verdict": d.steering.verdict() if d.steering else ""} for d in error.diagnostics
        ]
        finite = [{k: None if v != v else v for k, v in layer.items()} for layer in layers]
        with atomic_output(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
        raise AnchorRejected(f"{error}; what was found at each layer is in {path}", error.diagnostics) from error
