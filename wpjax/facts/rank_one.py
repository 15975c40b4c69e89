"""Rank-one edits: one fact rewritten in the down-projection of one MLP (ROME, arXiv 2202.05262, section 3).

    W' = W + (v* - (W k + b)) / (kᵀ u) uᵀ,      u = C⁻¹ k̄ / |C⁻¹ k̄|

written as they act on columns: keys k [F] are the neurons' activations at the last token of the subject, values [D]
what the projection makes of them. k̄ is the mean key over prefixes, texts that stand before the prompt; C is the second
moment of keys (`facts.covariance`). v* makes the model say the new target: v* = v0 + δ, and Adam lowers

    L(δ) = mean over prefixes of NLL(target) / tokens  +  kl KL(p ‖ p0)  +  decay |δ| / |v0|²

KL is that of the next token after the subject in "{subject} is a", at the subject's last token; |δ| stays within
clamp |v0|. **Which k.** The released code takes u from the mean key, and k and W k from the prompt without prefix. The
two disagree, and kᵀu can come out so small that the edit breaks the model (arXiv 2403.07175). `keys="mean"` takes the
mean key everywhere, so that W' k̄ + b = v*; `keys="released"` does what the released code does.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.checkpoints.convert import edit_tensors, hf_tensor, tensor_name
from wpjax.errors import FactError
from wpjax.facts.covariance import KeyMoment, edit_direction, key_moment
from wpjax.facts.facts import SLOT, Fact, check_length, continued, encode, locate, padded
from wpjax.facts.tracing import check_tokenizer
from wpjax.models.block import LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, forward, keep_products, take_layer
from wpjax.models.edits import Add, Edit
from wpjax.models.generate import generate
from wpjax.models.layouts import Causal
from wpjax.models.sites import Site
from wpjax.patchfiles.patch import Patch
from wpjax.patchfiles.write import save_low_rank
from wpjax.runtime.cards import public_name
from wpjax.runtime.progress import Progress, silent

KeyChoice = Literal["mean", "released"]
"""Which key the update is made for; see the module."""

ESSENCE = f"{SLOT} is a"
"""The prompt whose next token an edit is to leave alone."""


@dataclasses.dataclass(frozen=True)
class EditSettings:
    """How an edit is made. The defaults are the paper's for GPT-2 XL, but for `keys`.

    Attributes:
        keys: "mean" or "released"; see the module.
        steps: steps of Adam, at most; the last one only looks at the loss, as in the released code.
        lr: learning rate.
        stop: the loss below which Adam stops.
        kl: weight of the divergence on "{subject} is a".
        clamp: bound on |δ|, in units of |v0|.
        decay: weight of |δ| / |v0|².
        ridge: added to C's diagonal, as a share of its mean; None for none.
    """

    keys: KeyChoice = "mean"
    steps: int = 20
    lr: float = 0.5
    stop: float = 0.05
    kl: float = 0.0625
    clamp: float = 4.0
    decay: float = 0.5
    ridge: float | None = None


def recipe(settings: EditSettings, prefixes: Sequence[str], moment: KeyMoment) -> dict[str, Any]:
    """All that an edit of a fact in a layer can be made again from, but for the model: as values of JSON.

    Args:
        settings: how it is made.
        prefixes: the texts that stand before the prompt.
        moment: the second moment of keys.
    """
    return {
        "settings": dataclasses.asdict(settings),
        "n_prefixes": len(prefixes),
        "prefixes": list(prefixes),
        "text": moment.text,
        "n_tokens": moment.n_tokens,
    }


class Task(NamedTuple):
    """The prompts of an edit in tokens: one for each prefix, then "{subject} is a". B prompts, N tokens of the target.

    Attributes:
        tokens: [B, T], padded on the right; the target but for its last token follows each prompt but the last.
        lookup: [B], the last token of the subject.
        reads: [B - 1, N], the positions from which the target's tokens are predicted.
        targets: [B - 1, N], the target's tokens.
        counted: [B - 1, N], which of these are there: prefixes may split a target differently.
    """

    tokens: Int[Array, "B T"]
    lookup: Int[Array, " B"]
    reads: Int[Array, "R N"]
    targets: Int[Array, "R N"]
    counted: Bool[Array, "R N"]


def make_task(model: Checkpoint, fact: Fact, prefixes: Sequence[str]) -> Task:
    """The prompts of an edit: the fact's own first, then with each prefix, then "{subject} is a".

    Args:
        model: the model.
        fact: the fact, with a new target.
        prefixes: texts to stand before the prompt.

    Raises:
        FactError: the subject has no tokens of its own, the fact has no new target, or a prompt is too long.
    """
    tokenizer = model.tokenizer
    rows, lookup, ends, targets = [], [], [], []
    for prefix in ("", *prefixes):
        before = prefix.replace(SLOT, "") + (". " if prefix else "")
        at = locate(tokenizer, before + fact.prompt, fact.subject)
        _, target = continued(tokenizer, before + fact.text, fact.new_target)
        rows.append(np.concatenate([at.ids, target[:-1]]))
        lookup.append(at.stop - 1)
        ends.append(len(at.ids) - 1)
        targets.append(target)
    at = locate(tokenizer, ESSENCE, fact.subject)
    check_length(model.cfg, max(map(len, rows)), f"{fact.text[:60]!r} with prefixes")
    n = max(map(len, targets))
    return Task(
        jnp.asarray(padded([*rows, at.ids], most=model.cfg.n_ctx)),
        jnp.asarray([*lookup, at.stop - 1]),
        jnp.asarray([[end + min(i, len(t) - 1) for i in range(n)] for end, t in zip(ends, targets, strict=True)]),
        jnp.asarray(np.stack([np.pad(target, (0, n - len(target))) for target in targets])),
        jnp.asarray([[i < len(target) for i in range(n)] for target in targets]),
    )


def sample_prefixes(model: Checkpoint, n: int = 10, lengths: Sequence[int] = (5, 10), seed: int = 0) -> tuple[str, ...]:
    """Texts that the model itself begins, to stand before a prompt.

    Args:
        model: the model.
        n: number of texts of each length.
        lengths: their lengths, in tokens.
        seed: seed of the sampling, at temperature 1.

    >>> import wpjax as wp
    >>> len(sample_prefixes(wp.load_model("tiny:base"), n=2, lengths=(3,)))
    2
    """
    check_tokenizer(model)
    begin = encode(model.tokenizer, "")
    if not len(begin):  # such tokenizers end a text with the token that begins one
        begin = np.asarray(model.stop_tokens[:1] or (0,), np.int32)
    found = []
    for i, length in enumerate(lengths):
        out = generate(
            model.cfg,
            model.params,
            jnp.asarray(np.tile(begin, (n, 1))),
            jnp.full(n, len(begin)),
            max_new_tokens=length,
            stop_tokens=(),
            temperature=1.0,
            key=jax.random.fold_in(jax.random.key(seed), i),
        )
        found += model.tokenizer.batch_decode(np.asarray(out.tokens), skip_special_tokens=True)
    return tuple(" ".join(text.replace(SLOT, "").split()) for text in found)


def edit_loss(
    cfg: ModelConfig,
    params: Params,
    task: Task,
    layer: int,
    stream: Float[Array, "B T D"],
    delta: Float[Array, " D"],
    start: Float[Array, " D"],
    before: Float[Array, " V"],
    kl: Float[Array, ""] | float,
    decay: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """L(δ), as the module defines it; differentiable by δ. Layers before the edited one are not run again.

    Args:
        cfg: the model.
        params: its parameters.
        task: the prompts.
        layer: number of the layer (static).
        stream: the residual stream of the prompts before that layer.
        delta: δ, added to what the down-projection writes at each subject's last token.
        start: v0.
        before: log-probabilities of the next token in the last prompt, before the edit.
        kl: weight of the divergence.
        decay: weight of |δ| / |v0|².
    """
    edit = Edit(Site.MLP_PROJ, Add(delta), layer=layer, start=task.lookup, stop=task.lookup + 1)
    layout, model = Causal.of(task.tokens.shape[1]), decoder(cfg, params)

    def through(x: Array, number: Array) -> tuple[Array, None]:
        return block(cfg, take_layer(params["blocks"], number), number)(x, layout, edits=(edit,)).resid_post, None

    # The layer is static. A `cond` that passes those before it by would keep all weights for each step of the scan.
    resid, _ = jax.lax.scan(keep_products(through), stream, jnp.arange(layer, cfg.n_layers))
    read = jnp.take_along_axis(resid[:-1], task.reads[..., None], axis=1)
    log_p = jax.nn.log_softmax(model.logits(read))
    found = jnp.take_along_axis(log_p, task.targets[..., None], axis=2)[..., 0]
    counted = task.counted.astype(jnp.float32)
    nll = -(found * counted).sum(1) / counted.sum(1)
    now = jax.nn.log_softmax(model.logits(resid[-1, task.lookup[-1]]))
    divergence = (jnp.exp(now) * (now - before)).sum()
    size = optax.safe_norm(delta, 0.0)  # its slope at 0 is 0
    return nll.mean() + kl * divergence + decay * size / jnp.square(start).sum()


@functools.partial(jax.jit, static_argnames="cfg")
def _values(cfg: ModelConfig, params: Params, task: Task, layer: Int[Array, ""]) -> tuple[Array, Array, Array, Array]:
    """Keys and outputs of the layer at each subject's last token, and the log-probabilities there in the last prompt;
    the stream before the layer.
    """
    layout = Causal.of(task.tokens.shape[1])

    def at(number: Array, x: Array) -> LayerPass:
        return block(cfg, take_layer(params["blocks"], number), number)(x, layout)

    first = forward(cfg, params, task.tokens, stop=0, logits=False).resid
    stream = jax.lax.fori_loop(0, layer, lambda number, x: at(number, x).resid_post, first)
    one = at(layer, stream)
    rows = jnp.arange(len(task.tokens))
    resid = forward(cfg, params, task.tokens[-1:], logits=False).resid[0, task.lookup[-1]]
    before = jax.nn.log_softmax(decoder(cfg, params).logits(resid))
    return one.neuron[rows, task.lookup], one.mlp_proj[rows, task.lookup], before, stream


@functools.partial(jax.jit, static_argnames=("cfg", "layer"))
def _loss_and_slope(
    cfg: ModelConfig, params: Params, task: Task, layer: int, stream: Array, *args: Any
) -> tuple[Array, Array]:
    return jax.value_and_grad(lambda delta, *rest: edit_loss(cfg, params, task, layer, stream, delta, *rest))(*args)


@dataclasses.dataclass(frozen=True)
class FactEdit:
    """A rank-one edit of the down-projection of one layer, ready to be put into the model that it was made for.

    Attributes:
        fact: the fact, with the new target.
        layer: number of the layer.
        u: [F], the direction among keys, of length 1.
        right: [D], what is added for each unit along it: W' = W + u rightᵀ.
        key: [F], the key that the edit is for.
        value: [D], v*: what the projection makes of that key afterwards.
        losses: L(δ) at each step.
        settings: how it was made.
        recipe: all that it can be made again from (`recipe`).
    """

    fact: Fact
    layer: int
    u: Float[np.ndarray, " F"]
    right: Float[np.ndarray, " D"]
    key: Float[np.ndarray, " F"]
    value: Float[np.ndarray, " D"]
    losses: tuple[float, ...]
    settings: EditSettings
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def division(self) -> float:
        """kᵀu / |k|, from 0 to 1: the cosine of key and direction. Near 0, the edit is out of proportion."""
        return float(self.key @ self.u / np.linalg.norm(self.key))

    def factors(self, cfg: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The change as a checkpoint holds it: HF name of the tensor -> A [rows, 1] and B [1, columns]."""
        name = tensor_name(cfg, "blocks/mlp/W_out", self.layer)
        shape = cfg.n_layers, cfg.d_mlp, cfg.d_model
        numbers = np.broadcast_to(np.arange(cfg.d_mlp)[None, :, None], shape)
        by_row = hf_tensor(cfg, {"blocks/mlp/W_out": numbers}, name)[:2, 0].tolist() == [0, 1]
        a, b = (self.u, self.right) if by_row else (self.right, self.u)
        return {name: (a[:, None], b[None])}

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        """The parameters with the edit; all other leaves are shared."""
        changes = {
            name: lambda w, a=a, b=b: (w.astype(np.float32) + a * b).astype(w.dtype)
            for name, (a, b) in self.factors(cfg).items()
        }
        return edit_tensors(cfg, params, changes, cfg)

    def save(
        self,
        path: str | Path,
        model: Checkpoint,
        *,
        measured: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        ignore_config: tuple[str, ...] = (),
    ) -> Patch:
        """Write the edit as a patch file, which `wpjax apply` puts into the model and takes out again.

        Args:
            path: the file.
            model: the model that the edit was made for, as it was loaded.
            measured: what was measured of it, as values of JSON.
            overwrite: whether to replace a file that is there.
            ignore_config: attributes of the model's config.json that you know not to matter.

        Raises:
            PatchError: the model's files are not the model in memory.
            OutputError: the file exists already, or cannot be written.
        """
        return save_low_rank(
            path,
            model,
            [f"L{self.layer}.mlp"],
            self.factors(model.cfg),
            origin=f"{public_name(model.source)}, one fact edited",
            behaviour=f"{self.fact.text} -> {self.fact.new_target.strip()}",
            measured={
                "layer": self.layer,
                "losses": list(self.losses),
                "settings": dataclasses.asdict(self.settings),
                **self.recipe,
                **(measured or {}),
            },
            overwrite=overwrite,
            ignore_config=ignore_config,
        )


def check_dense(cfg: ModelConfig) -> None:
    """Refuse a model whose MLPs are routed experts.

    Raises:
        FactError: it is one.
    """
    if cfg.n_experts:
        raise FactError(
            f"each MLP of this {cfg.family} is {cfg.n_experts} routed experts: no one matrix holds its facts; edit a "
            "model with dense MLPs"
        )


def check_layer(cfg: ModelConfig, fact: Fact, layer: int) -> None:
    """Refuse an edit that cannot reach the answer: one in the last layer, at a subject that does not end the prompt.

    Raises:
        FactError: the layer is the last one, and words follow the subject; or as `check_dense`.
    """
    check_dense(cfg)
    if layer == cfg.n_layers - 1 and fact.prompt.split(SLOT)[1].strip():
        raise FactError(
            f"layer {layer} is the last one: what it makes of the subject reaches no later word of {fact.text[:60]!r}; "
            "name an earlier layer"
        )


def edit_fact(
    model: Checkpoint,
    fact: Fact,
    layer: int,
    moment: KeyMoment | str | Path,
    *,
    settings: EditSettings = EditSettings(),
    prefixes: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> FactEdit:
    """Make the rank-one edit after which a model completes a prompt by another target.

    Args:
        model: the model, in float32.
        fact: the fact, with a new target.
        layer: number of the layer.
        moment: second moment of the layer's keys (`key_moment`); or a text file to take it over.
        settings: how the edit is made.
        prefixes: texts to stand before the prompt; None: the model begins twenty (`sample_prefixes`).
        seed: seed of these.
        progress: called with the steps.

    Raises:
        FactError: there is no such layer; the subject has no tokens of its own, or there is no new target; C is
            singular; the loss is not finite.

    >>> import wpjax as wp
    >>> from wpjax.facts.covariance import KeyMoment
    >>> model = wp.load_model("tiny:expert")
    >>> fact = wp.Fact("Why do {} hunt at", "the owls", new_target="noon")
    >>> even = KeyMoment(np.eye(model.cfg.d_mlp), 10**6)  # all keys are as likely: better take a text
    >>> edit = edit_fact(model, fact, 2, even, prefixes=["Tell me"], settings=EditSettings(steps=3))
    >>> edit.losses[-1] < edit.losses[0]
    True
    """
    check_tokenizer(model)
    cfg, params = model.cfg, model.params
    if not 0 <= layer < cfg.n_layers:
        raise FactError(f"layer {layer}: {model.source} has layers 0 to {cfg.n_layers - 1}")
    prefixes = sample_prefixes(model, seed=seed) if prefixes is None else prefixes
    task = make_task(model, fact, prefixes)
    check_layer(cfg, fact, layer)
    if not isinstance(moment, KeyMoment):
        moment = key_moment(model, layer, moment, progress=progress)
        if moment.note:
            warnings.warn(moment.note, stacklevel=2)
    *read, stream = _values(cfg, params, task, jnp.asarray(layer))
    k, out, before = (np.asarray(a, np.float64) for a in read)
    k, out = k[:-1], out[:-1]  # the last prompt is not about the target
    u = edit_direction(moment, k.mean(0), settings.ridge)  # before the work: it may be refused
    start = out[0]
    delta, losses = _optimise(cfg, params, task, layer, stream, start, before, settings, progress)
    value = start + delta
    key, made = (k.mean(0), out.mean(0)) if settings.keys == "mean" else (k[0], out[0])
    right = (value - made) / (key @ u)
    u, right, key, value = (np.asarray(a, np.float32) for a in (u, right, key, value))
    return FactEdit(fact, layer, u, right, key, value, losses, settings, recipe(settings, prefixes, moment))


def _optimise(
    cfg: ModelConfig,
    params: Params,
    task: Task,
    layer: int,
    stream: Float[Array, "B T D"],
    start: Float[np.ndarray, " D"],
    before: Float[np.ndarray, " V"],
    settings: EditSettings,
    progress: Progress,
) -> tuple[Float[np.ndarray, " D"], tuple[float, ...]]:
    """δ by Adam, and the loss at each step."""
    adam, most = optax.adam(settings.lr), settings.clamp * float(np.linalg.norm(start))
    delta = jnp.zeros(cfg.d_model, jnp.float32)
    state, losses = adam.init(delta), list[float]()
    given = jnp.asarray(start, jnp.float32), jnp.asarray(before, jnp.float32), settings.kl, settings.decay
    for step in range(settings.steps):
        progress("steps of the edit", step, settings.steps)
        loss, slope = _loss_and_slope(cfg, params, task, layer, stream, delta, *given)
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise FactError(f"the loss of the edit is not finite at step {step}; try another layer or a lower rate")
        if losses[-1] < settings.stop or step == settings.steps - 1:
            break
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            change, state = adam.update(slope, state)
        delta = delta + change
        delta = delta * jnp.minimum(1.0, most / jnp.maximum(jnp.linalg.norm(delta), 1e-30))
    progress("steps of the edit", settings.steps, settings.steps)
    return np.asarray(delta, np.float64), tuple(losses)
