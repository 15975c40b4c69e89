"""Our decoder against HF torch: logits, every residual site, generation, round trips."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.oracles import hf_sites
from tests.tiny import build
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.errors import WpjaxError
from wpjax.models.decoder import decoder, forward
from wpjax.models.generate import generate
from wpjax.models.sites import Site

TOKENS = np.random.default_rng(0).integers(0, 61, (3, 24))


def test_logits_and_every_residual_site_equal_hf(hf_model):
    ours = load_checkpoint(str(hf_model.folder))
    out = forward(ours.cfg, ours.params, jnp.asarray(TOKENS), sites=tuple(Site))
    logits, sites = hf_sites(hf_model.model, TOKENS)
    np.testing.assert_allclose(np.asarray(out.logits), logits, atol=1e-4, rtol=1e-4)
    for site in Site:
        np.testing.assert_allclose(out.sites[site], sites[site], atol=1e-4, rtol=1e-4, err_msg=site)


@pytest.mark.parametrize("name", ["granite", "gemma2"])
def test_log_odds_are_differences_of_logits_after_factor_and_bound(name, tmp_path):
    ours, (a, b) = load_checkpoint(str(build(name, tmp_path).folder)), jnp.array([[7] * 24, [9] * 24])
    out = forward(ours.cfg, ours.params, jnp.asarray(TOKENS[:1]))
    odds = decoder(ours.cfg, ours.params).log_odds(out.resid[0], a, b)
    np.testing.assert_allclose(odds, out.logits[0, :, 7] - out.logits[0, :, 9], atol=1e-5)


def test_a_prefix_of_layers_equals_the_whole_run(hf_model):
    ours = load_checkpoint(str(hf_model.folder))
    whole = forward(ours.cfg, ours.params, jnp.asarray(TOKENS), sites=(Site.RESID_POST,))
    part = forward(ours.cfg, ours.params, jnp.asarray(TOKENS), stop=2, logits=False)
    np.testing.assert_array_equal(part.resid, whole.sites[Site.RESID_POST][1])


def test_greedy_generation_equals_hf_token_for_token(hf_model):
    ours = load_checkpoint(str(hf_model.folder))
    lengths = np.array([24, 9, 17])
    got = generate(
        ours.cfg,
        ours.params,
        jnp.asarray(TOKENS),
        jnp.asarray(lengths),
        max_new_tokens=8,
        stop_tokens=jnp.array([], jnp.int32),
    )
    for row, length in enumerate(lengths):
        prompt = torch.tensor(TOKENS[row : row + 1, :length])
        expected = hf_model.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(got.tokens[row], expected[0, length:].numpy())
    np.testing.assert_array_equal(got.lengths, [8, 8, 8])


def test_longrope_beyond_its_original_context_equals_hf(tmp_path):
    """Prompts of more than 32 tokens rotate by the long factors, in HF and here if the original context is ignored."""
    hf = build("llama-longrope", tmp_path)
    refused = load_checkpoint(str(hf.folder))
    ids = np.random.default_rng(4).integers(0, 61, (1, 40))
    with pytest.raises(WpjaxError, match=r"40 tokens exceed the context of 32.*--ignore-config original_max"):
        forward(refused.cfg, refused.params, jnp.asarray(ids))
    ours = load_checkpoint(str(hf.folder), ignore_config=("original_max_position_embeddings",))
    assert ours.cfg.n_ctx == 64
    with torch.no_grad():
        expected = hf.model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(forward(ours.cfg, ours.params, jnp.asarray(ids)).logits, expected, atol=1e-4, rtol=1e-4)
    args = ours.cfg, ours.params, jnp.asarray(ids), jnp.array([40])
    answer = hf.model.generate(torch.tensor(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = generate(*args, max_new_tokens=6, stop_tokens=jnp.array([], jnp.int32))
    np.testing.assert_array_equal(got.tokens[0], answer[0, 40:].numpy())


def test_generation_stops_at_a_stop_token(hf_model):
    ours = load_checkpoint(str(hf_model.folder))
    lengths = jnp.array([24, 9, 17])
    args = (ours.cfg, ours.params, jnp.asarray(TOKENS), lengths)
    free = generate(*args, max_new_tokens=8, stop_tokens=jnp.array([], jnp.int32))
    stop = free.tokens[1, 3]
    got = generate(*args, max_new_tokens=8, stop_tokens=stop[None])
    for row in range(3):
        hits = np.flatnonzero(np.asarray(free.tokens[row]) == int(stop))
        n = hits[0] + 1 if len(hits) else 8
        assert int(got.lengths[row]) == n
        np.testing.assert_array_equal(got.tokens[row, :n], free.tokens[row, :n])
        np.testing.assert_array_equal(got.tokens[row, n:], np.full(8 - n, int(stop)))


def test_round_trip_to_an_hf_folder_keeps_every_tensor(hf_model, tmp_path):
    ours = load_checkpoint(str(hf_model.folder))
    save_checkpoint(tmp_path / "out", ours)
    before = load_file(hf_model.folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    reloaded = type(hf_model.model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got, expected = (m(torch.tensor(TOKENS)).logits.numpy() for m in (reloaded, hf_model.model))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_more_layers_or_tokens_than_there_are_is_an_error(tmp_path):
    model = load_checkpoint(str(build("llama-gqa3", tmp_path / "m").folder))
    for stop in (-1, 4):
        with pytest.raises(WpjaxError, match="the model has 3 layers"):
            forward(model.cfg, model.params, jnp.zeros((1, 4), int), stop=stop, logits=False)
    with pytest.raises(WpjaxError, match="65 tokens exceed the context of 64"):
        forward(model.cfg, model.params, jnp.zeros((1, 65), int))
    arguments = (model.cfg, model.params, jnp.zeros((1, 4), int), jnp.array([4]))
    for changed, says in (
        ({"max_new_tokens": 61}, "exceed the context"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "not below 0"),
        ({"max_new_tokens": 2, "temperature": 1.0}, "needs a random key"),
    ):
        with pytest.raises(WpjaxError, match=says):
            generate(*arguments, stop_tokens=(2,), **changed)
