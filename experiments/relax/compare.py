"""Which parametrisation of a learned mask finds what was planted, with how many steps, and with which epsilon of Adam?

    python -m experiments.relax.compare --out experiments/relax/planted.json

The expert is the embedded `tiny:planted`, whose sources are known among as large changes that do nothing. Every row
learns the gates of all heads, KV groups and neurons with as many steps, from the same prompts, from several seeds. A
step costs all of them the same. AUROC and precision at the planted size are taken on the way. It takes about ten
minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from experiments.records import machine, made, table, write
from wpjax.behaviours import behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import enumerate_components
from wpjax.evaluation.learned import Aim, parts_of
from wpjax.pairs import load_pair, planted_components
from wpjax.relax.gates import Gates
from wpjax.relax.learn import Learned, RelaxConfig, learn, together
from wpjax.relax.objectives import AnyObjective, Weighted
from wpjax.relax.parametrisations import HardConcrete, Nested, Parametrisation, StraightThrough

LOOKS = (10, 20, 40, 100, 200)
"""Steps after which the ranking is judged."""

SEEDS = 4


class Row(NamedTuple):
    """One way to learn a mask."""

    name: str
    parametrisation: Parametrisation
    lr: float = 0.05
    eps: float = 1e-8


ROWS = (
    *(Row(f"nested, Adam's epsilon {eps:g}", Nested(), eps=eps) for eps in (1e-8, 1e-5, 1e-4, 1e-3, 1e-2)),
    *(Row(f"hard-concrete, price {price:g}", HardConcrete(price)) for price in (0.3, 1.0, 3.0)),
    *(Row(f"straight-through, price {price:g}", StraightThrough(price)) for price in (0.3, 1.0, 3.0)),
)  # fmt: skip


def judged(scores: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """AUROC, and precision among as many as were planted."""
    best = np.argsort(-scores, kind="stable")[: planted.sum()]
    return {"auroc": float(roc_auc_score(planted, scores)), "precision": float(planted[best].mean())}


def learned(row: Row, objective: AnyObjective, gates: Gates, planted: np.ndarray, progress: Any) -> dict[str, Any]:
    """Every seed at every look, the mean of their ranks, and the seed with the least loss."""
    looks: dict[str, Any] = {}

    def watch(so_far: Learned) -> None:
        taken = so_far.losses.shape[1]
        if taken in LOOKS:
            least = int(so_far.losses[:, -10:].mean(1).argmin())
            looks[str(taken)] = {
                "seeds": [judged(run, planted) for run in so_far.runs],
                "mean rank": judged(together(so_far.runs), planted),
                "least loss": judged(so_far.runs[least], planted),
            }

    config = RelaxConfig(steps=LOOKS[-1], lr=row.lr, eps=row.eps, restarts=SEEDS, steps_at_once=10)
    learn(objective, gates, row.parametrisation, config, watch=watch, progress=progress)
    return looks


def mean(look: dict[str, Any], figure: str) -> float:
    """Of one figure over seeds."""
    return float(np.mean([seed[figure] for seed in look["seeds"]]))


def markdown(report: dict[str, Any]) -> str:
    """A row a way to learn: AUROC and precision, mean over seeds, after so many steps."""
    rows = [
        [name, *(f"{mean(looks[str(n)], 'auroc'):.3f}, {mean(looks[str(n)], 'precision'):.2f}" for n in LOOKS)]
        for name, looks in report["rows"].items()
    ]
    return table(["AUROC, precision", *(f"{n} steps" for n in LOOKS)], rows)


def restarts(report: dict[str, Any]) -> str:
    """How restarts are put together, by the row with the defaults."""
    looks = report["rows"][ROWS[0].name]
    cell = "{auroc:.3f}, {precision:.2f}"
    rows = [
        ["one seed, mean over seeds", *(f"{mean(looks[str(n)], 'auroc'):.3f}, {mean(looks[str(n)], 'precision'):.2f}"
                                        for n in LOOKS)],
        *([f"{SEEDS} seeds, {how}", *(cell.format(**looks[str(n)][how]) for n in LOOKS)]
          for how in ("mean rank", "least loss")),
    ]  # fmt: skip
    return table([f"{ROWS[0].name}: AUROC, precision", *(f"{n} steps" for n in LOOKS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default="", help="only those whose name begins so")
    args = parser.parse_args()
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    components = enumerate_components(pair.cfg, ("head", "kv_group", "neuron"))
    planted, gates = np.isin([c.name for c in components], planted_components()), Gates.of(pair.cfg, components)
    aim = Aim("kl", n_prompts=32, max_new_tokens=8)
    (part,) = parts_of(pair, task, task.encode(pair.tokenizer, "sweep", aim.n_prompts), aim)
    objective = Weighted((part.objective,), jnp.array([part.weight]))
    report: dict[str, Any] = {"components": len(components), "planted": int(planted.sum()), "seeds": SEEDS, "rows": {}}
    for row in ROWS:
        if row.name.startswith(args.rows):
            with progress_bars() as progress:
                report["rows"][row.name] = learned(row, objective, gates, planted, progress)
            print(row.name, [(round(mean(look, "auroc"), 3), round(mean(look, "precision"), 2))
                             for look in report["rows"][row.name].values()], flush=True)  # fmt: skip
    report |= {"prompts": 32, "prompts_a_step": aim.prompts_a_step, "dtype": "float32", **made(), "machine": machine()}
    if not args.rows:
        print(markdown(report))
        print(restarts(report))
        write(args.out, report)


if __name__ == "__main__":
    main()
