"""Whole merges: recipes, checks before the work, folders; against mergekit's own runs and models sliced in torch."""

import json
import re
import tracemalloc
import typing
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import load_file, save_file

from tests.helpers import sweep_by_hand
from tests.tiny import build_pair, random_model, slices
from wpjax.checkpoints.convert import hf_tensors
from wpjax.checkpoints.rewrite import open_model
from wpjax.columns import ALWAYS, columns
from wpjax.components import Component, enumerate_components, n_parameters
from wpjax.errors import WpjaxError
from wpjax.merging.gates import check_changes, component_gates
from wpjax.merging.merge import masked_experts, merge, peak_bytes
from wpjax.merging.plan import make_plan
from wpjax.merging.recipe import Rule, recipe_of, value_for
from wpjax.merging.registry import MergeError
from wpjax.merging.scores import Scores, read_scores, scores_of, write_scores
from wpjax.patching import PatchMask, materialize
from wpjax.results.sweep_result import SweepResult

TOKENS = torch.tensor(np.random.default_rng(2).integers(0, 61, (2, 9)))
FAMILIES = ("llama-gqa3", "gpt2-tied", "phi3")


class Trio(typing.NamedTuple):
    """A base and two experts as torch models, and the folder that holds base, expert and other."""

    name: str
    folder: Path
    base: typing.Any
    experts: list[typing.Any]

    @property
    def paths(self) -> list[str]:
        return [str(self.folder / name) for name in ("expert", "other")]


def make_trio(name: str, folder: Path) -> Trio:
    pair, far, other = build_pair(name, folder), random_model(name, seed=2), random_model(name)
    with torch.no_grad():
        for p, q in zip(other.parameters(), far.parameters(), strict=True):
            p.add_(0.25 * (q - p))
    other.save_pretrained(folder / "other")
    return Trio(name, folder, pair.base.model, [pair.expert.model, other])


@pytest.fixture(scope="module", params=FAMILIES)
def trio(request, tmp_path_factory) -> Trio:
    return make_trio(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Trio:
    return make_trio("llama-gqa3", tmp_path_factory.mktemp("llama"))


def recipe(trio: Trio, method: str, *own, **shared):
    """The content of a recipe that merges the two experts, with the parameters of each and those of all."""
    content = {
        "merge_method": method,
        "base_model": str(trio.folder / "base"),
        "models": [
            {"model": path, "parameters": parameters}
            for path, parameters in zip(trio.paths, own or ({}, {}), strict=True)
        ],
        "parameters": shared,
    }
    return content


def run(content, out: Path, **options) -> Path:
    merge(make_plan(recipe_of(content)), out, **options)
    return out


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def by_mergekit(content, out: Path) -> dict[str, np.ndarray]:
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate({"dtype": "float32", **content}), str(out), options)
    return tensors(out)


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.numpy()


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys() - {"lm_head.weight"} | (ours.keys() & {"lm_head.weight"})  # of tied models
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6, err_msg=name)


RECIPES = {
    "ties": ("ties", ({"weight": 0.6, "density": 0.4}, {"weight": 0.5, "density": 0.7}), {"lambda": 1.2}),
    "filters": (
        "task_arithmetic",
        (
            {"weight": [{"filter": "mlp", "value": 0.3}, {"filter": "layers.1", "value": "1e-1"}, {"value": [0, 1]}]},
            {"weight": [{"filter": "self_attn.q_proj.weight", "value": [0.1, 0.9, 0.2]}, {"value": 0.5}]},
        ),
        {"normalize": True},
    ),
    "slerp": ("slerp", ({},), {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]}),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_mean_what_they_mean_to_mergekit(llama, tmp_path, case):
    method, own, shared = RECIPES[case]
    content = recipe(llama, method, *own, *([{}] if len(own) < 2 else []), **shared)
    content["models"] = content["models"][: len(own)]
    if method == "slerp":  # the base may stand among the models, as in mergekit's examples
        content["models"].insert(0, {"model": content["base_model"]})
    assert_close(tensors(run(content, tmp_path / "ours")), by_mergekit(content, tmp_path / "theirs"))


def test_a_merge_is_a_folder_that_transformers_loads_with_the_logits_of_the_merge_in_torch(trio, tmp_path):
    folder = run(recipe(trio, "task_arithmetic", {"weight": 0.7}, {"weight": -0.4}), tmp_path / "merged")
    state = {
        name: base + 0.7 * (one - base) - 0.4 * (two - base)
        for (name, base), one, two in zip(
            trio.base.state_dict().items(), *(e.state_dict().values() for e in trio.experts), strict=True
        )
    }
    expected = random_model(trio.name)
    expected.load_state_dict(state)
    np.testing.assert_allclose(logits(loaded(folder)), logits(expected), atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(trio.base).__name__]
    assert np.abs(logits(expected) - logits(trio.base)).max() > 0.1


def test_the_recipe_for_mergekit_in_the_folder_makes_the_same_merge(llama, tmp_path, monkeypatch):
    own = {"density": 0.5, "weight": [{"filter": "layers.0", "value": 1.0}, {"value": [0.1, 0.8]}]}
    folder = run(recipe(llama, "ties", own, {"weight": 0.5, "density": 0.5}), tmp_path / "merged")
    content = yaml.safe_load((folder / "mergekit.yaml").read_text())
    assert content["base_model"] == "base"  # no path of this machine
    monkeypatch.chdir(llama.folder)
    assert_close(tensors(folder), by_mergekit(content, tmp_path / "theirs"))
    again = recipe_of(yaml.safe_load((folder / "merge.yaml").read_text()))
    merge(make_plan(again), tmp_path / "again")
    assert_close(tensors(folder), tensors(tmp_path / "again"))


def test_models_are_averaged_without_a_base(llama, tmp_path):
    content = {
        "merge_method": "linear",
        "models": [{"model": p, "parameters": {"weight": w}} for p, w in zip(llama.paths, (1, 3), strict=True)],
        "out_dtype": "bfloat16",
    }
    merged = tensors(run(content, tmp_path / "merged"))
    for name, tensor in merged.items():
        one, two = (e.state_dict()[name] for e in llama.experts)
        assert tensor.dtype.name == "bfloat16"
        expected = ((one + 3 * two) / 4).to(torch.bfloat16).float()
        np.testing.assert_allclose(tensor.astype(np.float32), expected, rtol=0.01, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_no_filter_fits_stays_the_bases_bit_for_bit(llama, tmp_path):
    only = {"weight": [{"filter": "layers.1.mlp", "value": 0.5}]}
    content = recipe(llama, "task_arithmetic", only, only)
    plan = make_plan(recipe_of(content))
    assert plan.merged == tuple(f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
    merge(plan, tmp_path / "merged")
    merged, base = tensors(tmp_path / "merged"), tensors(llama.folder / "base")
    changed = {name for name in base if merged[name].tobytes() != base[name].tobytes()}
    assert changed == set(plan.merged)
    assert set(plan.kept) == set(base) - changed


def test_filters_and_lists_are_by_exact_layer():
    setting = (Rule("layers.1", 0.5), Rule(None, (0.0, 1.0)))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)]
    values = [value_for(setting, name, 12) for name in names]
    assert values[1] == 0.5
    assert values[2:] == pytest.approx([layer / 11 for layer in range(2, 12)])
    assert value_for(setting, "model.norm.weight", 12) == 0.0
    assert value_for(setting[:1], names[10], 12) is None


def test_random_masks_are_those_of_the_seed(llama, tmp_path):
    own = {"weight": 0.5, "density": 0.5}
    content = recipe(llama, "dare_ties", own, own)
    one, again = (tensors(run(content, tmp_path / name)) for name in ("one", "again"))
    other = tensors(run({**content, "seed": 1}, tmp_path / "other"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert one[name].tobytes() == again[name].tobytes() != other[name].tobytes()
    # a tensor's mask does not depend on which others are merged
    only = {**own, "weight": [{"filter": name, "value": 0.5}]}
    alone = tensors(run(recipe(llama, "dare_ties", only, only), tmp_path / "alone"))
    assert alone[name].tobytes() == one[name].tobytes()


def test_an_adapter_is_merged_as_the_model_that_peft_makes_of_it(llama, tmp_path):
    model = peft.get_peft_model(
        loaded(llama.folder / "base"), peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "whole")
    content = recipe(llama, "ties", {"weight": 0.5, "density": 0.3}, {"weight": 0.8, "density": 0.4})
    merged = []
    for expert in ("adapter", "whole"):
        content["models"][1]["model"] = str(tmp_path / expert)
        merged.append(tensors(run(content, tmp_path / f"with {expert}")))
    assert_close(*merged)


def test_memory_holds_a_few_tensors_not_models(tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 10}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=4))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "expert")
    own = {"model": str(tmp_path / "expert"), "parameters": {"weight": 1.0, "density": 0.5}}
    plan = make_plan(recipe_of({"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": [own]}))
    merge(plan, tmp_path / "first")  # what is imported on the way is no tensor
    tracemalloc.start()
    merge(plan, tmp_path / "merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < peak_bytes(plan) + 2**20 < sum(p.nbytes for p in model.parameters()) / 2


def test_the_tokenizer_is_the_bases_or_that_of_a_model(tmp_path):
    own = {"model": "tiny:expert", "parameters": {"weight": 1.0}}
    content = {"merge_method": "task_arithmetic", "base_model": "tiny:base", "models": [own]}
    run(content, tmp_path / "merged")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) > 100
    (tmp_path / "merged" / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "mark": 1}')
    content["models"].append({"model": str(tmp_path / "merged"), "parameters": {"weight": 0}})
    run(content | {"tokenizer_source": str(tmp_path / "merged")}, tmp_path / "again")
    assert "mark" in (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert "mark" not in (run(content, tmp_path / "plain") / "tokenizer_config.json").read_text()


def test_methods_take_tensors_from_files(llama, tmp_path):
    base, expert = llama.base.state_dict(), llama.experts[0].state_dict()
    matrices = [name for name, tensor in base.items() if tensor.ndim == 2 and "layers" in name]
    rng = np.random.default_rng(0)
    used = {name: rng.random(base[name].shape[1]).astype(np.float32) for name in matrices}
    save_file(used, tmp_path / "used.safetensors")
    aim = recipe(
        llama, "aim", {"weight": 1.0}, {"weight": 0.0}, activations=str(tmp_path / "used.safetensors"), omega=0
    )
    merged = tensors(run(aim, tmp_path / "aim"))
    for name, tensor in base.items():
        factor = 1 - used[name] / used[name].max() if name in used else 1
        np.testing.assert_allclose(merged[name], tensor + (expert[name] - tensor) * factor, atol=1e-6, err_msg=name)
    information = {n: rng.random(t.shape).astype(np.float32) for n, t in base.items()}
    save_file(information, tmp_path / "fisher.safetensors")
    fisher = recipe(llama, "fisher", *({"fisher": str(tmp_path / "fisher.safetensors")},) * 2)
    fisher["models"].insert(0, {"model": fisher["base_model"], "parameters": fisher["models"][0]["parameters"]})
    merged = tensors(run(fisher, tmp_path / "fisher"))  # all alike: a plain mean of three models
    other = llama.experts[1].state_dict()
    for name, tensor in base.items():
        np.testing.assert_allclose(merged[name], (tensor + expert[name] + other[name]) / 3, atol=1e-5)
    absent = {name: information[name] for name in list(information)[1:]}
    save_file(absent, tmp_path / "fisher.safetensors")
    with pytest.raises(MergeError, match=r"holds no \S+, and fisher is needed for each tensor that is merged"):
        make_plan(recipe_of(fisher))
    save_file({"model.layers.0.mlp.up_projj.weight": np.ones(3, np.float32)}, tmp_path / "used.safetensors")
    with pytest.raises(MergeError, match=r"is no tensor of the model \(did you mean model.layers.0.mlp.up_proj.weight"):
        make_plan(recipe_of(aim))


KINDS = ("head", "kv_group", "neuron")


def random_scores(trio: Trio, seed: int, kinds=KINDS) -> Scores:
    cfg = open_model(trio.folder / "base").cfg
    components = tuple(enumerate_components(cfg, kinds))
    return Scores(components, np.random.default_rng(seed).standard_normal(len(components)), {"behaviour": "b"})


def publish(trio: Trio, folder: Path, seed: int, kinds=KINDS) -> Scores:
    scores = random_scores(trio, seed, kinds)
    write_scores(folder / f"{seed}.safetensors", open_model(trio.folder / "base").cfg, scores)
    return scores


def gated_torch(trio: Trio, gates, weight=(1.0, 1.0)):
    """The base with slices of the experts' changes added in torch, component by component."""
    model = random_model(trio.name)
    base, state = trio.base.state_dict(), model.state_dict()
    with torch.no_grad():
        for (components, own), expert, w in zip(gates, trio.experts, weight, strict=True):
            theirs = expert.state_dict()
            for component, gate in zip(components, own, strict=True):
                for name, parts in slices(model, component).items() if gate else ():
                    for at in parts:
                        state[name][at] += float(w * gate) * (theirs[name][at] - base[name][at])
    return model


def test_published_scores_are_the_numbers_of_the_slices_and_come_back(trio, tmp_path):
    scores, cfg = publish(trio, tmp_path, 0), open_model(trio.folder / "base").cfg
    written = load_file(tmp_path / "0.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in trio.base.state_dict().items()}
    whole = {name: np.broadcast_to(tensor, shapes[name]) for name, tensor in written.items()}
    for component, value in list(zip(scores.components, scores.values, strict=True))[::5]:
        for name, parts in slices(trio.base, component).items():
            for at in parts:
                np.testing.assert_array_equal(whole[name][at], np.float32(value), err_msg=component.name)
    assert sum(t.size for t in written.values()) < 0.2 * sum(np.prod(shapes[name]) for name in written)
    back = read_scores(tmp_path / "0.safetensors", cfg)
    assert set(back.components) == set(scores.components)
    values = dict(zip(scores.components, scores.values, strict=True))
    np.testing.assert_allclose(back.values, [values[c] for c in back.components], rtol=1e-6)
    about = json.loads((tmp_path / "0.json").read_text())
    assert about["behaviour"] == "b"
    assert set(about["tensors"]) == set(written)
    modules = read_scores(tmp_path / "0.safetensors", cfg, ["mlp"])  # a module's is the mean over its weights
    for component, value in zip(modules.components, modules.values, strict=True):
        own = [v for c, v in values.items() if c.kind == "neuron" and c.layer == component.layer]
        parameters = {p: whole[p][a] for p, parts in slices(trio.base, component).items() if p in whole for a in parts}
        assert value == pytest.approx(np.nanmean(np.concatenate([p.ravel() for p in parameters.values()])), abs=1e-5)
        assert min(own) < value < max(own)


@pytest.mark.parametrize("options", [{}, {"conflict": "sum"}, {"conflict": "first"}, {"gate": "quantile"}])
def test_gates_let_slices_of_the_experts_through(trio, tmp_path, options):
    scores = [publish(trio, tmp_path, seed) for seed in (0, 1)]
    own = [{"scores": str(tmp_path / f"{seed}.safetensors"), "share": 0.4, "weight": 0.5 + seed} for seed in (0, 1)]
    folder = run(recipe(trio, "score_gated", *own, **options), tmp_path / "merged")
    gates = component_gates(open_model(trio.folder / "base").cfg, scores, [0.4, 0.4], **options)
    expected, base = gated_torch(trio, gates, (0.5, 1.5)).state_dict(), trio.base.state_dict()
    assert_close(tensors(folder), expected)
    assert sum(float((expected[name] - base[name]).abs().max()) > 0.01 for name in base) > 10
    weights = yaml.safe_load((folder / "mergekit.yaml").read_text())  # lossy: what was averaged
    assert "mergekit weighs whole tensors" in (folder / "mergekit.yaml").read_text()
    MergeConfiguration.model_validate(weights)


def test_rules_of_conflict_by_hand(llama):
    cfg = open_model(llama.folder / "base").cfg
    heads = tuple(Component("head", 0, i) for i in range(4))
    one, two = Scores(heads, np.array([4.0, 3, 2, 1]), {}), Scores(heads, np.array([1.0, 5, 3, 2]), {})

    def gates(**options):
        return [own.tolist() for _, own in component_gates(cfg, [one, two], [0.5, 0.75], **options)]

    assert gates(conflict="sum") == [[1, 1, 0, 0], [0, 1, 1, 1]]
    assert gates(conflict="largest") == [[1, 0, 0, 0], [0, 1, 1, 1]]
    assert gates(conflict="first") == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert gates(conflict="sum", gate="quantile") == [[0.875, 0.625, 0.375, 0.125], [0.125, 0.875, 0.625, 0.375]]
    assert gates(conflict="largest", gate="score") == [[4, 0, 0, 0], [0, 5, 3, 2]]


def test_a_budget_is_one_of_parameters():
    cfg = open_model("tiny:base").cfg
    components = tuple(enumerate_components(cfg, KINDS))
    sizes = np.array([n_parameters(cfg, c) for c in components])
    scores = Scores(components, np.random.default_rng(0).random(len(components)), {})
    for share in (0.01, 0.1, 0.5):
        ((_, own),) = component_gates(cfg, [scores], [share])
        assert sizes[own > 0].sum() == pytest.approx(share * sizes.sum(), abs=int(sizes.max()))
        assert scores.values[own > 0].min() > scores.values[own == 0].max()
    ((_, per),) = component_gates(cfg, [scores], [0.1], per_parameter=True)
    assert (scores.values / sizes)[per > 0].min() >= (scores.values / sizes)[per == 0].max()


def test_masked_experts_are_merged_by_mergekit_to_the_same_model(llama, tmp_path, monkeypatch):
    for seed in (0, 1):
        publish(llama, tmp_path, seed)
    own = [{"scores": str(tmp_path / f"{seed}.safetensors"), "share": 0.3, "weight": 0.5 + seed} for seed in (0, 1)]
    content = recipe(llama, "score_gated", *own, **{"lambda": 0.8})
    folders = masked_experts(make_plan(recipe_of(content)), tmp_path / "masked")
    assert [folder.name for folder in folders] == ["expert", "other"]
    monkeypatch.chdir(tmp_path / "masked")
    again = yaml.safe_load((tmp_path / "masked" / "mergekit.yaml").read_text())
    again["base_model"] = content["base_model"]
    merged = tensors(run(content, tmp_path / "merged"))
    assert_close(merged, by_mergekit(again, tmp_path / "theirs"))
    with pytest.raises(MergeError, match="ties has no gates"):
        masked_experts(make_plan(recipe_of(recipe(llama, "ties", {"weight": 1}, {"weight": 1}))), tmp_path / "no")


def test_controls_open_as_much_by_chance_or_by_change(trio, tmp_path):
    scores, cfg = publish(trio, tmp_path, 0), open_model(trio.folder / "base").cfg
    own = {"scores": str(tmp_path / "0.safetensors"), "share": 0.2}
    content = recipe(trio, "score_gated", own, own, control="delta", conflict="sum")
    content["models"] = content["models"][:1]
    base, expert = trio.base.state_dict(), trio.experts[0].state_dict()
    squares = []
    for component in scores.components:
        parts = [(n, at) for n, all_ in slices(trio.base, component).items() for at in all_]
        total = sum(float(((expert[n][at] - base[n][at]) ** 2).sum()) for n, at in parts)
        squares.append(total / n_parameters(cfg, component))
    by_change = Scores(scores.components, np.array(squares), {})
    expected = gated_torch(trio._replace(experts=trio.experts[:1]), component_gates(cfg, [by_change], [0.2]), (1.0,))
    assert_close(tensors(run(content, tmp_path / "by change")), expected.state_dict())
    changed = []
    for seed in (0, 1):
        content |= {"seed": seed, "parameters": {"control": "random"}}
        merged = tensors(run(content, tmp_path / f"random {seed}"))
        changed.append({n: merged[n] != base[n].numpy() for n in merged})
    shares = [sum(c.sum() for c in m.values()) for m in changed]
    total = sum(n_parameters(cfg, c) for c in scores.components)
    assert shares == pytest.approx([0.2 * total] * 2, abs=2 * max(n_parameters(cfg, c) for c in scores.components))
    assert any((changed[0][n] != changed[1][n]).any() for n in changed[0])


def test_scores_come_from_a_sweep(llama, tmp_path):
    cfg = open_model(llama.folder / "base").cfg
    names = ["L0.head.1", "L1.head.2", "L2.head.0"]
    result = sweep_by_hand([0.5, 0.1, 0.3], ["head"] * 3, [0, 1, 2], names=names, n_layers=3)
    result.dataset["set_score"] = ("component", [0.0, 2.0, np.nan])
    by_sets, by_effect = scores_of(cfg, result), scores_of(cfg, result, "effect")
    assert [c.name for c in by_sets.components] == names[:2]
    assert by_sets.values.tolist() == [0.0, 2.0]
    assert by_effect.values.tolist() == [0.5, 0.1, 0.3]
    assert by_effect.about["ranking"] == "effect"
    with pytest.raises(MergeError, match="kind 'neuron' was not swept, only head"):
        scores_of(cfg, result, kinds=["neuron"])
    other = sweep_by_hand([0.5], ["head"], [0], names=["L0.head.9"], n_layers=3)
    with pytest.raises(
        MergeError, match=r"the sweep is of another architecture: L0\.head\.9: a layer of this model has"
    ):
        scores_of(cfg, other, "effect")


def test_scores_of_other_models_are_refused(llama, tmp_path):
    base, experts = llama.base.state_dict(), [e.state_dict() for e in llama.experts]
    components = enumerate_components(open_model(llama.folder / "base").cfg, ["mlp"])
    result = sweep_by_hand(
        [0.5, 0.1, 0.3], ["mlp"] * 3, [0, 1, 2], names=[c.name for c in components], n_layers=3, schema=4
    )
    norms = []
    for component in components:
        parts = [(n, at) for n, all_ in slices(llama.base, component).items() for at in all_]
        norms.append(sum(float(((experts[0][n][at] - base[n][at]) ** 2).sum()) for n, at in parts) ** 0.5)
    result.dataset["delta_norm"] = ("component", norms)
    cfg = open_model(llama.folder / "base").cfg
    publish(llama, tmp_path, 0, ["mlp"])
    plan = make_plan(recipe_of(recipe(llama, "score_gated", *[{"scores": str(tmp_path / "0.safetensors")}] * 2)))
    check_changes(plan, 0, scores_of(cfg, result, "effect"))
    with pytest.raises(MergeError, match=r"the scores of .*other are of other models: what it changed of L0\.mlp has"):
        check_changes(plan, 1, scores_of(cfg, result, "effect"))


W, D = {"weight": 1.0}, {"weight": 1.0, "density": 0.5}
REFUSED = {
    "method": (
        lambda r: r | {"merge_method": "task_aritmetic"},
        r"unknown merge_method .* \(did you mean task_arithmetic\?\)",
    ),
    "key": (lambda r: r | {"base_modell": "x"}, r"unknown key: 'base_modell' \(did you mean base_model\?\)"),
    "slices": (lambda r: r | {"slices": []}, "slices is mergekit's, and not known here"),
    "parameter": (lambda r: r | {"parameters": {"lamda": 1}}, r"'lamda' \(did you mean lambda\?\)"),
    "own parameter": (lambda r: r["models"][0].update(parameters={"wieght": 1}) or r, r"\(did you mean weight\?\)"),
    "of all": (lambda r: r["models"][0].update(parameters={**D, "lambda": 1}) or r, "is one for the whole merge"),
    "no weight": (lambda r: r["models"][1].update(parameters={}) or r, "no weight for .*other"),
    "bounds": (lambda r: r["models"][0].update(parameters={**W, "density": 2}) or r, "density is between 0 and 1"),
    "number": (lambda r: r["models"][0].update(parameters={"weight": "much"}) or r, "'much' is no number"),
    "switch": (lambda r: r | {"parameters": {"normalize": "yes please"}}, "is neither true nor false"),
    "filter": (
        lambda r: r["models"][0].update(parameters={"weight": [{"filter": "atn", "value": 1}]}) or r,
        "filter 'atn' fits no tensor",
    ),
    "nearest filter": (
        lambda r: r["models"][0].update(parameters={"weight": [{"filter": "layers.01", "value": 1}]}) or r,
        r"filter 'layers.01' fits no tensor \(did you mean layers.[01]\?\)",
    ),
    "unreached": (
        lambda r: r["models"][0].update(parameters={"weight": [{"value": 1}, {"filter": "mlp", "value": 0}]}) or r,
        "never reached",
    ),
    "nothing": (lambda r: [m["parameters"].update(weight=0) for m in r["models"]] and r, "nothing would be merged"),
    "no mean": (
        lambda r: [m.update(parameters={"weight": w}) for m, w in zip(r["models"], (1, -1), strict=True)]
        and r | {"merge_method": "linear"},
        r"the weights 1, -1 sum to 0, so they make no mean",
    ),
    "one expert": (
        lambda r: r | {"merge_method": "model_stock", "models": [r["models"][0]["model"]]},
        "merges 2 or more models",
    ),
    "no base": (lambda r: {k: v for k, v in r.items() if k != "base_model"}, "ties needs base_model"),
    "twice": (lambda r: r | {"models": [r["models"][0]] * 2}, "stands twice under models"),
    "dtype": (lambda r: r | {"dtype": "float31"}, r"'float31' \(did you mean float32\?\)"),
    "union": (lambda r: r | {"tokenizer_source": "union"}, "makes a new vocabulary"),
    "epsilon": (
        lambda r: r | {"merge_method": "della", "parameters": {"epsilon": 0.5}, },
        "must lie between 0 and 1; give a smaller epsilon",
    ),
    "no model": (lambda r: r["models"][1].update(model="./nowhere/at/all") or r, "no such folder"),
    "scores": (
        lambda r: r | {"merge_method": "score_gated", "models": [
            {"model": m["model"], "parameters": {"scores": "x.csv"}} for m in r["models"]
        ]},
        "x.csv is neither a result",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(llama, tmp_path, wpjax, case):
    spoil, says = REFUSED[case]
    content = spoil(recipe(llama, "ties", dict(D), dict(D)))
    Path("merge.yaml").write_text(yaml.safe_dump(content))
    code, out, err = wpjax("merge", "merge.yaml", "--out", "merged")
    assert code == 2, err
    assert re.search(says, err), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_a_key_that_stands_twice_is_refused(wpjax):
    Path("merge.yaml").write_text("merge_method: ties\nmerge_method: linear\n")
    code, _, err = wpjax("merge", "merge.yaml", "--out", "merged")
    assert code == 2
    assert "the key 'merge_method' stands twice" in err
    Path("merge.yaml").write_text("merge_method: !!python/object/apply:os.getcwd []\n")
    code, _, err = wpjax("merge", "merge.yaml", "--dry-run")
    assert code == 2
    assert "not readable as YAML" in err


def test_models_that_do_not_fit_are_refused_before_the_work(llama, tmp_path, wpjax):
    random_model("llama-gqa3", seed=7).save_pretrained("apart")
    random_model("llama-mqa").save_pretrained("mqa")
    wide = transformers.LlamaConfig(**{**llama.base.config.to_dict(), "vocab_size": 62})
    transformers.LlamaForCausalLM(wide).save_pretrained("wide")
    for expert, says in (
        ("apart", "apart was not trained from .*base: the cosine between their "),
        ("mqa", "are not one architecture: .*n_kv_heads"),
        ("wide", "have vocabularies of 61 and 62 rows"),
        (str(llama.folder / "base" / "." / ".." / "base"), "is the base itself"),
    ):
        content = recipe(llama, "ties", D, D)
        content["models"][1]["model"] = expert
        Path("merge.yaml").write_text(yaml.safe_dump(content))
        code, _, err = wpjax("merge", "merge.yaml", "--out", "merged")
        assert code == 2
        assert re.search(says, err), err
        assert not Path("merged").exists()
    content["models"][1]["model"] = "apart"
    Path("merge.yaml").write_text(yaml.safe_dump(content))
    code, _, err = wpjax("merge", "merge.yaml", "--out", "merged", "--unrelated")
    assert code == 0
    assert "is far from" in err
    for place in (llama.folder / "expert" / "merged", llama.folder / "base"):
        code, _, err = wpjax("merge", "merge.yaml", "--out", place, "--unrelated", "--overwrite")
        assert code == 2
        assert "lies inside the model" in err or "is read as an input" in err
    assert (llama.folder / "base" / "model.safetensors").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(llama, tmp_path, wpjax):
    own = {"density": 0.5, "weight": [{"filter": "mlp", "value": 0.25}]}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe(llama, "ties", own, own)))
    code, out, _ = wpjax("merge", "merge.yaml", "--dry-run")
    assert code == 0
    assert "9 tensors merged by ties; " in out
    assert "stay those of" in out
    assert "nothing was written" in out
    code, out, _ = wpjax("merge", "merge.yaml", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["tensors"]["model.layers.2.mlp.up_proj.weight"]["weight"] == [0.25, 0.25]
    assert "model.norm.weight" in plan["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]
    code, out, err = wpjax("merge", "merge.yaml", "--out", "merged")
    assert (code, out.strip()) == (
        0,
        "wrote merged: 9 tensors merged by ties; 21 stay those of " + str(llama.folder / "base"),
    )
    code, _, err = wpjax("merge", "merge.yaml", "--out", "merged")
    assert code == 2
    assert "pass --overwrite" in err


def test_the_card_tells_what_was_merged_and_nothing_of_this_machine(llama, tmp_path):
    scores = publish(llama, tmp_path, 0)
    assert scores.about
    own = {"scores": str(tmp_path / "0.safetensors")}
    folder = run(recipe(llama, "score_gated", own, own), tmp_path / "merged")
    card = (folder / "README.md").read_text()
    assert "# A merge of `expert`, `other`" in card
    assert "into `base` by `score_gated`" in card
    for file in ("README.md", "merge.yaml", "mergekit.yaml"):
        assert str(tmp_path) not in (folder / file).read_text()
        assert str(llama.folder) not in (folder / file).read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["tags"] == ["wpjax", "merge"]


def test_a_sweep_is_published_and_merged_by(tiny_pair, tmp_path, wpjax):
    components = enumerate_components(tiny_pair.cfg, ["head"])
    n, names = len(components), [c.name for c in components]
    effects = np.random.default_rng(0).standard_normal(n)
    result = sweep_by_hand(effects, ["head"] * n, [c.layer for c in components], names=names, n_layers=8)
    data = result.dataset.assign_attrs(noise_floor_by_kind="{}", schema=4)
    data["delta_norm"] = ("component", tiny_pair.delta_norms(components))
    data["index"], data["query"] = ("component", [c.index for c in components]), ("prompt", np.arange(2))
    for column in columns():  # what a file of a sweep cannot lack
        if column.group_name == ALWAYS and column.name not in data:
            zeros = np.zeros([data.sizes[dim] for dim in column.dims])
            data[column.name] = (column.dims, zeros.astype(column.dtype[0]))
    SweepResult(data.assign_attrs(n_queries=2)).to_netcdf("r.nc")
    code, out, err = wpjax("scores", "r.nc", "--out", "r.safetensors")
    assert (code, out.strip()) == (0, f"wrote r.safetensors, r.json: effect of {n} components"), err
    merged = []
    for scores in ("r.nc", "r.safetensors"):
        own = {"model": "tiny:expert", "parameters": {"scores": scores, "share": 0.25}}
        recipe_ = {"merge_method": "score_gated", "base_model": "tiny:base", "models": [own], "out_dtype": "float32"}
        Path("merge.yaml").write_text(yaml.safe_dump(recipe_))
        code, _, err = wpjax("merge", "merge.yaml", "--out", f"by {scores}")
        assert code == 0, err
        merged.append(tensors(tmp_path / f"by {scores}"))
    best = [row.name for row in result.top(n // 4)]
    patched = materialize(tiny_pair.base, tiny_pair.expert, PatchMask.of(tiny_pair.cfg, best))
    assert_close(merged[0], dict(hf_tensors(tiny_pair.cfg, patched)))
    assert_close(merged[0], merged[1])
    own["model"] = "tiny:planted"
    own["parameters"]["scores"] = "r.nc"
    Path("merge.yaml").write_text(yaml.safe_dump(recipe_))
    code, _, err = wpjax("merge", "merge.yaml", "--out", "other")
    assert code == 2
    assert "the scores of tiny:planted are of other models" in err


def test_methods_are_listed(wpjax):
    code, out, _ = wpjax("merge", "--methods", "--json")
    assert code == 0
    assert set(json.loads(out)["ties"]["parameters"]) >= {"weight", "density", "lambda", "normalize"}
    code, _, err = wpjax("merge")
    assert code == 2
    assert "no recipe" in err


def test_errors_are_of_bad_input():
    with pytest.raises(WpjaxError):
        recipe_of({"merge_method": "linear"})
