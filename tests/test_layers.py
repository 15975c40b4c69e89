"""Results side by side by layer: the numbers are those of the files, summed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from wpjax.errors import WpjaxError
from wpjax.report.layers import write_layers
from wpjax.results.edit_scores import EditScores
from wpjax.results.layers import LayerCurve, agreement, layer_curves, read_layers
from wpjax.results.sweep_result import SweepResult

ROOT = Path(__file__).parent.parent
TRACE, IOI = ROOT / "experiments" / "facts" / "trace", ROOT / "experiments" / "ioi" / "smollm2.json"
SWEEP = Path(__file__).parent / "data" / "schema4" / "title.nc"


def edits(folder, by_layer, kinds="EPN"):
    """Files of scores of eight edits: layer -> how many of them make paraphrases follow. ES and NS are 1."""
    paths = []
    for layer, n in by_layer.items():
        old, new = (np.array([[0.25, 0.75]]),), (np.array([[0.75, 0.25]]),)
        p = {kind: 8 * (old if kind == "N" else new) for kind in kinds}
        if "P" in kinds:
            p["P"] = n * new + (8 - n) * old
        paths.append(folder / f"scores-{layer}.json")
        paths[-1].write_text(json.dumps(EditScores(p, p, model="m", layer=layer).as_json))
    return paths


def test_curves_are_sums_and_means_of_what_the_files_hold(tmp_path):
    scores = edits(tmp_path, {5: 4, 2: 2, 4: 6, 3: 1})
    curves = {(c.source, c.label): c for c in [*layer_curves([SWEEP]), *layer_curves([TRACE, *scores, IOI])]}

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
    assert s.layers.tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(s.values, [3 / (2 + 8 / n) for n in (2, 1, 6, 4)])
    assert curves["edits", "PS: paraphrases follow"].values.tolist() == [0.25, 0.125, 0.75, 0.5]
    assert curves["magnitudes", "PM: paraphrases follow"].values.tolist() == [-0.25, -0.375, 0.25, 0.0]
    ranks = np.argsort(np.argsort(effect[2:6]))
    assert agreement(mlps, s) == pytest.approx(np.corrcoef(ranks, [1, 0, 3, 2])[0, 1])


def test_edits_without_paraphrases_have_a_score_of_the_fact_itself(tmp_path):
    curves = layer_curves(edits(tmp_path, {3: 0}, kinds="E"))
    assert [(c.source, c.label, c.layers.tolist(), c.values.tolist()) for c in curves] == [
        ("edits", "ES: the fact itself", [3], [1.0]),
        ("magnitudes", "EM: the fact itself", [3], [0.5]),
    ]


def test_the_command_draws_and_refuses(tmp_path, wpjax):
    scores = edits(tmp_path, {3: 4, 4: 5, 5: 6, 6: 7})
    made = tmp_path / "layers.json"
    code, out, err = wpjax("layers", TRACE, *scores, "--out", made)
    assert code == 0, err
    assert "causal tracing" in out
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    curves = layer_curves([TRACE, *scores])
    for read, curve in zip(read_layers(made), curves, strict=True):
        assert (read.source, read.label, read.values.tolist()) == (curve.source, curve.label, curve.values.tolist())
    rho = agreement(curves[0], next(c for c in curves if c.source == "edits"))
    # PM has the order of PS here, and so that of S.
    assert json.loads(made.read_text())["curves"][0]["agreement_with_edits"] == pytest.approx([rho, rho])
    code, shown, err = wpjax("show", made)
    assert code == 0, err
    assert shown.strip() == out[: out.index("wrote")].strip()
    code, out, err = wpjax("show", made, "--json")
    assert (code, json.loads(out)) == (0, json.loads(made.read_text())), err
    for path in (tmp_path / "layers.json", tmp_path / "layers.png"):
        assert wpjax("layers", *scores, "--out", path)[0] == 2  # it is there; it is no .json
    (tmp_path / "other.json").write_text("{}")
    code, _, err = wpjax("layers", tmp_path / "other.json", "--out", tmp_path / "c.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "no result that has layers" in err
    code, _, err = wpjax("show", tmp_path / "other.json")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "c.json").exists()


def test_results_by_layer_stand_on_the_page_of_a_sweep(tmp_path, wpjax):
    """Those of a model that is deeper than the sweep's are refused; names are escaped."""
    layers = np.arange(int(SweepResult.from_netcdf(SWEEP).dataset.attrs["n_layers"]))
    curves = [LayerCurve("weights", "<b>heads", layers, layers / 10.0), LayerCurve("edits", "S", layers, layers / 9.0)]
    write_layers(curves, tmp_path / "layers.json")
    given = ["report", SWEEP, "--layers", tmp_path / "layers.json", "--out"]
    code, _, err = wpjax(*given, tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "By layer: where it appears to live, and where changing it works" in page
    assert f"<td>&lt;b&gt;heads</td><td>{layers[-1]}</td><td>{layers[-1] / 10:.2f}</td><td>+1.00</td><td></td>" in page
    write_layers([LayerCurve("weights", "all", np.arange(30), np.ones(30))], tmp_path / "layers.json", overwrite=True)
    code, _, err = wpjax(*given, tmp_path / "other.html")
    assert code == 2
    assert "of another model" in err
    assert not (tmp_path / "other.html").exists()


def test_damaged_files_and_two_scores_of_a_layer_are_refused(tmp_path):
    (one,) = edits(tmp_path, {3: 4})
    with pytest.raises(WpjaxError, match="results of different models"):
        layer_curves([SWEEP, TRACE])
    with pytest.raises(WpjaxError, match="another file has scores of edits in layer 3"):
        layer_curves([one, one])
    one.write_text(json.dumps({"what": "edit scores", "model": "m", "layer": 3, "probabilities": "many"}))
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
    with pytest.raises(WpjaxError, match="json: Corrupting the subject costs no probability: it changes nothing"):
        layer_curves([one])
    with pytest.raises(WpjaxError, match="no such file"):
        layer_curves([tmp_path / "absent.json"])
