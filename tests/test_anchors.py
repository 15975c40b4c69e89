"""Anchors against HF torch's hidden states, noise of known size, and pairs that must be refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import save_checkpoint
from wpjax.errors import AnchorRejected, CheckpointError, WpjaxError
from wpjax.evaluation.fit_anchor import fit_anchor, split_half_cosine
from wpjax.metrics.anchor import Anchor, identity_of
from wpjax.metrics.diagnostics import LayerDiagnostics
from wpjax.metrics.metric import scores
from wpjax.pairs import load_pair, make_pair
from wpjax.patching import PatchMask, materialize


@torch.no_grad()
def hf_states(model, tokens, speaker, n_response):
    """Hidden state after every block, [L, B, D], one unpadded prompt at a time: at the last prompt token, or the mean
    over the first tokens that the speaker answers."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, o: seen.append(o)) for m in model.model.layers]
    rows = []
    for ids, n in zip(tokens.ids, tokens.lengths, strict=True):
        prompt = torch.tensor(ids[:n].astype(np.int64))[None]
        said = prompt if not n_response else speaker.generate(prompt, do_sample=False, max_new_tokens=n_response)
        seen.clear()
        model(said)
        read = slice(int(n), None) if n_response else slice(-1, None)
        rows.append(torch.stack([(o[0] if isinstance(o, tuple) else o)[0, read].mean(0) for o in seen]))
    for hook in hooks:
        hook.remove()
    return torch.stack(rows, 1).numpy()


@pytest.mark.parametrize("n_response", [0, 3])
def test_direction_gap_and_its_specific_part_equal_those_of_hf_hidden_states(tiny_pair, tmp_path, n_response):
    task = behaviour("tiny:title")
    anchor = fit_anchor(tiny_pair, task, n_prompts=24, n_response=n_response, causal="skip")
    for name, checkpoint in (("base", tiny_pair.base_checkpoint), ("expert", tiny_pair.expert_checkpoint)):
        save_checkpoint(tmp_path / name, checkpoint)
    base, expert = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32).eval() for n in ("base", "expert")
    )
    fit, check = (task.encode(tiny_pair.tokenizer, split, 24) for split in ("fit", "sweep"))

    def project(model, tokens):
        return np.einsum("lbd,ld->lb", hf_states(model, tokens, expert, n_response), v)

    states = (hf_states(expert, tokens, expert, n_response) for tokens in (fit.with_instruction, fit.without))
    u = np.subtract(*states).mean(1)
    v = u / np.linalg.norm(u, axis=-1, keepdims=True)
    np.testing.assert_allclose(anchor.vector, v[anchor.layer], atol=1e-5)
    gap = project(expert, check.with_instruction) - project(base, check.with_instruction)
    alone = project(expert, check.without) - project(base, check.without)
    rows = anchor.diagnostics
    np.testing.assert_allclose([d.gap for d in rows], gap.mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([d.norm for d in rows], np.linalg.norm(u, axis=-1), rtol=1e-5)
    np.testing.assert_allclose([d.specific for d in rows], (gap - alone).mean(1), rtol=1e-4, atol=1e-4)
    metric = anchor.metric(tiny_pair, check)
    score = scores(tiny_pair.cfg, tiny_pair.expert, metric) - scores(tiny_pair.cfg, tiny_pair.base, metric)
    np.testing.assert_allclose(score, gap[anchor.layer], rtol=1e-4, atol=1e-3)
    if n_response:
        with pytest.raises(WpjaxError, match=r"read on the expert's answers: .* `anchor.metric\(pair, batch\)`"):
            anchor.score(tiny_pair.cfg, tiny_pair.base, check)


def test_untested_the_layer_of_largest_specific_gap_against_its_spread_is_chosen(tiny_pair):
    anchor = fit_anchor(tiny_pair, behaviour("tiny:title"), causal="skip")
    considered = [d for d in anchor.diagnostics[:-1] if not d.verdict()]
    assert anchor.layer == max(considered, key=lambda d: d.specific / d.specific_sd).layer


def test_split_half_cosine_of_a_direction_in_noise():
    """Halves of n/2 queries: |mu|^2 / (|mu|^2 + D sigma^2 / (n/2)), and about 0 where there is no direction."""
    rng, n, d, sigma = np.random.default_rng(0), 60, 400, 0.2
    mean = np.zeros((2, 1, d), np.float32)
    mean[0, 0, 0] = 1.0
    contrast = mean + rng.normal(0, sigma, (2, n, d)).astype(np.float32)
    found = split_half_cosine(contrast, np.arange(n))
    assert found[0] == pytest.approx(1 / (1 + d * sigma**2 / (n / 2)), abs=0.05)
    assert abs(found[1]) < 0.1


def test_halves_never_share_a_query():
    """Prompts of one query are copies: were they split apart, pure noise would look stable."""
    noise = np.random.default_rng(1).normal(size=(1, 20, 300)).astype(np.float32)
    found = split_half_cosine(np.repeat(noise, 4, axis=1), np.repeat(np.arange(20), 4))
    assert abs(found[0]) < 0.15


def test_an_expert_that_changed_nothing_up_to_the_anchor_is_refused(tiny_pair):
    """Its only change is in the last layer, which no anchor may read: every gap is exactly zero."""
    last = materialize(tiny_pair.base, tiny_pair.expert, PatchMask.of(tiny_pair.cfg, ["L7.mlp"]))
    pair = make_pair(tiny_pair.base_checkpoint, dataclasses.replace(tiny_pair.expert_checkpoint, params=last))
    with pytest.raises(AnchorRejected, match=r"no layer passes; .*gap 0 \[0, 0\] is not positive"):
        fit_anchor(pair, behaviour("tiny:title"))
    with pytest.raises(AnchorRejected, match=r"layer 3: gap 0 \[0, 0\]"):
        fit_anchor(pair, behaviour("tiny:title"), layer=3)


def test_drift_alone_is_refused(tiny_pair):
    """An expert whose embeddings are shifted along some direction moves the same with and without the instruction."""
    rng = np.random.default_rng(0)
    shift = (0.5 * rng.standard_normal(tiny_pair.cfg.d_model)).astype(np.float32)
    moved = {**tiny_pair.expert, "embed": {"W_E": tiny_pair.expert["embed"]["W_E"] + shift}}
    base = dataclasses.replace(tiny_pair.expert_checkpoint, params=tiny_pair.expert)
    pair = make_pair(base, dataclasses.replace(tiny_pair.expert_checkpoint, params=moved))
    for layer in range(5):
        with pytest.raises(AnchorRejected, match=rf"layer {layer}: gap [\d.]+ is drift: .* -[\d.]+ \["):
            fit_anchor(pair, behaviour("tiny:title"), layer=layer)


def test_a_file_keeps_everything_and_belongs_to_its_expert(tiny_pair, tmp_path):
    anchor = fit_anchor(tiny_pair, behaviour("tiny:title"), n_prompts=24, n_response=3, causal="skip")
    anchor.save(tmp_path / "a.safetensors")
    again = Anchor.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.vector, anchor.vector)
    labels = [(a.layer, a.n_response, a.behaviour, a.expert_fingerprint) for a in (again, anchor)]
    assert labels[0] == labels[1]
    figures = [[dataclasses.astuple(d) for d in a.diagnostics] for a in (again, anchor)]
    np.testing.assert_array_equal(figures[0], figures[1])  # NaN where no causal test was made
    again.check_belongs(tiny_pair)
    assert again.identity == identity_of(tiny_pair, behaviour("tiny:title"))
    assert again.differences(tiny_pair, behaviour("tiny:title")) == []
    assert again.differences(tiny_pair, behaviour("tiny:title", split="none")) == ["--split thirds (here none)"]
    with pytest.raises(AnchorRejected, match="another expert"):
        again.check_belongs(load_pair("tiny:base", "tiny:planted"))


def test_nan_is_never_accepted(tiny_pair):
    """It is refused where it begins, before anything is fitted."""
    damaged = jax.tree.map(lambda a: a, tiny_pair.expert)
    damaged["blocks"]["mlp"]["W_out"] = damaged["blocks"]["mlp"]["W_out"].at[0, 0, 0].set(np.nan)
    pair = dataclasses.replace(tiny_pair, expert=damaged)
    with pytest.raises(CheckpointError, match="stream reaches nan at layer 0"):
        fit_anchor(pair, behaviour("tiny:title"), n_prompts=8)


def test_anchors_that_do_not_fit_the_model_are_refused(tiny_pair, tmp_path):
    batch = behaviour("tiny:title").encode(tiny_pair.tokenizer, n_prompts=4)
    unit = np.eye(1, tiny_pair.cfg.d_model, dtype=np.float32)[0]
    for layer in (-1, 8):
        with pytest.raises(WpjaxError, match="layers 0 to 7"):
            Anchor(jnp.asarray(unit), layer).score(tiny_pair.cfg, tiny_pair.base, batch)
    for vector, layer in ((unit[:5], 3), (unit, 9)):
        with pytest.raises(AnchorRejected, match="dimensions at layer"):
            Anchor(jnp.asarray(vector), layer).check_belongs(tiny_pair)
    Anchor(jnp.asarray(unit), 3, "x", "0123456789abcdef").save(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="np") as file:
        metadata = file.metadata()
    for bad in (unit * 3, unit * np.nan, unit[None], unit.astype(np.float64)):
        save_file({"vector": bad}, tmp_path / "bad", metadata=metadata)
        with pytest.raises(CheckpointError, match="not a float32 unit vector"):
            Anchor.load(tmp_path / "bad")


@pytest.mark.parametrize("value", [[1], {}, "s", None])
def test_diagnostics_that_are_not_numbers_are_refused(tmp_path, value):
    fields = dict.fromkeys(LayerDiagnostics.__dataclass_fields__, value)
    metadata = {
        "layer": "0",
        "n_response": "0",
        "behaviour": "x",
        "expert_fingerprint": "",
        "diagnostics": json.dumps([fields]),
    }
    for text in (metadata["diagnostics"], "[" * 100_000):
        save_file({"vector": np.eye(1, 8, dtype=np.float32)[0]}, tmp_path / "a", metadata | {"diagnostics": text})
        with pytest.raises(CheckpointError, match="not an anchor file"):
            Anchor.load(tmp_path / "a")
