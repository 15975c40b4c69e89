"""Metrics: the number by which a patch is measured, one for each prompt, read from one forward pass.

    F(M, x) = sum_s w_s(x) readout(r_l^M(x)[t_s])

M is a model and x a prompt; r_l is the residual stream after layer l. The metric reads it at the positions t_s, and
weights them by w_s(x).

    anchor      readout = <r, v>                            has the control state formed?     (arXiv 2604.13694)
    response    readout = log p_M(y_t | x, y_<t)            the expert's own answer y, teacher-forced, mean over t
    decision    readout = log p_M(y_E) - log p_M(y_B)       at the first token where base and expert part ways
    partings    the same readout                            at every token where they do, mean over these
    kl          readout = -KL(p_E(. | x, y_<t) || p_M)      along the same answer y, mean over t

All but the first are ours (docs/method.md, "What the model says"). They read the output of the model, so components
after the anchor count too. All are differentiable, and every sweep and screen takes any of them.

The on-policy score reads the anchor along a model's own answer. A patch may change that answer, so it is a `Metric`
only once the answers are given: `Anchor.metric_along(batch, answers)`. `engines.on_policy` does the rest.

A metric that comes back is not yet a behaviour that comes back. Only a checker of generated text can tell.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
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
from wpjax.runtime.farm import made
from wpjax.runtime.placement import Placement, fetch
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
        tokens: the tokens that every model reads: prompts, or prompts followed by the expert's answers.
        at: [B, S], token positions that are read.
        weight: [B, S], weight of each position in the sum. Positions that only fill up the array have weight 0.
        readout: turns the residual stream at a position into a number.
        layer: 0-based layer whose `resid_post` is read. Later layers are not run (static).
        name: "anchor", "response", "decision", "instructed", "partings" or "kl"; "on_policy" along a model's own
            answer (static).
        held: an edit that holds every model at a given state (see `Anchor.clamp_to`), or None. With it, only components
            that act on that state count.

    >>> import jax.numpy as jnp
    >>> import wpjax as wp
    >>> from wpjax.metrics.readouts import Projection
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> prompts = task.encode(pair.tokenizer, n_prompts=4).with_instruction
    >>> last, first_coordinate = jnp.asarray(prompts.last[:, None]), Projection(jnp.eye(pair.cfg.d_model)[0])
    >>> metric = wp.Metric(prompts, last, jnp.ones((4, 1)), first_coordinate, layer=1, name="first coordinate")
    >>> metric(pair.cfg, pair.base).shape  # one number for each prompt
    (4,)
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
        """F of each prompt.

        The function is pure, so it composes with `jit`, `vmap` and `grad`. `params` may hold `Blend`s, that is, be a
        patched model. For parameters made by `patching.secant_patch` it returns a `Secant`: F of the base, F of the
        expert, and the change from one to the other, which is linear in the units.

        Raises:
            WpjaxError: the model has no such layer, or the tokens exceed its context.
        """
        if not 0 <= self.layer < cfg.n_layers:
            raise WpjaxError(
                f"the {self.name} metric reads layer {self.layer}: the model has layers 0 to {cfg.n_layers - 1}"
            )
        return self.read(cfg, params, self.pick(self.run(cfg, params).resid))

    def run(self, cfg: ModelConfig, params: Params, edits: Sequence[Edit] = (), sites: tuple[Site, ...] = ()) -> Output:
        """The forward pass that the metric reads, up to its layer; arguments as in `models.decoder.forward`."""
        ids = jnp.asarray(self.tokens.ids)
        given = () if self.held is None else (self.held,)
        return forward(cfg, params, ids, stop=self.layer + 1, logits=False, edits=(*edits, *given), sites=sites)

    def pick(self, resid: Float[Value, "B T D"]) -> Float[Value, "B S D"]:
        """The residual stream at the positions that are read."""
        # `ops.linear` also moves a `Secant`: picking is linear, so base, expert and change are picked alike.
        return ops.linear(lambda a: jnp.take_along_axis(a, jnp.asarray(self.at)[..., None], axis=1), resid)

    def read(self, cfg: ModelConfig, params: Params, picked: Float[Value, "B S D"]) -> Float[Value, " B"]:
        """F from the residual stream at the positions that are read. `params` are used by readouts of logits only."""
        return (self.readout(cfg, params, picked) * self.weight).sum(-1)

    def take(self, rows: Int[Array, " N"]) -> Metric:
        """The same metric on some of the prompts."""
        # `rows` may be traced, so everything that is indexed has to be a JAX array.
        tokens = Tokens(jnp.asarray(self.tokens.ids)[rows], jnp.asarray(self.tokens.lengths)[rows])
        at, weight = jnp.asarray(self.at)[rows], jnp.asarray(self.weight)[rows]
        held = None if self.held is None else self.held.take(rows)
        return Metric(tokens, at, weight, self.readout.take(rows), self.layer, self.name, held)

    @property
    def to_learn(self) -> Metric:
        """The metric that a mask is learned to raise: the same places, by the readout's `to_learn`."""
        return dataclasses.replace(self, readout=self.readout.to_learn)

    def reaches(self, component: Component) -> bool:
        """Whether a patch of a component can change the metric.

        A component inside a layer must come no later than the layer that is read, and after a state that is held.
        Embedding, final norm and unembedding belong to no layer.
        """
        if KINDS[component.kind].in_layer:
            return self.first_layer <= component.layer <= self.layer
        return self.held is None if component.kind == "embed" else self.readout.reads_logits

    def prepare(self, pair: Pair, batch: PromptBatch) -> PreparedMetric:
        """What a sweep needs to measure this metric: the metric itself, and nothing more."""
        return PreparedMetric(self)

    @property
    def first_layer(self) -> int:
        """The first layer whose components can change the metric: 0, or the layer after a state that is held."""
        return 0 if self.held is None else int(self.held.layer) + 1  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """A hash of everything that the metric reads, to tell one metric of a pair from another."""
        hasher = hashlib.blake2b(f"{self.name} {self.layer}".encode(), digest_size=16)
        # `Divergence` holds a whole reference model. Hashing gigabytes is slow, and its residual stream identifies it.
        readout = self.readout.resid if isinstance(self.readout, Divergence) else self.readout
        for leaf in jax.tree.leaves((self.tokens, self.at, self.weight, readout, self.held)):
            hasher.update(np.asarray(leaf).tobytes())
        return hasher.hexdigest()


def agreed_metric(metric: Metric, done: MutableMapping[str, np.ndarray]) -> Metric:
    """The metric of all processes that do parts of the same work (`runtime.farm.made`).

    Machines round differently. So the arrays of a metric that was made from a model's numbers, say the word that the
    base would say, could be others in another process.

    Args:
        metric: the metric of this process.
        done: finished parts.
    """
    readout = metric.readout
    # The reference of `Divergence` is a whole model, which is the same for all of them.
    light = dataclasses.replace(readout, params={}) if isinstance(readout, Divergence) else readout
    leaves, structure = jax.tree.flatten(dataclasses.replace(metric, readout=light))
    for i, leaf in enumerate(leaves):
        array = fetch(leaf)
        data = made(done, f"metric-{i}", functools.partial(np.frombuffer, array.tobytes(), np.uint8))
        if data.size != array.nbytes:
            raise WpjaxError(
                f"the {metric.name} metric has {array.nbytes} bytes here and {data.size} in other parts: the models "
                "answer differently on this machine; run all parts on machines of one kind"
            )
        agreed = np.frombuffer(data.tobytes(), array.dtype).reshape(array.shape)
        leaves[i] = jnp.asarray(agreed) if isinstance(leaf, jax.Array) else agreed
    agreed_by_all: Metric = jax.tree.unflatten(structure, leaves)
    if isinstance(readout, Divergence):
        light = dataclasses.replace(agreed_by_all.readout, params=readout.params)  # type: ignore[type-var]
        return dataclasses.replace(agreed_by_all, readout=light)
    return agreed_by_all


PROMPTS_AT_ONCE = 16
"""Prompts of one forward pass on a device, at most."""


def over_prompts(
    metric: Metric | tuple[Any, ...],
    run: Callable[..., Any],
    cfg: ModelConfig,
    *models: Any,
    axis: int = 0,
    **options: Any,
) -> Any:
    """Call `run(cfg, *models, metric, **options)` with the metric on a few prompts at a time; see `map_batches`.

    The prompts are divided among the devices on which the models stand.

    Args:
        metric: the metric on all prompts; or a metric and more that is by prompt: other metrics of the same prompts, or
            anything else with a method `take`.
        run: the function, one object from call to call. It returns a tree of arrays that have a prompt axis.
        cfg: architecture of the models.
        models: parameters, and what else every prompt needs; trees of arrays.
        axis: the prompt axis of what the function returns.
        options: arguments that are not arrays; hashable.

    Returns:
        the arrays of all prompts, on the host.
    """
    placement = Placement.of(models)
    whole = placement.replicate((metric, *models))
    n_prompts = len(metric if isinstance(metric, Metric) else metric[0])

    def some(rows: Int[np.ndarray, " N"]) -> Any:
        return placement.call(on_prompts, (run, cfg), whole, (jnp.asarray(rows),), axis, **options)

    return map_batches(n_prompts, PROMPTS_AT_ONCE, some, axis, parts=placement.n_patch)


def on_prompts(run: Callable[..., Any], cfg: ModelConfig, metric: Any, *rest: Any, **options: Any) -> Any:
    """The function of `over_prompts` on some prompts, whose numbers come last."""
    *models, rows = rest
    some = metric.take(rows) if isinstance(metric, Metric) else tuple(m.take(rows) for m in metric)
    return run(cfg, *models, some, **options)


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, " B"]:
    return metric(cfg, params)


def scores(cfg: ModelConfig, params: Params, metric: Metric) -> Float[np.ndarray, " B"]:
    """F of each prompt as a NumPy array, computed for a few prompts at a time.

    All models of one shape, and all masks of a patched model, run in one compiled program.

    Args:
        cfg: architecture of the model.
        params: its parameters; they may hold `Blend`s.
        metric: the metric.

    Returns:
        [B], in the units of the metric.

    >>> import wpjax as wp
    >>> from wpjax.metrics.metric import scores
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> gap = scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)
    >>> gap.shape, bool((gap > 0).all())
    ((4,), True)
    """
    return over_prompts(metric, _scores, cfg, params)


@functools.partial(jax.jit, static_argnames="cfg")
def _joint_scores(cfg: ModelConfig, params: Params, metrics: tuple[Metric, ...]) -> Float[Array, "B M"]:
    ids, stop = jnp.asarray(metrics[0].tokens.ids), 1 + max(m.layer for m in metrics)
    # The stream after every layer, [L, B, T, D], as metrics may read different layers.
    resid = forward(cfg, params, ids, stop=stop, logits=False, sites=(Site.RESID_POST,)).sites[Site.RESID_POST]
    return jnp.stack([m.read(cfg, params, m.pick(resid[m.layer])) for m in metrics], axis=1)


def joint_scores(cfg: ModelConfig, params: Params, metrics: Sequence[Metric]) -> Float[np.ndarray, "M B"]:
    """F of each prompt by several metrics, from as few forward passes as possible.

    What a causal model computes at a token does not depend on later tokens. So a metric whose tokens are the beginning
    of another metric's tokens can be read from the same pass. One pass runs over the longest tokens. A metric whose
    tokens differ, or that holds the model at a state, has a pass of its own.

    Args:
        cfg: architecture of the model.
        params: its parameters; they may hold `Blend`s.
        metrics: M metrics on the same prompts.
    """
    longest = max((m for m in metrics if m.held is None), key=lambda m: m.tokens.ids.shape[1], default=None)
    from_one_pass: dict[int, Float[np.ndarray, " B"]] = {}  # by the metric's number
    if longest is not None:
        # Positions that a metric reads stay valid in the longer tokens, as prompts are padded on the right.
        joint = [i for i, m in enumerate(metrics) if m.held is None and begins(m.tokens, longest.tokens)]
        same_tokens = tuple(dataclasses.replace(metrics[i], tokens=longest.tokens) for i in joint)
        from_one_pass = dict(zip(joint, over_prompts(same_tokens, _joint_scores, cfg, params).T, strict=True))
    return np.stack([from_one_pass[i] if i in from_one_pass else scores(cfg, params, m) for i, m in enumerate(metrics)])


def begins(short: Tokens, long: Tokens) -> bool:
    """Whether every row of one is the beginning of that row of the other; padding does not count."""
    ids, n = np.asarray(short.ids), np.asarray(short.lengths)[:, None]
    same = ids == np.asarray(long.ids)[:, : ids.shape[1]]
    return bool((same | (np.arange(ids.shape[1]) >= n)).all() and (n <= np.asarray(long.lengths)[:, None]).all())


LARGEST_STATE = 1e15
"""No residual stream is larger; squares of larger numbers would be infinite."""


def expect_finite(cfg: ModelConfig, params: Params, metric: Metric, score: Float[np.ndarray, " B"], model: str) -> None:
    """Refuse scores of a model that are not finite, and say where in the model that begins.

    Args:
        cfg: architecture of the model.
        params: its parameters.
        metric: the metric; of the on-policy score one that reads the same prompts.
        score: [B], the scores.
        model: what to call the model, say "the expert".

    Raises:
        MetricRejected: a score is not finite or larger than `LARGEST_STATE`; the message names the prompt and the
            layer.
    """
    bad = np.flatnonzero(~(np.abs(score) <= LARGEST_STATE))  # so written, NaN is too large
    if not bad.size:
        return
    ids = jnp.asarray(metric.tokens.ids)[bad[:1]]
    resid = forward(cfg, params, ids, sites=(Site.RESID_POST,), logits=False).sites[Site.RESID_POST]  # [L, 1, T, D]
    largest = np.abs(np.asarray(resid, np.float32)).max((1, 2, 3))
    layers = np.flatnonzero(~(largest <= LARGEST_STATE))
    where = f"its stream reaches {largest[layers[0]]:g} at layer {layers[0]}" if layers.size else "its stream is finite"
    raise MetricRejected(
        f"the {metric.name} metric of {model} is {score[bad[0]]:g} on prompt {bad[0]}: {where}; check its weights there"
    )


def expect_positive_gap(gap: Float[np.ndarray, " B"], queries: Int[np.ndarray, " B"], name: str, seed: int = 0) -> None:
    """Refuse a gap that may be zero, as effects are divided by it.

    Args:
        gap: [B], metric of the expert minus that of the base, for each prompt.
        queries: [B], index of each prompt's query.
        name: name of the metric, for the message.
        seed: seed of the bootstrap.

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
class PreparedMetric:
    """Everything a sweep needs to measure something on one pair and one batch of prompts.

    A metric of fixed words needs only `metric`. The other fields are for the on-policy score.

    Attributes:
        metric: a metric along fixed words. Screens differentiate it.
        reach_metric: a metric whose `reaches` says which components can be swept; None for `metric` itself.
        score: a function from a model's parameters to F of each prompt, [B]; None to read `metric`.
        make_engine: a function of (components, finished parts, progress) that returns the engine that
            replaces components; None for the `engines.engine.Engine` of fixed words.
        second_metric: a function that returns one more metric, or None if there is none on these prompts. After a
            screen, the first-order effects on that metric choose components to replace, too. None for no such metric.
        columns: variables to add to the result: name -> (dimension, values).
        attributes: attributes to add to the result.
    """

    metric: Metric
    reach_metric: Metric | None = None
    score: Callable[[Params], Float[np.ndarray, " B"]] | None = None
    make_engine: Callable[..., Any] | None = None
    second_metric: Callable[[], Metric | None] | None = None
    columns: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Measure(Protocol):
    """Anything that a sweep can measure: a `Metric`, an `Anchor`, an `OnPolicy`, or any class with these two members.

    Attributes:
        has_fixed_words: True if every model is read along the same words. False if each model is read along what it
            says itself, so that a patch may change the words.
    """

    has_fixed_words: ClassVar[bool]

    def prepare(self, pair: Pair, batch: PromptBatch) -> PreparedMetric:
        """Make everything that a sweep of this pair on these prompts needs.

        Raises:
            WpjaxError: the measure does not fit the pair or the prompts.
        """
        ...
