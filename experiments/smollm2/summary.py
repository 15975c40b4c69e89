"""A sweep's result in a small JSON file: what it was, what each kind recovers, the highest components of each kind.

python -m experiments.smollm2.summary work/smollm2/english_capital.nc --out experiments/smollm2/english_capital.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.records import table, write
from wpjax.results.sweep_result import SweepResult


def summarise(result: SweepResult, n: int = 20) -> dict[str, Any]:
    """Attributes, anchor, coverage, the highest and lowest components, and how near the screen came."""
    data = result.dataset
    kinds = data["kind"].values.astype(str)
    exact = data["exact"].values
    attrs = {k: result.attribute(k) for k in data.attrs}
    attrs |= {which: Path(attrs[which]).name for which in ("base", "expert")}
    summary: dict[str, Any] = {"attributes": attrs, "anchor_by_layer": anchor_by_layer(result), "kinds": {}}
    for i, kind in enumerate(data["swept_kind"].values.astype(str)):
        mine = kinds == kind
        effect, norm = data["effect"].values, data["delta_norm"].values
        measured = mine & exact
        rows = result.top(int(measured.sum()), kinds=(kind,))
        summary["kinds"][kind] = {
            "components": int(mine.sum()),
            "replaced": int(measured.sum()),
            "significant_at_q_0.05": int((data["q_value"].values[measured] < 0.05).sum()),
            "below_noise_floor": int(data["below_noise_floor"].values[measured].sum()),
            "recovered_jointly": rounded(data["coverage_joint"].values[i]),
            "sum_of_single_effects_replaced": rounded(effect[measured].sum()),
            "sum_of_positive_effects_replaced": rounded(np.clip(effect[measured], 0, None).sum()),
            "spearman_of_effect_and_delta_norm": rounded(spearmanr(np.abs(effect[measured]), norm[measured])[0]),
            "highest": [row._asdict() for row in rows[:n]],
            "lowest": [row._asdict() for row in rows[: -n // 4 - 1 : -1]],
        }
        if "screen" in data:
            screen = data["screen"].values
            summary["kinds"][kind] |= {
                "sum_of_screen": rounded(screen[mine].sum()),
                "spearman_of_effect_and_screen": rounded(spearmanr(effect[measured], screen[measured])[0]),
                "largest_error_of_screen": rounded(np.abs(effect - screen)[measured].max()),
            }
    return summary


def anchor_by_layer(result: SweepResult) -> dict[str, list[float]]:
    """The anchor's diagnostics, one list a figure."""
    data = result.dataset
    names = [str(n) for n in data.data_vars if data[n].dims == ("model_layer",)]
    return {n.removeprefix("anchor_"): [rounded(x) for x in data[n].values] for n in names}


def markdown(summary: dict[str, Any]) -> str:
    """What each kind recovers, and how near the screen came, as a table."""
    columns = ["kind", "components", "replaced", "q < 0.05", "under the floor", "jointly", "screens' sum",
               "screen against exact: Spearman", "largest error", "norm against effect: Spearman"]  # fmt: skip
    rows = [
        [
            kind,
            f"{row['components']:,}",
            f"{row['replaced']:,}",
            f"{row['significant_at_q_0.05']:,}",
            f"{row['below_noise_floor']:,}",
            f"{row['recovered_jointly']:.2f}",
            f"{row['sum_of_screen']:.2f}",
            f"{row['spearman_of_effect_and_screen']:.4f}",
            f"{row['largest_error_of_screen']:.1e}",
            f"{row['spearman_of_effect_and_delta_norm']:.2f}",
        ]
        for kind, row in summary["kinds"].items()
    ]
    return table(columns, rows)


def highest(summary: dict[str, Any], n: int = 8) -> str:
    """The n components of highest effect of each kind, as a table with intervals."""
    rows = [
        [
            f"`{row['name']}`",
            f"{row['effect']:+.4f}",
            f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]",
            f"{row['q_value']:.1e}",
        ]
        for kind in summary["kinds"].values()
        for row in kind["highest"][:n]
    ]
    return table(["component", "effect", "95 % interval", "q"], rows)


def rounded(value: Any) -> float:
    """Four significant digits."""
    return float(f"{float(value):.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    summary = summarise(SweepResult.from_netcdf(args.result))
    print(markdown(summary), highest(summary), sep="\n\n")
    write(args.out, summary)


if __name__ == "__main__":
    main()
