"""The methods that come with the package, the simplest one first."""

from __future__ import annotations

import functools

from wpjax.columns import Column
from wpjax.methods.registry import Estimate, Method, lazily, register

# First-order estimates, from the most to the least trustworthy one (`trust`).

SCREEN = Estimate(
    Column("screen", trust=70, estimates_effect=True), lazily("wpjax.estimators.screens", "output_linearised")
)
GRADIENT = Estimate(
    Column("gradient", trust=60, estimates_effect=True), lazily("wpjax.estimators.screens", "weight_gradient")
)
IG = Estimate(Column("ig", trust=50, estimates_effect=True), lazily("wpjax.estimators.screens", "integrated_gradients"))
SECANT = Estimate(
    Column("secant", trust=45, estimates_effect=True), lazily("wpjax.estimators.secant", "secant_adjoint")
)
ATTRIBUTION = Estimate(
    Column("attribution", "activation patching, first order", trust=40),
    functools.partial(lazily("wpjax.estimators.screens", "output_linearised"), inputs="donor"),
)
ACTIVATION = Column("activation", "activation patching", has_interval=True, trust=90, is_tested=True)

REPLACE = lazily("wpjax.estimators.job", "estimate_and_replace")
"""The step of most methods: make the estimates; if the method has cells, replace components there."""

# Each help goes on after the method's name, and stands by itself: "gradient+exact scores every component by ...".

register(Method("exact", "replaces every component for real", REPLACE, cells=("exact",), needs_fixed_words=False))
register(
    Method("screen", "scores every component by its first-order effect", REPLACE, (SCREEN,), needs_fixed_words=False)
)
register(
    Method(
        "screen+exact",
        "scores every component by its first-order effect and replaces the top ones for real",
        REPLACE,
        (SCREEN,),
        ("exact",),
        needs_fixed_words=False,
    )
)
register(
    Method(
        "gradient",
        "scores every component by the gradient of its weights",
        REPLACE,
        (GRADIENT,),
        needs_fixed_words=False,
    )
)
register(
    Method(
        "gradient+exact",
        "scores every component by the gradient of its weights and replaces the top ones for real",
        REPLACE,
        (GRADIENT,),
        ("exact",),
        needs_fixed_words=False,
    )
)
register(
    Method(
        "ig",
        "scores every component by integrated gradients: the weight gradient averaged from base to expert",
        REPLACE,
        (IG,),
    )
)
register(
    Method(
        "secant",
        "scores every component by slopes between base and expert, so that scores sum to the gap",
        REPLACE,
        (SECANT,),
    )
)
register(
    Method(
        "race",
        "replaces every component on a few prompts, and on more prompts only those that can still be among the top",
        lazily("wpjax.estimators.race", "run"),
        cells=("exact",),
        columns=(Column("race", trust=80, estimates_effect=True),),
        can_follow=False,
        marks=("race_share", "race_undecided"),
        note=lazily("wpjax.estimators.race", "note"),
    )
)
register(
    Method(
        "masks",
        "replaces random sets of components, to see redundancy and synergy",
        lazily("wpjax.estimators.masks", "run"),
        columns=tuple(
            Column(name, has_interval=True, trust=20) for name in ("banzhaf", "beta_low", "beta_high", "redundancy")
        ),
    )
)
register(
    Method(
        "activation",
        "patches the expert's activations instead of its weights",
        REPLACE,
        (ATTRIBUTION,),
        ("activation",),
        (ACTIVATION,),
    )
)
register(
    Method(
        "factorial",
        "crosses whose weights a component has with whose input it sees, to tell sources from relays, and adds the "
        "knock-out in the expert",
        lazily("wpjax.estimators.factorial", "run"),
        (SCREEN, ATTRIBUTION),
        ("exact", "activation", "relay", "knockout"),
        (
            ACTIVATION,
            *(Column(name, has_interval=True, trust=30) for name in ("source", "relay", "interaction", "knockout")),
        ),
    )
)
