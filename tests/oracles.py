"""What the same models say in HF torch, the independent truth that several test files compare with."""

import dataclasses
import functools
import sys

import numpy as np
import torch

from tests.tiny import ROUTED
from wpjax.models.sites import Site


def hf_layers(model):
    """The decoder layers of an HF model, in order."""
    inner = getattr(model, model.base_model_prefix)
    return inner.layers if hasattr(inner, "layers") else inner.h


def hf_final_norm(model):
    """The norm before the unembedding."""
    inner = getattr(model, model.base_model_prefix)
    return next(getattr(inner, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(inner, name))


@torch.no_grad()
def hf_log_p(model, ids):
    """Log-probabilities [T, V] of the next token after each token of one sequence."""
    return model(torch.tensor([list(map(int, ids))])).logits[0].log_softmax(-1)


def hf_answer(model, prompt, stop_tokens, n_new):
    """Greedy answer of at most `n_new` tokens, one whole forward a token; a stop token is its last."""
    ids = list(prompt)
    for _ in range(n_new):
        ids.append(int(hf_log_p(model, ids)[-1].argmax()))
        if ids[-1] in stop_tokens:
            break
    return ids[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class Names:
    """Where a family's modules stand in a layer of HF torch; a norm that it does not have is empty.

    Attributes:
        norm_attn: makes what attention reads.
        w_o: the projection of all heads.
        norm_mlp: makes what the MLP reads.
        mlp: the MLP.
        w_out: the projection of all neurons; empty in an MLP of routed experts.
        norm_attn_out: makes what attention adds to the stream.
        norm_mlp_out: makes what the MLP adds to it.
    """

    norm_attn: str
    w_o: str
    norm_mlp: str
    mlp: str
    w_out: str
    norm_attn_out: str = ""
    norm_mlp_out: str = ""


LLAMA = Names("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp", "mlp.down_proj")
GEMMA = Names("input_layernorm", "self_attn.o_proj", "pre_feedforward_layernorm", "mlp", "mlp.down_proj",
              "post_attention_layernorm", "post_feedforward_layernorm")  # fmt: skip
OLMO = Names("", "self_attn.o_proj", "", "mlp", "mlp.down_proj",
             "post_attention_layernorm", "post_feedforward_layernorm")  # fmt: skip
NAMES = {
    **dict.fromkeys("llama mistral ministral ministral3 qwen2 qwen3 phi3 smollm3 granite stablelm".split(), LLAMA),
    **dict.fromkeys(("olmo2", "olmo3"), OLMO),
    **dict.fromkeys(ROUTED, dataclasses.replace(LLAMA, w_out="")),
    **dict.fromkeys(("cohere", "cohere2"), dataclasses.replace(LLAMA, norm_mlp="")),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "gpt2": Names("ln_1", "attn.c_proj", "ln_2", "mlp", "mlp.c_proj"),
    "gpt_neox": Names("input_layernorm", "attention.dense", "post_attention_layernorm", "mlp", "mlp.dense_4h_to_h"),
    "starcoder2": dataclasses.replace(LLAMA, w_out="mlp.c_proj"),
}


def hf_sites(model, tokens):
    """Logits, and what passes at every site of HF's decoder layers, [L, B, T, ...].

    By forward hooks, and by a spy on the function that all families call for attention.
    """
    names, layers, seen, handles = NAMES[model.config.model_type], hf_layers(model), {}, []

    def keep(site, value):
        seen.setdefault(site, []).append(value.detach())

    def spy(module, query, key, value, *args, **kwargs):
        for site, x in ((Site.Q, query), (Site.K, key), (Site.V, value)):
            keep(site, x.transpose(1, 2))
        return eager(module, query, key, value, *args, **kwargs)

    def routed_neurons(experts, module, inputs, routed):
        _, weights, chosen = routed  # of each token's k experts
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        gate, up = torch.einsum("td,efd->tef", x, experts.gate_up_proj).chunk(2, dim=-1)
        by_expert = torch.zeros(len(x), gate.shape[1]).scatter(1, chosen, weights)
        keep(Site.NEURON, (experts.act_fn(gate) * up * by_expert[..., None]).reshape(*np.shape(tokens), -1))

    def hook(layer, name, read=None, made=None):
        if not name:
            return
        module = layer.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, a: keep(read, a[0]) if read else None))
        handles.append(module.register_forward_hook(lambda m, a, out: keep(made, out) if made else None))

    for layer in layers:
        handles += [
            layer.register_forward_pre_hook(
                lambda m, a, k: keep(Site.RESID_PRE, a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
            layer.register_forward_hook(
                lambda m, a, out: keep(Site.RESID_POST, out[0] if isinstance(out, tuple) else out)
            ),
        ]
        hook(layer, names.norm_attn, made=Site.ATTN_INPUT)
        hook(layer, names.w_o, Site.Z, Site.ATTN_PROJ)
        hook(layer, names.norm_attn_out, made=Site.ATTN_OUT)
        hook(layer, names.norm_mlp, Site.RESID_MID, Site.MLP_INPUT)
        if not names.norm_mlp:
            hook(layer, names.mlp, Site.RESID_MID)
        hook(layer, names.w_out, Site.NEURON, Site.MLP_PROJ)
        if not names.w_out:
            hook(layer, names.mlp, made=Site.MLP_PROJ)
            handles.append(layer.mlp.gate.register_forward_hook(functools.partial(routed_neurons, layer.mlp.experts)))
        hook(layer, names.norm_mlp_out, made=Site.MLP_OUT)
    modeling = sys.modules[type(model).__module__]
    eager = modeling.eager_attention_forward
    modeling.eager_attention_forward = spy
    try:
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits
    finally:
        modeling.eager_attention_forward = eager
        for handle in handles:
            handle.remove()
    found = {site: torch.stack(values).numpy() for site, values in seen.items()}
    found[Site.Z] = found[Site.Z].reshape(found[Site.Q].shape)
    for site, proj in ((Site.ATTN_OUT, Site.ATTN_PROJ), (Site.MLP_OUT, Site.MLP_PROJ)):
        found.setdefault(site, found[proj] * getattr(model.config, "residual_multiplier", 1.0))
    found.setdefault(Site.ATTN_INPUT, found[Site.RESID_PRE])
    found.setdefault(Site.MLP_INPUT, found[Site.RESID_MID])
    if model.config.model_type.startswith("cohere"):  # rotated pairs stand side by side there, half a head apart here
        for site in (Site.Q, Site.K):
            pairs = found[site].reshape(*found[site].shape[:-1], -1, 2)
            found[site] = pairs.swapaxes(-1, -2).reshape(found[site].shape)
        found[Site.MLP_INPUT], found[Site.RESID_MID] = (
            found[Site.ATTN_INPUT],
            found[Site.RESID_PRE] + found[Site.ATTN_OUT],
        )
    if getattr(model.config, "use_parallel_residual", False):  # its MLP reads the stream that enters
        found[Site.RESID_MID] = found[Site.RESID_PRE] + found[Site.ATTN_OUT]
    return logits.numpy(), found


def hf_patched_run(model, tokens, change=lambda part, layer, value: value):
    """Logits [B, T, V] of a run in which parts of layers are changed, and the parts as they were before the change.

    Args:
        model: an HF model.
        tokens: [B, T] token ids.
        change: function of (part, layer, value) that returns the new value. Parts: "resid", the stream that enters;
            "q", "k" and "v", what the projections (or a norm of all heads after them) make, [B, T, heads, Dh]; "z",
            what W_O reads, likewise; "mlp".

    Returns:
        logits, and {part: one value a layer}.
    """
    config, names = model.config, NAMES[model.config.model_type]
    n_heads = config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", n_heads)
    dh = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    seen, handles = {part: [] for part in ("resid", "q", "k", "v", "z", "mlp")}, []

    def changed(part, layer, value, shape=None):
        value = value if shape is None else value.reshape(*value.shape[:2], *shape)
        seen[part].append(value.clone())
        return change(part, layer, value)

    def fused(layer, out):
        by_head = config.model_type == "gpt_neox"  # its queries, keys and values stand head by head
        qkv = out.reshape(*out.shape[:2], n_heads, 3, dh) if by_head else out.reshape(*out.shape[:2], 3, n_heads, dh)
        axis = 3 if by_head else 2
        new = [changed(part, layer, qkv.select(axis, i)) for i, part in enumerate("qkv")]
        return torch.stack(new, axis).reshape(out.shape)

    for i, layer in enumerate(hf_layers(model)):
        for part, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
            if hasattr(layer, "self_attn"):
                # Where one norm spans all heads, a head's own queries and keys are those after it.
                joint = config.model_type.startswith("olmo") and part != "v"
                handles.append(
                    layer.self_attn.get_submodule(f"{part}_norm" if joint else f"{part}_proj").register_forward_hook(
                        lambda m, a, out, i=i, part=part, n=n: changed(part, i, out, (n, dh)).reshape(out.shape)
                    )
                )
        fuse = "attn.c_attn" if config.model_type == "gpt2" else "attention.query_key_value"
        if not hasattr(layer, "self_attn"):
            handles.append(layer.get_submodule(fuse).register_forward_hook(lambda m, a, out, i=i: fused(i, out)))
        handles += [
            layer.register_forward_pre_hook(lambda m, a, i=i: (changed("resid", i, a[0]), *a[1:])),
            layer.get_submodule(names.w_o).register_forward_pre_hook(
                lambda m, a, i=i: (changed("z", i, a[0], (n_heads, dh)).reshape(a[0].shape),)
            ),
            layer.get_submodule(names.mlp).register_forward_hook(lambda m, a, out, i=i: changed("mlp", i, out)),
        ]
    try:
        with torch.no_grad():
            return model(torch.tensor(tokens, dtype=torch.long)).logits, seen
    finally:
        for handle in handles:
            handle.remove()
