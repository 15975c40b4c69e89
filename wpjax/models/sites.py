"""Sites: the named places of a layer where a forward pass can be read or edited."""

from __future__ import annotations

import enum


class Site(enum.StrEnum):
    """A place in a layer, in the order in which a forward pass comes by; see `block.LayerPass` for the equations.

    Shapes of one layer: B batch, T tokens, D model, H query heads, K KV heads, Dh head width, F neurons.
    """

    RESID_PRE = "resid_pre"
    """[B, T, D], the residual stream that enters the layer."""
    ATTN_INPUT = "attn_input"
    """[B, T, D], what attention reads of it: the stream, normed in most families."""
    Q = "q"
    """[B, T, H, Dh], queries, rotated."""
    K = "k"
    """[B, T, K, Dh], keys, rotated."""
    V = "v"
    """[B, T, K, Dh], values."""
    Z = "z"
    """[B, T, H, Dh], each head's mix of values, before W_O."""
    ATTN_PROJ = "attn_proj"
    """[B, T, D], what W_O (and b_O) makes of all heads."""
    ATTN_OUT = "attn_out"
    """[B, T, D], what attention adds to the stream: `attn_proj`, normed in families with post-norms."""
    RESID_MID = "resid_mid"
    """[B, T, D], the stream with attention added."""
    MLP_INPUT = "mlp_input"
    """[B, T, D], what the MLP reads."""
    NEURON = "neuron"
    """[B, T, F], activations of the MLP's neurons."""
    MLP_PROJ = "mlp_proj"
    """[B, T, D], what W_out (and b_out) makes of all neurons."""
    MLP_OUT = "mlp_out"
    """[B, T, D], what the MLP adds to the stream: `mlp_proj`, normed in families with post-norms."""
    RESID_POST = "resid_post"
    """[B, T, D], the stream with the MLP added: what the next layer reads."""
