"""The roles of components, on a flow matrix made by hand."""

import numpy as np
import pytest
import xarray as xr

from wpjax.circuits.hierarchy import flow_by_layer, hierarchy
from wpjax.errors import WpjaxError
from wpjax.results.sweep_result import SweepResult

TARGETS = ["self", "L0.head.0", "L0.mlp", "L1.head.0", "L1.mlp"]
FLOW = [
    [0.0, 0.0, 0.1, 0.4, 0.0],  # a head of layer 0: mostly by way of L1.head.0
    [0.1, 0.0, 0.0, 0.2, 0.0],  # a neuron
    [0.05, 0.0, 0.0, 0.0, 0.0],  # sure, small, writes itself
    [0.0, 0.0, 0.0, 0.0, 0.9],  # large but unsure
    [0.0, 0.0, 0.0, 0.0, -0.3],  # sure and negative
    [np.nan] * 5,  # not replaced
]


def made(**attrs):
    effect = np.array(FLOW).sum(1)
    n = len(effect)
    return SweepResult(
        xr.Dataset(
            {
                "effect": ("component", effect),
                "q_value": ("component", [0.01, 0.01, 0.01, 0.5, 0.01, np.nan]),
                "below_noise_floor": ("component", np.zeros(n, bool)),
                "flow": (("component", "target"), np.array(FLOW)),
            },
            {
                "name": (
                    "component",
                    ["L0.head.0", "L0.neuron.0", "L1.neuron.3", "L0.neuron.1", "L0.neuron.2", "L0.mlp"],
                ),
                "kind": ("component", ["head", "neuron", "neuron", "neuron", "neuron", "mlp"]),
                "layer": ("component", [0, 0, 1, 0, 0, 0]),
                "target": ("target", TARGETS),
            },
            {"base_fingerprint": "b", "expert_fingerprint": "e", "behaviour": "x"}
            | {"metric": "anchor", "metric_layer": 1, "given_layer": -1}
            | attrs,
        )
    )


def test_roles_by_the_rule():
    found = hierarchy(made())
    assert [n.name for n in found.sources] == ["L0.head.0", "L0.neuron.0", "L1.neuron.3"]
    # inflow of the sources: L1.head.0 0.6, L0.mlp 0.1; the first alone holds 0.86 of it
    assert [(n.name, n.layer) for n in found.aggregators] == [("L1.head.0", 1)]
    assert found.aggregators[0].value == pytest.approx(0.6)
    np.testing.assert_allclose(found.flow, [[0.4], [0.2], [0.0]])
    np.testing.assert_allclose(found.direct, [0.0, 0.1, 0.05])
    assert found.executors == ()


def test_what_the_slope_does_not_tell_is_no_target():
    data = made(metric_layer=1).dataset
    rest = xr.DataArray([[9.0]] * data.sizes["component"], dims=("component", "target"), coords={"target": ["rest"]})
    flow = xr.concat([data["flow"], rest], "target")
    found = SweepResult(data.drop_dims("target").assign(flow=flow))
    assert hierarchy(found).aggregators == hierarchy(SweepResult(data)).aggregators
    np.testing.assert_array_equal(flow_by_layer(found, "head"), flow_by_layer(SweepResult(data), "head"))


def test_flow_is_summed_by_kind_and_layer():
    """Over [self, attention 0, MLP 0, attention 1, MLP 1]; each row sums to the effects of its components."""
    np.testing.assert_allclose(flow_by_layer(made(metric_layer=1), "head"), [[0, 0, 0.1, 0.4, 0], [0] * 5])
    np.testing.assert_allclose(
        flow_by_layer(made(metric_layer=1), "neuron"), [[0.1, 0, 0, 0.2, 0.6], [0.05, 0, 0, 0, 0]], atol=1e-12
    )
    assert not flow_by_layer(made(metric_layer=1), "mlp").any()


def test_executors_come_from_a_sweep_of_a_given_state():
    found = hierarchy(made(), made(given_layer=1), n_sources=2)
    assert [n.name for n in found.executors] == ["L0.head.0", "L0.neuron.0"]
    with pytest.raises(WpjaxError, match="no sweep from a given state"):
        hierarchy(made(), made(given_layer=-1))
    with pytest.raises(WpjaxError, match="another pair or behaviour"):
        hierarchy(made(), made(given_layer=1, behaviour="y"))
    with pytest.raises(WpjaxError, match="from a given state, of executors"):
        hierarchy(made(given_layer=1))
    with pytest.raises(WpjaxError, match="executors follow an anchor"):
        hierarchy(made(metric="kl"), made(given_layer=1))


def test_a_source_does_not_stand_after_what_is_read():
    """On-policy, what comes after the anchor acts by words alone."""
    found = hierarchy(made(metric="on_policy", metric_layer=0))
    assert [n.name for n in found.sources] == ["L0.head.0", "L0.neuron.0"]


def test_without_flow_there_are_no_roles():
    with pytest.raises(WpjaxError, match="holds no flow"):
        hierarchy(SweepResult(made().dataset.drop_vars("flow")))
    nothing = made().dataset.assign(q_value=("component", np.ones(6)))
    found = hierarchy(SweepResult(nothing))
    assert (found.sources, found.aggregators, found.flow.shape) == ((), (), (0, 0))
