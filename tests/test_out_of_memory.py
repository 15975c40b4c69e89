"""What sweeps do when a device runs out of memory, and how well they know beforehand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import exact, make_anchor, make_anchor_of
from wpjax.behaviours import Tokens
from wpjax.components import enumerate_components
from wpjax.engines.memory import bytes_of_rows, groups
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import replay, run_packed, unpacked_run
from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params

FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")


def test_out_of_memory_the_sweep_goes_on_with_less_at_once(one_pair, batch, monkeypatch):
    """The device is said to hold three heads or neurons at a time."""
    pair, anchor = one_pair, make_anchor(one_pair, 2)
    components = enumerate_components(pair.cfg, ("head", "neuron"), range(3))
    expected = exact(pair, batch, anchor, components)
    sizes: list[int] = []

    class Late:
        """Scores of a program that fails when they are fetched, as on an accelerator."""

        def __array__(self, *args, **kwargs):
            raise FULL

    def small(cfg, kind, *args, **options):
        sizes.append(args[7].size)
        if sizes[-1] > 5:
            raise FULL
        made = replay(cfg, kind, *args, **options)
        return made._replace(change=Late()) if sizes[-1] > 3 else made

    monkeypatch.setattr("wpjax.engines.exact.replay", small)
    with pytest.warns(UserWarning, match="out of memory: neuron patches go on"):
        got = exact(pair, batch, anchor, components)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert {size > 5 for size in sizes} == {size > 3 for size in sizes} == {False, True}

    plan = make_plan(pair.cfg, components, pack(anchor.metric_along(batch)))
    before = dict(plan.rows)
    with pytest.warns(UserWarning, match="out of memory"):
        exact(pair, batch, anchor, components, plan=plan)
    assert max(plan.rows.values()) <= 3 < max(before.values())  # what comes next starts with what fits

    def full(*args, **options):
        raise FULL

    monkeypatch.setattr("wpjax.engines.exact.replay", full)
    says = pytest.raises(WpjaxError, match=f"out of memory with one head patch on {len(batch)} prompts at once")
    with says, pytest.warns(UserWarning, match="out of memory"):
        exact(pair, batch, anchor, components)


def test_what_does_not_fit_beside_others_goes_on_alone(one_pair, batch, monkeypatch):
    """The device is said to hold two chunks: no patch is run with fewer others, and none is lost."""
    pair, anchor = one_pair, make_anchor(one_pair, 2)
    components = enumerate_components(pair.cfg, ("head", "neuron"), range(3))
    expected = exact(pair, batch, anchor, components)
    running: list[object] = []

    class Fetched:
        def __init__(self, change):
            self.change = change
            running.append(self)

        def __array__(self, *args, **kwargs):
            if len(running) > 2:
                running.clear()
                raise FULL
            running.remove(self)
            return np.asarray(self.change)

    def small(*args, **options):
        made = replay(*args, **options)
        return made._replace(change=Fetched(made.change))

    monkeypatch.setattr("wpjax.engines.exact.replay", small)
    plan = make_plan(pair.cfg, components, pack(anchor.metric_along(batch)), budget=1 << 16)
    before = dict(plan.rows)
    with pytest.warns(UserWarning, match="out of memory: chunks go on 2 at a time"):
        got = exact(pair, batch, anchor, components, plan=plan)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert plan.rows == before


def test_a_models_own_run_goes_on_with_fewer_prompts(one_pair, batch, monkeypatch):
    """The device is said to hold three prompts at a time."""
    metric = make_anchor(one_pair, 2).metric_along(batch)
    packing = pack(metric)
    expected = run_packed(one_pair.cfg, one_pair.base, metric, packing)

    def small(cfg, params, some):
        if len(some) > 3:
            raise FULL
        return unpacked_run(cfg, params, some)

    monkeypatch.setattr("wpjax.engines.replay.unpacked_run", small)
    with pytest.warns(UserWarning, match="out of memory: prompts go on"):
        got = run_packed(one_pair.cfg, one_pair.base, metric, packing)
    chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=2e-5)


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_the_estimate_of_memory_is_what_the_program_takes(kind):
    """Against XLA's own count of its temporaries, for chunks of some sizes, one group of rows and several; what does
    not grow with them is apart.
    """
    cfg = ModelConfig("llama", 3, 64, 4, 2, 16, 192, 61, 64)
    params = init_params(cfg, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 61, (24, 24)).astype(np.int32)
    metric = make_anchor_of(cfg, 2).metric_along(Tokens(ids, np.full(24, 24, np.int32)))
    packing = pack(metric)
    run = run_packed(cfg, params, metric, packing)

    def temporary(n: int) -> int:
        index, seeds = jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.uint32)
        where = jnp.asarray(0), jnp.asarray(0.0, jnp.float32)
        leaves, tree = jax.tree.flatten((params, params, (run, None), metric, packing, *where, index, seeds))
        program = jax.jit(lambda leaves: replay(cfg, kind, *jax.tree.unflatten(tree, leaves)))
        analysis = program.lower(leaves).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert [groups(cfg, packing, n) for n in (2, 8, 32)] == [(1, 2), (1, 8), (4, 8)]
    takes = [temporary(n) for n in (2, 8, 32)]
    planned = [bytes_of_rows(cfg, packing, n) for n in (2, 8, 32)]
    ratio = np.diff(planned) / np.diff(takes)
    assert (ratio > 0.5).all(), (takes, planned)
    assert (ratio < 2).all(), (takes, planned)
