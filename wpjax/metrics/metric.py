"""Metrics: what a patch is measured by, one number a prompt, read from the residual stream at some positions.

    F(M, x) = sum_s w_s(x) readout(r_l^M(x)[t_s])

    anchor      readout = <r, v>                            has the control state formed?     (arXiv 2604.13694)
    response    readout = log p_M(y_t | x, y_<t)            the expert's own answer y, teacher-forced, mean over t
    decision    readout = log p_M(y_E) - log p_M(y_B)       at the first token where base and expert part ways
    kl          readout = -KL(p_E(. | x, y_<t) || p_M)      along the same answer y, mean over t

The last three are ours (docs/method.md, "What the model says"): they reach past the anchor to the output, so that
components after it count too.
All are differentiable, and every sweep and screen takes any of them. The anchor read along a model's own answer is
one of them along given answers only, `Anchor.on(batch, answers)`: what is said depends on the patch.
`engines.on_policy` measures that. A metric that agrees is not yet a behaviour: only a checker on generated text says
that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import PromptBatch, Tokens
from wpjax.components import KINDS, Component
from wpjax.errors import MetricRejected, WpjaxError
from wpjax.metrics.readouts import Divergence, Readout
from wpjax.models import ops
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Output, Params, forward
from wpjax.models.edits import Edit
from wpjax.models.secant import Value
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.runtime.batching import map_batches
from wpjax.stats import mean_interval, resample


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "at", "weight", "readout", "held"],
    meta_fields=["layer", "name"],
)
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number for each prompt, read from one forward pass over fixed tokens; a pytree.

    Attributes:
        tokens: what every model is given: prompts, or prompts and the expert's answers.
        at: [B, S], the positions that are read.
        weight: [B, S], how much each counts; 0 fills up.
        readout: what is read there.
        layer: 0-based block whose `resid_post` is read; later ones are not run (static).
        name: "anchor", "response", "decision" or "kl", or what an on-policy sweep reads (static).
        held: an edit of every model that holds it at a state, so that only what executes it counts; None for none.
    """

    tokens: Tokens
    at: Int[Array, "B S"]
    weight: Float[Array, "B S"]
    readout: Readout
    layer: int
    name: str
    held: Edit | None = None

    has_fixed_words: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.tokens.ids)

    def __call__(self, cfg: ModelConfig, params: Params) -> Float[Value, " B"]:
        """F of each prompt; pure, so it composes with `jit`, `vmap` and `grad`. `params` may hold `Blend`s.

        Of `patching.secant_patch` it is a `Secant`: F of base and expert, and its change, linear in the units.

        Raises:
            WpjaxError: a layer that the model does not have, or tokens beyond its context.
        """
        if not 0 <= self.layer < cfg.n_layers:
            raise WpjaxError(
                f"the {self.name} metric reads layer {self.layer}: the model has layers 0 to {cfg.n_layers - 1}"
            )
        return self.read(cfg, params, self.pick(self.run(cfg, params).resid))

    def run(self, cfg: ModelConfig, params: Params, edits: Sequence[Edit] = (), sites: tuple[Site, ...] = ()) -> Output:
        """The forward pass that is read, up to the metric's layer; arguments as `forward` takes them."""
        ids = jnp.asarray(self.tokens.ids)
        given = () if self.held is None else (self.held,)
        return forward(cfg, params, ids, stop=self.layer + 1, logits=False, edits=(*edits, *given), sites=sites)

    def pick(self, resid: Float[Value, "B T D"]) -> Float[Value, "B S D"]:
        """The residual stream at the positions that are read."""
        return ops.linear(lambda a: jnp.take_along_axis(a, jnp.asarray(self.at)[..., None], axis=1), resid)

    def read(self, cfg: ModelConfig, params: Params, picked: Float[Value, "B S D"]) -> Float[Value, " B"]:
        """F from the residual stream at the positions that are read; `params` matter to logits only."""
        return (self.readout(cfg, params, picked) * self.weight).sum(-1)

    def take(self, rows: Int[Array, " N"]) -> Metric:
        """The same metric on some of the prompts."""
        tokens = Tokens(jnp.asarray(self.tokens.ids)[rows], jnp.asarray(self.tokens.lengths)[rows])
        at, weight = jnp.asarray(self.at)[rows], jnp.asarray(self.weight)[rows]
        held = None if self.held is None else self.held.take(rows)
        return Metric(tokens, at, weight, self.readout.take(rows), self.layer, self.name, held)

    def reaches(self, component: Component) -> bool:
        """Whether a component comes early enough to change the metric, and after a state that is held."""
        if KINDS[component.kind].in_layer:
            return self.first_layer <= component.layer <= self.layer
        return self.held is None if component.kind == "embed" else self.readout.reads_logits

    def prepare(self, pair: Pair, batch: PromptBatch) -> Prepared:
        """What a sweep needs of it: itself."""
        return Prepared(self)

    @property
    def first_layer(self) -> int:
        """The first layer that counts: 0, or the one after a state that is held."""
        return 0 if self.held is None else int(self.held.layer) + 1  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """A hash of everything that is measured, to tell one metric of a pair from another."""
        found = hashlib.blake2b(f"{self.name} {self.layer}".encode(), digest_size=16)
        # A reference model's weights are gigabytes, and its residual stream tells it as well.
        readout = self.readout.resid if isinstance(self.readout, Divergence) else self.readout
        for leaf in jax.tree.leaves((self.tokens, self.at, self.weight, readout, self.held)):
            found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()


PROMPTS_AT_ONCE = 16


def over_prompts(metric: Metric, run: Callable[[Metric], Any], axis: int = 0) -> Any:
    """Run something on a metric of a few prompts at a time; see `map_batches`."""
    return map_batches(len(metric), PROMPTS_AT_ONCE, lambda rows: run(metric.take(jnp.asarray(rows))), axis)


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, " B"]:
    return metric(cfg, params)


def scores(cfg: ModelConfig, params: Params, metric: Metric) -> Float[np.ndarray, " B"]:
    """F of each prompt, a few at a time, on the host; one program serves all parameters and masks.

    Args:
        cfg: the model.
        params: may hold `Blend`s.
        metric: what is measured.
    """
    return over_prompts(metric, lambda some: _scores(cfg, params, some))


@functools.partial(jax.jit, static_argnames="cfg")
def _joint_scores(cfg: ModelConfig, params: Params, metrics: tuple[Metric, ...]) -> Float[Array, "B M"]:
    ids, stop = jnp.asarray(metrics[0].tokens.ids), 1 + max(m.layer for m in metrics)
    resid = forward(cfg, params, ids, stop=stop, logits=False, sites=(Site.RESID_POST,)).sites[Site.RESID_POST]
    return jnp.stack([m.read(cfg, params, m.pick(resid[m.layer])) for m in metrics], axis=1)


def joint_scores(cfg: ModelConfig, params: Params, metrics: Sequence[Metric]) -> Float[np.ndarray, "M B"]:
    """F of each prompt by several metrics, from one forward pass over the longest tokens among them.

    What a causal model does at a token does not depend on what follows, so a metric whose tokens begin another's can be
    read there; one whose tokens do not, or that is given a state, has a pass of its own.
    """
    longest = max((m for m in metrics if m.held is None), key=lambda m: m.tokens.ids.shape[1], default=None)
    found: dict[int, Float[np.ndarray, " B"]] = {}
    if longest is not None:
        joint = [i for i, m in enumerate(metrics) if m.held is None and _begins(m.tokens, longest.tokens)]
        some = tuple(dataclasses.replace(metrics[i], tokens=longest.tokens) for i in joint)

        def run(rows: Int[np.ndarray, " N"]) -> Float[Array, "N M"]:
            return _joint_scores(cfg, params, tuple(m.take(jnp.asarray(rows)) for m in some))

        found = dict(zip(joint, map_batches(len(longest), PROMPTS_AT_ONCE, run).T, strict=True))
    return np.stack([found[i] if i in found else scores(cfg, params, m) for i, m in enumerate(metrics)])


def _begins(short: Tokens, long: Tokens) -> bool:
    ids, n = np.asarray(short.ids), np.asarray(short.lengths)[:, None]
    same = ids == np.asarray(long.ids)[:, : ids.shape[1]]
    return bool((same | (np.arange(ids.shape[1]) >= n)).all() and (n <= np.asarray(long.lengths)[:, None]).all())


def expect_positive_gap(gap: Float[np.ndarray, " B"], queries: Int[np.ndarray, " B"], name: str, seed: int = 0) -> None:
    """Refuse to divide by a gap that may be zero.

    Raises:
        MetricRejected: the 95 % interval of the mean gap reaches zero.
    """
    mean, low, high = mean_interval(gap, resample(queries, seed=seed))
    if not low > 0:
        raise MetricRejected(
            f"the gap of {name} on these {len(gap)} prompts is {mean:.3g} [{low:.3g}, {high:.3g}], not positive: "
            "effects cannot be given as shares of it; use another anchor or metric, or more prompts"
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a sweep needs of what it measures on a pair and some prompts.

    Attributes:
        metric: what is read, along fixed words.
        reached_by: a metric that is changed by all components that count (see `Metric.reaches`), if `metric` is not.
        score: a function of a model's parameters that returns F of each prompt, [B]; None: `metric` along its words.
        make_engine: a function of (components, finished parts, progress, placement) that returns the engine which
            replaces components (see `engines.engine`); None: that of fixed words.
        chooses_too: a function that returns one more metric whose first-order effects choose what is replaced after a
            screen, or None; None: there is none.
        columns: variables that the result has of it: dimension and values by name.
        attributes: of the result.
    """

    metric: Metric
    reached_by: Metric | None = None
    score: Callable[[Params], Float[np.ndarray, " B"]] | None = None
    make_engine: Callable[..., Any] | None = None
    chooses_too: Callable[[], Metric | None] | None = None
    columns: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Measure(Protocol):
    """Anything that a sweep can measure: a `Metric`, an `Anchor`, an `OnPolicy`, or what has these two.

    Attributes:
        has_fixed_words: every model is read along the same words; not, if what is said depends on the patch.
    """

    has_fixed_words: ClassVar[bool]

    def prepare(self, pair: Pair, batch: PromptBatch) -> Prepared:
        """Make it ready for a pair and some prompts.

        Raises:
            WpjaxError: it does not fit them.
        """
        ...
