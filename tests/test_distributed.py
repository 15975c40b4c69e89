"""Everything that evaluates patches, on meshes of virtual devices: what one device finds, and nothing is exchanged.

One process of its own has four devices. Each case below runs there on four meshes, and every program that is divided
is looked through for collectives.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wpjax as wp
from experiments.tpu.collectives import collectives
from tests.helpers import make_anchor, run_cli
from wpjax.behaviours import PromptBatch, PromptPair, Tokens
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.components import enumerate_components
from wpjax.engines.engine import Engine
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.on_policy import BaseAnswers, OnPolicyEngine
from wpjax.engines.reference import reference_changes
from wpjax.errors import WpjaxError
from wpjax.estimators.masks import random_masks
from wpjax.estimators.screens import output_linearised
from wpjax.facts.covariance import read_keys
from wpjax.facts.flow import flow, packing
from wpjax.facts.rank_one import Task, edit_loss
from wpjax.metrics.answers import answer_metric, answer_of
from wpjax.metrics.metric import joint_scores
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import forward, init_params
from wpjax.models.sharding import choose_placement, memory_of, spec_of, weight_bytes
from wpjax.pairs import Pair
from wpjax.patching import PatchMask
from wpjax.runtime import placement as placing
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement

CFG = ModelConfig("llama", 3, 16, 4, 2, 4, 24, 40, 64)
MESHES = ("patch=1,model=1", "patch=2,model=1", "patch=1,model=2", "patch=2,model=2")
N_NEW = 3


def made_pair(dtype="float32") -> Pair:
    """Random models, the expert a part of the way to another one."""
    base, other = (init_params(CFG, jax.random.key(seed), dtype) for seed in (0, 1))
    expert = jax.tree.map(lambda a, b: a + jnp.asarray(0.5, a.dtype) * (b - a), base, other)
    whole, changed = (Checkpoint(CFG, params, None, {}, None, n) for params, n in ((base, "base"), (expert, "expert")))
    return Pair(CFG, base, expert, None, whole, changed)


def made_batch() -> PromptBatch:
    """Five prompts, which two devices do not divide evenly; they begin alike."""
    ids = np.random.default_rng(0).integers(0, CFG.d_vocab, (5, 8)).astype(np.int32)
    ids[:, :2] = ids[0, :2]
    tokens = Tokens(ids, np.array([8, 5, 7, 8, 4], np.int32))
    pairs = tuple(PromptPair(f"with {i}", f"without {i}", i) for i in range(5))
    return PromptBatch("random", "sweep", tokens, tokens, tuple(p.with_instruction for p in pairs), pairs)


COMPONENTS = enumerate_components(CFG, ("head", "neuron"), range(2))[::3]
ANYWHERE = [c for c in enumerate_components(CFG, ("mlp",)) if c.layer != 1]


def single(pair, batch):
    """Effects of single patches, by way of what they arrive, and shams."""
    engine = Engine(pair, make_anchor(pair, 1).metric_along(batch), COMPONENTS, {}, lambda *_: None)
    plan = engine.plan(COMPONENTS)
    assert all(rows % pair.placement.n_patch == 0 for rows in plan.rows.values())
    changes, flow = engine.changes("exact", plan)
    return {"changes": changes, "flow": flow}


def screens(pair, batch):
    metric = make_anchor(pair, 1).metric_along(batch)
    return {"screen": output_linearised(pair.cfg, pair.base, pair.expert, COMPONENTS, metric)}


def sets(pair, batch):
    """Joint patches and random masks."""
    metric = make_anchor(pair, 1).metric_along(batch)
    masks = [PatchMask.of(pair.cfg, COMPONENTS[i::3]) for i in range(3)]
    models = pair.cfg, pair.base, pair.expert
    betas = random_masks(*models, COMPONENTS, metric, 0.5, n_masks=8, control=False)
    return {"joint": scores_of_sets(*models, masks, metric), "masks": betas.beta}


def spoken(pair, batch):
    """Patched models that are read along their own words, and answers."""
    answers = BaseAnswers(pair, batch, make_anchor(pair, 1), N_NEW)
    engine = OnPolicyEngine(answers, ANYWHERE, {}, lambda *_: None)
    changes, _ = engine.changes("exact", engine.plan(ANYWHERE))
    assert 0 < np.nanmean(engine.changed) < 1  # some components change words, others do not
    said = answer_of(pair, pair.expert, batch.with_instruction, N_NEW)
    metrics = [answer_metric(pair.cfg, batch.with_instruction, said), make_anchor(pair, 1).metric_along(batch)]
    return {
        "on-policy": changes,
        "changed words": engine.changed,
        "answers": np.asarray(said.tokens),
        "scores": joint_scores(pair.cfg, pair.expert, metrics),
    }


def facts(pair, batch):
    """A trace of a fact, the sum of keys of a text, and the loss of an edit with its slope."""
    ids, restored = batch.with_instruction.ids, jnp.eye(8, dtype=bool)[2:4]
    tokens, numbers = jnp.asarray(ids), (jnp.asarray(7), jnp.asarray(5))
    noise = jnp.where(restored.any(0)[:, None], jax.random.normal(jax.random.key(0), (2, 8, CFG.d_model)), 0.0)
    pair_of = jnp.tile(tokens[:1], (2, 1))
    traced = flow(CFG, pair.base, tokens[0], pair_of, noise, restored, packing(np.asarray(restored), 8), *numbers)
    first = forward(CFG, pair.base, tokens, stop=0, logits=False).resid
    stream, keys = read_keys(CFG, pair.base, first, jnp.asarray(0), jnp.asarray(1), tokens < 40)
    rows = jnp.array([[5, 6]] * 4)
    task = Task(tokens, jnp.full(5, 3), rows, rows, jnp.ones((4, 2), bool))
    start, before = jnp.ones(CFG.d_model), jax.nn.log_softmax(jnp.linspace(0.0, 4.0, CFG.d_vocab))
    loss = jax.value_and_grad(lambda d: edit_loss(CFG, pair.base, task, 1, stream, d, start, before, 1.0, 1.0))
    value, slope = jax.jit(loss)(jnp.full(CFG.d_model, 0.1))
    found = {"trace": traced.restored, "keys": keys, "loss": value, "slope": slope}
    return {name: np.asarray(of) for name, of in found.items()}


DIVIDED = tuple(mesh for mesh in MESHES if mesh != "patch=1,model=2")
CASES = {single: MESHES, screens: MESHES, sets: MESHES, facts: MESHES[:3:2], spoken: DIVIDED}
"""Cases, and the meshes that they run on: those of the last take the longest to compile."""

EQUAL = ("answers", "changed words")
"""What is the same bit for bit on every mesh: words, and counts of them."""


def test_meshes_of_four_devices():
    code = "from tests.test_distributed import on_four_devices; on_four_devices()"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def on_four_devices():
    """Float32 rounding is all that a mesh changes, and no program exchanges anything along `patch`."""
    assert len(jax.devices()) == 4
    batch, programs = made_batch(), watched_programs()
    pairs = {mesh: made_pair().on(mesh) for mesh in MESHES}
    for mesh, pair in pairs.items():
        assert str(pair.placement) == mesh
        assert cut_into(pair.base["blocks"]["mlp"]["W_in"]) == cut_into(pair.expert["embed"]["W_E"])
        assert cut_into(pair.base["blocks"]["mlp"]["W_in"]) == pair.placement.n_model
    for case, meshes in CASES.items():
        found = {mesh: case(pairs[mesh], batch) for mesh in meshes}
        alone = found[MESHES[0]]
        for mesh in meshes[1:]:
            for name, value in found[mesh].items():
                near = 0 if name in EQUAL else 2e-6 * max(1, np.abs(alone[name]).max())
                np.testing.assert_allclose(value, alone[name], rtol=0, atol=near, err_msg=f"{name}, {mesh}")
    one = pairs[MESHES[0]]
    metric = make_anchor(one, 1).metric_along(batch)
    expected = reference_changes(CFG, one.base, one.expert, COMPONENTS, metric)
    np.testing.assert_allclose(single(pairs["patch=2,model=2"], batch)["changes"], expected, rtol=0, atol=2e-5)
    bad_meshes()
    one_row_for_each_device()
    whole_commands()
    assert len(programs) > 12
    for (placement, name), text in programs.items():
        along = {axes for _, axes in collectives(text, placement.mesh.shape)}
        assert along == ({"model"} if placement.n_model > 1 else set()), (str(placement), name, along)


def cut_into(leaf) -> int:
    """Number of different parts of an array."""
    return len({str(shard.index) for shard in leaf.addressable_shards})


def watched_programs():
    """Texts of all divided programs that run from here on, by placement and name."""
    divided, texts = placing.divided, {}

    def watched(placement, run, static, *args, **options):
        program, compiled = divided(placement, run, static, *args, **options), {}

        def call(*arrays):
            leaves, tree = jax.tree.flatten(arrays)
            key = tree, tuple((a.shape, str(a.dtype)) for a in leaves)
            if key not in compiled:
                compiled[key] = program.lower(*arrays).compile()
                name = " ".join(str(getattr(part, "__name__", part)) for part in (run, *static) if part is not CFG)
                texts[placement, f"{name} {options} {len(texts)}"] = compiled[key].as_text()
            return compiled[key](*arrays)

        return call

    placing.divided = watched
    return texts


def bad_meshes():
    for mesh, what in {"patch=3": "does not divide the 4 devices", "patch=2,model=4": "takes 8 devices"}.items():
        with pytest.raises(WpjaxError, match=what):
            made_pair().on(mesh)
    assert str(made_pair().on("model=2").placement) == "patch=2,model=2"  # patches take what is left
    assert str(made_pair().on("patch=2").placement) == "patch=2,model=1"  # and the weights are not cut
    assert str(choose_placement(CFG, "float32")) == "patch=4,model=1"  # it fits: the weights are not cut


def one_row_for_each_device():
    """A device that runs out of memory goes on with fewer rows, down to one."""
    sizes = []

    def run(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return rows

    with pytest.warns(UserWarning, match="out of memory: prompts go on 2 at a time"):
        assert map_batches(5, 4, run, parts=2).tolist() == [0, 1, 2, 3, 4]
    assert sizes[:2] == [6, 4]
    assert set(sizes[2:]) == {2}


def whole_commands():
    """A sweep and its validation of the embedded pair: on one device, and from the command line on four."""
    out, names = "caps.nc", ("L2.head.0", "L4.mlp")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pair, task = wp.load_pair("tiny:base", "tiny:expert", mesh="patch=1"), wp.behaviour("tiny:english_capital")
        batch = task.encode(pair.tokenizer, n_prompts=4)
        metric = wp.decision_metric(pair, batch, max_new_tokens=6)
        result = wp.sweep(pair, batch, metric, components=names, method="screen")
        result.to_netcdf(out)
        ours = wp.validate(pair, task, result, n_prompts=4, n_points=2, n_random=1, max_new_tokens=6)
        options = "--n-prompts 4 --points 2 --n-random 1 --max-new-tokens 6 --mesh patch=2,model=2"
        models = "--base tiny:base --expert tiny:expert --behaviour tiny:english_capital"
        assert run_cli("validate", out, *options.split(), *models.split()) == 0
        theirs = wp.Curves.from_netcdf(Path("caps.curves.nc"))
        for name, values in theirs.dataset.data_vars.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(values, ours.dataset[name], atol=1e-4, err_msg=name)


GROUPS = {
    "all-reduce(f32[4] %b), replica_groups={{0,1},{2,3}}, to_apply=%add": ("all-reduce", "model"),
    "all-gather-start(f32[4] %b), replica_groups={{0,2},{1,3}}, dimensions={0}": ("all-gather", "patch"),
    "all-to-all(f32[4] %b), replica_groups=[2,2]<=[4], dimensions={0}": ("all-to-all", "model"),
    "reduce-scatter(f32[4] %b), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add": ("reduce-scatter", "patch"),
    "all-reduce(f32[4] %b), replica_groups={}, to_apply=%add": ("all-reduce", "patch+model"),
    "collective-permute(f32[4] %b), source_target_pairs={{0,1},{1,0}}": ("collective-permute", "model"),
    "all-reduce(f32[4] %b), replica_groups={{0},{1},{2},{3}}, to_apply=%add": ("all-reduce", ""),
    "all-reduce(f32[4] %b), replica_groups=mesh['a'=1,'b'=2,'c'=2] {'b'}, to_apply=%add": ("all-reduce", "patch"),
    "all-reduce(f32[4] %b), replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'a','b'}, x=1": (
        "all-reduce",
        "model",
    ),
    "all-reduce(f32[4] %b), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add": ("all-reduce", "patch+model"),
}


@pytest.mark.parametrize("call", GROUPS)
def test_collectives_are_counted_by_the_axes_that_they_go_along(call):
    text = f"  %a = f32[4] {call}\n  %c = f32[4] add(f32[4] %a, f32[4] %all-reduce.1)"
    assert dict(collectives(text, {"patch": 2, "model": 2})) == {GROUPS[call]: 1}


@pytest.mark.parametrize("text", ["patch", "patch=0", "patch=2,patch=2", "rows=2", "patch=two", "model=-1", ""])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(WpjaxError, match="patch=4,model=2"):
        placing.read_mesh(text)


def test_a_bad_mesh_is_refused_before_anything_is_read(wpjax):
    code, out, err = wpjax(*"sweep --base no/such --expert no/such --behaviour title --out t.nc --mesh patch=3".split())
    assert (code, out) == (2, "")
    assert "patch=3 takes 3 devices, which does not divide the 1 device here" in err


def test_a_model_that_fits_no_mesh_is_told_what_would():
    """A pair of one layer, with weights of four times this machine's memory."""
    wide = 4096 * (4 * memory_of(jax.devices()[0]) // (2 * 3 * 16 * 4) // 4096)
    large = dataclasses.replace(CFG, n_layers=1, d_mlp=wide)
    with pytest.raises(WpjaxError, match=r"GiB a device, and a device has .*a mesh of model=\d+ .*--dtype bfloat16x2"):
        choose_placement(large, "float32")


def test_the_bytes_of_weights_are_those_of_the_arrays():
    """Of axes that a mesh does not divide, nothing is saved."""
    params = init_params(CFG, jax.random.key(0))
    assert weight_bytes(CFG, "float32") == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    thirds = dataclasses.replace(CFG, n_heads=3, n_kv_heads=3, d_mlp=25, d_vocab=41)
    assert weight_bytes(thirds, "float32", 2) == weight_bytes(thirds, "float32")
    assert all(axis is None for axis in spec_of("blocks/attn/W_Q", (3, 16, 3, 4), 2))


def test_a_placement_is_found_by_its_arrays():
    assert Placement.of({"a": jnp.ones(2)}).n_devices == 1
    assert Placement.of({}) == Placement.single()
