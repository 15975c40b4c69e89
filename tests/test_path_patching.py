"""Activation and path patching against the same interventions by hooks in torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import compiled
from tests.oracles import hf_patched_run
from tests.tiny import build
from wpjax.behaviours import Tokens
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.circuits.activations import activation_patch, attention_pattern
from wpjax.circuits.contrast import Contrast, contrast
from wpjax.circuits.paths import path_patch
from wpjax.errors import BehaviourError, ComponentError, WpjaxError

rng = np.random.default_rng(3)
CLEAN, CORRUPTED = rng.integers(0, 61, (2, 2, 7)).astype(np.int32)
LENGTHS = np.array([7, 6])
ANSWERS, FOILS = np.array([4, 9]), np.array([11, 2])


WIRINGS = ["granite", "gpt2-tied", "gemma3", "gpt-neox", "cohere2", "olmo2"]


@pytest.fixture(scope="module", params=WIRINGS)
def models(request, tmp_path_factory):
    """A torch model of each wiring, and the same as ours."""
    hf = build(request.param, tmp_path_factory.mktemp(request.param))
    return hf.model, load_checkpoint(str(hf.folder))


def two(cfg):
    return Contrast.of_tokens(cfg, Tokens(CLEAN, LENGTHS), Tokens(CORRUPTED, LENGTHS), ANSWERS, FOILS)


def difference(logits):
    last = logits[torch.arange(2), LENGTHS - 1]
    return np.array([float(last[i, ANSWERS[i]] - last[i, FOILS[i]]) for i in range(2)])


def only(values, axis, index):
    """A function that takes `values` at one index of an axis, and leaves the rest of x."""

    def put(x):
        x = x.clone()
        at = (slice(None),) * axis + (index,)
        x[at] = values[at]
        return x

    return put


@pytest.mark.parametrize("models", ["llama-gqa3"], indirect=True)
def test_activation_patches_are_those_of_hooks(models):
    """Heads, KV groups, MLPs, the stream by position, and what a head attends to."""
    model, ours = models
    pair = two(ours.cfg)
    clean, _ = hf_patched_run(model, CLEAN)
    corrupted, theirs = hf_patched_run(model, CORRUPTED)

    def expect(effects, place, part, layer, put):
        got, _ = hf_patched_run(model, CLEAN, lambda p, i, x: put(x) if (p, i) == (part, layer) else x)
        np.testing.assert_allclose(effects.change[place], difference(got) - difference(clean), atol=1e-4, rtol=1e-4)

    heads = activation_patch(ours.cfg, ours.params, pair, "z")
    np.testing.assert_allclose(heads.clean, difference(clean), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(heads.corrupted, difference(corrupted), atol=1e-4, rtol=1e-4)
    keys = activation_patch(ours.cfg, ours.params, pair, "k")
    mlps = activation_patch(ours.cfg, ours.params, pair, "mlp_out")
    stream = activation_patch(ours.cfg, ours.params, pair, "resid_pre", by_position=True)
    by_token = activation_patch(ours.cfg, ours.params, pair, "z", by_position=True)
    assert by_token.change.shape == (3, ours.cfg.n_heads, 7, 2)
    for layer in range(3):
        for h in range(ours.cfg.n_heads):
            expect(heads, (layer, h), "z", layer, only(theirs["z"][layer], 2, h))
        for k in range(ours.cfg.n_kv_heads):
            expect(keys, (layer, k), "k", layer, only(theirs["k"][layer], 2, k))
        expect(mlps, layer, "mlp", layer, lambda x, i=layer: theirs["mlp"][i])
        for t in (2, 5):
            expect(stream, (layer, t), "resid", layer, only(theirs["resid"][layer], 1, t))
            head_at = only(theirs["z"][layer][:, t : t + 1], 2, 1)
            expect(
                by_token, (layer, 1, t), "z", layer,
                lambda x, t=t, put=head_at: torch.cat([x[:, :t], put(x[:, t : t + 1]), x[:, t + 1 :]], 1),
            )  # fmt: skip
    # A pattern: queries and keys are the corrupted run's, values are the clean run's.
    pattern = activation_patch(ours.cfg, ours.params, pair, "pattern")
    _, mixed = hf_patched_run(model, CLEAN, lambda p, i, x: theirs[p][1] if p in "qk" and i == 1 else x)
    expect(pattern, (1, 2), "z", 1, only(mixed["z"][1], 2, 2))


def test_after_the_last_layer_only_the_last_token_is_read(one_pair):
    """Patching the stream there at any other token changes nothing; at the last one it is the corrupted run."""
    effects = activation_patch(one_pair.cfg, one_pair.base, two(one_pair.cfg), "resid_post", by_position=True)
    expected = np.zeros((7, 2))
    expected[LENGTHS - 1, [0, 1]] = effects.corrupted - effects.clean
    np.testing.assert_allclose(effects.change[-1], expected, atol=1e-5)
    # The two prompts differ in length, so their positions have no mean. Of one prompt they have.
    with pytest.raises(WpjaxError, match="prompt 0 has 7 tokens and prompt 1 has 6, so a position is another word"):
        _ = effects.share
    alone = effects._replace(lengths=LENGTHS[:1], **{n: getattr(effects, n)[..., :1] for n in effects._fields[:3]})
    assert alone.share[-1, 6] == pytest.approx(1, abs=1e-4)


def path_by_hooks(model, sender, receivers, mlps):
    """The four passes of the IOI paper's code: two runs, one with the sender, one with the receivers."""
    _, ours = hf_patched_run(model, CLEAN)
    _, theirs = hf_patched_run(model, CORRUPTED)
    kind, at, index = sender

    def send(part, layer, x):
        if kind == "embed" and part == "resid" and layer == 0:
            return theirs["resid"][0]
        if part in "qkv":  # all heads are frozen
            return ours[part][layer]
        if part == kind == "z" and layer == at:
            return only(theirs["z"][layer], 2, index)(x)
        if part == "mlp":
            return (
                theirs["mlp"][layer] if (kind, at) == ("mlp", layer) else ours["mlp"][layer] if mlps == "frozen" else x
            )
        return x

    logits, recorded = hf_patched_run(model, CLEAN, send)
    if receivers == "logits":
        return difference(logits)

    def receive(part, layer, x):
        for name, at, index in receivers:
            if (part, layer) == (name, at):
                x = recorded[part][layer] if part == "mlp" else only(recorded[part][layer], 2, index)(x)
        return x

    return difference(hf_patched_run(model, CLEAN, receive)[0])


SENDERS = {
    "embed": ("embed", -1, 0), "L0.head.1": ("z", 0, 1), "L0.mlp": ("mlp", 0, 0), "L1.head.2": ("z", 1, 2),
    "L1.mlp": ("mlp", 1, 0),
}  # fmt: skip


def receivers_of(cfg):
    k = cfg.n_kv_heads - 1
    return {
        "L2.head.1.q": [("q", 2, 1)],
        f"L2.kv_group.{k}.k": [("k", 2, k)],
        f"L1.kv_group.{k}.v": [("v", 1, k)],
        "L1.mlp": [("mlp", 1, 0)],
        ("L2.head.0.q", "L1.head.2.q", "L2.mlp"): [("q", 2, 0), ("q", 1, 2), ("mlp", 2, 0)],
        "logits": "logits",
    }


@pytest.mark.parametrize(
    ("models", "mlps"), [*((name, "live") for name in WIRINGS), ("llama-gqa3", "frozen")], indirect=["models"]
)
def test_a_matrix_of_paths_is_that_of_four_passes_each(models, mlps):
    model, ours = models
    receivers = receivers_of(ours.cfg)
    got = path_patch(ours.cfg, ours.params, two(ours.cfg), list(SENDERS), list(receivers), mlps=mlps)
    clean = difference(hf_patched_run(model, CLEAN)[0])
    for i, sender in enumerate(SENDERS.values()):
        for j, read in enumerate(receivers.values()):
            if np.isnan(got.change[i, j]).all():
                assert all(layer <= sender[1] for _, layer, _ in read)
                continue
            expected = path_by_hooks(model, sender, read, mlps) - clean
            np.testing.assert_allclose(got.change[i, j], expected, atol=1e-4, rtol=1e-4, err_msg=f"{i} {j}")


@pytest.mark.parametrize("models", ["llama-gqa3"], indirect=True)
def test_the_end_of_all_paths_stands_alone(models):
    ours = models[1]
    with pytest.raises(WpjaxError, match="name it by itself"):
        path_patch(ours.cfg, ours.params, two(ours.cfg), "L0.head.0", [["L1.mlp", "logits"]])


@pytest.mark.parametrize("models", ["gemma3"], indirect=True)
def test_the_pattern_is_the_softmax_of_the_scores(models):
    model, ours = models
    with torch.no_grad():
        expected = torch.stack(model(torch.tensor(CLEAN, dtype=torch.long), output_attentions=True).attentions)
    got = attention_pattern(ours.cfg, ours.params, jnp.asarray(CLEAN))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_paths_that_cannot_be_are_refused(one_pair):
    cfg, params, pair = one_pair.cfg, one_pair.base, two(one_pair.cfg)
    with pytest.raises(WpjaxError, match=r"L2.head.0 writes after every receiver has read"):
        path_patch(cfg, params, pair, "L2.head.0", "L1.head.1.q")
    with pytest.raises(WpjaxError, match=r"L0.head.1.q reads before any sender has written"):
        path_patch(cfg, params, pair, "L0.head.0", ["L0.head.1.q", "logits"])
    with pytest.raises(ComponentError, match=r"'L0.head.1' is no receiver"):
        path_patch(cfg, params, pair, "embed", "L0.head.1")
    with pytest.raises(ComponentError, match=r"the model has layers L0 to L2"):
        path_patch(cfg, params, pair, "L7.head.0", "logits")
    with pytest.raises(WpjaxError, match="unknown site 'head'"):
        activation_patch(cfg, params, pair, "head")


def test_prompts_that_do_not_align_are_refused(tiny_pair):
    model = tiny_pair.base_checkpoint
    with pytest.raises(BehaviourError, match="prompt 0 has 5 tokens clean and 6 corrupted: positions must align"):
        contrast(model, ["the fox and the"], ["the fox and the dog"], [" fox"], [" dog"])
    with pytest.raises(BehaviourError, match="' Mary' is 3 tokens for this tokenizer"):
        contrast(model, ["the fox"], ["the dog"], [" Mary"], [" dog"])
    with pytest.raises(BehaviourError, match="1 clean and 2 corrupted prompts"):
        contrast(model, ["the fox"], ["the dog", "the owl"], [" fox"], [" dog"])


def test_a_map_is_one_program_however_many_places(one_pair):
    """The second contrast of the same shape compiles nothing."""
    cfg, params, pair = one_pair.cfg, one_pair.base, two(one_pair.cfg)
    activation_patch(cfg, params, pair, "z")
    with compiled() as names:
        activation_patch(cfg, one_pair.expert, pair.swapped, "z")
    assert names == []
