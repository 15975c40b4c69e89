"""Directions of changes, against torch models with pieces of rank one added, PEFT's merged model and planted truths."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from tests.helpers import exact, make_anchor
from tests.oracles import hf_layers
from tests.tiny import HfModel, HfPair, as_pair, build, build_pair, random_model
from wpjax.arguments import SweepConfig
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import flatten
from wpjax.components import (
    Component,
    check_with_directions,
    enumerate_components,
    n_parameters,
    parse_component,
)
from wpjax.directions import by_directions, folded, spectrum_of, spectrum_of_product
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.reference import patched_score, reference_changes
from wpjax.errors import CheckpointError, ComponentError, PairError, PatchError, WpjaxError
from wpjax.estimators.screens import output_linearised
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sweep import sweep
from wpjax.metrics.metric import scores
from wpjax.models.decoder import forward
from wpjax.models.parameters import MATRICES
from wpjax.pairs import Pair, load_pair
from wpjax.patchfiles import save_patch
from wpjax.patching import PatchMask, components_of, materialize, patch
from wpjax.results.sweep_result import SweepResult

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 10))
KIND = "delta_direction"
FAMILIES = ("llama-gqa3", "gpt2-untied")


@pytest.fixture(scope="module", params=FAMILIES)
def hf_pair(request, tmp_path_factory) -> HfPair:
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def whole(hf_pair):
    """The pair as it is loaded."""
    return as_pair(hf_pair)


@pytest.fixture(scope="module")
def pair(whole):
    """The pair with three directions of each matrix."""
    return by_directions(whole, 3)


@pytest.fixture(scope="module")
def one_whole(one_pair):
    """A pair of one family, for what does not depend on the family."""
    return one_pair


@pytest.fixture(scope="module")
def one(one_whole):
    """The same, divided as `pair` is."""
    return by_directions(one_whole, 3)


@pytest.fixture(scope="module")
def swept(one, batch):
    """All its directions and what they change at the last layer, by suffix replay."""
    every = enumerate_components(one.cfg, [KIND])
    return every, exact(one, batch, make_anchor(one, 2), every)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params):
    return forward(cfg, params, jnp.asarray(TOKENS)).logits


def hf_module(model, component) -> torch.Tensor:
    """The matrix of a direction's module in a torch model as [out, in], a view of the parameter.

    Written down from HF's own layout: GPT-2 has its matrices transposed, with queries, keys and values side by side.
    """
    module, layer = component.name.split(".")[2], hf_layers(model)[component.layer]
    if model.config.model_type != "gpt2":
        room = "mlp" if module in ("gate", "up", "down") else "self_attn"
        return layer.get_submodule(f"{room}.{module}_proj").weight
    name = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}.get(module, "attn.c_attn")
    weight, d = layer.get_submodule(name).weight.T, model.config.n_embd
    start = {"q": 0, "k": d, "v": 2 * d}.get(module)
    return weight if start is None else weight[start : start + d]


def piece(hf_pair, component) -> torch.Tensor:
    """s u v of the change of a module, [out, in], by torch's own decomposition."""
    change = hf_module(hf_pair.expert.model, component) - hf_module(hf_pair.base.model, component)
    u, s, v = torch.linalg.svd(change.detach().double(), full_matrices=False)
    i = int(component.name.split(".")[3])
    return (s[i] * torch.outer(u[:, i], v[i])).float()


@torch.no_grad()
def with_pieces(hf_pair, components):
    """The torch base's logits while pieces are added to its matrices."""
    matrices = [(hf_module(hf_pair.base.model, c), piece(hf_pair, c)) for c in components]
    for matrix, added in matrices:
        matrix += added
    said = hf_pair.base.model(torch.tensor(TOKENS)).logits.numpy()
    for matrix, added in matrices:
        matrix -= added
    return said


def some(pair, n=3):
    """Some directions of every module that the family has, layers in turn."""
    modules = dict(pair.cfg.directions)
    return [
        parse_component(pair.cfg, f"L{(i + j) % 3}.{KIND}.{module}.{j}")
        for i, module in enumerate(modules)
        for j in range(n)
    ]


def test_every_module_has_its_directions(whole, pair):
    assert [*dict(pair.cfg.directions)] == [m for m, path in MATRICES.items() if path in flatten(whole.base)]
    every = enumerate_components(pair.cfg, [KIND])
    assert len(every) == 3 * 3 * len(pair.cfg.directions) == pair.division.n_directions
    assert [parse_component(pair.cfg, c.name) for c in every] == every
    assert pair.division.n_parameters == sum(n_parameters(pair.cfg, c) for c in every)
    assert n_parameters(pair.cfg, every[0]) == pair.cfg.d_model + pair.cfg.n_heads * pair.cfg.d_head + 1


def test_lazy_patches_equal_torch_with_the_piece_added(hf_pair, pair):
    components = some(pair)
    before = logits(pair.cfg, pair.base)
    for c in components:
        ours = logits(pair.cfg, patch(pair.base, pair.expert, PatchMask.of(pair.cfg, [c])))
        np.testing.assert_allclose(ours, with_pieces(hf_pair, [c]), atol=1e-4, err_msg=c.name)
        assert np.abs(ours - before).max() > 1e-3, c.name
    together = PatchMask.of(pair.cfg, components)
    np.testing.assert_allclose(
        logits(pair.cfg, patch(pair.base, pair.expert, together)), with_pieces(hf_pair, components), atol=1e-4
    )
    assert set(components_of(pair.cfg, together, kinds=[KIND])) == set(components)
    assert set(components_of(pair.cfg, together)) == set(components)


def test_suffix_replay_equals_the_lazy_patch(pair, batch):
    components, anchor = enumerate_components(pair.cfg, [KIND]), make_anchor(pair, 2)
    got = exact(pair, batch, anchor, components)
    few = [*range(0, len(components), 5)]
    expected = reference_changes(
        pair.cfg, pair.base, pair.expert, [components[i] for i in few], anchor.metric_along(batch)
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got[few], expected, atol=2e-5)


def test_the_ends_are_those_of_the_pair(hf_pair, whole, pair):
    """The base bit for bit, the expert up to rounding; all directions with the rest are the whole change."""
    np.testing.assert_array_equal(logits(pair.cfg, pair.base), logits(whole.cfg, whole.base))
    np.testing.assert_allclose(logits(pair.cfg, pair.expert), logits(whole.cfg, whole.expert), atol=2e-5)
    again, plain = flatten(folded(pair.expert)), flatten(whole.expert)
    assert again.keys() == plain.keys()
    for path, leaf in plain.items():
        np.testing.assert_allclose(again[path], leaf, atol=1e-6, err_msg=path)
    assert pair.fingerprints == whole.fingerprints


def test_all_directions_of_a_module_are_the_module(one_whole):
    """With as many as a matrix has; every other leaf of the expert is left out."""
    few = {path: flatten(one_whole.expert)[path] for path in (MATRICES["k"], MATRICES["down"])}
    expert = jax.tree.map(lambda leaf: leaf, one_whole.base)
    for path, leaf in few.items():
        _, room, name = path.split("/")
        expert["blocks"][room][name] = leaf
    n = min(one_whole.cfg.d_model, one_whole.cfg.n_kv_heads * one_whole.cfg.d_head)
    divided = by_directions(dataclasses.replace(one_whole, expert=expert), n)
    assert divided.division.kept["k"] == pytest.approx(1, abs=1e-12)
    every = enumerate_components(divided.cfg, [KIND])
    assert {c.name.split(".")[2] for c in every} == {"k", "down"}
    mask = PatchMask.of(divided.cfg, [c for c in every if c.name.split(".")[2] == "k"])
    expert["blocks"]["mlp"]["W_out"] = one_whole.base["blocks"]["mlp"]["W_out"]
    np.testing.assert_allclose(
        logits(divided.cfg, patch(divided.base, divided.expert, mask)), logits(one_whole.cfg, expert), atol=2e-5
    )


def test_energies_sum_to_the_square_of_the_change(one_whole, one):
    ours, theirs = (flatten(params) for params in (one_whole.base, one_whole.expert))
    every = enumerate_components(one.cfg, [KIND])
    norms = dict(zip([c.name for c in every], one.delta_norms(every), strict=True))
    kept_all = whole_all = 0.0
    for module, path in MATRICES.items():
        if path not in ours:
            continue
        change = np.asarray(theirs[path], np.float64) - np.asarray(ours[path], np.float64)
        inputs = 2 if module == "o" else 1
        kept = 0.0
        for layer, delta in enumerate(change.reshape(3, int(np.prod(change.shape[1 : 1 + inputs])), -1)):
            s = np.linalg.svd(delta, compute_uv=False)
            found = [norms[f"L{layer}.{KIND}.{module}.{i}"] for i in range(3)]
            np.testing.assert_allclose(found, s[:3], rtol=1e-5)
            assert spectrum_of(delta, len(s)).energy == pytest.approx(float((s**2).sum()))
            kept += float((s[:3] ** 2).sum())
        assert one.division.kept[module] == pytest.approx(kept / float((change**2).sum()))
        kept_all, whole_all = kept_all + kept, whole_all + float((change**2).sum())
    assert one.division.kept_together == pytest.approx(kept_all / whole_all)


def test_joint_patches_are_those_of_the_reference(one, batch):
    metric, rng = make_anchor(one, 2).metric_along(batch), np.random.default_rng(0)
    every = enumerate_components(one.cfg, [KIND])
    masks = [PatchMask.of(one.cfg, [c for c in every if rng.random() < p]) for p in (0.05, 0.5, 1.0)]
    got = scores_of_sets(one.cfg, one.base, one.expert, masks, metric)
    expected = [patched_score(one.cfg, one.base, one.expert, mask, metric) for mask in masks]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    model = materialize(one.base, one.expert, masks[1])
    plain = dataclasses.replace(one.cfg, directions=())
    np.testing.assert_allclose(logits(plain, folded(model)), logits(one.cfg, model), atol=2e-5)


def test_estimates_are_exact_where_nothing_nonlinear_follows(one, batch, swept):
    """At the anchor's layer what an MLP writes enters the score linearly: so do directions of its output matrix."""
    metric = make_anchor(one, 2).metric_along(batch)
    components, effects = zip(*[(c, e) for c, e in zip(*swept, strict=True) if c.name.startswith(f"L2.{KIND}.down")],
                              strict=True)  # fmt: skip
    assert np.abs(effects).max() > 0.01
    got = output_linearised(one.cfg, one.base, one.expert, components, metric)
    np.testing.assert_allclose(got, effects, atol=2e-5)


def test_a_small_change_is_estimated_to_first_order(one, batch, swept):
    near = jax.tree.map(lambda b, e: b + 1e-3 * (e - b), one.base, one.expert)
    effect = exact(one, batch, make_anchor(one, 2), swept[0], donor=near)
    got = output_linearised(one.cfg, one.base, near, swept[0], make_anchor(one, 2).metric_along(batch))
    assert np.abs(got - effect).max() < 0.03 * np.abs(effect).max()


def test_secant_scores_of_directions_and_the_rest_sum_to_the_gap(one, batch, swept):
    """With `layer` as the rest of each layer; and where one direction alone changes, its score is its effect."""
    metric = make_anchor(one, 2).metric_along(batch)
    every = enumerate_components(one.cfg, [KIND, "layer", "embed"])
    parts = secant_adjoint(one.cfg, one.base, one.expert, every, metric)
    ends = [scores(one.cfg, params, metric) for params in (one.base, one.expert)]
    np.testing.assert_allclose(parts.sum(0), ends[1] - ends[0], rtol=1e-3, atol=1e-4)
    only = [i for i, c in enumerate(swept[0]) if c.name == f"L1.{KIND}.q.0"]
    chosen = [swept[0][i] for i in only]
    expert = materialize(one.base, one.expert, PatchMask.of(one.cfg, chosen))
    got = secant_adjoint(one.cfg, one.base, expert, chosen, metric)
    np.testing.assert_allclose(got, swept[1][only], atol=1e-4)


PLANTED = ("L0.delta_direction.v.0", "L1.delta_direction.down.0", "L1.delta_direction.down.1", "L2.delta_direction.o.0")


def planted(folder: Path, noise: float) -> HfPair:
    """An expert with known pieces of rank one, and noise in every weight."""
    base, model, rng = (
        build("llama-gqa3", folder / "base"),
        random_model("llama-gqa3"),
        torch.Generator().manual_seed(3),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=rng)
        for i, name in enumerate(PLANTED):
            matrix = hf_module(model, Component(KIND, int(name[1]), _index(name)))
            u, v = (torch.randn(n, generator=rng) for n in matrix.shape)
            matrix += (4.0 - i / 2) * torch.outer(u / u.norm(), v / v.norm())
    model.save_pretrained(folder / "expert")
    return HfPair("planted", base, HfModel("planted", model, folder / "expert"))


def _index(name: str) -> int:
    _, _, module, i = name.split(".")
    return int(i) * len(MATRICES) + list(MATRICES).index(module)


def test_planted_pieces_are_found(tmp_path, batch):
    """With noise everywhere they come first; without it nothing else has a direction at all."""
    noisy = by_directions(as_pair(planted(tmp_path / "noisy", 1e-3)), 2)
    every = enumerate_components(noisy.cfg, [KIND])
    effects = np.abs(exact(noisy, batch, make_anchor(noisy, 2), every)).mean(1)
    assert {every[i].name for i in np.argsort(-effects)[: len(PLANTED)]} == set(PLANTED)
    pure = by_directions(as_pair(planted(tmp_path / "pure", 0.0)), 8)
    assert {c.name for c in enumerate_components(pure.cfg, [KIND])} == set(PLANTED)
    assert pure.division.kept_together == pytest.approx(1)
    flat, base = flatten(pure.expert), flatten(pure.base)
    assert all(flat[path] is base[path] for path in MATRICES.values())
    with pytest.raises(ComponentError, match="down of L0 has no direction: the expert did not change it"):
        parse_component(pure.cfg, "L0.delta_direction.down.0")
    with pytest.raises(ComponentError, match="down of L1 has 2 directions, from 0 on"):
        parse_component(pure.cfg, "L1.delta_direction.down.2")


def adapter(base: Path, to: Path, **options):
    """A PEFT model over a base with random factors, saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(to)
    return model


ADAPTERS = {
    "llama-gqa3": {"target_modules": "all-linear"},
    "gpt2-tied": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True},
    "gpt-neox": {"target_modules": ["query_key_value", "dense"], "layers_to_transform": [0, 2]},
    "olmo2": {"target_modules": ["o_proj", "v_proj"], "use_dora": True},
    "mixtral": {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_directions_of_an_adapter_are_the_model_that_peft_merges(tmp_path, name):
    """By its factors: as many directions as its rank, and the base's own matrices in the expert.

    That our merged weights are PEFT's, `test_adapters` tests.
    """
    base = build(name, tmp_path / "base")
    model = adapter(base.folder, tmp_path / "adapter", **ADAPTERS[name])
    ours = load_checkpoint(str(base.folder))
    theirs = load_checkpoint(str(tmp_path / "adapter"), base=ours)
    pair = by_directions(Pair(ours.cfg, ours.params, theirs.params, None, ours, theirs))
    again, merged = flatten(folded(pair.expert)), flatten(theirs.params)
    assert again.keys() == merged.keys()
    for path, leaf in merged.items():
        np.testing.assert_allclose(again[path], leaf, atol=2e-6, err_msg=path)
    if "use_dora" in ADAPTERS[name]:  # no product of two factors
        assert pair.division.kept_together < 0.9999
        return
    flat, plain = flatten(pair.expert), flatten(pair.base)
    assert all(flat[MATRICES[module]] is plain[MATRICES[module]] for module in dict(pair.cfg.directions))
    assert {n for _, numbers in pair.cfg.directions for n in numbers} <= {0, 3}
    assert pair.division.kept_together == pytest.approx(1)
    if name != "llama-gqa3":
        return
    every = PatchMask.of(pair.cfg, enumerate_components(pair.cfg, [KIND]))
    with torch.no_grad():
        expected = model.merge_and_unload()(torch.tensor(TOKENS)).logits.numpy()
    for params in (patch(pair.base, pair.expert, every), pair.expert):
        np.testing.assert_allclose(logits(pair.cfg, params), expected, atol=1e-4)
    with pytest.raises(PairError, match=r"rank 4: .*adapter is an adapter of rank 3, so a matrix has 3 directions at"):
        by_directions(Pair(ours.cfg, ours.params, theirs.params, None, ours, theirs), 4)
    fewer = by_directions(Pair(ours.cfg, ours.params, theirs.params, None, ours, theirs), 1)
    assert fewer.division.n_directions * 3 == pair.division.n_directions
    np.testing.assert_allclose(flatten(folded(fewer.expert))[MATRICES["up"]], merged[MATRICES["up"]], atol=2e-6)


def test_spectra_of_factors_are_those_of_their_product():
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((30, 4)), rng.standard_normal((4, 50))
    small, large = spectrum_of_product(p, q), np.linalg.svd(p @ q, compute_uv=False)
    np.testing.assert_allclose(small.s, large[:4], rtol=1e-10)
    np.testing.assert_allclose(small.product, p @ q, atol=1e-10)
    mix = rng.standard_normal((4, 4))
    mixed = spectrum_of_product(p @ mix, np.linalg.solve(mix, q))
    np.testing.assert_allclose(mixed.u, small.u, atol=1e-8)  # the same whichever factors
    lanczos = spectrum_of(p @ q + 1e-3 * rng.standard_normal((30, 50)), 3)
    np.testing.assert_allclose(lanczos.s, large[:3], rtol=1e-2)
    assert spectrum_of(p @ q, 4).first(4).s.shape == (4,)
    assert spectrum_of(np.outer(p[:, 0], q[0]), 3).first(3).s.shape == (1,)


def test_a_lora_holds_the_base_and_its_factors(tmp_path):
    base = build("llama-gqa3", tmp_path / "base")
    adapter(base.folder, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    ours = load_checkpoint(str(base.folder))
    theirs = load_checkpoint(str(tmp_path / "adapter"), base=ours)
    pair = by_directions(Pair(ours.cfg, ours.params, theirs.params, None, ours, theirs))
    held = {id(leaf): leaf.nbytes for params in (pair.base, pair.expert) for leaf in jax.tree.leaves(params)}
    n_zeros = 2 * 3 * 3  # the base's strengths: of two modules, three layers and three directions
    assert sum(held.values()) == sum(a.nbytes for a in jax.tree.leaves(ours.params)) + 4 * (
        pair.division.n_parameters + n_zeros
    )


def test_what_cannot_be_divided_is_refused(one_whole, one, batch, tmp_path):
    with pytest.raises(PairError, match="rank 17: the matrices of k have at most 16 directions; ask for fewer"):
        by_directions(one_whole, 17)
    with pytest.raises(PairError, match="divided into directions already"):
        by_directions(one)
    with pytest.raises(PairError, match="the weights are bfloat16, whose rounding"):
        by_directions(load_pair("tiny:base", "tiny:expert", "bfloat16"))
    with pytest.raises(WpjaxError, match="delta_direction needs --dtype float32"):
        SweepConfig("tiny:base", "tiny:expert", "tiny:title", kinds=("delta_direction",), dtype="bfloat16x2").check(
            False
        )
    with pytest.raises(PairError, match="rank=0: ask for at least one"):
        by_directions(one_whole, 0)
    norms = {**one_whole.base, "final_norm": one_whole.expert["final_norm"]}
    with pytest.raises(PairError, match="there is no change to divide into directions"):
        by_directions(dataclasses.replace(one_whole, expert=norms))
    with pytest.raises(ComponentError, match=r"has none; a pair has directions once it is divided: .*by_directions"):
        parse_component(one_whole.cfg, f"L0.{KIND}.q.0")
    for name in (f"L0.{KIND}.0", f"L0.{KIND}.q", f"L0.{KIND}.z.0", f"L0.{KIND}.q.01"):
        with pytest.raises(ComponentError, match="is not a component name"):
            parse_component(one.cfg, name)
    anchor = make_anchor(one, 2)
    for swept, options, says in (
        (
            one_whole,
            {"kinds": [KIND]},
            r"divide it first: pair = wp.by_directions\(pair\)",
        ),
        (one, {"kinds": [KIND, "head"]}, "delta_direction and head own the same matrices"),
        (one, {"kinds": ["neuron"]}, "delta_direction and neuron own the same matrices"),
        (one, {"components": ["L0.attn"]}, "delta_direction and attn own the same matrices"),
        (one, {"kinds": [KIND], "method": "activation"}, "of a direction only the weights are patched"),
        (one, {"kinds": [KIND], "method": "factorial"}, "of a direction only the weights are patched"),
    ):
        with pytest.raises(ComponentError, match=says):
            sweep(swept, batch, lambda pair, batch: anchor.metric_along(batch), **options)
    with pytest.raises(ComponentError, match="delta_direction and head own the same matrices"):
        check_with_directions(["head"], is_divided=True)
    with pytest.raises(PatchError, match="this pair is divided into directions; load it again"):
        save_patch(tmp_path / "p.safetensors", one, [f"L0.{KIND}.q.0"])
    with pytest.raises(CheckpointError, match="has no place for them in its files"):
        save_checkpoint(tmp_path / "model", one.expert_checkpoint)


SWEEP = "sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --metric decision --causal skip".split()


def test_a_sweep_of_directions_from_the_command_line(wpjax, tmp_path):
    """Its file says what was divided and how; what makes other files of it refuses it, in one line."""
    names = ("L6.delta_direction.down.0", "L4.delta_direction.q.1")
    options = ("--method", "exact", "--n-prompts", 4, "--answers", 0, "--max-new-tokens", 8, "--no-set-score")
    code, out, err = wpjax(*SWEEP, "--components", ",".join(names), "--rank", 2, *options, "--out", "r.nc")
    assert code == 0, err
    assert "112 directions with 35,952 parameters; they hold 23.7% of its energy (q 33%" in err
    result = SweepResult.from_netcdf(tmp_path / "r.nc")
    assert set(result.dataset["name"].values) == set(names)
    said = json.loads(result.dataset.attrs["directions"])
    assert (said["rank"], said["n_directions"], said["n_parameters"]) == (2, 112, 35952)
    whole = load_pair("tiny:base", "tiny:expert")
    assert said["kept"] == pytest.approx(by_directions(whole, 2).division.kept)
    assert result.dataset.attrs["expert_fingerprint"] == whole.fingerprints[1]
    assert "wpjax extract" not in out
    for command in (
        "extract r.nc --out p.safetensors",
        "export r.nc --top 1 --out model",
        "scores r.nc --out s.safetensors",
    ):
        code, _, err = wpjax(*command.split())
        assert code == 2
        assert "r.nc is a sweep of directions of changes, and" in err
    for more, says in (
        (("--kinds", "delta_direction,head"), "delta_direction and head own the same matrices"),
        (("--kinds", "delta_direction", "--rank", 999), "rank 999: the matrices of q have at most 128 directions"),
        (("--rank", 3), "--rank goes with --kinds delta_direction"),
        (("--kinds", "delta_direction", "--method", "activation"), "of a direction only the weights are patched"),
    ):
        code, _, err = wpjax(*SWEEP, *more, "--out", "other.nc")
        assert code == 2
        assert says in err.replace("\n", " ")
    code, out, _ = wpjax("inspect", "tiny:base", "tiny:expert", "--directions", "--rank", 2, "--json")
    assert code == 0
    assert {row["module"]: row["kept"] for row in json.loads(out)["directions"]} == pytest.approx(said["kept"])
    assert wpjax("inspect", "tiny:base", "--directions")[0] == 2
