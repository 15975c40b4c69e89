"""Patch files against torch models that are edited by hand, against PEFT, and against the base's own bytes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import wpjax
from tests.tiny import as_pair, build_pair, random_model, slices
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.checkpoints.rewrite import open_model
from wpjax.components import enumerate_components, parse_component
from wpjax.errors import CheckpointError, OutputError, PatchError
from wpjax.models.decoder import forward
from wpjax.pairs import Pair, load_pair
from wpjax.patchfiles import (
    Encoding,
    apply_patches,
    encode_patch,
    export_lora,
    export_mask,
    load_patch,
    remove_patch,
    save_patch,
)
from wpjax.patchfiles.card import model_card
from wpjax.patchfiles.stack import stack
from wpjax.patching import PatchMask, materialize

IDS = np.random.default_rng(2).integers(0, 61, (2, 9))
# Some overlap: what they share counts once.
NAMES = ["L0.head.1", "L1.kv_group.0", "L2.neuron.5", "L2.neuron.7", "L1.attn", "L1.head.0", "L0.norm.mlp", "L2.mlp"]
NAMES += ["final_norm", "embed"]


def by_hand(hf_pair, names, host=None, donor=None):
    """The torch base with the slices of components copied from the expert's state dict."""
    model = random_model(hf_pair.name)
    model.load_state_dict((host or hf_pair.base.model).state_dict())
    state, theirs = model.state_dict(), (donor or hf_pair.expert.model).state_dict()
    with torch.no_grad():
        for name in names:
            for tensor, parts in slices(model, parse_component(as_cfg(hf_pair), name)).items():
                for at in parts:
                    state[tensor][at] = theirs[tensor][at]
    return model


def as_cfg(hf_pair):
    return load_checkpoint(str(hf_pair.base.folder)).cfg


def torch_of(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def assert_same_weights(model, expected):
    theirs = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def weights_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_bytes(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One pair, and a patch of it."""
    folder = tmp_path_factory.mktemp("one")
    hf_pair = build_pair("llama-gqa3", folder)
    pair = as_pair(hf_pair)
    names = ["L1.head.1", "L0.kv_group.1", "L2.neuron.5"]
    patch = save_patch(folder / "p.safetensors", pair, names, behaviour="capitals")
    return hf_pair, pair, patch


def test_a_patch_goes_in_and_comes_out_bit_for_bit(hf_pair, pair, tmp_path):
    """For every family: fused and transposed tensors, biases, norms, and an embedding that is tied."""
    norm = enumerate_components(pair.cfg, ["norm"], [0])[-1].name
    names = [norm if name == "L0.norm.mlp" else name for name in NAMES]
    names += ["L1.routed_expert.3", "L0.router", "L0.routed_expert.0"] if pair.cfg.n_experts else []
    patch = save_patch(tmp_path / "p.safetensors", pair, names)
    base = open_model(hf_pair.base.folder)
    assert apply_patches(base, [patch], tmp_path / "patched").is_host
    assert_same_weights(torch_of(tmp_path / "patched"), by_hand(hf_pair, names))
    apply_patches(open_model(tmp_path / "patched"), [patch], tmp_path / "restored", undo=True)
    assert_same_bytes(tmp_path / "restored", hf_pair.base.folder)


def test_the_folder_computes_what_the_patch_computes(one, tmp_path):
    hf_pair, pair, patch = one
    apply_patches(open_model(hf_pair.base.folder), [patch], tmp_path / "patched")
    params = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, patch.info.components))
    ours = forward(pair.cfg, params, jax.numpy.asarray(IDS)).logits
    torch.testing.assert_close(logits(torch_of(tmp_path / "patched")), torch.tensor(np.asarray(ours)))


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_a_base_that_is_stored_in_bfloat16(tmp_path, loaded):
    """Whatever precision the pair was loaded in, the base comes back bit for bit."""
    hf_pair = build_pair("qwen2", tmp_path)  # tied, with biases
    hf_pair.base.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    ends = [load_checkpoint(str(folder), loaded) for folder in (tmp_path / "half", hf_pair.expert.folder)]
    pair = Pair(ends[0].cfg, ends[0].params, ends[1].params, None, *ends)
    patch = save_patch(tmp_path / "p.safetensors", pair, NAMES)
    base = open_model(tmp_path / "half")
    apply_patches(base, [patch], tmp_path / "patched")
    theirs = hf_pair.expert.model.to(torch.bfloat16)
    assert_same_weights(
        torch_of(tmp_path / "patched", dtype="auto"), by_hand(hf_pair, NAMES, donor=theirs).to(torch.bfloat16)
    )
    apply_patches(open_model(tmp_path / "patched"), [patch], tmp_path / "restored", undo=True)
    assert_same_bytes(tmp_path / "restored", tmp_path / "half")
    # The same base in a wider dtype is the same base, too.
    apply_patches(base, [patch], tmp_path / "wide", dtype="float32")
    again = open_model(tmp_path / "wide")
    apply_patches(again, [patch], tmp_path / "narrow", undo=True, dtype="bfloat16")
    assert_same_bytes(tmp_path / "narrow", tmp_path / "half")
    donor = hf_pair.expert.model if loaded == "bfloat16" else random_model_of(hf_pair)
    wide = torch_of(tmp_path / "wide").state_dict()["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(wide, donor.state_dict()["model.layers.2.mlp.down_proj.weight"].float())


def random_model_of(hf_pair):
    return torch_of(hf_pair.expert.folder)


def test_scales_and_several_patches(one, tmp_path):
    hf_pair, pair, _ = one
    base, tensor = open_model(hf_pair.base.folder), "model.layers.1.self_attn.q_proj.weight"
    p, q = (
        save_patch(tmp_path / f"{i}.safetensors", pair, names)
        for i, names in enumerate((["L1.head.1", "L1.head.2"], ["L1.head.2", "L0.mlp"]))
    )
    w, v = (m.model.state_dict()[tensor].numpy() for m in (hf_pair.base, hf_pair.expert))
    with pytest.raises(PatchError, match=r"0\.safetensors and .*1\.safetensors both bring L1\.head\.2;"):
        apply_patches(base, [p, q], tmp_path / "x")
    summed = w.copy()
    summed[8:16] += np.float32(0.5) * (v - w)[8:16]
    summed[16:24] += np.float32(0.5) * (v - w)[16:24] + np.float32(2) * (v - w)[16:24]
    first = w.copy()
    first[8:24] = v[8:24]
    for how, scales, expected in (("sum", (0.5, 2.0), summed), ("first", 1.0, first)):
        options = {"scales": scales, "on_conflict": how}
        apply_patches(base, [p, q], tmp_path / how, **options)
        np.testing.assert_allclose(weights_of(tmp_path / how)[tensor], expected, atol=1e-7)
        apply_patches(open_model(tmp_path / how), [p, q], tmp_path / f"un{how}", undo=True, **options)
        assert_same_bytes(tmp_path / f"un{how}", hf_pair.base.folder)
    with pytest.raises(PatchError, match="another --scale"):
        apply_patches(open_model(tmp_path / "sum"), [p, q], tmp_path / "x", undo=True, on_conflict="sum")
    # Two patches of different components: together, or one after the other.
    r = save_patch(tmp_path / "r.safetensors", pair, ["L2.head.0"])
    apply_patches(base, [p, r], tmp_path / "both")
    apply_patches(base, [p], tmp_path / "p")
    later = apply_patches(open_model(tmp_path / "p"), [r], tmp_path / "later")
    assert_same_bytes(tmp_path / "later", tmp_path / "both")
    assert not later.is_host
    apply_patches(open_model(tmp_path / "both"), [p, r], tmp_path / "neither", undo=True)
    assert_same_bytes(tmp_path / "neither", hf_pair.base.folder)


def test_models_that_a_patch_does_not_fit(one, tmp_path):
    hf_pair, pair, patch = one
    base = open_model(hf_pair.base.folder)
    apply_patches(base, [patch], tmp_path / "patched")
    patched = open_model(tmp_path / "patched")
    half = save_patch(tmp_path / "half.safetensors", pair, ["L1.head.1"])
    apply_patches(base, [half], tmp_path / "in half")
    moved = tmp_path / "moved"
    shutil.copytree(hf_pair.base.folder, moved)
    tensors = weights_of(moved)
    tensors["model.layers.0.self_attn.k_proj.weight"][8] = 0
    save_file(tensors, moved / "model.safetensors")
    build_pair("qwen3", tmp_path / "qwen")
    narrow = build_pair("llama-mqa", tmp_path / "mqa").base.folder
    for model, undo, says in (
        (patched, False, "is in .*patched already; .* pass --undo"),
        (base, True, "is not in .*: nothing to undo"),
        (open_model(moved), False, r"1 of the .* neither .* the first model\.layers\.0\.self_attn\.k_proj.weight"),
        (open_model(tmp_path / "in half"), False, "2 of the 7 tensors .* are patched already, and 5 are not"),
        (open_model(tmp_path / "qwen" / "base"), False, "a patch for a 'llama' model, and this is a 'qwen3'"),
        (open_model(narrow), False, "does not fit this model: L0.kv_group.1"),
        (open_model("tiny:base"), False, "other rows or columns"),
    ):
        with pytest.raises(PatchError, match=says):
            apply_patches(model, [patch], tmp_path / "x", undo=undo)
    with pytest.raises(OutputError, match="exists"):
        apply_patches(base, [patch], tmp_path / "patched")
    with pytest.raises(OutputError, match="lies inside"):
        apply_patches(patched, [patch], tmp_path / "patched" / "x", undo=True)
    assert not (tmp_path / "x").exists()


def test_a_behaviour_is_taken_out_of_an_expert(one, tmp_path):
    hf_pair, pair, patch = one
    base, expert = open_model(hf_pair.base.folder), open_model(hf_pair.expert.folder)
    remove_patch(expert, patch, tmp_path / "out", base=base)
    knocked = by_hand(hf_pair, patch.info.components, host=hf_pair.expert.model, donor=hf_pair.base.model)
    assert_same_weights(torch_of(tmp_path / "out"), knocked)
    # It is what the knock-out as a patch of its own makes.
    reverse = save_patch(tmp_path / "k.safetensors", pair, patch.info.components, knockout=True)
    apply_patches(expert, [reverse], tmp_path / "applied")
    assert_same_bytes(tmp_path / "applied", tmp_path / "out")
    with pytest.raises(PatchError, match="there already: nothing to remove"):
        remove_patch(open_model(tmp_path / "out"), patch, tmp_path / "x")
    with pytest.raises(PatchError, match="use wpjax apply"):
        remove_patch(expert, reverse, tmp_path / "x")
    with pytest.raises(PatchError, match="the patch is for another base"):
        remove_patch(expert, patch, tmp_path / "x", base=open_model(build_other(tmp_path)))


def build_other(folder):
    model = random_model("llama-gqa3", seed=5)
    model.save_pretrained(folder / "random")
    return folder / "random"


def contents(path):
    """The tensors of a patch file, and what its header says but for the time."""
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["wpjax_patch"])
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}, about | {"date": ""}  # noqa: SIM118


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        (Encoding(rank=2), "changes of rank 2 at most"),
        (Encoding(tolerance=0.6), "changes to a relative error of 0.6 in each tensor"),
        (Encoding(int8=True), "changes in 8 bits"),
    ],
)
def test_smaller_patches_state_their_error_and_are_undone_exactly(tmp_path, encoding, says):
    hf_pair = build_pair("gpt2-tied", tmp_path)
    patch = save_patch(
        tmp_path / "p.safetensors", as_pair(hf_pair), ["L1.mlp", "L0.head.1", "embed"], encoding=encoding
    )
    assert patch.info.encoding == says
    whole = save_patch(tmp_path / "whole.safetensors", as_pair(hf_pair), patch.info.components)
    again = encode_patch(tmp_path / "again.safetensors", whole, encoding)
    tensors, metadata = contents(tmp_path / "p.safetensors")
    assert contents(tmp_path / "again.safetensors") == (tensors, metadata)
    assert again.info.error == patch.info.error > 0
    if encoding.int8:
        with pytest.raises(PatchError, match=r"holds changes in 8 bits already, with a relative error of 0\.00"):
            encode_patch(tmp_path / "twice.safetensors", again, Encoding(rank=1))
        assert not (tmp_path / "twice.safetensors").exists()
    apply_patches(open_model(hf_pair.base.folder), [patch], tmp_path / "patched")
    base, expert = (m.model.state_dict() for m in (hf_pair.base, hf_pair.expert))
    found = torch_of(tmp_path / "patched").state_dict()
    exact = by_hand(hf_pair, patch.info.components).state_dict()
    change = {name: (exact[name] - base[name]).double() for name in expert if name != "lm_head.weight"}
    wrong = {name: (found[name] - exact[name]).double() for name in change}
    error = sum(e.square().sum() for e in wrong.values()).sqrt() / sum(c.square().sum() for c in change.values()).sqrt()
    assert patch.info.error == pytest.approx(float(error), rel=1e-4)
    name = "transformer.h.1.mlp.c_fc.weight"
    relative = float(wrong[name].norm() / change[name].norm())
    singular = torch.linalg.svdvals(change[name]).square()
    if encoding.rank:
        assert relative == pytest.approx(float((singular[2:].sum() / singular.sum()).sqrt()), rel=1e-4)  # Eckart, Young
    elif encoding.tolerance:
        rank = np.linalg.matrix_rank(patch.delta(name), 1e-3)
        assert relative <= 0.6 < float((singular[rank - 1 :].sum() / singular.sum()).sqrt())
    else:
        assert (wrong[name].abs() <= change[name].abs().max(1, keepdim=True).values / 127 * 0.501).all()
    apply_patches(open_model(tmp_path / "patched"), [patch], tmp_path / "restored", undo=True)
    assert_same_bytes(tmp_path / "restored", hf_pair.base.folder)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2-untied", "gpt-neox", "phi3"])
def test_peft_merges_the_lora_to_the_patched_model(tmp_path, name):
    hf_pair = build_pair(name, tmp_path)
    pair = as_pair(hf_pair)
    names = ["L0.head.1", "L1.kv_group.0", "L2.neuron.5", "L1.attn", "L0.norm.mlp", "final_norm", "embed", "unembed"]
    patch = save_patch(tmp_path / "p.safetensors", pair, names)
    made = export_lora(open_model(hf_pair.base.folder), [patch], tmp_path / "lora")
    assert made.error < 1e-4
    model = peft.PeftModel.from_pretrained(random_model(name), tmp_path / "lora")
    expected = by_hand(hf_pair, names)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    merged, theirs = model.merge_and_unload().state_dict(), expected.state_dict()
    for tensor, values in theirs.items():
        torch.testing.assert_close(merged[tensor], values, rtol=1e-3, atol=2e-4, msg=tensor)
    # One neuron is of rank 1, and so says the adapter.
    ranks = {module: rank for module, rank in made.ranks.items() if ".2." in module}
    assert set(ranks.values()) <= {1, 2}
    # The package reads it, too.
    ours = load_checkpoint(str(tmp_path / "lora"), base=pair.base_checkpoint)
    chex.assert_trees_all_close(
        ours.params, materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names)), atol=2e-4
    )


def test_a_lora_of_bounded_rank_and_what_no_lora_can_hold(one, tmp_path):
    hf_pair, pair, _ = one
    base = open_model(hf_pair.base.folder)
    patch = save_patch(tmp_path / "p.safetensors", pair, ["L1.mlp"])
    made = export_lora(base, [patch], tmp_path / "lora", rank=3)
    assert set(made.ranks.values()) == {3}
    wrong = total = 0.0
    for name in patch.slices:
        s = np.linalg.svd(patch.delta(name).astype(np.float64), compute_uv=False) ** 2
        wrong, total = wrong + s[3:].sum(), total + s.sum()
    assert made.error == pytest.approx(np.sqrt(wrong / total), rel=1e-4)
    norm = save_patch(tmp_path / "n.safetensors", pair, ["final_norm"])
    with pytest.raises(PatchError, match="no matrix changes"):
        export_lora(base, [norm], tmp_path / "x")
    tied = build_pair("llama-tied", tmp_path / "tied")
    embed = save_patch(tmp_path / "e.safetensors", as_pair(tied), ["embed"])
    with pytest.raises(PatchError, match="ties embed and unembed"):
        export_lora(open_model(tied.base.folder), [embed], tmp_path / "x")


def outside(hf_pair, patch, before, after):
    """Which weights changed that no component of a patch owns, and which changed that one does; by tensor."""
    wrong, right = {}, {}
    owned = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in before.items()}
    for component in patch.info.components:
        for tensor, parts in slices(hf_pair.base.model, parse_component(as_cfg(hf_pair), component)).items():
            for at in parts:
                owned[tensor][at] = True
    for name, tensor in before.items():
        changed = after[name] != tensor
        wrong[name], right[name] = int((changed & ~owned[name]).sum()), int((changed & owned[name]).sum())
    return {n for n, count in wrong.items() if count}, {n for n, count in right.items() if count}


def step(model):
    """One step down the gradient, without weight decay."""
    ids = torch.tensor(IDS)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None


def test_training_with_the_mask_changes_nothing_else(one, tmp_path):
    """The lines of docs/patches.md: all weights, and a LoRA."""
    hf_pair, _, patch = one
    export_mask(open_model(hf_pair.base.folder), [patch], tmp_path / "mask.safetensors")
    page = (Path(wpjax.__file__).parents[1] / "docs" / "patches.md").read_text()
    plain, lora = (block.split("```")[0] for block in page.split("```python\n")[1:])
    model = torch_of(hf_pair.base.folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(plain, names := {"model": model, "PATH": tmp_path / "mask.safetensors"})
    step(model)
    assert outside(hf_pair, patch, before, dict(model.named_parameters())) == (set(), set(names["masks"]))
    assert set(names["masks"]) == set(patch.slices)
    torch.manual_seed(0)
    names["model"] = torch_of(hf_pair.base.folder)
    exec(lora, names)
    for _ in range(3):  # B is 0 at first, so that A learns from the second step on
        step(names["model"])
    merged = names["model"].merge_and_unload().state_dict()
    assert outside(hf_pair, patch, before, merged) == (set(), set(names["masks"]))


def test_a_card_tells_no_path_and_no_markup(one, tmp_path):
    """Whatever a patch file says of itself."""
    hf_pair, pair, _ = one
    ours = dataclasses.replace(pair.base_checkpoint, source=str(hf_pair.base.folder))
    theirs = dataclasses.replace(pair.expert_checkpoint, source="org/expert")
    pair = dataclasses.replace(pair, base_checkpoint=ours, expert_checkpoint=theirs)
    names = [f"L{i}.neuron.{j}" for i in range(2) for j in range(30)]
    measured = {"<b>x`": {"mean": 0.5, "low": 0.25, "high": float("nan")}, "y": "`<script>\n# z"}
    patch = save_patch(tmp_path / "p.safetensors", pair, names, behaviour="a`b\n# c", measured=measured)
    apply_patches(open_model(hf_pair.base.folder), [patch], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(hf_pair.base.folder.parent) not in card
    assert "# `base` with 60 components of `org/expert`" in card
    assert "- Behaviour: `a'b # c`" in card
    assert "- Measured, `<b>x'`: `0.5 [0.25, unknown]`" in card
    assert "- Measured, `y`: `'<script> # z`" in card
    assert "and 10 more" in card
    assert "base_model" not in card
    hub = dataclasses.replace(open_model(hf_pair.base.folder), source="org/base@v1")
    assert 'base_model: "org/base@v1"' in model_card(hub.source, stack(hub.cfg, [patch]))


def rewrite_patch(path, out, edit_json=lambda about: None, edit_tensors=lambda tensors: None):
    """A copy of a patch file with something else in it."""
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    about = json.loads(metadata["wpjax_patch"])
    edit_json(about)
    edit_tensors(tensors)
    save_file(tensors, out, metadata={"wpjax_patch": json.dumps(about)})


def nested(depth):
    """A table in a table, and so on."""
    return {"x": nested(depth - 1)} if depth else {}


KEY = "model.layers.1.self_attn.q_proj.weight"
HOSTILE = {
    "no components": (lambda a: a.update(components=[]), None, "damaged patch: .* components are no names"),
    "components are numbers": (lambda a: a.update(components=[1]), None, "components are no names"),
    "no json object": (lambda a: a.update(measured=3), None, "measured is int"),
    "a later format": (lambda a: a.update(format=2), None, "a patch of format 2, and this wpjax reads up to 1"),
    "no format": (lambda a: a.pop("format"), None, "damaged patch"),
    "no tensors": (lambda a: a.update(tensors={}), None, "it holds no tensors"),
    "huge": (
        lambda a: a["tensors"][KEY].update(shape=[10**15, 24]),
        None,
        "is for a model where it has .10+, 24.",
    ),
    "many weights": (lambda a: a.update(n_parameters=10**4000), None, "another number of weights than the 840"),
    "deep": (lambda a: a.update(measured=nested(100)), None, "nested too deep"),
    "large": (lambda a: a.update(error=10**400), None, "does not say what it must"),
    "infinite": (lambda a: a["tensors"][KEY].update(shape=[float("inf"), 24]), None, "cannot be"),
    "axis": (lambda a: a["tensors"][KEY].update(axis=2), None, "axis 2 of a tensor"),
    "other axis": (lambda a: a["tensors"][KEY].update(axis=1, shape=[48, 24]), None, "which does not fit"),
    "lacks before": (None, lambda t: t.pop(f"before/{KEY}"), "it lacks 'before/"),
    "lacks after": (None, lambda t: t.pop(f"after/{KEY}"), "does not hold what .* becomes"),
    "lacks positions": (None, lambda t: t.pop(f"positions/{KEY}"), "it lacks 'positions/"),
    "more": (None, lambda t: t.update(more=np.ones(1)), "holds 'more', which its header does not name"),
    "out of range": (None, lambda t: t[f"positions/{KEY}"].__setitem__(-1, 48), "not among its 48"),
    "negative": (None, lambda t: t[f"positions/{KEY}"].__setitem__(0, -1), "not among its 48"),
    "twice": (None, lambda t: t[f"positions/{KEY}"].__setitem__(0, 9), "not among its 48"),
    "shapes": (None, lambda t: t.update({f"after/{KEY}": np.ones((8, 25), np.float32)}), "which does not fit"),
    "integers": (None, lambda t: t.update({f"after/{KEY}": np.ones((8, 24), np.int32)}), "is I32 of shape"),
    "not finite": (None, lambda t: t[f"after/{KEY}"].__setitem__((0, 0), np.nan), "holds NaN or infinity"),
    "another's rows": (None, lambda t: t[f"positions/{KEY}"].__isub__(8), "own other rows or columns"),
    "no component of it": (lambda a: a.update(components=["L0.kv_group.1"], n_parameters=1), None, "own nothing of"),
    "no name": (lambda a: a.update(components=["../x"]), None, "not a component name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_patches_are_refused_in_one_line(one, tmp_path, case):
    hf_pair, _, patch = one
    edit_json, edit_tensors, says = HOSTILE[case]
    nothing = lambda _: None  # noqa: E731
    rewrite_patch(patch.where, tmp_path / "h.safetensors", edit_json or nothing, edit_tensors or nothing)
    with pytest.raises((PatchError, CheckpointError), match=says) as refused:
        apply_patches(open_model(hf_pair.base.folder), [load_patch(tmp_path / "h.safetensors")], tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["h.safetensors"]


def test_files_that_are_no_patches(one, tmp_path):
    hf_pair, _, patch = one
    (tmp_path / "cut").write_bytes(Path(patch.where).read_bytes()[:-9])
    (tmp_path / "text").write_text("x")
    nested = json.dumps({"__metadata__": {"wpjax_patch": "[" * 100_000}}).encode()
    (tmp_path / "deep").write_bytes(len(nested).to_bytes(8, "little") + nested)
    weights = hf_pair.base.folder / "model.safetensors"
    for path, says in (
        (tmp_path / "nowhere", "no patch file that can be read"),
        (tmp_path, "no patch file that can be read"),
        (tmp_path / "cut", "no patch file that can be read"),
        (tmp_path / "text", "no patch file that can be read"),
        (tmp_path / "deep", "a damaged patch"),
        (weights, "a safetensors file, but not a patch"),
    ):
        with pytest.raises(PatchError, match=says):
            load_patch(path)


def test_what_cannot_be_saved_as_a_patch(one, tmp_path):
    _, pair, _ = one
    base = dataclasses.replace(pair, base=jax.tree.map(lambda leaf: 2 * leaf, pair.base))
    same = dataclasses.replace(pair, expert=pair.base)
    for case, names, options, says in (
        (pair, [], {}, "needs components"),
        (base, ["L0.mlp"], {}, "in memory is not that of"),
        (same, ["L0.mlp"], {}, "nothing to patch"),
        (pair, ["L0.mlp"], {"encoding": Encoding(rank=0)}, "rank=0"),
        (pair, ["L0.mlp"], {"encoding": Encoding(tolerance=1.0)}, "tolerance=1"),
        (pair, ["L0.mlp"], {"encoding": Encoding(rank=1, int8=True)}, "two ways"),
    ):
        with pytest.raises(PatchError, match=says):
            save_patch(tmp_path / "p.safetensors", case, names, **options)
    assert not list(tmp_path.iterdir())


def test_a_patch_of_an_adapter_and_its_knock_out(tmp_path):
    """The expert is a LoRA over a base in bfloat16: its files are read over the base's, in both directions."""
    folder = tmp_path / "base"
    random_model("llama-gqa3").to(torch.bfloat16).save_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(torch_of(folder, dtype=torch.float32), config)
    wrapped.save_pretrained(tmp_path / "lora")
    base = load_checkpoint(str(folder))
    expert = load_checkpoint(str(tmp_path / "lora"), base=base)
    pair = Pair(base.cfg, base.params, expert.params, None, base, expert)
    patch = save_patch(tmp_path / "p.safetensors", pair, ["L1"])
    assert set(patch.slices) == {f"model.layers.1.{m}.weight" for m in ("self_attn.q_proj", "mlp.down_proj")}
    stored = open_model(folder)
    apply_patches(stored, [patch], tmp_path / "wide", dtype="float32")
    merged = wrapped.merge_and_unload().state_dict()
    found = torch_of(tmp_path / "wide").state_dict()
    for name in patch.slices:
        torch.testing.assert_close(found[name], merged[name])
    # The change is of rank 2, and PEFT gets no more.
    made = export_lora(stored, [patch], tmp_path / "again")
    assert set(made.ranks.values()) == {2}
    adapted = open_model(tmp_path / "lora", base=stored)
    reverse = save_patch(tmp_path / "k.safetensors", pair, ["L1"], knockout=True)
    apply_patches(adapted, [reverse], tmp_path / "knocked")
    remove_patch(adapted, patch, tmp_path / "removed", base=stored)
    assert_same_bytes(tmp_path / "knocked", tmp_path / "removed")
    original, left = weights_of(folder), weights_of(tmp_path / "removed")
    changed = {name for name, tensor in left.items() if tensor.tobytes() != original[name].tobytes()}
    assert changed == {f"model.layers.{i}.{m}.weight" for i in (0, 2) for m in ("self_attn.q_proj", "mlp.down_proj")}


def test_the_command_line(tmp_path, wpjax):
    pair = load_pair("tiny:base", "tiny:expert")
    save_patch("p.safetensors", pair, ["L2.head.0", "L4.mlp"], behaviour="title", measured={"recovery": 0.5})
    save_patch("q.safetensors", pair, ["L2.head.0"])
    both = ["--patch", "p.safetensors", "--patch", "q.safetensors"]
    code, out, err = wpjax("apply", "--base", "tiny:base", *both, "--out", "x")
    assert code == 2
    assert err.count("\n") == 1
    assert "p.safetensors and q.safetensors both bring L2.head.0;" in err
    code, out, err = wpjax(
        "apply", "--base", "tiny:base", *both, "--on-conflict", "sum", "--scale", "1,0.5", "--out", "x"
    )
    assert (code, "2 patches" in out, "wrote x: tiny:base with 3 components" in out) == (0, False, True), err
    code, out, err = wpjax("apply", "--base", "tiny:base", *both[:2], "--out", "patched", "--json")
    assert (code, json.loads(out)["rest_is_the_hosts"]) == (0, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained("patched")
    assert tokenizer.chat_template
    code, out, err = wpjax("apply", "--base", "patched", *both[:2], "--undo", "--out", "restored")
    assert (code, open_model("restored").fingerprint()) == (0, open_model("tiny:base").fingerprint())
    code, out, err = wpjax("apply", "--base", "patched", *both[:2], "--out", "y")
    assert (code, "already; to take it out, pass --undo" in err) == (2, True)
    code, out, err = wpjax("remove", "--expert", "tiny:expert", "--patch", "p.safetensors", "--out", "without")
    assert (code, "wrote without: tiny:expert with 2 components" in out) == (0, True), err
    code, out, err = wpjax("apply", "--base", "tiny:base", *both[:2], "--as", "lora", "--rank", "4", "--out", "lora")
    assert (code, bool(re.search(r"LoRA of 5 modules, rank 4 to 4; relative error 0\.\d", out))) == (0, True), err
    code, out, err = wpjax("apply", "--base", "tiny:base", *both[:2], "--as", "mask", "--out", "m.safetensors")
    assert (code, "2 components own, in 5 tensors" in out) == (0, True), err
    shutil.copy("p.safetensors", "copy")
    code, out, err = wpjax("show", "copy")
    assert code == 0
    assert "Patch: 1 head and 1 MLP of tiny:expert, for tiny:base (" in out
    assert "Components: L2.head.0, L4.mlp" in out
    assert json.loads(wpjax("show", "p.safetensors", "--json")[1])["measured"] == {"recovery": 0.5}
    code, out, err = wpjax("encode", "p.safetensors", "--int8", "--out", "small.safetensors")
    small = load_patch("small.safetensors").info
    assert (code, f"wrote small.safetensors: changes in 8 bits, relative error {small.error:.2g};" in out) == (
        0,
        True,
    ), err
    assert 0 < small.error < 0.01
    told = wpjax("show", "small.safetensors")[1]
    assert f"Stored as changes in 8 bits; relative error of the change {small.error:.2g}. What was measured" in told
    left = sorted(tmp_path.iterdir())
    for arguments, says in (([], "say how changes are to be stored"), (["--int8", "--rank", "2"], "two ways"),
                            (["--rank", "0"], "greater than or equal to 1")):  # fmt: skip
        code, _, err = wpjax("encode", "p.safetensors", *arguments, "--out", "z.safetensors")
        assert (code, err.count("\n"), says in err) == (2, 1, True), err
    for arguments, says in (
        (["--scale", "x"], "give numbers"),
        (["--scale", "1,2"], "2 scales for 1 patches"),
        (["--scale", "nan"], "scale nan"),
        (["--rank", "4"], "--rank and --tolerance are for --as lora"),
        (["--as", "mask", "--undo"], "--undo and --dtype are for a model"),
    ):
        code, _, err = wpjax("apply", "--base", "tiny:base", *both[:2], *arguments, "--out", "z")
        assert (code, err.count("\n"), says in err) == (2, 1, True), err
    code, _, err = wpjax("show", "p.safetensors", "--csv")
    assert (code, "is a patch: --by" in err) == (2, True)
    assert sorted(tmp_path.iterdir()) == left
