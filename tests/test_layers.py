"""Results side by side by layer: the numbers are those of the files, summed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from wpjax.errors import WpjaxError
from wpjax.results.layers import agreement, layer_curves
from wpjax.results.sweep_result import SweepResult

ROOT = Path(__file__).parent.parent
TRACE, IOI = ROOT / "experiments" / "facts" / "trace", ROOT / "experiments" / "ioi" / "smollm2.json"
SWEEP = Path(__file__).parent / "data" / "schema4" / "title.nc"


def edits(folder, by_layer):
    """Files of scores of edits: layer -> S."""
    paths = []
    for layer, s in by_layer.items():
        after = {"S": s, "PS": {"mean": s / 2}, "NS": {"mean": 1 - s}}
        paths.append(folder / f"scores-{layer}.json")
        paths[-1].write_text(json.dumps({"what": "edit scores", "layer": layer, "after": after}))
    return paths


def test_curves_are_sums_and_means_of_what_the_files_hold(tmp_path):
    scores = edits(tmp_path, {5: 0.5, 2: 0.25, 4: 0.75, 3: 0.1})
    curves = {(c.source, c.label): c for c in layer_curves([SWEEP, TRACE, *scores, IOI])}

    result = SweepResult.from_netcdf(SWEEP)
    weights = next(c for (source, _), c in curves.items() if source == "weights")
    by_hand = np.zeros(int(result.dataset.attrs["n_layers"]))
    for kind, layer, value in zip(
        result.dataset["kind"].values, result.dataset["layer"].values, result.best(), strict=True
    ):
        if kind in result.finest_kinds and layer >= 0 and np.isfinite(value):
            by_hand[layer] += value
    np.testing.assert_allclose(weights.values, by_hand)

    facts = json.loads((TRACE / "trace.json").read_text())["facts"]
    total = np.mean([f["clean"] - f["corrupted"] for f in facts])
    effect = np.mean([np.array(f["maps"]["mlp"])[:, f["stop"] - 1] - f["corrupted"] for f in facts], axis=0)
    mlps = curves["causal tracing", "MLPs, subject's last token"]
    np.testing.assert_allclose(mlps.values, effect / total)
    assert mlps.peak[0] == int(effect.argmax())

    heads = json.loads(IOI.read_text())["heads"]
    direct = curves["paths", "heads, straight to the logits"]
    assert direct.values[23] == pytest.approx(sum(h["direct"] for h in heads if h["name"].startswith("L23.")))

    s = curves["edits", "S: all three"]
    assert (s.layers.tolist(), s.values.tolist()) == ([2, 3, 4, 5], [0.25, 0.1, 0.75, 0.5])
    assert curves["edits", "PS: paraphrases follow"].values.tolist() == [0.125, 0.05, 0.375, 0.25]
    ranks = np.argsort(np.argsort(effect[2:6]))
    assert agreement(mlps, s) == pytest.approx(np.corrcoef(ranks, [1, 0, 3, 2])[0, 1])


def test_edits_without_paraphrases_have_a_score_of_the_fact_itself(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(
        json.dumps({"what": "edit scores", "layer": 3, "after": {"ES": {"mean": 0.5}, "EM": {"mean": 0.1}}})
    )
    (curve,) = layer_curves([path])
    assert (curve.label, curve.layers.tolist(), curve.values.tolist()) == ("ES: the fact itself", [3], [0.5])


def test_the_command_draws_and_refuses(tmp_path, wpjax):
    (scores,) = edits(tmp_path, {3: 0.5})
    code, out, _ = wpjax("layers", SWEEP, TRACE, scores, "--out", tmp_path / "layers.png")
    assert code == 0
    assert "causal tracing" in out
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = wpjax("layers", scores, "--out", tmp_path / "b.png", "--json")
    assert (code, json.loads(out)[0]["values"]) == (0, [0.5])
    assert wpjax("layers", scores, "--out", tmp_path / "layers.png")[0] == 2  # it is there
    (tmp_path / "other.json").write_text("{}")
    code, _, err = wpjax("layers", tmp_path / "other.json", "--out", tmp_path / "c.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "no result that has layers" in err
    assert not (tmp_path / "c.png").exists()


def test_damaged_files_and_two_scores_of_a_layer_are_refused(tmp_path):
    (one,) = edits(tmp_path, {3: 0.5})
    with pytest.raises(WpjaxError, match="another file has scores of edits in layer 3"):
        layer_curves([one, one])
    one.write_text(json.dumps({"what": "edit scores", "layer": 3, "after": {"S": "much"}}))
    with pytest.raises(WpjaxError, match="damaged"):
        layer_curves([one])
    one.write_text(json.dumps({"what": "ioi", "heads": [{"name": "L0.head.0"}]}))
    with pytest.raises(WpjaxError, match="damaged"):
        layer_curves([one])
    trace = json.loads((TRACE / "trace.json").read_text())
    for fact in trace["facts"]:
        fact["clean"] = fact["corrupted"]
    one.write_text(json.dumps(trace))
    one = one.rename(tmp_path / "trace.json")
    with pytest.raises(WpjaxError, match="json: corrupting the subject costs no probability"):
        layer_curves([one])
    with pytest.raises(WpjaxError, match="no such file"):
        layer_curves([tmp_path / "absent.json"])
