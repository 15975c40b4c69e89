"""Names, enumeration, and that every parameter belongs to exactly one unit."""

import numpy as np
import pytest

from wpjax.checkpoints.convert import flatten
from wpjax.components import (
    KINDS,
    LEAVES,
    Component,
    best_within,
    count,
    enumerate_components,
    n_within,
    open_units,
    parse_component,
)
from wpjax.errors import ComponentError
from wpjax.models.decoder import abstract_params
from wpjax.models.parameters import PARAMETERS
from wpjax.runtime.placement import partition


def test_names_parse_back(pair):
    for component in enumerate_components(pair.cfg, KINDS):
        assert parse_component(pair.cfg, component.name) == component


def test_counts(pair):
    cfg = pair.cfg
    assert count(cfg, "head") == cfg.n_heads
    assert count(cfg, "kv_group") == cfg.n_kv_heads
    assert count(cfg, "neuron") == cfg.d_mlp
    assert count(cfg, "norm") == 2 * cfg.pre_norm + 2 * cfg.post_norm - cfg.shared_norm
    assert count(cfg, "unembed") == (0 if cfg.tied else 1)
    assert len(enumerate_components(cfg, ["head"])) == cfg.n_heads * cfg.n_layers
    assert len(enumerate_components(cfg, ["head"], range(2))) == cfg.n_heads * 2


def test_finest_kinds_partition_all_parameters(pair):
    """Heads, KV groups, neurons, norms and the whole-model kinds are disjoint.

    What they leave is what all heads or neurons of a layer share: biases of outputs, and norms of queries and keys.
    """
    finest = ["head", "kv_group", "neuron", "router", "norm", "embed", "unembed", "final_norm"]
    opened = [open_units(pair.cfg, [c]) for c in enumerate_components(pair.cfg, finest)]
    for unit in opened[0]:
        times = np.sum([g[unit] for g in opened], axis=0)
        assert (times == (0 if unit in ("attn_bias", "qk_norm", "mlp_bias") else 1)).all(), unit
    layers = open_units(pair.cfg, enumerate_components(pair.cfg, ["layer", "embed", "unembed", "final_norm"]))
    assert all(unit.all() for unit in layers.values())
    assert set(flatten(abstract_params(pair.cfg))) <= set(LEAVES)


def test_the_table_of_parameters_says_the_axes_of_every_leaf(pair):
    """Their sizes, and so how a leaf would be cut over a mesh, follow from the names."""
    cfg = pair.cfg
    sizes = {"layer": cfg.n_layers, "vocab": cfg.d_vocab, "position": cfg.n_ctx, "d_model": cfg.d_model,
             "head": cfg.n_heads, "kv_head": cfg.n_kv_heads, "d_head": cfg.d_head, "neuron": cfg.d_mlp,
             "routed_expert": cfg.n_experts}  # fmt: skip
    for path, leaf in flatten(abstract_params(cfg)).items():
        axes = (*["layer"][: path.startswith("blocks/")], *PARAMETERS[path].axes)
        assert tuple(sizes[axis] for axis in axes) == leaf.shape, path
        cut = partition(axes, {"head": "model", "neuron": "model"})
        assert [axis for axis, where in zip(axes, cut, strict=True) if where] == [
            axis for axis in axes if axis in ("head", "neuron")
        ]


def test_the_best_within_a_budget_are_the_longest_beginning_that_fits():
    """Against brute force; a share of exactly some components is not missed by rounding."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 12))
        scores, sizes = rng.integers(0, 4, n).astype(float), rng.integers(1, 9, n)
        order = sorted(range(n), key=lambda i: (-scores[i], i))
        for budget in (0, *rng.uniform(0, sizes.sum(), 4), *(k / sizes.sum() * sizes.sum() for k in np.cumsum(sizes))):
            fits = [k for k in range(n + 1) if sum(sizes[order[:k]]) <= budget + 1e-6]
            assert n_within(sizes[order], budget) == max(fits)
            for least in (0, 1):
                chosen = best_within(scores, sizes, budget, least)
                assert set(np.flatnonzero(chosen)) == set(order[: max(max(fits), least)])
    sizes = rng.integers(1, 10**6, 1000)
    for k in range(0, 1001, 50):
        share = sizes[:k].sum() / sizes.sum()
        assert n_within(sizes, share * sizes.sum()) == k


def test_norms_that_a_model_does_not_have_are_named(pair):
    if pair.cfg.post_norm:
        assert parse_component(pair.cfg, "L1.norm.mlp_out") == Component("norm", 1, 3)
    else:
        with pytest.raises(
            ComponentError, match="a layer of this model has norm attn" + ", mlp" * (not pair.cfg.shared_norm)
        ):
            parse_component(pair.cfg, "L1.norm.mlp_out")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("L3.head.0", "layers L0 to L2"),
        ("L0.head.99", "has head 0 to"),
        ("L0.heads.1", "not a component name"),
        ("L0.head", "not a component name"),
        ("L0.head.01", "not a component name"),
        ("L0.head.-1", "not a component name"),
        ("L0.attn.0", "not a component name"),
        ("L0.norm.mid", "not a component name"),
        ("l0.head.1", "not a component name"),
        ("L.head.1", "not a component name"),
        ("L0.embed", "not a component name"),
        ("L0.layer", "not a component name"),
        ("", "not a component name"),
        ("L١.head.1", "not a component name"),
    ],
)
def test_bad_names_are_refused(pair, name, says):
    with pytest.raises(ComponentError, match=says):
        parse_component(pair.cfg, name)


def test_a_tied_unembedding_is_refused_by_name(pair):
    if pair.cfg.tied:
        with pytest.raises(ComponentError, match="tied to embed"):
            parse_component(pair.cfg, "unembed")
    else:
        assert parse_component(pair.cfg, "unembed") == Component("unembed")


def test_an_unknown_kind_names_the_nearest(pair):
    with pytest.raises(ComponentError, match="did you mean neuron"):
        enumerate_components(pair.cfg, ["neurons"])
