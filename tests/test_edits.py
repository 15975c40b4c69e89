"""Edits of a forward pass: against HF torch with its own values replaced, under vmap and grad, and what is refused."""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.oracles import NAMES, hf_layers
from tests.tiny import as_pair, build_pair
from wpjax.components import Component
from wpjax.engines.engine import Engine
from wpjax.engines.plan import make_plan
from wpjax.errors import WpjaxError
from wpjax.models.decoder import decoder, forward
from wpjax.models.edits import Add, ClampTo, Edit, Scale, Set
from wpjax.models.generate import generate
from wpjax.models.layouts import Packed
from wpjax.models.sites import Site

LAYER, TOKENS = 1, np.random.default_rng(0).integers(0, 61, (3, 12)).astype(np.int32)


@pytest.fixture(scope="module", params=["llama-gqa3", "gpt2-untied", "gemma3", "gpt-neox"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(hf_pair):
    return as_pair(hf_pair)


@contextlib.contextmanager
def value_replaced(model, layer, kv_head, values):
    """HF torch with the values [B, T, Dh] of one KV head of a layer replaced, where attention takes them."""
    modeling, calls = sys.modules[type(model).__module__], []
    eager = modeling.eager_attention_forward

    def patched(module, query, key, value, *args, **kwargs):
        if len(calls) == layer:
            value = value.clone()
            value[:, kv_head] = values
        calls.append(value)
        return eager(module, query, key, value, *args, **kwargs)

    modeling.eager_attention_forward = patched
    try:
        yield
    finally:
        modeling.eager_attention_forward = eager


@torch.no_grad()
def hf_logits(model):
    return model(torch.tensor(TOKENS)).logits.numpy()


def test_an_activation_patch_of_one_head_s_value_equals_hf_torch(hf_pair, pair):
    """The expert's value of one KV head, from the fourth token on, in the base."""
    cfg, ids, head = pair.cfg, jnp.asarray(TOKENS), pair.cfg.n_kv_heads - 1
    ours, theirs = (forward(cfg, p, ids, sites=(Site.V,)).sites[Site.V][LAYER] for p in (pair.base, pair.expert))
    edit = Edit(Site.V, Set(theirs), layer=LAYER, start=3, channels=head)
    got = jax.jit(lambda edit: forward(cfg, pair.base, ids, edits=(edit,)).logits)(edit)
    values = np.where(np.arange(TOKENS.shape[1])[:, None] < 3, ours[:, :, head], theirs[:, :, head])
    with value_replaced(hf_pair.base.model, LAYER, head, torch.tensor(values)):
        expected = hf_logits(hf_pair.base.model)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - hf_logits(hf_pair.base.model)).max() > 0.01


def test_a_mean_ablation_of_one_head_equals_hf_torch(hf_pair, pair):
    """What a head writes is replaced by its mean over prompts and tokens."""
    cfg, ids, head = pair.cfg, jnp.asarray(TOKENS), 1
    mean = forward(cfg, pair.base, ids, sites=(Site.Z,)).sites[Site.Z][LAYER].mean((0, 1))  # [H, Dh]
    edit = Edit(Site.Z, Set(mean), layer=LAYER, channels=head)
    got = forward(cfg, pair.base, ids, edits=(edit,)).logits
    model, width = hf_pair.base.model, cfg.d_head

    def ablate(module, args):
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = torch.tensor(np.asarray(mean[head]))
        return (z,)

    w_o = hf_layers(model)[LAYER].get_submodule(NAMES[model.config.model_type].w_o)
    handle = w_o.register_forward_pre_hook(ablate)
    expected = hf_logits(model)
    handle.remove()
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - hf_logits(model)).max() > 0.01


def test_many_edits_run_under_vmap_and_layers_may_be_traced(pair):
    cfg, ids = pair.cfg, jnp.asarray(TOKENS)

    def knocked_out(layer, head):
        edit = Edit(Site.Z, Scale(jnp.zeros(())), layer=layer, channels=head)
        return forward(cfg, pair.base, ids, edits=(edit,)).logits

    layers, heads = jnp.array([0, 2, 1]), jnp.array([1, 0, 2])
    many = jax.vmap(knocked_out)(layers, heads)
    for got, layer, head in zip(many, [0, 2, 1], [1, 0, 2], strict=True):
        attn = pair.base["blocks"]["attn"]
        without = attn | {"W_O": attn["W_O"].at[layer, head].set(0.0)}
        params = pair.base | {"blocks": pair.base["blocks"] | {"attn": without}}
        np.testing.assert_allclose(got, forward(cfg, params, ids).logits, atol=2e-5, rtol=1e-5)


def test_the_gradient_by_an_edit_s_value_is_that_of_finite_differences(pair):
    cfg, ids = pair.cfg, jnp.asarray(TOKENS)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((*TOKENS.shape, cfg.d_vocab)), jnp.float32)

    def score(value):
        edits = (
            Edit(Site.MLP_OUT, Add(value), layer=LAYER, start=2, stop=5),
            Edit(Site.Q, Scale(1 + value[:1]), LAYER),
        )
        return (forward(cfg, pair.base, ids, edits=edits).logits * weights).sum()

    value = jnp.asarray(np.random.default_rng(2).standard_normal(cfg.d_model) * 0.1, jnp.float32)
    way = jnp.asarray(np.random.default_rng(3).standard_normal(cfg.d_model), jnp.float32)
    slope = float(jax.grad(score)(value) @ way)
    step = 2e-3
    by_differences = float(score(value + step * way) - score(value - step * way)) / (2 * step)
    assert slope == pytest.approx(by_differences, rel=2e-2)


def test_edits_apply_in_order_and_layer_by_layer(pair):
    cfg, ids = pair.cfg, jnp.asarray(TOKENS)
    by_layer = jnp.arange(1.0, cfg.n_layers + 1)[:, None, None, None] * jnp.ones((1, 1, cfg.d_model))
    edits = (Edit(Site.ATTN_OUT, Scale(jnp.zeros(()).reshape(1).repeat(cfg.n_layers)[:, None, None, None])),
             Edit(Site.ATTN_OUT, Add(by_layer)))  # fmt: skip
    sites = forward(cfg, pair.base, ids, sites=(Site.RESID_PRE, Site.ATTN_OUT, Site.RESID_MID), edits=edits).sites
    np.testing.assert_allclose(sites[Site.ATTN_OUT], np.broadcast_to(by_layer, sites[Site.ATTN_OUT].shape))
    np.testing.assert_allclose(sites[Site.RESID_MID], sites[Site.RESID_PRE] + by_layer, atol=1e-6)


def test_a_clamped_coordinate_stands_at_its_target_from_its_token_on(pair):
    cfg, ids = pair.cfg, jnp.asarray(TOKENS)
    unit = np.random.default_rng(4).standard_normal(cfg.d_model).astype(np.float32)
    unit /= np.linalg.norm(unit)
    start = jnp.array([2, 0, 11])
    edit = Edit(Site.RESID_POST, ClampTo(jnp.asarray(unit), jnp.asarray(unit), jnp.float32(3)), LAYER, start)
    free, held = (forward(cfg, pair.base, ids, sites=(Site.RESID_POST,), edits=e).sites for e in ((), (edit,)))
    here = np.arange(TOKENS.shape[1]) >= np.asarray(start)[:, None]
    along = np.asarray(held[Site.RESID_POST][LAYER]) @ unit
    np.testing.assert_allclose(along[here], 3.0, atol=1e-4)
    np.testing.assert_array_equal(along[~here], (np.asarray(free[Site.RESID_POST][LAYER]) @ unit)[~here])


def test_activation_patching_by_suffix_replay_is_an_edit_of_a_forward_pass(pair, batch):
    """The sweep's fast path and the door that everything else uses say the same of every head."""
    cfg, metric = pair.cfg, make_anchor(pair, 2).metric_along(batch)
    heads = [Component("head", layer, h) for layer in range(3) for h in range(cfg.n_heads)]
    engine = Engine(pair, metric, heads, {}, lambda *_: None)
    got, _ = engine.changes("activation", make_plan(cfg, heads, engine.packing))
    donor = metric.run(cfg, pair.expert, sites=(Site.Z,)).sites[Site.Z]
    w_o = pair.expert["blocks"]["attn"]["W_O"], pair.base["blocks"]["attn"]["W_O"]

    @jax.jit
    def score(layer, head):
        # The donor's own output: its value through its own W_O, as an addition to what the host's heads write.
        own = metric.run(cfg, pair.base, sites=(Site.Z,)).sites[Site.Z]  # up to its layer the host is unpatched
        written = [jnp.einsum("btd,de->bte", z[layer][:, :, head], w[layer, head], precision="highest")
                   for z, w in zip((donor, own), w_o, strict=True)]  # fmt: skip
        edit = Edit(Site.ATTN_PROJ, Add(written[0] - written[1]), layer=layer)
        picked = metric.pick(metric.run(cfg, pair.base, edits=(edit,)).resid)
        return metric.read(cfg, pair.base, picked)

    before = metric(cfg, pair.base)
    for c, change in zip(heads, got, strict=True):
        np.testing.assert_allclose(change, score(c.layer, c.index) - before, atol=3e-5, err_msg=c.name)


def test_an_edit_of_some_prompts_is_theirs(pair):
    """Arrays with an axis of prompts are taken apart; one vector for all of them is not."""
    cfg, ids, rows = pair.cfg, jnp.asarray(TOKENS), np.array([2, 0])
    rng = np.random.default_rng(5)
    each = jnp.asarray(rng.standard_normal((3, 1, cfg.d_model)), jnp.float32)
    one = jnp.asarray(rng.standard_normal(cfg.d_model), jnp.float32)
    by_layer = jnp.asarray(rng.standard_normal((cfg.n_layers, 3, 1, cfg.d_model)), jnp.float32)
    edits = (
        Edit(Site.MLP_OUT, Add(each), layer=0, start=jnp.array([1, 5, 2])),
        Edit(Site.RESID_POST, Add(one), layer=1),
        Edit(Site.ATTN_OUT, Add(by_layer)),
    )
    whole = forward(cfg, pair.base, ids, edits=edits).logits
    some = forward(cfg, pair.base, ids[rows], edits=[edit.take(rows) for edit in edits]).logits
    np.testing.assert_allclose(some, whole[rows], atol=2e-5, rtol=1e-5)


def test_what_cannot_be_edited_is_refused(pair):
    cfg, ids = pair.cfg, jnp.asarray(TOKENS)
    with pytest.raises(WpjaxError, match="the site resid_mid has no heads or neurons"):
        forward(cfg, pair.base, ids, edits=(Edit(Site.RESID_MID, Scale(jnp.zeros(())), layer=0, channels=1),))
    packed = Packed.side_by_side(3, 12, 0)
    edit = Edit(Site.RESID_MID, Scale(jnp.zeros(())), layer=0, start=jnp.array([1, 2, 3]))
    with pytest.raises(WpjaxError, match="needs prompts side by side, not packed"):
        decoder(cfg, pair.base)(packed.lay(ids), layout=packed, edits=(edit,))
    edit = Edit(Site.RESID_MID, Scale(jnp.zeros((3, 1, 1, 1))))
    with pytest.raises(WpjaxError, match="names its layer"):
        generate(cfg, pair.base, ids, jnp.full(3, 12), max_new_tokens=2, stop_tokens=(), edits=(edit,))
