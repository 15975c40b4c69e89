"""Causal tracing: against ROME's released trace in HF torch, with the same noise; identities; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.oracles import NAMES, hf_layers
from tests.tiny import build_pair
from wpjax.facts.flow import flow, packing

N, PAD, SUBJECT, SAMPLES, WINDOW = 9, 12, (2, 5), 3, 2
RNG = np.random.default_rng(0)
IDS = np.pad(RNG.integers(0, 61, N), (0, PAD - N)).astype(np.int32)
OTHER = IDS.copy()
OTHER[slice(*SUBJECT)] = (IDS[slice(*SUBJECT)] + 7) % 61
ANSWER = 11


@pytest.fixture(scope="module", params=["gpt2-tied", "llama-gqa3", "gemma3", "gpt-neox"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def noise_of(width):
    noise = np.zeros((SAMPLES, PAD, width), np.float32)
    noise[:, slice(*SUBJECT)] = np.random.default_rng(1).standard_normal((SAMPLES, SUBJECT[1] - SUBJECT[0], width))
    return noise


def hf_embedding(model):
    return model.get_input_embeddings()


def hf_module(model, layer, kind):
    """The module whose output ROME restores: a layer, what its MLP adds to the stream, or what its attention adds."""
    one, names = hf_layers(model)[layer], NAMES[model.config.model_type]
    if kind == "stream":
        return one
    own = {"mlp": names.norm_mlp_out or names.mlp, "attn": names.norm_attn_out or names.w_o}[kind]
    return one.get_submodule(own)


@torch.no_grad()
def trace_with_repatch(model, ids, noise, restore, unpatch):
    """`trace_with_repatch` of kmeng01/rome (experiments/causal_trace.py), for modules in place of their names.

    Row 0 is the clean run; noise is added to the embeddings of the others. `restore` and `unpatch` hold (token,
    module): what is given the clean run's value, and what is given the value of a corrupted run without restoration.
    """
    patch, back, first = {}, {}, {}
    for token, module in restore:
        patch.setdefault(module, []).append(token)
    for token, module in unpatch:
        back.setdefault(module, []).append(token)

    def rule(module, args, out):
        h = out[0] if isinstance(out, tuple) else out
        if module is hf_embedding(model):
            h[1:] += torch.tensor(noise)
        elif first_pass:
            first[module] = h.clone()
        else:
            for token in patch.get(module, []):
                h[1:, token] = h[0, token]
            for token in back.get(module, []):
                h[1:, token] = first[module][1:, token]
        return out

    for first_pass in [True, False]:  # noqa: B007  (the hook reads it)
        handles = [m.register_forward_hook(rule) for m in {hf_embedding(model): 0} | patch | back]
        logits = model(torch.tensor(np.tile(ids, (len(noise) + 1, 1)))).logits
        for handle in handles:
            handle.remove()
    p = torch.softmax(logits[:, -1], dim=1)[:, ANSWER]
    return p[0].item(), p[1:].numpy()


def released(model, noise, kind="stream", severed=None):
    """ROME's table of every token and layer; [L, C, R]."""
    n_layers, ids = len(hf_layers(model)), IDS[:N]
    noise = noise[:, :N]
    table = np.zeros((n_layers, N, SAMPLES))
    for token in range(N):
        unpatch = [(token, hf_module(model, layer, severed)) for layer in range(n_layers)] if severed else []
        for layer in range(n_layers):
            span = range(max(0, layer - WINDOW // 2), min(n_layers, layer - (-WINDOW // 2)))
            layers = [layer] if kind == "stream" else span
            restore = [(token, hf_module(model, i, kind)) for i in layers]
            clean, table[layer, token] = trace_with_repatch(model, ids, noise, restore, unpatch)
    return clean, trace_with_repatch(model, ids, noise, [], [])[1], table


def ours(pair, noise, restored, corrupted=IDS, **options):
    found = flow(
        pair.cfg, pair.base, jnp.asarray(IDS), jnp.asarray(np.tile(corrupted, (len(noise), 1))), jnp.asarray(noise),
        jnp.asarray(restored), packing(restored[:, :N], N), jnp.asarray(N - 1), jnp.asarray(ANSWER), window=WINDOW,
        **options,
    )  # fmt: skip
    return jax.tree.map(np.asarray, found)


def each_token(first=0):
    return np.eye(N, PAD, dtype=bool)[first:]


@pytest.mark.parametrize("options", [{"kind": "stream"}, {"kind": "mlp"}, {"kind": "attn"},
                                     {"severed": "mlp"}, {"severed": "attn"}], ids=str)  # fmt: skip
def test_every_cell_is_that_of_the_released_trace(hf_pair, pair, options):
    noise = noise_of(pair.cfg.d_model)
    clean, corrupted, table = released(hf_pair.base.model, noise, **options)
    found = ours(pair, noise, each_token(SUBJECT[0]), **options)
    worst = max(np.abs(found.restored - table[:, SUBJECT[0] :]).max(), np.abs(found.corrupted - corrupted).max())
    print(f"{hf_pair.name} {options}: largest difference {worst:.1e}, effects up to {np.ptp(table):.1e}")
    assert worst < 2e-6
    assert found.clean == pytest.approx(clean, abs=2e-6)
    assert np.ptp(table) > 1e-3
    # What stands before the subject is the same in both runs: to restore it does nothing, so it is not run.
    np.testing.assert_allclose(
        table[:, : SUBJECT[0]], np.broadcast_to(corrupted, table[:, : SUBJECT[0]].shape), atol=1e-6
    )
