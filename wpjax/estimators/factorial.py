"""Sources and relays: a 2x2 of whose weights a component has and whose input it sees.

y_ab is the metric of the base B when the component has the weights of a and sees the input that it has in b; a and b
are B or the expert E (docs/method.md, "Source or relay"; ours):

    S = ((y_EB - y_BB) + (y_EE - y_BE)) / 2     R = ((y_BE - y_BB) + (y_EE - y_EB)) / 2
    I = y_EE - y_EB - y_BE + y_BB               y_EE - y_BB = S + R

S is the source effect, R the relay effect and I their interaction. So the effect of activation patching, y_EE - y_BB,
is the effect of the weights, plus the effect of the input that is only passed on, plus the interaction of the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from wpjax.columns import EFFECT
from wpjax.estimators.job import MethodOutput, SweepJob, estimate_and_replace


def run(job: SweepJob) -> MethodOutput:
    """The step of method "factorial".

    Components are chosen by a screen of weights and by one of activations. They are replaced in every cell of the 2x2
    and, for the knock-out, in the expert.
    """
    output = estimate_and_replace(job)
    changes = dict(output.changes)
    changes |= two_by_two({"exact": changes[EFFECT], **{cell: changes[cell] for cell in ("activation", "relay")}})
    changes["knockout"] = -changes["knockout"]  # the cell is F(knocked out) - F(expert); a loss counts as positive
    return output._replace(changes=changes)


def two_by_two(cells: Mapping[str, Float[np.ndarray, "C B"]]) -> dict[str, Float[np.ndarray, "C B"]]:
    """Source, relay and interaction from the cells of the 2x2, prompt by prompt.

    The module's docstring has the formulas. All values are changes of the metric.

    Args:
        cells: "exact" -> y_EB - y_BB, "activation" -> y_EE - y_BB, "relay" -> y_BE - y_BB.

    Returns:
        "source" -> S, "relay" -> R, "interaction" -> I.

    >>> import numpy as np
    >>> from wpjax.estimators.factorial import two_by_two
    >>> parts = two_by_two({"exact": np.array([[1.0]]), "activation": np.array([[4.0]]), "relay": np.array([[2.0]])})
    >>> {name: float(value[0, 0]) for name, value in parts.items()}  # source + relay = 4
    {'source': 1.5, 'relay': 2.5, 'interaction': 1.0}
    """
    weights, both, inputs = cells["exact"], cells["activation"], cells["relay"]
    return {
        "source": (weights + both - inputs) / 2,
        "relay": (inputs + both - weights) / 2,
        "interaction": both - weights - inputs,
    }
