"""Sources and relays: whose weights a component has, crossed with whose input it sees.

With y_ab the metric when the component has weights a on the input that b sees
(docs/method.md, "Source or relay"; ours):

    S = ((y_EB - y_BB) + (y_EE - y_BE)) / 2     R = ((y_BE - y_BB) + (y_EE - y_EB)) / 2
    I = y_EE - y_EB - y_BE + y_BB               y_EE - y_BB = S + R

So the effect of activation patching is that of the weights, plus what is only relayed, plus their interaction.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from wpjax.columns import EFFECT
from wpjax.estimators.job import Found, Job, estimate_and_replace


def run(job: Job) -> Found:
    """Replace what both screens choose in every cell of the 2x2 and, for the knock-out, in the expert."""
    found = estimate_and_replace(job)
    changes = dict(found.changes)
    changes |= two_by_two({"exact": changes[EFFECT], **{cell: changes[cell] for cell in ("activation", "relay")}})
    changes["knockout"] = -changes["knockout"]  # what is lost with the base's slice in the expert counts as positive
    return found._replace(changes=changes)


def two_by_two(cells: Mapping[str, Float[np.ndarray, "C B"]]) -> dict[str, Float[np.ndarray, "C B"]]:
    """Source, relay and interaction from the cells of the 2x2, prompt by prompt; see the module.

    Args:
        cells: changes of the metric: "exact" is y_EB - y_BB, "activation" y_EE - y_BB and "relay" y_BE - y_BB.
    """
    weights, both, inputs = cells["exact"], cells["activation"], cells["relay"]
    return {
        "source": (weights + both - inputs) / 2,
        "relay": (inputs + both - weights) / 2,
        "interaction": both - weights - inputs,
    }
