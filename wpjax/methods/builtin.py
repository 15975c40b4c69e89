"""The methods that come with the package, the one to begin with first."""

from __future__ import annotations

import functools

from wpjax.columns import Column
from wpjax.methods.registry import Estimate, Method, lazily, register

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

register(Method("exact", "replaces every component for real", REPLACE, cells=("exact",), needs_fixed_words=False))
register(Method("screen", "scores all by first order", REPLACE, (SCREEN,), needs_fixed_words=False))
register(Method("screen+exact", "then replaces the top ones", REPLACE, (SCREEN,), ("exact",), needs_fixed_words=False))
register(Method("gradient", "scores all by the plain weight gradient", REPLACE, (GRADIENT,), needs_fixed_words=False))
register(
    Method("gradient+exact", "then replaces the top ones", REPLACE, (GRADIENT,), ("exact",), needs_fixed_words=False)
)
register(Method("ig", "averages that gradient on the way from base to expert", REPLACE, (IG,)))
register(
    Method("secant", "takes slopes from base to expert instead, so that scores sum to the gap", REPLACE, (SECANT,))
)
register(
    Method(
        "race",
        "replaces all on a few prompts, and on more only what can still be among the top",
        lazily("wpjax.estimators.race", "run"),
        cells=("exact",),
        columns=(Column("race", trust=80, estimates_effect=True),),
        marks=("race_share", "race_undecided"),
        note=lazily("wpjax.estimators.race", "note"),
    )
)
register(
    Method(
        "masks",
        "replaces random sets, to see redundancy and synergy",
        lazily("wpjax.estimators.masks", "run"),
        columns=tuple(
            Column(name, has_interval=True, trust=20) for name in ("banzhaf", "beta_low", "beta_high", "redundancy")
        ),
    )
)
register(
    Method(
        "activation",
        "patches the expert's activations instead",
        REPLACE,
        (ATTRIBUTION,),
        ("activation",),
        (ACTIVATION,),
    )
)
register(
    Method(
        "factorial",
        "tells sources from relays and adds the knock-out in the expert",
        lazily("wpjax.estimators.factorial", "run"),
        (SCREEN, ATTRIBUTION),
        ("exact", "activation", "relay", "knockout"),
        (
            ACTIVATION,
            *(Column(name, has_interval=True, trust=30) for name in ("source", "relay", "interaction", "knockout")),
        ),
    )
)
