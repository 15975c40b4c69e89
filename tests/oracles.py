"""What the same models say in HF torch, the independent truth that several test files compare with."""

import torch

from wpjax.models.decoder import Site


def hf_layers(model):
    """The decoder layers of an HF model of either family, in order."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h


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


def hf_sites(model, tokens):
    """Every site of HF's decoder layers by forward hooks: the stream and what the two modules read of it."""
    pre, mid, post, attn_input, mlp_input = [], [], [], [], []
    llama = model.config.model_type == "llama"
    hooks = []
    for layer in hf_layers(model):
        attn_norm = layer.input_layernorm if llama else layer.ln_1
        mlp_norm = layer.post_attention_layernorm if llama else layer.ln_2
        hooks += [
            layer.register_forward_pre_hook(
                lambda m, a, k: pre.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
            attn_norm.register_forward_hook(lambda m, a, out: attn_input.append(out)),
            mlp_norm.register_forward_pre_hook(lambda m, a: mid.append(a[0])),
            mlp_norm.register_forward_hook(lambda m, a, out: mlp_input.append(out)),
            layer.register_forward_hook(lambda m, a, out: post.append(out[0] if isinstance(out, tuple) else out)),
        ]
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), {
        site: torch.stack(found).numpy()
        for site, found in zip(Site, (pre, attn_input, mid, mlp_input, post), strict=True)
    }
