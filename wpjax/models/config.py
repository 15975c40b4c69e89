"""The shape of a decoder, as frozen data: everything the forward pass needs to know besides the weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
Backward = Literal["gradient", "relp", "attnlrp"]
RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

ORIGINAL_CONTEXT = "original_max_position_embeddings"
"""HF's attribute for the context before longrope extended it."""


def _later(default: Any) -> Any:
    """A field that a later version added; at its default, `_repr` leaves it out."""
    return dataclasses.field(default=default, metadata={"later": True})


def _repr(self: Any) -> str:
    """As a dataclass shows itself, so that a model which an earlier version knew looks as it did then.

    A model's fingerprint is a hash of this text, and results and anchors hold fingerprints.
    """
    shown = {
        field.name: getattr(self, field.name)
        for field in dataclasses.fields(self)
        if field.repr and not (field.metadata.get("later") and getattr(self, field.name) == field.default)
    }
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding in the half-split layout, with its length-scaling variant.

    Attributes:
        theta: base of the wavelengths: pair i of d dimensions turns by theta^(-2 i / d) radians a token.
        scaling: name of the variant, as in HF's `rope_type`.
        options: the variant's numbers by name, sorted (a tuple, so that a configuration is hashable). For
            longrope, "long" says whether the long factors are used, at every length.
        fraction: share of a head's dimensions that are rotated. These come first; the others have no position.
    """

    theta: float = 10_000.0
    scaling: RopeScaling = "default"
    options: tuple[tuple[str, float | bool | tuple[float, ...]], ...] = ()
    fraction: float = _later(1.0)

    __repr__ = _repr

    @property
    def is_long(self) -> bool:
        """Whether longrope rotates by its long factors."""
        return bool(dict(self.options).get("long", False))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder. It is hashable, so it can be a static argument of a jitted function.

    Shape letters used throughout: L layers, D model, H heads, K KV heads, F neurons, V vocabulary.

    Attributes:
        family: name of the entry in `wpjax.models.families` that reads and writes its checkpoints.
        n_layers: L.
        d_model: D.
        n_heads: H, query heads.
        n_kv_heads: K, key/value heads. Query head `h` reads KV head `h // n_rep`.
        d_head: width of one head.
        d_mlp: F, neurons of a layer: the hidden width of its MLP.
        d_vocab: V, tokens of the vocabulary.
        n_ctx: longest sequence the model accepts, in tokens.
        norm: "rms" (scale only) or "layer" (centred, scale and bias).
        norm_bias: whether a norm of kind "layer" has a bias.
        norm_eps: small number that a norm adds to the mean square (or the variance).
        norm_offset: number added to a norm's scale. It is 1 in families whose checkpoints hold scale - 1 (Gemma).
        pre_norm: true if attention and MLP read a normed stream; false if they read the stream itself (OLMo 2).
        post_norm: true if a norm stands between what they write and the stream (Gemma 2, OLMo 2).
        parallel: true if the MLP reads the stream that enters the layer, beside attention (GPT-NeoX); false if it
            reads the stream after attention.
        shared_norm: true if attention and MLP, side by side, read what one norm makes (Cohere); only with `parallel`.
        act: activation of the MLP.
        gated: true for act(x W_gate) * (x W_in), false for act(x W_in).
        rope: rotary embedding; None for learned absolute positions.
        local_rope: rotary embedding of the layers with a sliding window, if theirs is another one (Gemma 3).
        window: size of the sliding window: a token sees itself and the `window` - 1 tokens before it. None: no layer
            has a window, and tokens see all those before them.
        sliding: [L], whether each layer has the window; empty without a window.
        query_growth: (beta, n): queries at position p are multiplied by 1 + beta log(1 + floor(p / n)), after rotary
            positions (Ministral 3); None for no growth.
        unrotated: [L], whether each layer has no rotary positions (SmolLM3); empty if all layers have them.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether each head's queries and keys go through a norm over their d_head numbers, before rotary
            positions. All heads of a layer share its scale (Qwen3, Gemma 3).
        joint_qk_norm: whether the queries of all heads of a layer together go through one norm over their n_heads
            d_head numbers, and the keys through another, before rotary positions (OLMo 2).
        out_bias: whether the output of attention has a bias.
        mlp_bias: whether the MLP has biases.
        attn_scale: factor of attention scores; None for d_head ** -0.5.
        attn_softcap: bound on attention scores, see `ops.soft_cap`; None for no bound.
        logit_softcap: bound on logits, likewise.
        embed_scale: factor of embedded tokens.
        resid_scale: factor of what attention and MLP add to the stream, after their norms if they have these (Granite).
        logit_scale: factor of logits, before their bound (Granite).
        tied: whether the unembedding is the embedding transposed.
        n_experts: E, routed experts of a layer. Each has d_mlp / E of its neurons, in order: neuron f belongs to expert
            f // (d_mlp / E). 0: there are none, and all neurons act on every token.
        n_active: how many experts act on a token: those with the largest logits of the router.
        norm_routing: whether the weights of these experts are divided by their sum (`ops.top_k_softmax`).
        directions: of each module whose change is divided into directions ("q", "k", "v", "o", "gate", "up", "down"),
            its name and the number of directions in each layer, [L]. Empty but for `directions.by_directions`.
        qkv_clip: queries and keys, after norms and before rotary positions, and values are clipped to this magnitude
            (OLMoE); None for no bound.
        activation_splits: 1 or 2. Where an activation meets a bfloat16 weight, it is written as the sum of so many
            bfloat16 numbers. 1 keeps 8 bits of it; 2 keeps 16 and takes twice the operations. With float32 weights
            it changes nothing.
        backward: what slopes a backward pass takes: "gradient", or relevance by one of two sets of rules, "relp" and
            "attnlrp" (`models.relevance`).

    >>> cfg = ModelConfig("llama", 2, 16, n_heads=4, n_kv_heads=2, d_head=4, d_mlp=32, d_vocab=50, n_ctx=64)
    >>> cfg.n_rep, cfg.score_scale
    (2, 0.5)
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    act: Activation = "silu"
    gated: bool = True
    rope: Rope | None = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    # Not in the repr, which fingerprints hash: these two say how the model is run, not what it is.
    activation_splits: int = dataclasses.field(default=1, repr=False)
    backward: Backward = dataclasses.field(default="gradient", repr=False)
    norm_offset: float = _later(0.0)
    pre_norm: bool = _later(True)
    post_norm: bool = _later(False)
    parallel: bool = _later(False)
    attn_scale: float | None = _later(None)
    attn_softcap: float | None = _later(None)
    logit_softcap: float | None = _later(None)
    embed_scale: float = _later(1.0)
    qk_norm: bool = _later(False)
    window: int | None = _later(None)
    sliding: tuple[bool, ...] = _later(())
    local_rope: Rope | None = _later(None)  # noqa: RUF009  (a frozen field)
    joint_qk_norm: bool = _later(False)
    resid_scale: float = _later(1.0)
    logit_scale: float = _later(1.0)
    unrotated: tuple[bool, ...] = _later(())
    query_growth: tuple[float, int] | None = _later(None)
    norm_bias: bool = _later(True)
    shared_norm: bool = _later(False)
    n_experts: int = _later(0)
    n_active: int = _later(0)
    norm_routing: bool = _later(False)
    qkv_clip: float | None = _later(None)
    directions: tuple[tuple[str, tuple[int, ...]], ...] = _later(())

    __repr__ = _repr

    @property
    def score_scale(self) -> float:
        """Factor of attention scores."""
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def n_rep(self) -> int:
        """Number of query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def d_expert(self) -> int:
        """Number of neurons of one routed expert."""
        return self.d_mlp // self.n_experts

    def n_directions(self, module: str) -> tuple[int, ...]:
        """Number of directions of a module's change in each layer, [L]; empty if its change is not divided."""
        return dict(self.directions).get(module, ())

    @property
    def longer_context(self) -> str:
        """What to do if a prompt is longer than the context, as the end of an error; empty if nothing can be done."""
        if self.rope is None or self.rope.scaling != "longrope" or self.rope.is_long:
            return ""
        return (
            f"; or pass --ignore-config {ORIGINAL_CONTEXT}: the model then rotates by its long factors at all lengths"
        )

    def differences(self, other: ModelConfig) -> list[str]:
        """Fields in which two configurations differ, each as "name: mine != theirs"."""
        return [
            f"{f.name}: {getattr(self, f.name)} != {getattr(other, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]
