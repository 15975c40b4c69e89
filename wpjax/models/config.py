"""The shape of a decoder, as frozen data: everything the forward pass needs to know besides the weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


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
        theta: base wavelength.
        scaling: name of the variant, as in HF's `rope_type`.
        options: the variant's numbers, sorted by name (a tuple, so that the whole stays hashable).
        fraction: share of a head's dimensions that are rotated, the first ones; the others know no position.
    """

    theta: float = 10_000.0
    scaling: RopeScaling = "default"
    options: tuple[tuple[str, float | bool | tuple[float, ...]], ...] = ()
    fraction: float = _later(1.0)

    __repr__ = _repr


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder; hashable, so it can be a static argument of a jitted function.

    Shape letters used throughout: L layers, D model, H heads, K KV heads, F neurons, V vocabulary.

    Attributes:
        family: name of the entry in `wpjax.models.families` that reads and writes its checkpoints.
        n_layers: L.
        d_model: D.
        n_heads: H, query heads.
        n_kv_heads: K, key/value heads; query head `h` reads KV head `h // n_rep`.
        d_head: width of one head.
        d_mlp: F, hidden width of the MLP, i.e. neurons a layer.
        d_vocab: V.
        n_ctx: longest sequence the model accepts, in tokens.
        norm: "rms" (scale only) or "layer" (centred, scale and bias).
        norm_eps: added to the mean square (or variance).
        act: activation of the MLP.
        gated: whether the MLP is act(x W_gate) * (x W_in) or act(x W_in).
        rope: rotary embedding, or None for learned absolute positions.
        qkv_bias: biases on queries, keys and values.
        out_bias: bias on the attention's output.
        mlp_bias: biases in the MLP.
        tied: whether the unembedding is the embedding transposed.
        activation_splits: bfloat16 numbers, 1 or 2, that each activation is written as where it meets a bfloat16
            weight: the product in 8 bits of it or, for twice the operations, in 16. Of no effect on float32.
        norm_offset: added to a norm's scale: 1 in families that write it as the difference from 1 (Gemma).
        pre_norm: whether attention and MLP read a normed stream, or the stream itself (OLMo 2).
        post_norm: whether what they write is normed before it is added to the stream (Gemma 2, OLMo 2).
        parallel: whether the MLP reads the stream as it enters the layer, beside attention (GPT-NeoX), or the stream
            that attention has written to.
        attn_scale: of attention scores; None for d_head ** -0.5.
        attn_softcap: bound on attention scores, see `ops.soft_cap`; None for none.
        logit_softcap: bound on logits, likewise.
        embed_scale: factor of embedded tokens.
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
    activation_splits: int = dataclasses.field(default=1, repr=False)  # how it is run, not what it is
    norm_offset: float = _later(0.0)
    pre_norm: bool = _later(True)
    post_norm: bool = _later(False)
    parallel: bool = _later(False)
    attn_scale: float | None = _later(None)
    attn_softcap: float | None = _later(None)
    logit_softcap: float | None = _later(None)
    embed_scale: float = _later(1.0)

    __repr__ = _repr

    @property
    def score_scale(self) -> float:
        """Of attention scores."""
        return self.d_head**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def n_rep(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    def differences(self, other: ModelConfig) -> list[str]:
        """Fields in which two configurations differ, each as "name: mine != theirs"."""
        return [
            f"{f.name}: {getattr(self, f.name)} != {getattr(other, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]
