"""The whole study of indirect object identification in one model: which heads, which edges, and how good a circuit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wpjax.checkpoints.checkpoint import Checkpoint, fingerprint
from wpjax.circuits.activations import activation_patch, attention_pattern
from wpjax.circuits.circuit import Ablation, Circuit, ablation, circuit_scores
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.edges import METHODS, score_edges
from wpjax.circuits.ioi import IOI, PUBLISHED, TEMPLATES, copy_scores, ioi_prompts, published_classes
from wpjax.circuits.learned import learn_circuit
from wpjax.circuits.measures import (
    Curve,
    Faithfulness,
    Needed,
    circuit_curve,
    completeness,
    faithfulness,
    minimality,
    share_of_model,
)
from wpjax.circuits.paths import path_patch
from wpjax.circuits.scores import ARROW, EdgeScores, Level, NodeScores
from wpjax.errors import BehaviourError, WpjaxError
from wpjax.metrics.metric import scores as scores_of
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.relax.learn import RelaxConfig
from wpjax.results.files import read_json
from wpjax.results.words import enumerated
from wpjax.runtime.cards import public_name
from wpjax.runtime.progress import Progress, silent

MIN_DIRECT = 0.02
"""Smallest share of the gap that a name mover's direct path to the logits has (ours)."""

MIN_COPY = 0.5
"""Smallest copy score of a name mover (ours; in GPT-2 small they have more than .95)."""

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of heads that are tried as a circuit."""

MEAN_OF = 10
"""ABC prompts of each template and order of names that "mean" ablation is over; other ones than are measured."""

ENOUGH = 0.9
"""Share of what the model does that a circuit should do."""

N_EDGES = 60
"""Edges that are listed and drawn."""


SCHEMA = 2
"""Number of the form of its files."""

MASKS = "masks"
"""The method that learns circuits, beside the first-order ones (`edges.METHODS`)."""

LEVELS: tuple[Level, Level] = ("edges", "nodes")

STEPS = {MASKS: 100}
"""Steps of a method, if none are given; else 5."""


class Head(NamedTuple):
    """What one head is in this task. Shares are of the gap between clean and corrupted prompts; 1 is all of it.

    Attributes:
        name: its name.
        patched: share that goes with its output of the corrupted run, by all paths.
        direct: share that goes by way of its direct path to the logits (other heads frozen, MLPs live).
        to_io: attention from the last token to IO, mean over prompts.
        to_s: attention from there to both S.
        copies: copy score, 0 to 1 (`copy_scores`).
        suppresses: how surely it writes against the names that it reads, 0 to 1.
    """

    name: str
    patched: float
    direct: float
    to_io: float
    to_s: float
    copies: float
    suppresses: float

    @property
    def moves_names(self) -> bool:
        """Whether it is a name mover by our rule: it writes the answer, it looks at IO, and it copies."""
        return self.direct >= MIN_DIRECT and self.to_io > self.to_s and self.copies >= MIN_COPY


@dataclasses.dataclass(frozen=True)
class IOIStudy:
    """What was found. Scores are from one set of prompts, and circuits are measured on another one.

    Attributes:
        model: the model's source, and its fingerprint.
        n_prompts: prompts of each of the two sets.
        seed: seed of the prompts.
        answered: of the second set: mean logit difference, the same on the ABC prompts, share of prompts with IO over
            S.
        heads: every head, in order of layers.
        circuit: the smallest of the circuits that were tried (`SIZES`) that does `ENOUGH`, or else the best: the heads
            with the best node scores; MLPs stay.
        sizes: number of heads -> share of the model that so many of the best heads do.
        faithful: faithfulness of `circuit`, by mean ablation over ABC prompts of the same template.
        incomplete: scores of random sets K.
        needed: minimality of each member.
        curves: faithfulness by share of edges and by share of nodes (heads and MLPs), each signed and absolute, by
            resampling.
        edges: the strongest edges: sender, receiver, mean score.
        stability: bootstrap Jaccard of the best 1 % of the edges: mean, and 95 % limits; empty of learned masks, which
            have no score by prompt.
        published: of GPT-2 small: faithfulness of the published circuit here; None of other models.
    """

    model: tuple[str, str]
    n_prompts: int
    seed: int
    answered: tuple[float, float, float]
    heads: tuple[Head, ...]
    circuit: Circuit
    sizes: dict[int, float]
    faithful: Faithfulness
    incomplete: tuple[float, ...]
    needed: tuple[Needed, ...]
    curves: tuple[Curve, ...]
    edges: tuple[tuple[str, str, float], ...]
    stability: tuple[float, ...]
    published: Faithfulness | None = None

    @property
    def name_movers(self) -> tuple[Head, ...]:
        """Name movers, the strongest first."""
        return tuple(h for h in sorted(self.heads, key=lambda h: -h.direct) if h.moves_names)

    @property
    def negative(self) -> tuple[Head, ...]:
        """Heads whose direct path works against the answer by at least `MIN_DIRECT`, the strongest first."""
        return tuple(h for h in sorted(self.heads, key=lambda h: h.direct) if h.direct <= -MIN_DIRECT)

    @property
    def summary(self) -> str:
        """What was found, in sentences."""
        difference, _, right = self.answered
        movers, against = ([h.name for h in heads] for heads in (self.name_movers, self.negative))
        told = [
            f"{self.model[0]} prefers the indirect object to the subject on {right:.0%} of {self.n_prompts} prompts; "
            f"the mean logit difference is {difference:.2f}.",
            f"The name is moved by {enumerated(movers)}." if movers else "No head moves the name.",
            f"{enumerated(against)} {'work' if len(against) > 1 else 'works'} against it." if against else "",
            f"A circuit of {len(self.circuit.members)} heads, with all MLPs kept, does {self.faithful.share:.0%} of "
            "what all heads do.",
        ]
        return " ".join(sentence for sentence in told if sentence)

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        faithful = {**self.faithful._asdict(), "share": self.faithful.share, "difference": self.faithful.difference}
        return {
            "what": "ioi",
            "schema": SCHEMA,
            "model": self.model[0],
            "fingerprint": self.model[1],
            "n_prompts": self.n_prompts,
            "seed": self.seed,
            "logit_difference": self.answered[0],
            "logit_difference_abc": self.answered[1],
            "io_over_s": self.answered[2],
            "name_movers": [h.name for h in self.name_movers],
            "negative_heads": [h.name for h in self.negative],
            "heads": [h._asdict() for h in self.heads],
            "circuit": dataclasses.asdict(self.circuit),
            "sizes": {str(n): share for n, share in self.sizes.items()},
            "faithfulness": faithful,
            "incompleteness_of_random_sets": list(self.incomplete),
            "minimality": [n._asdict() for n in self.needed],
            "curves": [{**c._asdict(), "cpr": c.cpr, "cmd": c.cmd} for c in self.curves],
            "edges": [list(e) for e in self.edges],
            "stability_of_top_1_percent": list(self.stability),
            "published_circuit": None
            if self.published is None
            else {
                **self.published._asdict(),
                "difference": self.published.difference,
                "in_the_paper": dict(PUBLISHED),
            },
        }

    @classmethod
    def from_json(cls, path: Path | str) -> IOIStudy:
        """Read a file that `wpjax circuit ioi` wrote.

        Raises:
            WpjaxError: there is no such file, or it is none of this version, or damaged.
        """
        return read_json(path, {"ioi": cls.of_json}, "study of this task", "wpjax circuit ioi")

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> IOIStudy:
        """The inverse of `as_json`.

        Raises:
            WpjaxError: another version wrote it.
            KeyError, TypeError, ValueError, AttributeError: it is damaged.
        """
        if content.get("schema") != SCHEMA:
            raise WpjaxError("another version of `wpjax circuit ioi` wrote it; make it again")
        return _study_of(content)


def _study_of(content: Mapping[str, Any]) -> IOIStudy:
    """A study from its JSON values; the inverse of `IOIStudy.as_json`."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    def made(kind: Any, values: dict[str, Any]) -> Any:
        """A named tuple or dataclass from some of the values: those of its fields."""
        names = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: tuples(values[name]) for name in names})

    published = content["published_circuit"]
    return IOIStudy(
        model=(str(content["model"]), str(content["fingerprint"])),
        n_prompts=int(content["n_prompts"]),
        seed=int(content["seed"]),
        answered=tuple(float(content[n]) for n in ("logit_difference", "logit_difference_abc", "io_over_s")),  # type: ignore[arg-type]
        heads=tuple(made(Head, head) for head in content["heads"]),
        circuit=made(Circuit, content["circuit"]),
        sizes={int(n): float(share) for n, share in content["sizes"].items()},
        faithful=made(Faithfulness, content["faithfulness"]),
        incomplete=tuples(content["incompleteness_of_random_sets"]),
        needed=tuple(made(Needed, needed) for needed in content["minimality"]),
        curves=tuple(made(Curve, curve) for curve in content["curves"]),
        edges=tuples(content["edges"]),
        stability=tuples(content["stability_of_top_1_percent"]),
        published=None if published is None else made(Faithfulness, published),
    )


def is_gpt2_small(cfg: ModelConfig) -> bool:
    """Whether a model has the shape of GPT-2 small."""
    return (cfg.family, cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_vocab) == ("gpt2", 12, 12, 768, 50257)


def ioi_study(
    model: Checkpoint,
    *,
    n_prompts: int = 16,
    method: str = "eap-ig",
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> IOIStudy:
    """Find the heads and the circuit of indirect object identification in a model.

    Args:
        model: the model, from `load_model`.
        n_prompts: prompts that heads and edges are scored on; as many others serve to measure circuits.
        method: how edges and nodes are scored: a first-order method (`edges.METHODS`), or "masks" for learned ones.
        steps: steps of integrated gradients (5 if None), or of the learner (100 if None).
        seed: seed of the prompts.
        progress: function that is called as work gets done.

    Raises:
        WpjaxError: there is no such method.
        BehaviourError: the tokenizer splits too many names, places or objects; or the model does not do the task: it
            does not prefer IO over S on the clean prompts more than on ABC prompts.
    """
    cfg, params = model.cfg, model.params
    if method not in (*METHODS, MASKS):
        raise WpjaxError(f"unknown method {method!r}; methods: {', '.join((*METHODS, MASKS))}")
    found, held_out = (ioi_prompts(model, n_prompts, seed=s) for s in (seed, seed + 1))
    n_phases = 8

    def phase(i: int) -> None:
        progress("phases", i, n_phases)

    phase(0)
    clean, abc = (scores_of(cfg, params, metric) for metric in held_out.contrast)
    if clean.mean() <= max(abc.mean(), 0):
        raise BehaviourError(
            f"{model.source} does not do the task: its mean logit difference of IO and S is {clean.mean():.2f} on "
            f"clean prompts and {abc.mean():.2f} on ABC prompts; take another model"
        )
    phase(1)
    edges, nodes = _scored(cfg, params, found.contrast, method, steps or STEPS.get(method, 5), seed, progress)
    phase(2)
    heads = _heads(cfg, params, found)
    phase(4)
    own = fingerprint(cfg, params)
    others = ioi_prompts(model, 2 * len(TEMPLATES) * MEAN_OF, seed=seed + 2)
    mean = ablation(cfg, params, held_out.contrast, "mean", held_out.groups, (others.contrast, others.groups))
    circuit, sizes = _smallest(cfg, params, held_out.contrast, mean, nodes, own)
    phase(5)
    faithful = faithfulness(cfg, params, held_out.contrast, mean, circuit)
    by_chance, _ = completeness(cfg, params, held_out.contrast, mean, circuit, n_random=8, seed=seed)
    needed = minimality(cfg, params, held_out.contrast, mean, circuit)
    phase(6)
    resample = ablation(cfg, params, held_out.contrast, "resample")
    curves = tuple(
        circuit_curve(cfg, params, held_out.contrast, resample, scores, absolute=absolute)
        for scores in (edges, nodes)
        for absolute in (False, True)
    )
    phase(7)
    published = None
    if is_gpt2_small(cfg):
        paper = Circuit("nodes", tuple(published_classes()), own, ("head",), "arXiv 2211.00593")
        published = faithfulness(cfg, params, held_out.contrast, mean, paper)
    stability = () if method == MASKS else edges.stability(max(1, round(0.01 * edges.n_members)))
    strongest = [(*name.partition(ARROW)[::2], score) for name, score in edges.listed(N_EDGES)]
    phase(n_phases)
    return IOIStudy(
        (public_name(model.source), own),
        n_prompts,
        seed,
        (float(clean.mean()), float(abc.mean()), float((clean > 0).mean())),
        heads,
        circuit,
        sizes,
        faithful,
        tuple(k.score for k in by_chance),
        tuple(needed),
        curves,
        tuple(strongest),
        stability,
        published,
    )


def _heads(cfg: ModelConfig, params: Params, prompts: IOI) -> tuple[Head, ...]:
    """What every head is."""
    names = [f"L{layer}.head.{h}" for layer in range(cfg.n_layers) for h in range(cfg.n_heads)]
    patched = activation_patch(cfg, params, prompts.contrast, "z").share.ravel()
    direct = path_patch(cfg, params, prompts.contrast, names, "logits").share[:, 0]
    tokens = prompts.contrast.clean.tokens
    ids, last, rows = jnp.asarray(tokens.ids), np.asarray(tokens.last), np.arange(len(tokens.ids))
    from_end = np.asarray(attention_pattern(cfg, params, ids))[:, rows, :, last]  # [B, L, H, S]
    at = [from_end[rows, ..., prompts.positions[:, i]].mean(0).ravel() for i in range(3)]
    copies = np.asarray(copy_scores(cfg, params, ids, jnp.asarray(prompts.positions))).reshape(2, -1)
    columns = (patched, direct, at[0], at[1] + at[2], *copies)
    return tuple(Head(name, *map(float, values)) for name, *values in zip(names, *columns, strict=True))


def _scored(
    cfg: ModelConfig, params: Params, contrast: Contrast, method: str, steps: int, seed: int, progress: Progress
) -> tuple[EdgeScores, NodeScores]:
    """Scores of all edges, and of all heads and MLPs."""
    if method != MASKS:
        edges = score_edges(cfg, params, contrast, method, steps=steps)
        return edges, edges.nodes()
    ablated, config = ablation(cfg, params, contrast, "resample"), RelaxConfig(steps=steps, seed=seed)
    learned = [
        learn_circuit(cfg, params, contrast, ablated, level, None, config, progress=progress) for level in LEVELS
    ]
    return learned[0], learned[1]  # type: ignore[return-value]


def _smallest(
    cfg: ModelConfig, params: Params, contrast: Contrast, mean: Ablation, nodes: NodeScores, model: str
) -> tuple[Circuit, dict[int, float]]:
    """The fewest best heads that do `ENOUGH`, and what every number of heads does."""
    heads = dataclasses.replace(nodes, ablates=("head",))
    sizes = [n for n in SIZES if n <= heads.n_members]
    circuits = [Circuit.of(heads, n, model, absolute=False) for n in (0, heads.n_members, *sizes)]
    nothing, whole, *f = circuit_scores(cfg, params, contrast, mean, circuits).mean(1).tolist()
    shares = dict(zip(sizes, share_of_model(f, whole, nothing), strict=True))
    enough = [n for n in sizes if shares[n] >= ENOUGH]
    chosen = enough[0] if enough else max(sizes, key=lambda n: shares[n])
    return circuits[2 + sizes.index(chosen)], shares
