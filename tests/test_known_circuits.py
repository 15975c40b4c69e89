"""Circuits that are known: worked out by hand, and compiled by Tracr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.circuits import tracr
from wpjax.behaviours import Tokens
from wpjax.circuits.circuit import Circuit, ablation, circuit_scores
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.edges import edge_patch
from wpjax.circuits.learned import learn_circuit
from wpjax.circuits.measures import circuit_curve
from wpjax.circuits.nodes import Graph
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import forward
from wpjax.relax.learn import RelaxConfig
from wpjax.relax.parametrisations import HardConcrete


@pytest.mark.parametrize("coordinate", [0, 1])
def test_the_hand_worked_circuit_of_autocircuit(coordinate):
    """Two layers of two heads that multiply the stream by [1, 2] and by [3, 4]; clean is (1, 1), corrupted (-1, -1).

    Clean values are put into the corrupted run: B0.1 to the output, then B0.0 to B1.1, then the input to B0.0.
    """
    cfg = ModelConfig("llama", 2, 2, 2, 2, 2, 1, 2, 4, pre_norm=False)
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    nothing, identity = jnp.zeros((2, 2, 2, 2)), jnp.broadcast_to(jnp.eye(2), (2, 2, 2, 2))
    values = jnp.broadcast_to(jnp.moveaxis(w[:, None] * jnp.eye(2), 0, 1), (2, 2, 2, 2))  # [L, D, H, Dh]
    params = {
        "embed": {"W_E": jnp.array([[1.0, 1.0], [-1.0, -1.0]])},
        "blocks": {
            "attn": {"W_Q": nothing, "W_K": nothing, "W_V": values, "W_O": identity},
            "mlp": {name: jnp.zeros((2, 2, 1)) for name in ("W_gate", "W_in")} | {"W_out": jnp.zeros((2, 1, 2))},
        },
        "final_norm": {"scale": jnp.ones(2)},
        "unembed": {"W_U": jnp.zeros((2, 2))},
    }
    ids, one = np.array([[0]], np.int32), np.array([1])
    readout = Projection(jnp.eye(2)[coordinate])
    metric = Metric(Tokens(ids, one), jnp.zeros((1, 1), int), jnp.ones((1, 1)), readout, 1, "coordinate")
    pair = Contrast.of(metric, Tokens(1 - ids, one)).swapped
    edges = [("L0.head.1", "logits"), ("L0.head.0", "L1.kv_group.1.v"), ("embed", "L0.kv_group.0.v")]
    expected = [[-19, -41], [-13, -25], [-9, -13]]
    for n, values in enumerate(expected, 1):
        got = edge_patch(cfg, params, pair, edges[:n], together=True)
        assert (got.clean[0], got.corrupted[0]) == pytest.approx(((-25, 25), (-49, 49))[coordinate])
        assert got.clean[0] + got.change[0, 0] == pytest.approx(values[coordinate])


@pytest.fixture(scope="module")
def compiled():
    return tracr.load("share of x, one back", n_prompts=8)


def test_a_compiled_program_is_the_same_model(compiled):
    words = {token: word for word, token in compiled.assembled.input_encoder.encoding_map.items()}
    for row in compiled.two.clean.tokens.ids[:2]:
        with jax.numpy_dtype_promotion("standard"):
            theirs = compiled.assembled.apply([words[int(token)] for token in row])
        ours = forward(compiled.cfg, compiled.params, jnp.asarray(row)[None], logits=False).resid
        np.testing.assert_allclose(ours, theirs.residuals[-1], atol=1e-5)


TRUE = ["embed->L0.kv_group.0.v", "L0.head.0->L0.mlp", "L0.mlp->L1.kv_group.0.v", "L1.head.0->logits"]
"""A head fetches the word before, an MLP asks whether it is x, a head takes the mean."""

ONLY_BY_ZERO = ["embed->L0.head.0.q", "embed->L0.kv_group.0.k", "embed->L1.head.0.q", "embed->L1.kv_group.0.k"]
"""Positions: the same in all prompts."""


def test_the_circuit_of_a_compiled_program_is_found(compiled):
    """What is true depends on the ablation; every method ranks it first."""
    cfg, params, two = compiled.cfg, compiled.params, compiled.two
    graph = Graph.of(cfg)
    resample, zero = (ablation(cfg, params, two, kind) for kind in ("resample", "zero"))
    for ablated, edges in ((resample, TRUE), (zero, TRUE + ONLY_BY_ZERO)):
        true = Circuit("edges", tuple(edges), "0")
        np.testing.assert_array_equal(tracr.truth(compiled, ablated), true.kept(graph))
        # It is enough, and each of its edges is needed.
        whole, alone, *without = circuit_scores(
            cfg, params, two, ablated, [true.whole(graph), true, *(true.without([e]) for e in edges)]
        )
        np.testing.assert_allclose(alone, whole, atol=1e-5)
        assert all(np.abs(w - whole).max() > 0.01 for w in without)
    for method in ("eap-ig", "relp", "exact"):
        assert tracr.auroc(tracr.scored(compiled, method, resample), tracr.truth(compiled, resample)) == 1.0, method


def test_masks_learn_the_circuit_of_a_compiled_program(compiled):
    """Edges and nodes; with one ranking for all sizes, and with gates at a price; signed and absolute are the same."""
    cfg, params, two = compiled.cfg, compiled.params, compiled.two
    ablated, config = ablation(cfg, params, two, "resample"), RelaxConfig(steps=80, lr=0.1)
    edges = learn_circuit(cfg, params, two, ablated, config=config)
    assert edges.method == "learned masks, resample ablation"
    assert tracr.auroc(edges, tracr.truth(compiled, ablated)) == 1.0
    for absolute in (True, False):
        curve = circuit_curve(cfg, params, two, ablated, edges, absolute=absolute, shares=(4 / edges.n_members, 1.0))
        assert curve.counts[0] == 4
        np.testing.assert_allclose(curve.f, 1, atol=1e-4)
    nodes = learn_circuit(cfg, params, two, ablated, "nodes", HardConcrete(0.3, initial=3.0), config)
    assert {name for name, _ in nodes.listed(3)} == {"L0.head.0", "L0.mlp", "L1.head.0"}
    # Started where it should end, the best stay the best.
    again = learn_circuit(cfg, params, two, ablated, config=RelaxConfig(steps=5, lr=0.1), start=edges)
    assert {name for name, _ in again.listed(4)} == set(TRUE)
    with pytest.raises(WpjaxError, match="one score for all prompts"):
        edges.stability(3)
    with pytest.raises(WpjaxError, match="start: scores of other members"):
        learn_circuit(cfg, params, two, ablated, start=nodes)
    with pytest.raises(WpjaxError, match="there is nothing to learn"):
        learn_circuit(cfg, params, two, ablated, "nodes", ablates=())
