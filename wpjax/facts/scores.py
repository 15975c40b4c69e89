"""What an edit did, as Meng et al. score it on CounterFact (arXiv 2202.05262, section 3.3, and the released code).

o* is the new target, o the old one; P of a target of several tokens is the geometric mean of theirs.

    ES, PS   efficacy and paraphrase score: share of the prompts with P(o*) > P(o)
    EM, PM   their magnitudes: mean of P(o*) - P(o)
    NS, NM   neighbourhood score and magnitude: share of prompts with P(o) > P(o*), mean of P(o) - P(o*)
    S        harmonic mean of ES, PS and NS

Every fact is edited alone, in the model as it was. A fact's prompts of one kind are averaged first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.stats import hmean

from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.errors import FactError
from wpjax.facts.facts import Fact, continued, padded
from wpjax.facts.rank_one import FactEdit
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder, forward
from wpjax.runtime.progress import Progress, silent
from wpjax.stats import Interval, mean_interval, resample

KINDS: Mapping[str, str] = {"E": "the fact itself", "P": "paraphrases", "N": "neighbours"}
"""First letter of a score -> which prompts it is about."""

_BATCH = 16


@functools.partial(jax.jit, static_argnames="cfg")
def _log_p(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    reads: Int[Array, "B N"],
    targets: Int[Array, "B N"],
    counted: Float[Array, "B N"],
) -> Float[Array, " B"]:
    """Mean log-probability of the tokens of each row's target."""
    resid = forward(cfg, params, tokens, logits=False).resid
    read = jnp.take_along_axis(resid, reads[..., None], axis=1)
    log_p = jax.nn.log_softmax(decoder(cfg, params).logits(read))
    found = jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    return (found * counted).sum(1) / counted.sum(1)


def target_probabilities(
    model: Checkpoint, params: Params, prompts: Sequence[str], targets: Sequence[str]
) -> Float[np.ndarray, " N"]:
    """Probability of each target after its prompt; of several tokens, the geometric mean.

    Args:
        model: the model, for its tokenizer.
        params: the parameters: the model's, or edited ones.
        prompts: N prompts.
        targets: N targets.

    Raises:
        FactError: a target is empty, or changes the tokens of its prompt.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> bool(0 < target_probabilities(model, model.params, ["Owls hunt at"], ["night"])[0] < 1)
    True
    """
    both = [continued(model.tokenizer, *one) for one in zip(prompts, targets, strict=True)]
    found: list[Float[np.ndarray, " N"]] = []
    for first in range(0, len(both), _BATCH):
        some = both[first : first + _BATCH]
        some += some[:1] * (_BATCH - len(some))  # filled up, so that one program serves all batches of a length
        n = -(-max(len(target) for _, target in some) // 4) * 4
        rows = padded([np.concatenate([ids, target]) for ids, target in some], 16, model.cfg.n_ctx)
        reads = np.array([[len(ids) - 1 + min(i, len(target) - 1) for i in range(n)] for ids, target in some])
        ids = np.stack([np.pad(target, (0, n - len(target))) for _, target in some])
        counted = np.array([[i < len(target) for i in range(n)] for _, target in some], np.float32)
        arrays = map(jnp.asarray, (rows, reads, ids, counted))
        found.append(np.exp(np.asarray(_log_p(model.cfg, params, *arrays), np.float64)))
    return np.concatenate(found)[: len(both)] if both else np.zeros(0)


@dataclasses.dataclass(frozen=True)
class EditScores:
    """Scores of several edits, each alone.

    Attributes:
        before: kind ("E", "P", "N") -> for each fact with such prompts, P(new) and P(old) of each, [n, 2]; in the model
            as it was.
        after: the same in the edited model.

    >>> half = {kind: (np.array([[0.25, 0.75]]), np.array([[0.5, 0.0]])) for kind in "EPN"}
    >>> scores = EditScores(half, half).table()
    >>> scores["ES"].mean, scores["NS"].mean, scores["EM"].mean, round(scores["S"].mean, 3)
    (0.5, 0.5, 0.0, 0.5)
    """

    before: Mapping[str, tuple[Float[np.ndarray, "_ 2"], ...]]
    after: Mapping[str, tuple[Float[np.ndarray, "_ 2"], ...]]

    def table(self, when: str = "after") -> dict[str, Interval]:
        """ES, EM, PS, PM, NS, NM and S, with 95 % intervals over facts; S has none. What has no prompts is left out.

        Args:
            when: "before" or "after".
        """
        found: dict[str, Interval] = {}
        for kind, cases in getattr(self, when).items():
            if not cases:
                continue
            sign = -1 if kind == "N" else 1
            ahead = [sign * (p[:, 0] - p[:, 1]) for p in cases]
            samples = resample(np.arange(len(cases)))
            for letter, values in (("S", [(d > 0).mean() for d in ahead]), ("M", [d.mean() for d in ahead])):
                found[kind + letter] = mean_interval(np.array(values, float), samples)
        if all(name in found for name in ("ES", "PS", "NS")):
            s = float(hmean([found[name].mean for name in ("ES", "PS", "NS")]))
            found["S"] = Interval(s, s, s)
        return found

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it as values that JSON can hold."""
        return {
            "what": "edit scores",
            "n_facts": len(self.after["E"]),
            **{
                when: {name: of._asdict() for name, of in self.table(when).items() if name != "S"}
                | {name: of.mean for name, of in self.table(when).items() if name == "S"}
                for when in ("before", "after")
            },
            "probabilities": {
                when: {kind: [np.round(p, 8).tolist() for p in cases] for kind, cases in getattr(self, when).items()}
                for when in ("before", "after")
            },
        }


def score_edits(
    model: Checkpoint,
    facts: Sequence[Fact],
    make: Callable[[Fact], FactEdit],
    *,
    done: Callable[[FactEdit], None] = lambda edit: None,
    progress: Progress = silent,
) -> EditScores:
    """Edit each fact alone, and score what the edit did.

    Args:
        model: the model.
        facts: facts with a target and a new target; paraphrases and neighbours where there are any.
        make: makes the edit of a fact, such as `lambda fact: edit_fact(model, fact, layer, moment)`.
        done: called with each edit.
        progress: called with the number of facts that are done.

    Raises:
        FactError: a fact has no target or no new target; or as `edit_fact`.

    >>> import wpjax as wp
    >>> from wpjax.facts.covariance import KeyMoment
    >>> model, fact = wp.load_model("tiny:expert"), wp.Fact("Why do {} hunt at", "the owls", "night", "noon")
    >>> even, quick = KeyMoment(np.eye(model.cfg.d_mlp), 10**6), wp.EditSettings(steps=3)
    >>> scores = score_edits(model, [fact], lambda f: wp.edit_fact(model, f, 2, even, settings=quick, prefixes=[]))
    >>> list(scores.table())
    ['ES', 'EM']
    """
    check_scored(facts)
    found: dict[str, dict[str, list[np.ndarray]]] = {when: {k: [] for k in KINDS} for when in ("before", "after")}
    for i, fact in enumerate(facts):
        progress("facts that are edited", i, len(facts))
        kinds = [("E", fact.text), *(("P", p) for p in fact.paraphrases), *(("N", p) for p in fact.neighbours)]
        prompts = [prompt for _, prompt in kinds for _ in range(2)]
        targets = [fact.new_target, fact.target] * len(kinds)
        # Before the edit: what cannot be scored is refused before that work.
        params = {"before": target_probabilities(model, model.params, prompts, targets)}
        edit = make(fact)
        done(edit)
        params["after"] = target_probabilities(model, edit.apply(model.cfg, model.params), prompts, targets)
        for when, p in params.items():
            for kind in KINDS:
                if any(k == kind for k, _ in kinds):
                    found[when][kind].append(p.reshape(-1, 2)[[k == kind for k, _ in kinds]])
    progress("facts that are edited", len(facts), len(facts))
    before, after = ({kind: tuple(of) for kind, of in found[when].items()} for when in ("before", "after"))
    return EditScores(before, after)


def check_scored(facts: Sequence[Fact]) -> None:
    """Refuse facts that cannot be edited and scored, before any work.

    Raises:
        FactError: there are none, or one has no target or no new target.
    """
    if not facts:
        raise FactError("there are no facts; give at least one")
    for fact in facts:
        if not fact.target or not fact.new_target:
            raise FactError(f"{fact.text!r} has no target and new_target; scores compare the two")
