"""What programs hold besides their arguments and results, by the compiler's own account: no copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wpjax.behaviours import Tokens
from wpjax.estimators.kind_slopes import linearised_by_kind
from wpjax.estimators.secant import secant_scores
from wpjax.estimators.unit_slopes import unit_gradient
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import abstract_params
from wpjax.pairs import squared_change
from wpjax.patching import PatchMask, deal_out
from wpjax.training import loss_fn


def wide(n_layers):
    """Much larger weights than activations."""
    return ModelConfig("llama", n_layers, 256, 4, 2, 64, 1024, 61, 64)


def temporary(function, static, *args):
    """Bytes of a function of something static and arrays."""
    program = jax.jit(function, static_argnums=0).lower(static, *args).compile()
    return program.memory_analysis().temp_size_in_bytes


def read_last(cfg):
    """Two prompts of four tokens, the last one read after the last layer."""
    tokens, at = Tokens(np.zeros((2, 4), np.int32), np.full(2, 4, np.int32)), jnp.full((2, 1), 3)
    return Metric(tokens, at, jnp.ones((2, 1)), Projection(jnp.ones(cfg.d_model) / 16), cfg.n_layers - 1, "anchor")


def screen(cfg, params):
    return linearised_by_kind(cfg, params, params, read_last(cfg), ("head", "kv_group", "neuron"), "donor", "host", 2)


def gradient(cfg, params):
    return unit_gradient(cfg, params, params, PatchMask.empty(cfg, jnp.float32), read_last(cfg))


def secant(cfg, params):
    return secant_scores(cfg, params, params, read_last(cfg))


def training(cfg, params):
    return jax.grad(loss_fn, argnums=1)(cfg, params, jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4)))


@pytest.mark.parametrize("program", [screen, gradient, secant, training])
def test_gradients_keep_no_layer_of_weights(program):
    """Of twelve layers' weights, a program holds what it works on, less than three layers' worth at any depth."""
    params = abstract_params(wide(12))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["blocks"]))
    assert temporary(program, wide(12), params) < weights / 4


@pytest.mark.parametrize("axis", [0, 1])
def test_a_null_model_is_dealt_out_without_copies(axis):
    leaf, order = jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16), jax.ShapeDtypeStruct((3, 256), jnp.int32)
    assert temporary(lambda axis, *leaves: deal_out(*leaves, axis), axis, leaf, leaf, order) < leaf.size / 10


@pytest.mark.parametrize("over", [(), (1,), (2,), (1, 2)])
def test_changes_are_summed_without_copies(over):
    leaf = jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16)
    assert temporary(lambda over, *leaves: squared_change(*leaves, over), over, leaf, leaf) < leaf.size / 10
