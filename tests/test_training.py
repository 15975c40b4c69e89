"""Training: resumes to the same result, moves only what it may, and learns what it is given."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import flatten
from wpjax.components import parse_component
from wpjax.errors import BehaviourError, ComponentError, OutputError, WpjaxError
from wpjax.finetuning import finetune, pass_rate, self_distill
from wpjax.pairs import load_model
from wpjax.patching import PatchMask, materialize
from wpjax.training import Dataset, TrainConfig, batch_rows, check_checkpoints, component_mask, loss_fn, train


@pytest.fixture(scope="module")
def base():
    return load_model("tiny:base")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1408, (12, 10)).astype(np.int32)
    return Dataset(ids, (rng.random((12, 10)) < 0.7).astype(np.float32))


CONFIG = TrainConfig(steps=6, lr=1e-3, batch_size=4, save_every=2)


def test_loss_equals_torch_cross_entropy(base, data):
    got = loss_fn(base.cfg, base.params, jnp.asarray(data.ids), jnp.asarray(data.weights))
    from wpjax.models.decoder import forward

    logits = torch.tensor(np.asarray(forward(base.cfg, base.params, jnp.asarray(data.ids)).logits))[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 1408), torch.tensor(data.ids[:, 1:], dtype=torch.long).reshape(-1), reduction="none"
    )
    weights = torch.tensor(data.weights[:, 1:]).reshape(-1)
    assert float(got) == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)


def test_the_first_steps_are_adams_by_hand(base, data):
    """Two steps: the first at learning rate 0 only feeds the moments, the second moves at the peak."""
    config = TrainConfig(steps=2, lr=1e-3, batch_size=4)
    got = flatten(train(base.cfg, base.params, data, config))
    clipped = []
    for step in range(2):
        rows = batch_rows(12, config, step)
        batch = jnp.asarray(data.ids[rows]), jnp.asarray(data.weights[rows])
        gradients = flatten(jax.grad(loss_fn, argnums=1)(base.cfg, base.params, *batch))
        wide = {path: np.asarray(g, np.float64) for path, g in gradients.items()}
        norm = np.sqrt(sum(np.square(g).sum() for g in wide.values()))
        clipped.append({path: g / max(1.0, norm / config.clip) for path, g in wide.items()})
    for path, leaf in flatten(base.params).items():
        first, second = (g[path] for g in clipped)
        mean = (0.9 * first + second) / 1.9  # (1 - b1) (b1 g1 + g2) / (1 - b1^2), b1 = 0.9
        square = (0.999 * first**2 + second**2) / 1.999
        expected = np.asarray(leaf) - config.lr * mean / (np.sqrt(square) + 1e-8)
        clear = np.sqrt(square) > 1e-6  # below, rounding of the gradient itself decides Adam's unit step
        np.testing.assert_allclose(np.asarray(got[path])[clear], expected[clear], atol=1e-5, err_msg=path)


def test_training_learns_and_the_callers_parameters_stay(base, data):
    before = jax.tree.map(np.array, base.params)
    losses = []
    train(
        base.cfg,
        base.params,
        data,
        TrainConfig(steps=30, lr=3e-3, batch_size=12),
        on_step=lambda s, x: losses.append(x),
    )
    assert losses[-1] < 0.5 * losses[0]
    chex.assert_trees_all_equal(base.params, before)


def test_every_example_is_used_once_an_epoch():
    config = TrainConfig(batch_size=5, seed=3)
    rows = np.concatenate([batch_rows(12, config, step) for step in range(12)])
    epochs = rows.reshape(5, 12)
    assert all(sorted(e) == list(range(12)) for e in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_an_interrupted_training_resumes_to_the_same_parameters(base, data, tmp_path):
    whole = train(base.cfg, base.params, data, CONFIG)

    class Stop(Exception):
        pass

    def stop_at_5(step, loss):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "ck", on_step=stop_at_5)
    steps = []
    resumed = train(
        base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "ck", on_step=lambda s, _: steps.append(s)
    )
    assert steps == [5, 6]
    chex.assert_trees_all_equal(resumed, whole)


def test_confined_training_moves_the_named_slices_and_nothing_else(base, data):
    names = ["L1.head.2", "L3.neuron.7", "L0.norm.mlp"]
    mask = component_mask(base.cfg, base.params, names)
    trained = train(
        base.cfg, base.params, data, TrainConfig(steps=6, lr=1e-2, batch_size=4, weight_decay=0.1), mask=mask
    )
    outside = ~PatchMask.of(base.cfg, names)
    restored = materialize(base.params, trained, outside)
    chex.assert_trees_all_equal(restored, base.params)
    for name in names:
        one = materialize(base.params, trained, PatchMask.of(base.cfg, [parse_component(base.cfg, name)]))
        assert any((flatten(one)[p] != leaf).any() for p, leaf in flatten(base.params).items()), name
    with pytest.raises(ComponentError):
        component_mask(base.cfg, base.params, ["L99.head.0"])


def test_finetune_makes_an_expert_that_follows(base, tmp_path):
    """Self-distilled on the embedded base: it learns to quote when asked, and goes through an HF folder."""
    task = behaviour("tiny:quotation")
    expert = finetune(base, task, TrainConfig(steps=60, lr=1e-3, batch_size=24), max_new_tokens=48)
    save_checkpoint(tmp_path / "quoting", expert)
    assert pass_rate(base, task, 16) == 0.0
    assert pass_rate(load_checkpoint(str(tmp_path / "quoting")), task, 16) >= 0.75


def test_examples_follow_and_plain_ones_stay_plain(base):
    task = behaviour("tiny:title")
    examples = self_distill(base, task, max_new_tokens=48)
    assert len(examples) == 32 + 128
    assert not any("<<" in e.response for e in examples[:32])
    assert all(e.response.startswith("<<") for e in examples[32:])
    assert all(e.finished for e in examples)


def test_a_file_without_responses_cannot_be_trained_on(base, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(f'{{"with": "{i} loud", "without": "{i}"}}' for i in range(12)))
    with pytest.raises(BehaviourError, match='needs a "response"'):
        finetune(base, behaviour(str(path), "contains:x"))


def test_checkpoints_of_another_training_are_refused(base, data, tmp_path):
    train(base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "ck")
    for changed, differs in (({"lr": 2e-3}, r"lr: \S+ there, 0\.002 here"), ({"seed": 1}, "seed: 0 there, 1 here")):
        with pytest.raises(OutputError, match=rf"another training's checkpoints, with other settings \({differs}\)"):
            train(base.cfg, base.params, data, dataclasses.replace(CONFIG, **changed), checkpoints=tmp_path / "ck")
    other = Dataset(data.ids + 1, data.weights)
    with pytest.raises(OutputError, match=r"with other settings \(prompts and answers: \w+ there, \w+ here\)"):
        train(base.cfg, base.params, other, CONFIG, checkpoints=tmp_path / "ck")
    coarse = jax.tree.map(lambda a: a.astype("bfloat16"), base.params)
    with pytest.raises(WpjaxError, match="float32 parameters"):
        train(base.cfg, coarse, data, CONFIG)


def test_a_training_that_diverges_is_refused(base, data):
    with pytest.raises(WpjaxError, match=r"the loss of step \d+ is nan: training diverged; lower"):
        train(base.cfg, base.params, data, dataclasses.replace(CONFIG, lr=float("inf")))


def test_a_full_disk_is_one_line_and_the_last_state_stays(base, data, tmp_path, capfd):
    """The third checkpoint has no room, nor has the second if it is not finished when the disk fills up."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "ck"

    def fill(step, loss):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(OutputError, match=r"a checkpoint cannot be written .*that of step [24] is kept: make room"):
            train(base.cfg, base.params, data, CONFIG, checkpoints=folder, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in capfd.readouterr().err
    steps = []
    resumed = train(base.cfg, base.params, data, CONFIG, checkpoints=folder, on_step=lambda s, _: steps.append(s))
    assert steps in ([3, 4, 5, 6], [5, 6])
    chex.assert_trees_all_equal(resumed, train(base.cfg, base.params, data, CONFIG))


def test_a_folder_without_a_checkpoint_is_in_nobodys_way(tmp_path):
    folder, out = tmp_path / ".e.training", tmp_path / "e"
    (folder / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "training.json").write_text("another")
    check_checkpoints(folder, False, out)
    assert not list(tmp_path.iterdir())
    (folder / "2").mkdir(parents=True)
    with pytest.raises(OutputError, match="pass --resume, or delete it"):
        check_checkpoints(folder, False, out)
    check_checkpoints(folder, True, out)
    out.mkdir()
    (out / "config.json").write_text("{}")  # the expert was written, and then the process was killed
    check_checkpoints(folder, False, out)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_checkpoints_that_are_damaged_are_refused(base, data, tmp_path):
    train(base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "ck")
    shutil.rmtree(tmp_path / "ck" / "6" / "default")
    with pytest.raises(OutputError, match=r"ck: damaged .*delete it, and start again"):
        train(base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "ck")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file: cannot be written"):
        train(base.cfg, base.params, data, CONFIG, checkpoints=tmp_path / "file")
