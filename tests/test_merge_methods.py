"""Merge methods on single tensors: against mergekit in torch, and against formulas written out element by element."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mergekit.merge_methods.api import merge_tensors

from wpjax.merging.methods.aim import aim
from wpjax.merging.methods.averages import fisher
from wpjax.merging.methods.masked import emr, localize_and_stitch, tall_mask
from wpjax.merging.methods.spectral import isotropic, tsv
from wpjax.merging.registry import MergeError, find_merge_method, merge_methods
from wpjax.merging.sparsify import largest

SHAPES = {"matrix": (13, 37), "vector": (41,)}
TWO = {"weight": [0.7, 0.4]}
THIN = {**TWO, "density": [0.3, 0.6]}
CASES = {
    "linear": ("linear", TWO),
    "linear-sum": ("linear", {**TWO, "normalize": False}),
    "task_arithmetic": ("task_arithmetic", TWO),
    "task_arithmetic-normalised": ("task_arithmetic", {**TWO, "normalize": True, "lambda": 1.7}),
    "task_arithmetic-negated": ("task_arithmetic", {"weight": [1.0, -1.0]}),
    "ties": ("ties", THIN),
    "ties-sum": ("ties", {**THIN, "normalize": False, "lambda": 0.3}),
    "ties-negative": ("ties", {"weight": [1.0, -0.5], "density": [0.3, 0.0]}),
    "ties-few": ("ties", {"weight": [1.0, 1.0], "density": [0.001, 1.0]}),
    "breadcrumbs": ("breadcrumbs", {**THIN, "gamma": [0.1, 0.02]}),
    "breadcrumbs-dense": ("breadcrumbs", {**TWO, "density": [0.95, 1.0], "gamma": [0.1, 0.1]}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {**THIN, "gamma": [0.1, 0.02]}),
    "dare_linear": ("dare_linear", THIN),
    "dare_linear-unscaled": ("dare_linear", {**THIN, "rescale": False}),
    "dare_ties": ("dare_ties", {**THIN, "normalize": True}),
    "della": ("della", {**THIN, "epsilon": [0.15, 0.2]}),
    "della_linear": ("della_linear", {**THIN, "epsilon": [0.15, 0.2], "normalize": True}),
    "slerp": ("slerp", {"t": 0.3}),
    "nuslerp": ("nuslerp", TWO),
    "nuslerp-rows": ("nuslerp", {**TWO, "nuslerp_flatten": False}),
    "nuslerp-columns": ("nuslerp", {**TWO, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "nuslerp-no-base": ("nuslerp", TWO),
    "model_stock": ("model_stock", {}),
    "model_stock-rows": ("model_stock", {"filter_wise": True}),
    "sce": ("sce", {}),
    "sce-some": ("sce", {"select_topk": 0.4}),
}


def models(shape, n=2, seed=0):
    """A base and experts of one tensor; the experts share a direction, and the second leaves some elements alone."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    common = rng.standard_normal(shape)
    experts = [(base + 0.2 * (common + rng.standard_normal(shape))).astype(np.float32) for _ in range(n)]
    experts[-1][..., ::7] = base[..., ::7]
    return base, experts


@pytest.fixture
def draws(monkeypatch):
    """mergekit draws its masks from our random numbers: what is below its probability is kept."""
    rng = np.random.default_rng(5)
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.tensor(rng.random(p.shape, dtype=np.float32)) < p).to(p.dtype)
    )
    return np.random.default_rng(5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_is_merged_as_mergekit_merges_it(case, shape, draws):
    name, parameters = CASES[case]
    base, experts = models(SHAPES[shape])
    method = find_merge_method(name)
    experts = experts[:1] if method.n_experts == (1, 1) else experts
    without_base = method.base == "none" or case == "nuslerp-no-base"
    inputs = experts if without_base else [base, *experts]
    expected = merge_tensors(
        [torch.tensor(tensor) for tensor in inputs],
        name,
        parameters=parameters,
        base_index=None if without_base else 0,
    ).numpy()
    before = [tensor.copy() for tensor in inputs]
    values = {p.argument: parameters.get(p.name, p.default) for p in method.parameters if not p.ignored}
    values |= {p.argument: [p.default] * 2 for p in method.parameters if p.per_expert and p.name not in parameters}
    rng = {"rng": draws} if method.random else {}
    merged = method.merge(None if without_base else base, iter(experts), **values, **rng)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
    for tensor, was in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(tensor, was)


def test_every_method_of_mergekit_is_compared_with_it():
    assert {method.name for method in merge_methods() if method.in_mergekit} == {name for name, _ in CASES.values()}


def test_slerp_of_nearly_parallel_tensors_is_a_straight_line():
    base = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    expert = base + np.float32(0.01)
    expected = merge_tensors([torch.tensor(base), torch.tensor(expert)], "slerp", parameters={"t": 0.25}, base_index=0)
    merged = find_merge_method("slerp").merge(base, [expert], t=0.25)
    np.testing.assert_allclose(merged, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(merged, 0.75 * base + 0.25 * expert, atol=1e-6)


def test_experts_equal_to_the_base_give_the_base():
    base, _ = models((5, 6))
    for name in ("ties", "dare_ties", "breadcrumbs", "sce", "model_stock", "isotropic", "tsv", "emr", "tall_mask"):
        method = find_merge_method(name)
        values = {p.argument: [0.5, 0.5] if p.per_expert else p.default for p in method.parameters if not p.ignored}
        rng = {"rng": np.random.default_rng(0)} if method.random else {}
        np.testing.assert_array_equal(method.merge(base, [base, base], **values, **rng), base, err_msg=name)


def test_of_equal_sizes_the_first_are_kept():
    tau = np.float32([[1, -2, 2], [2, -2, 3]])
    assert largest(tau, 3).astype(int).tolist() == [[0, 1, 1], [0, 0, 1]]
    rng = np.random.default_rng(0)
    coarse = rng.integers(-3, 4, 500).astype(np.float32)  # as in bfloat16, many are equal
    for k in (0, 1, 100, 250, 499, 500):
        expected = np.zeros(500, bool)
        expected[np.argsort(-np.abs(coarse), kind="stable")[:k]] = True
        np.testing.assert_array_equal(largest(coarse, k), expected)


def test_dare_by_density_has_the_right_mean():
    base, expert = np.zeros(20000, np.float32), np.ones(20000, np.float32)
    rng = np.random.default_rng(0)
    dare = find_merge_method("dare_linear").merge
    merged = dare(base, [expert], weight=[1.0], density=[0.3], rng=rng, rescale_by="density")
    assert set(np.unique(merged).tolist()) == {0.0, float(np.float32(1) / np.float32(0.3))}
    assert abs(merged.mean() - 1) < 0.05


def test_fisher_is_the_mean_weighted_element_by_element():
    _, experts = models((4, 5))
    rng = np.random.default_rng(1)
    information = [rng.random((4, 5)).astype(np.float32), rng.random((4, 1)).astype(np.float32)]
    merged = fisher(None, experts, weight=[1.0, 3.0], fisher=information)
    for i, j in np.ndindex(4, 5):
        a, b = information[0][i, j], 3 * information[1][i, 0]
        assert merged[i, j] == pytest.approx((a * experts[0][i, j] + b * experts[1][i, j]) / (a + b), abs=1e-5)
    nothing = [np.zeros((4, 5), np.float32)] * 2  # the floor makes it a plain mean
    np.testing.assert_allclose(fisher(None, experts, weight=[1, 1], fisher=nothing), sum(experts) / 2, atol=1e-6)


def test_tall_masks_keep_what_two_experts_need():
    base, experts = models((6, 7), 3)
    merged = tall_mask(base, experts, weight=[1, 1, 1], threshold=[0.3, 0.4, 0.5], lambda_=0.5)
    taus = [(e - base).astype(float) for e in experts]
    n_changed = 0
    for at in np.ndindex(6, 7):
        together = sum(tau[at] for tau in taus)
        needing = [abs(t[at]) >= x * abs(together - t[at]) for t, x in zip(taus, (0.3, 0.4, 0.5), strict=True)]
        n_changed += sum(needing) >= 2
        expected = base[at] + (0.5 * together if sum(needing) >= 2 else 0)
        assert merged[at] == pytest.approx(expected, abs=1e-5)
    assert 0 < n_changed < base.size


def test_stitched_changes_are_a_mean_where_masks_overlap():
    base, experts = models((4, 5))
    masks = [np.zeros((4, 5), bool), np.zeros((4, 1), bool)]
    masks[0][:, :3], masks[1][1:3] = True, True
    merged = localize_and_stitch(base, experts, density=[0.1, 0.1], mask=masks)
    for i, j in np.ndindex(4, 5):
        both = [e[i, j] - base[i, j] for e, m in zip(experts, (j < 3, 1 <= i < 3), strict=True) if m]
        assert merged[i, j] == pytest.approx(base[i, j] + (np.mean(both) if both else 0), abs=1e-6)
    alone = localize_and_stitch(base, experts[:1], density=[0.25])
    assert np.count_nonzero(alone != base) == 5
    smallest_kept = np.abs(experts[0] - base)[alone != base].min()
    assert (np.abs(experts[0] - base)[alone == base] <= smallest_kept).all()


def test_emr_gives_each_task_its_share_of_one_change():
    base, experts = models((6, 7), 3)
    taus = np.stack([e - base for e in experts]).astype(float)
    together = np.zeros((6, 7))
    for at in np.ndindex(6, 7):
        here = taus[(slice(None), *at)]
        sign = np.sign(here.sum())
        together[at] = sign * max([abs(t) for t in here if t * sign > 0], default=0)
    np.testing.assert_allclose(emr(base, experts, weight=[1, 1, 1]), base + together, atol=1e-5)
    kept = np.where(taus[1] * together > 0, together, 0)
    expected = base + kept * np.abs(taus[1]).sum() / np.abs(kept).sum()
    np.testing.assert_allclose(emr(base, experts, weight=[1, 1, 1], task=2), expected, atol=1e-5)
    only = emr(base, experts[:1], weight=[1], task=1)  # of one expert nothing is lost
    np.testing.assert_allclose(only, experts[0], atol=1e-6)


def test_isotropic_changes_have_equal_singular_values():
    base, experts = models((6, 9), 3)
    merged = isotropic(base, experts, lambda_=2.0)
    total = sum(e.astype(float) - base for e in experts)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    np.testing.assert_allclose(np.linalg.svd(merged - base, compute_uv=False), np.full(6, 2 * s.mean()), rtol=1e-4)
    np.testing.assert_allclose(np.diag(u.T @ (merged - base) @ vt.T), np.full(6, 2 * s.mean()), rtol=1e-4)
    vector, two = models((8,))
    np.testing.assert_allclose(isotropic(vector, two), (two[0] + two[1]) / 2, atol=1e-6)


def test_singular_vectors_of_experts_are_made_orthogonal():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    base = rng.standard_normal((8, 8)).astype(np.float32)
    # experts that use different directions are added up, but for what is beyond half of the rank of each
    values = [[5, 4, 3, 2, 0.5, 0, 0, 0], [0, 0, 0, 0, 6, 5, 4, 2]]
    experts = [(base + u @ np.diag(np.float32(x)) @ v.T).astype(np.float32) for x in values]
    kept = np.diag([5.0, 4, 3, 2, 6, 5, 4, 2])
    np.testing.assert_allclose(tsv(base, experts), base + u @ kept @ v.T, atol=1e-4)
    both = tsv(base, [experts[0], experts[0]])  # the same direction twice: no longer orthogonal, so made so
    assert np.isfinite(both).all()
    assert np.linalg.norm(both - base) <= np.sqrt(2) * np.linalg.norm([5, 4, 3, 2]) * 1.01
    vector, two = models((8,))
    np.testing.assert_allclose(tsv(vector, two), (two[0] + two[1]) / 2, atol=1e-6)


def test_aim_keeps_the_base_where_it_is_much_used():
    base, experts = models((4, 5))
    used = np.float32([0, 1, -2, 4, 8])
    plain = find_merge_method("task_arithmetic").merge(base, experts, weight=[1.0, 0.5])
    merged = aim(base, experts, weight=[1.0, 0.5], activations=used, omega=0.25)
    np.testing.assert_allclose(merged, base + (plain - base) * (1 - 0.75 * np.abs(used) / 8), atol=1e-6)
    np.testing.assert_array_equal(aim(base, experts, weight=[1.0, 0.5], activations=None), plain)


def test_unknown_methods_are_refused_with_the_nearest():
    with pytest.raises(MergeError, match=r"unknown merge_method 'tie' \(did you mean ties\?\)"):
        find_merge_method("tie")


def test_every_method_is_told_of_in_the_documents():
    page = (Path(__file__).parent.parent / "docs" / "merging.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {method.name for method in merge_methods()}
