"""Anchors: a direction in the residual stream that tells whether a behaviour's control state has formed.

    u_l = mean over prompts of h_l(x+) - h_l(x-), in the expert, at the last prompt token      (arXiv 2410.12877)
    F(M, x) = <r_a^M(x)[t*], v>,  v = u_a / |u_a|                                               (arXiv 2604.13694)
    G(x) = F(expert, x) - F(base, x)

x+ is a query with the instruction, x- the query alone, and t* the last prompt token. h_l and r_l are the residual
stream after layer l (`resid_post`), and a is the layer of the anchor. The direction is fitted on the "fit" queries; the
gap G is measured on the "sweep" queries.

The stream may instead be read as the mean over the first tokens of the expert's own answer. Then every model reads
those tokens (ours; the paper's rule is not known).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from wpjax.behaviours import Behaviour, PromptBatch, Tokens
from wpjax.errors import AnchorRejected, CheckpointError, WpjaxError
from wpjax.metrics.diagnostics import LayerDiagnostics
from wpjax.metrics.metric import Metric, PreparedMetric, scores
from wpjax.metrics.reading import first_answers, read_at
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.runtime.files import atomic_output, write_tensors

MAX_RESPONSE = 2**20
"""Most tokens of an answer that the file of an anchor may ask for; more is damage."""


CHECKSUM = "checksum"
"""Name of the checksum among the metadata of a file: of the vector and of everything else that the file says."""


def _checksum(vector: np.ndarray, metadata: Mapping[str, str]) -> str:
    said = json.dumps({name: text for name, text in metadata.items() if name != CHECKSUM}, sort_keys=True)
    return hashlib.blake2b(said.encode() + vector.tobytes(), digest_size=16).hexdigest()


N_TOKENISED = 64
"""Prompts whose tokens tell one tokenizer from another, at most."""


def identity_of(pair: Pair, behaviour: Behaviour) -> dict[str, str]:
    """What an anchor of a behaviour depends on beside its expert, each as a text that is the same for the same.

    Args:
        pair: base and expert.
        behaviour: the behaviour.

    Returns:
        "prompts" -> a hash of all prompts and their arguments; "checker" -> its name, empty if it has none; "split" ->
        how the prompts are divided; "base" -> its fingerprint; "tokens" -> a hash of the tokens of the first prompts to
        fit on, which depend on tokenizer and chat template.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> one, other = (identity_of(pair, wp.behaviour(name)) for name in ("tiny:title", "tiny:no_comma"))
    >>> [name for name in one if one[name] == other[name]]
    ['split', 'base']
    """
    prompts = [[p.with_instruction, p.without, dict(p.args)] for p in behaviour.pairs]
    batch = behaviour.encode(pair.tokenizer, "fit", N_TOKENISED)
    sides = (batch.with_instruction, batch.without)
    tokens = [ids[:n].tolist() for side in sides for ids, n in zip(*map(np.asarray, side), strict=True)]
    hashes = {
        name: hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
        for name, value in (("prompts", prompts), ("tokens", tokens))
    }
    return {
        "prompts": hashes["prompts"],
        "checker": behaviour.checker_name,
        "split": behaviour.division,
        "base": pair.fingerprints[0],
        "tokens": hashes["tokens"],
    }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector"],
    meta_fields=["layer", "n_response"],
    drop_fields=["behaviour", "expert_fingerprint", "diagnostics", "template_date", "identity"],
)
@dataclasses.dataclass(frozen=True)
class Anchor:
    """A unit direction at one layer; a pytree, so it can be an argument of a jitted function.

    JAX's transformations and tree operations keep `vector`, `layer` and `n_response`, and drop the other fields. So
    call `check_belongs` before such an operation, not after.

    Attributes:
        vector: [D] float32, the direction, of norm 1.
        layer: 0-based layer whose `resid_post` is read (static).
        behaviour: name of the behaviour.
        expert_fingerprint: fingerprint of the expert that the anchor was fitted in.
        diagnostics: diagnostics of every layer of that expert.
        n_response: 0 to read the last prompt token; n to read the mean over the first n tokens of the expert's answer
            (static).
        template_date: the date in the prompts that it was fitted on (see `PromptBatch`); empty if they have none.
        identity: what it was fitted with, beside the expert (see `identity_of`); empty if that is not known.

    >>> import jax.numpy as jnp
    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> anchor = wp.Anchor(jnp.eye(pair.cfg.d_model)[0], layer=2)  # made by hand; `fit_anchor` fits one
    >>> anchor.score(pair.cfg, pair.expert, batch).shape  # one projection for each prompt
    (4,)
    >>> anchor.acceptance
    'not tested'
    """

    vector: Float[Array, " D"]
    layer: int
    behaviour: str = ""
    expert_fingerprint: str = ""
    diagnostics: tuple[LayerDiagnostics, ...] = ()
    n_response: int = 0
    template_date: str = ""
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)

    has_fixed_words: ClassVar[bool] = True

    def metric_along(self, batch: PromptBatch | Tokens, answers: Generation | None = None) -> Metric:
        """The metric F on some prompts: the projection of the residual stream after the anchor's layer.

        Args:
            batch: prompts; of a `PromptBatch` those with the instruction.
            answers: answers to the prompts; F is then the mean over their tokens. None to read the last prompt token.

        Raises:
            WpjaxError: the anchor is read on answers, and `answers` is None; `metric` makes them.
        """
        if self.n_response and answers is None:
            raise WpjaxError(
                "this anchor is read on the expert's answers: give them, or use `anchor.metric(pair, batch)`"
            )
        prompts = batch.with_instruction if isinstance(batch, PromptBatch) else batch
        tokens, at, weight = read_at(prompts, answers)
        return Metric(tokens, jnp.asarray(at), jnp.asarray(weight), Projection(self.vector), self.layer, "anchor")

    def metric(self, pair: Pair, batch: PromptBatch) -> Metric:
        """The metric F on some prompts. If the anchor is read on the expert's answers, they are generated here."""
        return self.metric_along(batch, first_answers(pair, batch.with_instruction, self.n_response))

    def prepare(self, pair: Pair, batch: PromptBatch) -> PreparedMetric:
        """What a sweep needs to measure this anchor.

        Raises:
            AnchorRejected: the anchor belongs to another expert, or was fitted on prompts of another date.
        """
        self.check_belongs(pair)
        if self.expert_fingerprint and self.template_date != batch.template_date:
            dates = [date or "no date" for date in (self.template_date, batch.template_date)]
            raise AnchorRejected(
                f"the chat template wrote {dates[0]} into the prompts of the anchor, and writes {dates[1]} into these; "
                "fit one with `wpjax anchor`"
            )
        return PreparedMetric(
            self.metric(pair, batch), columns=self.columns, attributes=self.attributes(batch.behaviour)
        )

    @property
    def columns(self) -> dict[str, tuple[str, Any]]:
        """Variables of a sweep's result that describe the anchor: name -> (dimension, values)."""
        variables: dict[str, tuple[str, Any]] = {"anchor_vector": ("d_model", np.asarray(self.vector))}
        for field in dataclasses.fields(LayerDiagnostics) if self.diagnostics else ():
            if field.name != "layer":
                values = [getattr(d, field.name) for d in self.diagnostics]
                variables[f"anchor_{field.name}"] = ("model_layer", values)
        return variables

    def attributes(self, behaviour: str) -> dict[str, Any]:
        """Attributes of the result of a sweep of some behaviour, which describe the anchor."""
        return {
            "anchor_acceptance": self.acceptance_for(behaviour),
            "anchor_n_response": self.n_response,
            "anchor_behaviour": self.behaviour,
        }

    def acceptance_for(self, behaviour: str) -> str:
        """The outcome of the causal tests, as a sweep of some behaviour says it.

        The tests were made on the anchor's own behaviour, and say nothing of another one.

        >>> Anchor(jnp.eye(4)[0], 2, "tiny:title").acceptance_for("tiny:no_comma")
        'not tested: it is an anchor of tiny:title'
        """
        if self.behaviour in ("", behaviour):
            return self.acceptance
        return f"not tested: it is an anchor of {self.behaviour}"

    def score(
        self, cfg: ModelConfig, params: Params, batch: PromptBatch | Tokens, answers: Generation | None = None
    ) -> Float[Array, " B"]:
        """F(M, x) of each prompt, in the units of the residual stream.

        The function is pure, so it composes with `jit`, `vmap` and `grad`.

        Args:
            cfg: architecture of the model M.
            params: its parameters; they may hold `Blend`s.
            batch: prompts; see `metric_along`.
            answers: answers to read instead of the last prompt token; see `metric_along`.

        Raises:
            WpjaxError: the model has no such layer, a prompt exceeds its context, or answers are missing.
        """
        return self.metric_along(batch, answers)(cfg, params)

    def clamp_to(self, pair: Pair, batch: PromptBatch, metric: Metric) -> Metric:
        """The same metric with every model held at the expert's state on the anchor.

        All models then have the state, so only components that act on it differ: those that execute the behaviour.
        From the last prompt token on, the stream after the anchor's layer is held at the expert's mean score:

            h += (mean F(expert) - <h, v>) v        (ours)

        Args:
            pair: base and expert.
            batch: the prompts that the metric was made on.
            metric: a metric that reads a later layer.

        Raises:
            WpjaxError: the metric reads no later layer, or has another number of prompts.
        """
        if metric.layer <= self.layer:
            raise WpjaxError(
                f"the {metric.name} metric reads layer {metric.layer}, the anchor is at layer {self.layer}: nothing "
                "comes between; take a metric that reads the answer (response, decision, kl)"
            )
        if len(metric) != len(batch):
            raise WpjaxError(f"the metric has {len(metric)} prompts, the batch {len(batch)}; make it on this batch")
        state = scores(pair.cfg, pair.expert, self.metric(pair, batch)).mean()
        # Read and write along the same unit vector: the projection becomes the target, all else stays as it is.
        vector = jnp.asarray(self.vector)
        clamp = ClampTo(vector, vector, jnp.asarray(state, jnp.float32))
        start = jnp.asarray(batch.with_instruction.last)
        return dataclasses.replace(metric, held=Edit(Site.RESID_POST, clamp, jnp.asarray(self.layer), start))

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a safetensors file: the vector as a tensor, everything else in the metadata.

        Args:
            path: file to write.
            overwrite: whether an existing file is replaced.

        Raises:
            OutputError: the file exists or cannot be written.
            CheckpointError: the anchor does not say which expert it was fitted in, or its vector is not finite.
        """
        if not self.expert_fingerprint:
            raise CheckpointError("this anchor does not say which expert it belongs to; set its expert_fingerprint")
        if not np.isfinite(self.vector).all():
            raise CheckpointError("this anchor's vector is not finite; check the expert for damaged weights")
        metadata = {
            "layer": str(self.layer),
            "n_response": str(self.n_response),
            "behaviour": self.behaviour,
            "expert_fingerprint": self.expert_fingerprint,
            "template_date": self.template_date,
            "identity": json.dumps(dict(self.identity)),
            "diagnostics": json.dumps([dataclasses.asdict(d) for d in self.diagnostics]),
        }
        vector = np.asarray(self.vector)
        metadata[CHECKSUM] = _checksum(vector, metadata)
        with atomic_output(Path(path), overwrite) as temporary:
            write_tensors(temporary, {"vector": vector}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Anchor:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: the file is not an anchor file, or it is damaged.
        """
        try:
            if not Path(path).is_file():  # nor a pipe, which never ends
                raise ValueError("no such file")
            with safe_open(path, framework="np") as file:
                meta: Mapping[str, str] = file.metadata() or {}
                vector = file.get_tensor("vector")
            diagnostics = tuple(LayerDiagnostics(**d) for d in json.loads(meta["diagnostics"]))
            if not all(isinstance(v, int | float) for d in diagnostics for v in dataclasses.astuple(d)):
                raise ValueError("diagnostics that are not numbers")
            layer, n_response = int(meta["layer"]), int(meta["n_response"])
            behaviour, fingerprint = meta["behaviour"], meta["expert_fingerprint"]
            identity = json.loads(meta.get("identity", "{}"))
            if not isinstance(identity, dict) or not all(isinstance(value, str) for value in identity.values()):
                raise ValueError("an identity that is no text")
            if not 0 <= n_response <= MAX_RESPONSE:
                raise ValueError(f"n_response is not between 0 and {MAX_RESPONSE}")
            if not re.fullmatch("[0-9a-f]{16}", fingerprint):
                raise ValueError("it does not say which expert it was fitted in")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not an anchor file ({error}); make one with `wpjax anchor`") from error
        if vector.ndim != 1 or vector.dtype != np.float32 or not np.isclose(np.linalg.norm(vector), 1, atol=1e-3):
            raise CheckpointError(f"{path}: its vector is not a float32 unit vector; make it anew with `wpjax anchor`")
        if CHECKSUM in meta and meta[CHECKSUM] != _checksum(vector, meta):  # version 0.1.0 wrote none
            raise CheckpointError(
                f"{path}: what it holds is not what was written (its checksum differs); take a copy that is whole, or "
                "make it anew with `wpjax anchor`"
            )
        date = meta.get("template_date", "")
        return cls(jnp.asarray(vector), layer, behaviour, fingerprint, diagnostics, n_response, date, identity)

    @property
    def acceptance(self) -> str:
        """Outcome of the causal tests at the anchor's layer: "accepted", "not tested", or the test that failed."""
        tests = [d.steering for d in self.diagnostics if d.layer == self.layer]
        if not tests or tests[0] is None:
            return "not tested"
        return tests[0].verdict() or "accepted"

    def differences(self, pair: Pair, behaviour: Behaviour) -> list[str]:
        """In words, what this anchor was fitted with that is another here; empty if nothing is, or if it is not known.

        Args:
            pair: the pair at hand.
            behaviour: the behaviour at hand; its name is not compared.
        """
        here, known = identity_of(pair, behaviour), self.identity
        differ = {name for name in here if here[name] and known.get(name) and here[name] != known[name]}
        if differ & {"prompts", "split"}:
            differ -= {"tokens"}  # of other prompts
        in_words = {
            "prompts": "other prompts",
            "checker": f"the checker {known.get('checker')} (here {here['checker']})",
            "split": f"--split {known.get('split')} (here {here['split']})",
            "base": f"another base (fingerprint {known.get('base')}, here {here['base']})",
            "tokens": "other tokens of the same prompts (another tokenizer or chat template)",
        }
        return [text for name, text in in_words.items() if name in differ]

    def check_belongs(self, pair: Pair) -> None:
        """Refuse an anchor of another expert.

        Raises:
            AnchorRejected: the fingerprint is another expert's, or the vector or the layer does not fit the model.
        """
        if self.vector.shape != (pair.cfg.d_model,) or not 0 <= self.layer < pair.cfg.n_layers:
            raise AnchorRejected(
                f"the anchor has {self.vector.shape[0]} dimensions at layer {self.layer}, the model {pair.cfg.d_model} "
                f"and layers 0 to {pair.cfg.n_layers - 1}; fit one with `wpjax anchor`"
            )
        if self.expert_fingerprint and self.expert_fingerprint != pair.fingerprints[1]:
            raise AnchorRejected(
                f"the anchor was fitted in another expert (fingerprint {self.expert_fingerprint}, this one is "
                f"{pair.fingerprints[1]}), or in this one at another dtype; fit one with `wpjax anchor`"
            )
