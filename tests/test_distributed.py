"""A sweep over three devices against the lazy patch on one, in a process of its own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from wpjax.anchors import Anchor
from wpjax.behaviours import PromptBatch, Tokens
from wpjax.components import enumerate_components
from wpjax.distributed import Spread
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params
from wpjax.sweeps.exact import exact_changes, make_plan
from wpjax.sweeps.packing import pack
from wpjax.sweeps.reference import reference_changes
from wpjax.sweeps.replay import run_packed

CFG = ModelConfig("llama", 3, 24, 6, 2, 8, 40, 61, 64)


def test_three_devices():
    code = "from tests.test_distributed import *; sweep_over_three('float32'); sweep_over_three('bfloat16')"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sweep_over_three(dtype):
    """Heads and neurons of a random pair; what is split is a third on each device."""
    assert len(jax.local_devices()) == 3
    base, expert = (init_params(CFG, jax.random.key(seed), jnp.dtype(dtype)) for seed in (0, 1))
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(0, 61, (4, 9)).astype(np.int32), np.array([9, 5, 7, 9], np.int32))
    vector = rng.standard_normal(CFG.d_model).astype(np.float32)
    anchor = Anchor(jnp.asarray(vector / np.linalg.norm(vector)), 2)
    metric = anchor.on(PromptBatch("random", "sweep", tokens, tokens, (), ()))

    packing = pack(metric)
    components = enumerate_components(CFG, ["head", "neuron"])
    plan = make_plan(CFG, components, packing)
    assert all(rows % 3 == 0 for rows in plan.rows.values())
    part = Spread.local().split(jnp.zeros((plan.rows["head"], 2)))
    assert [s.data.shape[0] for s in part.addressable_shards] == [plan.rows["head"] // 3] * 3

    runs = run_packed(CFG, base, metric, packing), None
    args = (CFG, base, expert, runs, metric, packing, plan)
    found = {c: d for chunk, delta, _ in exact_changes(*args) for c, d in zip(chunk.components, delta, strict=True)}
    got = np.stack([found[c] for c in components])
    if dtype == "float32":
        np.testing.assert_allclose(got, reference_changes(CFG, base, expert, components, metric), atol=2e-5)
    else:  # against the same weights in float32: as near as their products' rounding
        base, expert = (jax.tree.map(lambda a: a.astype(jnp.float32), tree) for tree in (base, expert))
        exact = reference_changes(CFG, base, expert, components, metric)
        assert np.abs(got - exact).max() < 0.05 * np.abs(exact).max()
