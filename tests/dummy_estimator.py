"""A method in one file: what it is called, what column it makes, and the step that does it. `test_methods` uses it.

A component's value is the size of its change times the sign of its first-order effect. To be found by `wpjax sweep`
without an import of one's own, such a file is put into `wpjax/methods/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wpjax.columns import Column
from wpjax.methods import Method, register
from wpjax.methods.builtin import SCREEN

if TYPE_CHECKING:
    from wpjax.estimators.job import MethodOutput, SweepJob


def run(job: SweepJob) -> MethodOutput:
    """Norm of the change of each component's weights, times the sign of its screen."""
    from wpjax.estimators.job import MethodOutput

    norm = job.pair.delta_norms(job.components)
    sign = np.sign(job.estimate(SCREEN).mean(1))
    # What a method finds are changes of the metric, and the result holds their shares of the gap.
    return MethodOutput({"dummy": (norm * sign * job.gap.mean())[:, None]})


DUMMY = register(
    Method(
        "dummy",
        "scores all by the norm of their change, with the sign of the screen",
        run,
        columns=(Column("dummy", "signed norm of the change", trust=5, estimates_effect=True),),
    )
)
