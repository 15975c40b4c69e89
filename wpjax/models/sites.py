"""Sites: the named places of a layer where a forward pass can be read or edited."""

from __future__ import annotations

import enum


class Site(enum.StrEnum):
    """A place in a layer, in the order of a forward pass; `models.block` has the equations.

    Shapes of one layer: B batch, T tokens, D model, H query heads, K KV heads, Dh head width, F neurons.

    >>> Site("resid_mid") is Site.RESID_MID  # a site's name will do
    True
    >>> [site.value for site in Site][:3]
    ['resid_pre', 'attn_input', 'q']
    """

    RESID_PRE = "resid_pre"
    """[B, T, D], the residual stream that enters the layer."""
    ATTN_INPUT = "attn_input"
    """[B, T, D], what attention reads: the stream that enters, normed in most families."""
    Q = "q"
    """[B, T, H, Dh], queries, after rotary positions."""
    K = "k"
    """[B, T, K, Dh], keys, after rotary positions."""
    V = "v"
    """[B, T, K, Dh], values."""
    Z = "z"
    """[B, T, H, Dh], each head's mix of values, before W_O."""
    ATTN_PROJ = "attn_proj"
    """[B, T, D], what all heads write together: z W_O + b_O."""
    ATTN_OUT = "attn_out"
    """[B, T, D], what attention adds to the stream: `attn_proj`, normed in post-norm families, times `resid_scale`."""
    RESID_MID = "resid_mid"
    """[B, T, D], the stream with attention added."""
    MLP_INPUT = "mlp_input"
    """[B, T, D], what the MLP reads."""
    NEURON = "neuron"
    """[B, T, F], activations of the MLP's neurons; those of a routed expert times the router's weight of it."""
    MLP_PROJ = "mlp_proj"
    """[B, T, D], what all neurons write together: neuron W_out + b_out."""
    MLP_OUT = "mlp_out"
    """[B, T, D], what the MLP adds to the stream: `mlp_proj`, normed in post-norm families, times `resid_scale`."""
    RESID_POST = "resid_post"
    """[B, T, D], the stream with the MLP added: what the next layer reads."""
