"""The public API, the one list of it: `__init__.py` reads it when it runs, type checkers and editors as it stands."""

from .anchors import Anchor as Anchor
from .anchors import fit_anchor as fit_anchor
from .behaviours import Behaviour as Behaviour
from .behaviours import PromptBatch as PromptBatch
from .behaviours import behaviour as behaviour
from .components import Component as Component
from .components import enumerate_components as enumerate_components
from .components import parse_component as parse_component
from .curves import Curves as Curves
from .errors import AnchorRejected as AnchorRejected
from .errors import MetricRejected as MetricRejected
from .errors import WpjaxError as WpjaxError
from .metrics import Metric as Metric
from .metrics import decision_metric as decision_metric
from .metrics import kl_metric as kl_metric
from .metrics import response_metric as response_metric
from .models.checkpoint import Checkpoint as Checkpoint
from .models.checkpoint import load_checkpoint as load_checkpoint
from .models.checkpoint import save_checkpoint as save_checkpoint
from .models.config import ModelConfig as ModelConfig
from .models.decoder import forward as forward
from .models.decoder import init_params as init_params
from .models.edits import Add as Add
from .models.edits import ClampTo as ClampTo
from .models.edits import Edit as Edit
from .models.edits import Scale as Scale
from .models.edits import Set as Set
from .models.generate import generate as generate
from .models.sites import Site as Site
from .pairs import Pair as Pair
from .pairs import load_model as load_model
from .pairs import load_pair as load_pair
from .patching import PatchMask as PatchMask
from .patching import materialize as materialize
from .patching import patch as patch
from .report import write_report as write_report
from .results import SweepResult as SweepResult
from .sweeps import OnPolicy as OnPolicy
from .sweeps import add_set_score as add_set_score
from .sweeps import sweep as sweep
from .training import TrainConfig as TrainConfig
from .training import finetune as finetune
from .validation import validate as validate

__version__: str
