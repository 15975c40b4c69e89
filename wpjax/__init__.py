"""Which weights of a fine-tuned model carry its new behaviour? Weight patching in JAX.

The public API is the list below; each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wpjax.anchors import Anchor, fit_anchor
    from wpjax.behaviours import Behaviour, PromptBatch, behaviour
    from wpjax.components import Component, enumerate_components, parse_component
    from wpjax.config import SweepConfig
    from wpjax.curves import Curves
    from wpjax.errors import AnchorRejected, MetricRejected, WpjaxError
    from wpjax.metrics import Metric, decision_metric, kl_metric, response_metric
    from wpjax.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from wpjax.models.config import ModelConfig
    from wpjax.models.decoder import Site, forward, init_params
    from wpjax.models.generate import generate
    from wpjax.pairs import Pair, load_model, load_pair
    from wpjax.patching import PatchMask, materialize, patch
    from wpjax.report import write_report
    from wpjax.results import SweepResult
    from wpjax.study import Study, run_study
    from wpjax.sweeps import OnPolicy, add_set_score, sweep
    from wpjax.training import TrainConfig, finetune
    from wpjax.validation import validate

_MODULES = {
    "wpjax.anchors": ("Anchor", "fit_anchor"),
    "wpjax.behaviours": ("Behaviour", "PromptBatch", "behaviour"),
    "wpjax.components": ("Component", "enumerate_components", "parse_component"),
    "wpjax.config": ("SweepConfig",),
    "wpjax.errors": ("AnchorRejected", "MetricRejected", "WpjaxError"),
    "wpjax.metrics": ("Metric", "decision_metric", "kl_metric", "response_metric"),
    "wpjax.training": ("TrainConfig", "finetune"),
    "wpjax.models.checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "wpjax.models.config": ("ModelConfig",),
    "wpjax.models.decoder": ("Site", "forward", "init_params"),
    "wpjax.models.generate": ("generate",),
    "wpjax.pairs": ("Pair", "load_model", "load_pair"),
    "wpjax.patching": ("PatchMask", "materialize", "patch"),
    "wpjax.report": ("write_report",),
    "wpjax.results": ("SweepResult",),
    "wpjax.study": ("Study", "run_study"),
    "wpjax.sweeps": ("OnPolicy", "add_set_score", "sweep"),
    "wpjax.curves": ("Curves",),
    "wpjax.validation": ("validate",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Anchor",
    "AnchorRejected",
    "Behaviour",
    "Checkpoint",
    "Component",
    "Curves",
    "Metric",
    "MetricRejected",
    "ModelConfig",
    "OnPolicy",
    "Pair",
    "PatchMask",
    "PromptBatch",
    "Site",
    "Study",
    "SweepConfig",
    "SweepResult",
    "TrainConfig",
    "WpjaxError",
    "add_set_score",
    "behaviour",
    "decision_metric",
    "enumerate_components",
    "finetune",
    "fit_anchor",
    "forward",
    "generate",
    "init_params",
    "kl_metric",
    "load_checkpoint",
    "load_model",
    "load_pair",
    "materialize",
    "parse_component",
    "patch",
    "response_metric",
    "run_study",
    "save_checkpoint",
    "sweep",
    "validate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'wpjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
