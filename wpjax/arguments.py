"""The arguments of a study, one field each; what a field says of itself is the help of its command-line option.

Nothing here imports JAX, so that the command line's help is quick.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from wpjax.errors import OutputError, WpjaxError
from wpjax.methods import check_method, described, methods
from wpjax.methods.metrics import check_metric, metric_entries, metrics_described


@dataclasses.dataclass(frozen=True)
class Setting:
    """What there is to know of an argument beside its type and its default; it stands in `Annotated`.

    Attributes:
        help: what it is for.
        least: smallest number; None for any.
        most: largest number; None for any.
        choices: a function that returns the values that there are, where only the running program knows them.
        separator: between values of a tuple on the command line; empty: the option is given once for each.
        option: on the command line; empty for its name.
        is_of_sweep: `sweep` takes it, under the same name.
    """

    help: str | Callable[[], str]
    least: float | None = None
    most: float | None = None
    choices: Callable[[], tuple[str, ...]] | None = None
    separator: str = ""
    option: str = ""
    is_of_sweep: bool = False

    @property
    def text(self) -> str:
        """The help."""
        return self.help if isinstance(self.help, str) else self.help()


class Argument(NamedTuple):
    """An argument, as `arguments_of` finds it: its name, its type without `Annotated`, its default, and the rest.

    The default is `dataclasses.MISSING` where it must be given.
    """

    name: str
    type: Any
    default: Any
    setting: Setting


MODEL = "HF folder, .gguf file, hub id (org/name or org/name@revision) or embedded model (tiny:base)."

Base = Annotated[str, Setting(f"The base: {MODEL}")]
Expert = Annotated[str, Setting("The expert: as the base.")]
BehaviourName = Annotated[
    str,
    Setting(
        "A built-in behaviour (english_capital, no_comma, title, multiple_sections, quotation, "
        "number_highlighted_sections; tiny:NAME for the embedded models) or a .jsonl file of prompt pairs."
    ),
]
Checker = Annotated[
    str | None, Setting("For a .jsonl file: regex:..., contains:..., module:function or a built-in name.")
]
Out = Annotated[Path, Setting("What to write.")]
Causal = Annotated[
    Literal["require", "report", "skip"],
    Setting(
        "Steering tests of the anchor, by the checker on generated answers (of other metrics: whether base and expert "
        "differ in the behaviour): require them, report them (the result of one that fails is marked), or skip them."
    ),
]
NSteered = Annotated[int, Setting("Prompts of the steering tests, at most.", least=4)]
ResponseTokens = Annotated[
    int,
    Setting(
        "Read the anchor as the mean over so many first tokens of the expert's own answer; 0: at the last prompt "
        "token.",
        least=0,
    ),
]
NewTokens = Annotated[
    int,
    Setting("Length of generated answers: for the checker, and what response, decision and kl read.", least=1),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "bfloat16x2"],
    Setting(
        "Precision of weights and matrix products. In bfloat16 small effects drown in rounding; bfloat16x2 keeps 16 "
        "bits of the activations for twice the operations."
    ),
]
Seed = Annotated[int, Setting("Seed of everything random.", least=0, most=2**32 - 1, is_of_sweep=True)]
NPrompts = Annotated[int, Setting("Prompts, at most.", least=4)]
Overwrite = Annotated[bool, Setting("Replace files that exist.")]
Resume = Annotated[bool, Setting("Go on with a run that was interrupted.")]
IgnoreConfig = Annotated[
    tuple[str, ...], Setting("An attribute of config.json known not to change the forward pass; repeatable.")
]


def _method_names() -> tuple[str, ...]:
    return tuple(method.name for method in methods())


def _metric_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in metric_entries())


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The arguments of a study: of one sweep from its models to its file. What each is for stands in its `Setting`.

    >>> config = SweepConfig("tiny:base", "tiny:expert", "tiny:title", Path("title.nc"), method="exact")
    >>> config.n_prompts
    64
    """

    base: Base
    expert: Expert
    behaviour: BehaviourName
    out: Out
    checker: Checker = None
    anchor: Annotated[Path | None, Setting("From `wpjax anchor`; fitted if absent.")] = None
    metric: Annotated[
        str,
        Setting(metrics_described, choices=_metric_names),
    ] = "anchor"
    given_anchor: Annotated[
        Path | None,
        Setting(
            "From `wpjax anchor`: both models are held at the expert's mean state on it, and what comes after is "
            "swept: which components execute the behaviour? With --metric response, decision or kl."
        ),
    ] = None
    response_tokens: ResponseTokens = 0
    max_new_tokens: NewTokens = 32
    causal: Causal = "require"
    n_steered: NSteered = 64
    kinds: Annotated[
        tuple[str, ...],
        Setting(
            "Comma-separated: head,kv_group,neuron,attn,mlp,layer,norm,embed,unembed,final_norm (the last two act on "
            "what is said: not on the anchor).",
            separator=",",
            is_of_sweep=True,
        ),
    ] = ("head", "kv_group", "neuron")
    components: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Comma-separated names to sweep instead, e.g. L3.head.5,L4.mlp.",
            separator=",",
            is_of_sweep=True,
        ),
    ] = None
    method: Annotated[str, Setting(described, choices=_method_names, is_of_sweep=True)] = "screen+exact"
    top: Annotated[
        int,
        Setting("Components of each kind replaced after a screen, or that a race is for.", least=1, is_of_sweep=True),
    ] = 512
    confidence: Annotated[
        float, Setting("Of a race: that it loses none of the true top.", least=0.5, most=0.9999, is_of_sweep=True)
    ] = 0.95
    stratum: Annotated[
        int,
        Setting("Random others of each kind replaced too: what did the screen miss?", least=0, is_of_sweep=True),
    ] = 64
    n_masks: Annotated[int, Setting("Random sets a share, with --method masks.", least=8, is_of_sweep=True)] = 256
    set_score: Annotated[
        bool,
        Setting(
            "Also rank components to be patched together, by the secant adjoint of anchor and decision score on the "
            "way from base to expert; `wpjax validate` takes that ranking."
        ),
    ] = True
    n_prompts: NPrompts = 64
    dtype: Dtype = "float32"
    memory_mb: Annotated[
        float | None, Setting("Memory for a chunk of patches; chosen if absent.", least=1, most=2**30)
    ] = None
    profile: Annotated[
        Path | None, Setting("New folder for a JAX profile of the sweep, to open with XProf or Perfetto.")
    ] = None
    resume: Resume = False
    seed: Seed = 0
    ignore_config: IgnoreConfig = ()
    overwrite: Overwrite = False

    @property
    def reads_anchor(self) -> bool:
        """Whether an anchor is what is measured."""
        return check_metric(self.metric).reads_anchor

    @property
    def of_sweep(self) -> dict[str, Any]:
        """The arguments that `sweep` takes itself."""
        return {arg.name: getattr(self, arg.name) for arg in arguments_of(SweepConfig) if arg.setting.is_of_sweep}

    def check(self) -> None:
        """Refuse what cannot work, before any work is done.

        Raises:
            OutputError: a place that cannot be written to.
            WpjaxError: a value that there is not, or two that do not go together.
        """
        from wpjax.runtime.files import check_output

        check_output(self.out, self.overwrite)
        if self.profile is not None:
            if self.profile.exists():
                raise OutputError(f"--profile {self.profile} exists; name a new folder")
            check_output(self.profile)
        check_values(self)
        check_method(self.method, check_metric(self.metric).has_fixed_words)
        if self.anchor is not None and not self.reads_anchor:
            raise WpjaxError(
                f"--anchor {self.anchor} goes with --metric anchor or on_policy, not with --metric {self.metric}; "
                "drop one"
            )
        if self.response_tokens and (self.anchor is not None or not self.reads_anchor):
            raise WpjaxError("--response-tokens is for an anchor that is fitted here; drop it, --anchor or --metric")
        if self.given_anchor is not None and self.reads_anchor:
            raise WpjaxError("--given-anchor needs --metric response, decision or kl: the anchor itself is given")


def arguments_of(config: type) -> tuple[Argument, ...]:
    """The fields of a dataclass whose types say, by a `Setting`, what they are for."""
    hints = typing.get_type_hints(config, include_extras=True)
    return tuple(argument(field.name, hints[field.name], field.default) for field in dataclasses.fields(config))


def argument(name: str, annotation: Any, default: Any) -> Argument:
    """An argument from its annotation, which holds a `Setting`."""
    plain, *rest = typing.get_args(annotation)
    return Argument(name, plain, default, next(extra for extra in rest if isinstance(extra, Setting)))


def choices_of(arg: Argument) -> tuple[Any, ...]:
    """The values that an argument may have; none if there is no list of them."""
    if arg.setting.choices is not None:
        return arg.setting.choices()
    return typing.get_args(arg.type) if typing.get_origin(arg.type) is Literal else ()


def check_values(config: Any) -> None:
    """Refuse values out of bounds, and those that there are not.

    Raises:
        WpjaxError: with the argument and what it may be.
    """
    for arg in arguments_of(type(config)):
        value, choices = getattr(config, arg.name), choices_of(arg)
        if choices and value not in choices:
            raise WpjaxError(f"{arg.name}={value!r}: there are {', '.join(map(str, choices))}")
        least, most = arg.setting.least, arg.setting.most
        if value is not None and least is not None and not value >= least:
            raise WpjaxError(f"{arg.name}={value!r}: at least {least:g}")
        if value is not None and most is not None and not value <= most:
            raise WpjaxError(f"{arg.name}={value!r}: at most {most:g}")
