"""A sweep over three devices against the lazy patch on one, in a process of its own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from wpjax.behaviours import Tokens
from wpjax.components import enumerate_components
from wpjax.engines import exact
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.reference import reference_changes
from wpjax.engines.replay import run_packed
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import LogProb, Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params
from wpjax.runtime.placement import Placement

CFG = ModelConfig("llama", 3, 24, 6, 2, 8, 40, 61, 64)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def test_three_devices():
    code = "from tests.test_distributed import *; sweep_over_three()"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=3"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sweep_over_three():
    """Every device runs a third of each chunk, and asks nothing of the others."""
    assert len(jax.local_devices()) == 3
    divided, checked = exact.divided_replay, []

    def watched(spread, cfg, kind, **options):
        program = divided(spread, cfg, kind, **options)

        def run(*args):
            if kind == "head":
                text = program.lower(*args).compile().as_text()
                checked.append([word for word in COLLECTIVES if word in text])
            made = program(*args)
            assert [s.data.shape[0] for s in made.change.addressable_shards] == [len(made.change) // 3] * 3
            return made

        return run

    exact.divided_replay = watched
    rng = np.random.default_rng(0)
    vector = jnp.asarray(rng.standard_normal(CFG.d_model), jnp.float32)
    said = jnp.asarray(rng.integers(0, 61, (4, 1)))
    for readout, dtype, kinds in (
        (Projection(vector / jnp.linalg.norm(vector)), "float32", ("head", "neuron", "embed")),
        (LogProb(said), "bfloat16", ("head",)),
    ):
        compare(readout, jnp.dtype(dtype), kinds)
    assert len(checked) >= 2
    assert not any(checked), checked


def compare(readout, dtype, kinds):
    """With the lazy patch, in float32."""
    base, expert = (init_params(CFG, jax.random.key(seed), dtype) for seed in (0, 1))
    ids, lengths = np.random.default_rng(0).integers(0, 61, (4, 9)), np.array([9, 5, 7, 9], np.int32)
    at, weight = jnp.asarray(lengths[:, None] - 1), jnp.ones((4, 1))
    metric = Metric(Tokens(ids.astype(np.int32), lengths), at, weight, readout, 2, "random")
    packing, components = pack(metric), enumerate_components(CFG, kinds)
    plan = make_plan(CFG, components, packing, placement=Placement.on())
    assert all(rows % 3 == 0 for rows in plan.rows.values())
    runs = run_packed(CFG, base, metric, packing), None
    parts = exact.exact_changes(CFG, base, expert, runs, metric, packing, plan)
    found = {}
    for chunk, delta, flow in parts:
        found |= dict(zip(chunk.components, delta, strict=True))
        index = jnp.asarray([c.index for c in chunk.components])
        where = jnp.asarray(max(chunk.layer, 0)), jnp.asarray(0.0, jnp.float32)
        models = CFG, chunk.kind, base, expert, runs, metric, packing
        alone = exact.replay(*models, *where, index, jnp.zeros(len(index), jnp.uint32), with_reference=True)
        near = (1e-5 if dtype == jnp.float32 else 0.05) * float(jnp.abs(alone.flow).max())
        np.testing.assert_allclose(flow, alone.flow, rtol=0, atol=near)
    got = np.stack([found[c] for c in components])
    fine = [jax.tree.map(lambda a: a.astype(jnp.float32), model) for model in (base, expert)]
    expected = reference_changes(CFG, *fine, components, metric)
    moved = [p.delta for p in exact.exact_changes(CFG, base, base, runs, metric, packing, plan, jitter_seed=0)]
    sham = max(float(np.abs(delta).max()) for delta in moved)  # a rounding step on each device's share
    assert 0 < sham < (1e-4 if dtype == jnp.float32 else 0.5) * np.abs(expected).max()
    near = 2e-5 if dtype == jnp.float32 else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=near)
