"""The arguments of a study, one field each, and the types of arguments that several commands share.

`Annotated[TYPE, Setting(...)]` says what an argument is for. The command line makes its options and their help from
these types (`cli/options.py`), and `check_values` their bounds. Nothing here imports JAX, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from wpjax.errors import OutputError, WpjaxError, nearest
from wpjax.methods import DEFAULT_METHOD, check_method, methods, methods_help
from wpjax.methods.metrics import check_metric, metric_entries, metrics_help


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an argument is for and what it may be; stands beside the argument's type in `Annotated`.

    Attributes:
        help: text for `--help`, or a function that makes it: the lists of methods and metrics are known at run time.
        least: smallest number allowed; None for no bound.
        most: largest number allowed; None for no bound.
        choices: function that returns the values allowed, where the list is known at run time only.
        separator: text between the values of a tuple on the command line; empty: the option is repeated.
        option: name of the option, say "--json"; empty: made from the argument's name.
        passed_to_sweep: whether the function `sweep` takes the argument too, under the same name.
        panel: title of the panel of `--help` that shows the option; empty for the first panel.
        more: name of a tuple beside it that takes further values, if the option is repeated; empty: it is not repeated.
        is_positional: whether the values of a tuple stand on the command line without an option.
    """

    help: str | Callable[[], str]
    least: float | None = None
    most: float | None = None
    choices: Callable[[], tuple[str, ...]] | None = None
    separator: str = ""
    option: str = ""
    passed_to_sweep: bool = False
    panel: str = ""
    more: str = ""
    is_positional: bool = False

    @property
    def text(self) -> str:
        """The text for `--help`."""
        return self.help if isinstance(self.help, str) else self.help()


class Argument(NamedTuple):
    """An argument, as `arguments_of` reads it from a dataclass.

    Attributes:
        name: name of the field.
        type: its type, without `Annotated`.
        default: its default; `dataclasses.MISSING` if a value must be given.
        setting: what it is for.
    """

    name: str
    type: Any
    default: Any
    setting: Setting


# Titles of the panels of `--help`. What a command cannot do without stands in a first panel, without a title of ours.
INPUT = "Models and prompts"
MEASURED = "What is measured"
PATCHED = "What is patched"
RUNNING = "Running"
TOGETHER = "Several processes"
OUTPUT = "Output"

MODEL = "Hugging Face folder, .gguf file, hub id (gpt2, org/name or org/name@revision) or embedded model (tiny:base)."

Base = Annotated[str, Setting(f"The base model: {MODEL}")]
Expert = Annotated[str, Setting("The expert model, named in the same ways; or a PEFT adapter of the base.")]
BehaviourName = Annotated[
    str,
    Setting(
        "A built-in behaviour (english_capital, no_comma, title, multiple_sections, quotation, "
        "number_highlighted_sections; tiny:NAME for the embedded models) or a .jsonl file with at least 12 different "
        "prompts, a pair on each line. A third of them fits anchors, a third is swept, a third is for tests."
    ),
]
Checker = Annotated[
    str | None,
    Setting(
        "Checker for a .jsonl file: regex:..., contains:..., a built-in behaviour, or module:function. The module is "
        "imported from the working directory or from what is installed, and its code is run: name only what you trust."
    ),
]
Split = Annotated[
    Literal["thirds", "none"],
    Setting(
        "How the prompts are divided. thirds: different ones to fit, to sweep and to test. none: all of them serve all "
        "three, for files of few prompts (4 or more); the result is marked.",
        panel=INPUT,
    ),
]
Out = Annotated[Path, Setting("Where to write.")]
OutOfSweep = Annotated[Path | None, Setting("Where to write; not with --part.")]
Causal = Annotated[
    Literal["require", "report", "skip"],
    Setting(
        "Causal tests of the anchor: steered models answer, and the checker judges. With other metrics: do base and "
        "expert differ in the behaviour? require: stop if the anchor is rejected, go on and mark the result if the "
        "tests are undecided; report: go on whatever they say; skip: leave them out.",
        panel=MEASURED,
    ),
]
NSteered = Annotated[
    int, Setting("Most prompts that the causal tests use; they stop once they are decided.", least=4, panel=MEASURED)
]
ResponseTokens = Annotated[
    int,
    Setting(
        "Read the anchor as the mean over this many first tokens of the expert's own answer; 0: at the last prompt "
        "token.",
        least=0,
        panel=MEASURED,
    ),
]
NewTokens = Annotated[
    int,
    Setting(
        "Longest answer, in tokens. The checker judges these answers, and the metrics of answers read them.",
        least=1,
        panel=MEASURED,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "bfloat16x2"],
    Setting(
        "Precision of weights and matrix products. In bfloat16 small effects drown in rounding. bfloat16x2 rounds the "
        "weights alone: it keeps 16 bits of each activation, at twice the operations.",
        panel=INPUT,
    ),
]
Seed = Annotated[
    int, Setting("Seed of everything random.", least=0, most=2**32 - 1, passed_to_sweep=True, panel=RUNNING)
]
NPrompts = Annotated[int, Setting("Most prompts to use.", least=4, panel=MEASURED)]
Overwrite = Annotated[bool, Setting("Replace files that exist.", panel=OUTPUT)]
Resume = Annotated[bool, Setting("Go on with a run that was interrupted.", panel=RUNNING)]
TokenizerOf = Annotated[
    Literal["base", "expert"] | None,
    Setting(
        "Whose tokenizer to use; without it the expert's if it has a chat template, otherwise the base's, and prompts "
        "that the two split differently are refused.",
        panel=INPUT,
    ),
]
ChangeRank = Annotated[
    int | None,
    Setting(
        "Store the change of each matrix in a low rank, this at most; the file states the error.", least=1, panel=OUTPUT
    ),
]
ChangeTolerance = Annotated[
    float | None,
    Setting(
        "Store the change of each matrix in the lowest rank with this relative error (Frobenius norm).",
        least=0,
        most=0.999,
        panel=OUTPUT,
    ),
]
ChangeInt8 = Annotated[
    bool,
    Setting("Store the change of each matrix in 8 bits; the file states the error.", option="--int8", panel=OUTPUT),
]
Mesh = Annotated[
    str | None,
    Setting(
        "How the devices are used: patch=4,model=2 divides patches and prompts among 4 parts, and cuts the weights in "
        "2. model=2 alone takes all devices, patch=4 alone cuts no weights. Without it all devices are used, and "
        "weights are cut only as far as memory demands.",
        panel=RUNNING,
    ),
]
ModelMesh = Annotated[
    str | None,
    Setting("Cut the weights among devices, as model=4 does among 4. Without it, one device.", panel=RUNNING),
]
IgnoreConfig = Annotated[
    tuple[str, ...],
    Setting(
        "Attribute of config.json that is known not to change the forward pass. Repeat the option for more.",
        panel=INPUT,
    ),
]


Rank = Annotated[
    int | None,
    Setting(
        "With delta_direction: directions of each matrix, those of the largest singular values. Without it, all of a "
        "LoRA, and 16 of any other change.",
        least=1,
        panel=PATCHED,
    ),
]


def _method_names() -> tuple[str, ...]:
    return tuple(method.name for method in methods())


def _metric_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in metric_entries())


QUICK = {
    "n_prompts": 16, "n_steered": 16, "max_new_tokens": 16, "top": 32, "stratum": 8, "n_masks": 32, "set_score": False,
}  # fmt: skip
"""What `--quick` lowers arguments of a study to."""


DIRECTIONS = "delta_direction"
"""The kind of components for which a pair is divided (`wpjax.directions`)."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The arguments of a study (see `run_study`). The `Setting` of each says what it is for, as `--help` does.

    >>> config = SweepConfig("tiny:base", "tiny:expert", "tiny:title", Path("title.nc"), method="exact")
    >>> config.n_prompts
    32
    >>> config.check()  # no error: nothing is in the way
    """

    base: Base
    expert: Annotated[
        str,
        Setting(
            "The expert model, named in the same ways; or a PEFT adapter of the base. Several of them, --expert A B C, "
            "--expert 'run/checkpoint-*' or the option repeated, are the checkpoints of one fine-tuning: the result is "
            "the history of the behaviour, step by step.",
            more="more_experts",
        ),
    ]
    behaviour: BehaviourName
    out: OutOfSweep = None
    checker: Checker = None
    split: Split = "thirds"
    anchor: Annotated[
        Path | None, Setting("Anchor file from `wpjax anchor`; fitted here if absent.", panel=MEASURED)
    ] = None
    metric: Annotated[
        str,
        Setting(metrics_help, choices=_metric_names, panel=MEASURED),
    ] = "anchor"
    given_anchor: Annotated[
        Path | None,
        Setting(
            "Anchor file from `wpjax anchor`. Both models are held at the expert's mean state on it, and the "
            "components after it are swept: which of them execute the behaviour? Needs --metric response, decision "
            "or kl.",
            panel=MEASURED,
        ),
    ] = None
    anchor_behaviour: Annotated[
        str | None,
        Setting(
            "Behaviour of the anchor file, where it is meant to be another than --behaviour, or one of this name that "
            "was fitted with other prompts, another checker or another base. The result says so, and the anchor counts "
            "as untested.",
            panel=MEASURED,
        ),
    ] = None
    response_tokens: ResponseTokens = 0
    max_new_tokens: NewTokens = 32
    causal: Causal = "require"
    n_steered: NSteered = 64
    kinds: Annotated[
        tuple[str, ...],
        Setting(
            "Kinds of components, comma-separated: head, kv_group, neuron, routed_expert, router, attn, mlp, layer, "
            "norm, embed, unembed, final_norm; or delta_direction: the singular directions of what the expert changed "
            "in each matrix. Unembed and final_norm come after every anchor, so they need another metric.",
            separator=",",
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = ("head", "kv_group", "neuron")
    rank: Rank = None
    components: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Names to sweep instead of whole kinds, comma-separated: L3.head.5,L4.mlp.",
            separator=",",
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = None
    method: Annotated[str, Setting(methods_help, choices=_method_names, passed_to_sweep=True, panel=PATCHED)] = (
        DEFAULT_METHOD
    )
    top: Annotated[
        int,
        Setting(
            "After a screen: how many components of each kind are replaced. In a race: how many of each kind can win.",
            least=1,
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = 128
    confidence: Annotated[
        float,
        Setting(
            "In a race: probability that none of the true top is lost.",
            least=0.5,
            most=0.9999,
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = 0.95
    stratum: Annotated[
        int,
        Setting(
            "After a screen: how many of the other components of each kind are replaced too, chosen at random, to see "
            "what the screen missed.",
            least=0,
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = 64
    n_masks: Annotated[
        int,
        Setting(
            "With --method masks: random sets at each share of components (.1, .5, .9).",
            least=8,
            most=2**16,
            passed_to_sweep=True,
            panel=PATCHED,
        ),
    ] = 256
    set_score: Annotated[
        bool,
        Setting(
            "Also rank components of all layers for patching together: the secant adjoint of the places "
            "where base and expert part, for each parameter. `wpjax validate` uses this ranking.",
            panel=OUTPUT,
        ),
    ] = True
    quick: Annotated[
        bool,
        Setting(
            "A first look: at most 16 prompts and answers of 16 tokens; of each kind 32 components are replaced, and 8 "
            "at random; no set score. The result is marked.",
            panel=RUNNING,
        ),
    ] = False
    answers: Annotated[
        int,
        Setting(
            "Held-out prompts that base, patched base and expert answer at the end, to be read; 0 for none.",
            least=0,
            panel=OUTPUT,
        ),
    ] = 4
    n_prompts: NPrompts = 32
    tokenizer: TokenizerOf = None
    dtype: Dtype = "float32"
    memory_mb: Annotated[
        float | None,
        Setting(
            "Memory for one chunk of patches, in MiB; without it, chosen from the device.",
            least=1,
            most=2**30,
            panel=RUNNING,
        ),
    ] = None
    mesh: Mesh = None
    profile: Annotated[
        Path | None, Setting("New folder for a JAX profile of the sweep; XProf and Perfetto open it.", panel=RUNNING)
    ] = None
    part: Annotated[
        str | None,
        Setting(
            "Do part i/n of the sweep, say 2/8, and leave the rest to other processes, with --part 1/8 to 8/8 and the "
            "same --shards. `wpjax collect` then writes the result.",
            panel=TOGETHER,
        ),
    ] = None
    shards: Annotated[
        Path | None, Setting("Folder that all parts share; made by the first of them.", panel=TOGETHER)
    ] = None
    resume: Resume = False
    seed: Seed = 0
    ignore_config: IgnoreConfig = ()
    overwrite: Overwrite = False
    more_experts: Annotated[
        tuple[str, ...],
        Setting("The experts behind the first: --expert A B C, or --expert run/checkpoint-*.", is_positional=True),
    ] = ()
    stages: Annotated[
        bool,
        Setting(
            "The experts are stages of training, in this order, such as SFT, DPO, RL: each is swept over the one "
            "before it, the first over the base.",
            panel=PATCHED,
        ),
    ] = False

    @property
    def output(self) -> Path:
        """Where to write.

        Raises:
            OutputError: no place was named.
        """
        if self.out is None:
            raise OutputError("--out is missing: name the file to write, say --out r.nc")
        return self.out

    @property
    def resolved(self) -> SweepConfig:
        """The same config with what `quick` lowers; itself if it is not quick."""
        if not self.quick:
            return self
        lowered = {name: min(getattr(self, name), most) for name, most in QUICK.items()}
        return dataclasses.replace(self, **lowered)

    @property
    def experts(self) -> tuple[str, ...]:
        """All experts as they were named, patterns replaced by what they match.

        Raises:
            WpjaxError: a pattern matches nothing.
        """
        from wpjax.runtime.patterns import expanded

        return expanded((self.expert, *self.more_experts))

    @property
    def is_history(self) -> bool:
        """Whether several experts are named, or a pattern for several."""
        from wpjax.runtime.patterns import is_pattern

        return bool(self.more_experts) or self.stages or is_pattern(self.expert)

    @property
    def by_directions(self) -> bool:
        """Whether the pair is divided into directions: where such components are swept."""
        if self.components is None:
            return DIRECTIONS in self.kinds
        return any(f".{DIRECTIONS}." in name for name in self.components)

    @property
    def reads_anchor(self) -> bool:
        """Whether the metric is read along an anchor."""
        return check_metric(self.metric).reads_anchor

    @property
    def sweep_arguments(self) -> dict[str, Any]:
        """The arguments of the function `sweep`, by name."""
        return {arg.name: getattr(self, arg.name) for arg in arguments_of(SweepConfig) if arg.setting.passed_to_sweep}

    @property
    def shared_arguments(self) -> dict[str, Any]:
        """The arguments that all parts of a farm must repeat, by name.

        Not among them are names of files, which may be others on another machine: what they hold is compared.
        """
        ours = {"out", "part", "shards", "resume", "overwrite", "profile", "memory_mb", "mesh", "quick"}
        files = {"base", "expert", "behaviour", "anchor", "given_anchor"}
        ours |= {"more_experts", "stages"}  # a farm sweeps one expert
        names = (arg.name for arg in arguments_of(SweepConfig) if arg.name not in ours | files)
        return {name: getattr(self.resolved, name) for name in names}

    def check(self, writes: bool = True) -> None:
        """Refuse what cannot work, before any work is done.

        Args:
            writes: whether this process writes the output; of several that work together, only one does.

        Raises:
            OutputError: a place that cannot be written to.
            WpjaxError: a value that is not allowed, or two arguments that do not go together.
        """
        from wpjax.runtime.farm import Part, check_farm
        from wpjax.runtime.files import check_output
        from wpjax.runtime.shards import check_parts

        check_values(self)
        inputs: list[str | Path | None] = [self.base, self.expert, self.behaviour, self.anchor, self.given_anchor]
        if self.is_history:
            inputs += self._check_history()
        if self.part is not None:
            Part.parse(self.part)
            if self.shards is None:
                raise OutputError("--part needs --shards: name a folder that all parts share")
            if self.out is not None:
                raise OutputError(f"--out does not go with --part: `wpjax collect {self.shards} --out r.nc` writes it")
        elif writes:
            for path in self.outputs:
                check_output(path, self.overwrite, inputs=inputs)
        if self.shards is not None:
            check_farm(self.shards, self.shared_arguments, is_begun=self.part is None)
        elif writes:
            check_parts(self.output, "anchor", self.resume)
            check_parts(self.output, "sweep", self.resume, {"dtype": self.dtype, **self.resolved.sweep_arguments})
        if self.profile is not None:
            if self.profile.exists():
                raise OutputError(f"--profile {self.profile} exists; name a new folder")
            check_output(self.profile)
        check_method(self.method, check_metric(self.metric).has_fixed_words)
        if self.anchor is not None and not self.reads_anchor:
            raise WpjaxError(
                f"--anchor {self.anchor} goes with --metric anchor or on_policy, not with --metric {self.metric}; "
                "drop one"
            )
        if self.anchor_behaviour is not None and self.anchor is None and self.given_anchor is None:
            raise WpjaxError("--anchor-behaviour goes with --anchor or --given-anchor; drop it, or name the file")
        if self.response_tokens and (self.anchor is not None or not self.reads_anchor):
            raise WpjaxError("--response-tokens is for an anchor that is fitted here; drop it, --anchor or --metric")
        if self.by_directions and self.dtype != "float32":
            raise WpjaxError(f"--kinds {DIRECTIONS} needs --dtype float32: in {self.dtype} rounding hides the changes")
        if self.rank is not None and not self.by_directions:
            raise WpjaxError(f"--rank goes with --kinds {DIRECTIONS}; drop it, or sweep that kind")
        if self.given_anchor is not None and self.reads_anchor:
            raise WpjaxError("--given-anchor needs --metric response, decision or kl: the anchor itself is given")

    def _check_history(self) -> tuple[str, ...]:
        """Refuse what does not go with several experts; their names."""
        names = ("part", "shards", "given_anchor", "profile")
        for option in (name.replace("_", "-") for name in names if getattr(self, name) is not None):
            raise WpjaxError(f"--{option} is for one expert; drop it, or name one expert")
        if self.by_directions:
            raise WpjaxError(
                f"{DIRECTIONS} is for one expert, as each expert's change has its own; sweep other kinds, or name one "
                "expert"
            )
        if not check_metric(self.metric).has_fixed_words:
            raise WpjaxError(
                f"--metric {self.metric} reads each model along its own words, and a history compares experts along "
                "the same words; take another metric"
            )
        if not check_method(self.method).can_follow:
            raise WpjaxError(
                f"--method {self.method} finds other components for each expert, and a history compares the same ones; "
                "take exact or screen+exact"
            )
        experts = self.experts
        if len(experts) < 2:
            what = "stages are two or more" if self.stages else f"{self.expert} matches one checkpoint only"
            raise WpjaxError(f"{what}; name several experts, --expert A B C, or the one expert without a pattern")
        return experts

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files to write: the result and, of a history, its figure.

        Raises:
            OutputError: no place was named.
        """
        if not self.is_history:
            return (self.output,)
        if self.output.suffix == ".png":
            raise OutputError(f"--out {self.output}: the figure goes there, beside the result; name a .nc file")
        return (self.output, self.output.with_suffix(".png"))


def as_command(config: SweepConfig) -> str:
    """The command that asks for a sweep, without what only one part of a farm is told.

    >>> as_command(SweepConfig("tiny:base", "tiny:expert", "tiny:title", seed=1, set_score=False))
    'wpjax sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --no-set-score --seed 1'
    """
    words = ["wpjax", "sweep"]
    for arg in arguments_of(SweepConfig):
        value, option = getattr(config, arg.name), "--" + arg.name.replace("_", "-")
        if value == arg.default or arg.name in ("out", "part", "shards", "resume", "overwrite", "profile"):
            continue
        if arg.setting.is_positional:  # it stands with the option whose values it goes on with
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple) and not arg.setting.separator:
            words += [word for item in value for word in (option, item)]
        else:
            words += [option, arg.setting.separator.join(value) if isinstance(value, tuple) else str(value)]
        for item in getattr(config, arg.setting.more, ()):
            words += [option, item]
    return shlex.join(words)


def read_config(path: Path, **changes: Any) -> SweepConfig:
    """The config in a YAML file, with the names of the arguments as keys. `wpjax sweep --config` reads the same file.

    Args:
        path: the file.
        **changes: arguments that are not in the file, or that replace the file's.

    Raises:
        WpjaxError: it cannot be read, or holds a key or a value that does not exist.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "wpjax.yaml"
    >>> _ = path.write_text("{base: tiny:base, expert: tiny:expert, behaviour: tiny:title, kinds: [head]}")
    >>> as_command(read_config(path, seed=3))
    'wpjax sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --kinds head --seed 3'
    """
    values = {**config_values(path), **changes}
    missing = [arg.name for arg in arguments_of(SweepConfig) if arg.default is dataclasses.MISSING]
    if absent := [name for name in missing if name not in values]:
        raise WpjaxError(f"{path}: no {', '.join(absent)}; add what a sweep cannot do without")
    defaults = {arg.name: arg.default for arg in arguments_of(SweepConfig) if arg.name not in missing}
    try:
        return as_read({**defaults, **values})
    except WpjaxError as error:
        raise WpjaxError(f"{path}: {error}") from error


def config_values(path: Path) -> dict[str, Any]:
    """The arguments of a sweep in a YAML file, by name: those that it names, and no others.

    Raises:
        WpjaxError: it cannot be read, or a key is no argument; the message names the nearest.
    """
    from wpjax.runtime.yaml_files import read_yaml

    content, known = read_yaml(path), {arg.name: arg for arg in arguments_of(SweepConfig)}
    split: dict[str, Any] = {}  # a list that stands for one value and more of them
    if not isinstance(content, dict):
        raise WpjaxError(f"{path}: not a mapping; write lines like base: org/model")
    for name, value in content.items():
        if name not in known:
            raise WpjaxError(
                f"{path}: {name!r} is no argument of a sweep{nearest(name, known)}; see wpjax sweep --help"
            )
        kinds = (known[name].type, *typing.get_args(known[name].type))
        many = any(typing.get_origin(kind) is tuple for kind in kinds)
        if (more := known[name].setting.more) and isinstance(value, list) and value:
            if more in content:
                raise WpjaxError(f"{path}: {name} is a list already; write all of them there, without {more}")
            split[name], split[more] = value[0], value[1:]
            continue
        if isinstance(value, dict) or (isinstance(value, list) and not many):
            raise WpjaxError(f"{path}: {name} has one value; write it behind the colon")
        if many and isinstance(value, str):
            content[name] = [part.strip() for part in value.split(known[name].setting.separator or None)]
    return {**content, **split}


def as_written(config: SweepConfig) -> dict[str, Any]:
    """The arguments as values that JSON can hold; `as_read` makes them a config again.

    >>> config = SweepConfig("tiny:base", "tiny:expert", "tiny:title", kinds=("head",))
    >>> as_read(as_written(config)) == config
    True
    """
    values = {arg.name: getattr(config, arg.name) for arg in arguments_of(SweepConfig)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def as_read(values: Mapping[str, Any]) -> SweepConfig:
    """The config of arguments that `as_written` made, perhaps by way of a file.

    Raises:
        WpjaxError: they are no such arguments.
    """
    found: dict[str, Any] = {}
    for arg in arguments_of(SweepConfig):
        absent = None if arg.default is dataclasses.MISSING else arg.default  # as of a file of an earlier version
        value, kinds = values.get(arg.name, absent), (arg.type, *typing.get_args(arg.type))
        is_path, is_tuple = Path in kinds, any(typing.get_origin(kind) is tuple for kind in kinds)
        found[arg.name] = Path(value) if is_path and isinstance(value, str) else value
        if is_tuple and isinstance(value, list | tuple):
            found[arg.name] = tuple(map(str, value))
    try:
        config = SweepConfig(**found)
        check_values(config)
    except (TypeError, ValueError) as error:
        raise WpjaxError(f"these are no arguments of a sweep ({error})") from error
    return config


def arguments_of(config: type) -> tuple[Argument, ...]:
    """The fields of a dataclass as arguments; the type of each field holds a `Setting`."""
    hints = typing.get_type_hints(config, include_extras=True)
    return tuple(argument(field.name, hints[field.name], field.default) for field in dataclasses.fields(config))


def argument(name: str, annotation: Any, default: Any) -> Argument:
    """An argument from its annotation, `Annotated[TYPE, Setting(...)]`."""
    plain, *extras = typing.get_args(annotation)
    return Argument(name, plain, default, next(extra for extra in extras if isinstance(extra, Setting)))


def choices_of(arg: Argument) -> tuple[Any, ...]:
    """The values that an argument may have; empty if there is no list of them."""
    if arg.setting.choices is not None:
        return arg.setting.choices()
    kinds = (arg.type, *typing.get_args(arg.type))  # the argument may be optional
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal), ())


def check_values(config: Any) -> None:
    """Refuse values that are out of bounds or not among the choices.

    Raises:
        WpjaxError: names the argument and says what it may be.
    """
    for arg in arguments_of(type(config)):
        value, choices = getattr(config, arg.name), choices_of(arg)
        if isinstance(value, str) and Path in (arg.type, *typing.get_args(arg.type)):
            raise WpjaxError(f"{arg.name}={value!r} is text; give a path: {arg.name}=Path({value!r})")
        is_absent = value is None and type(None) in typing.get_args(arg.type)
        if choices and value not in choices and not is_absent:
            raise WpjaxError(f"{arg.name}={value!r}: there are {', '.join(map(str, choices))}")
        least, most = arg.setting.least, arg.setting.most
        # `not value >= least` and not `value < least`: NaN is refused too
        if value is not None and least is not None and not value >= least:
            raise WpjaxError(f"{arg.name}={value!r}: at least {least:g}")
        if value is not None and most is not None and not value <= most:
            raise WpjaxError(f"{arg.name}={value!r}: at most {most:g}")
