"""Both pairs' rankings together: the mean area over all tasks, and over those whose anchor was accepted.

python -m experiments.paper.together experiments/paper
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.paper.rankings import N_RANDOM, NAMES
from experiments.paper.tasks import measured
from experiments.records import table

PAIRS = ("tiny", "smollm2")


def markdown(folder: Path) -> str:
    """One line a ranking, the highest mean over all tasks first."""
    areas, accepted = [], []
    for pair in PAIRS:
        ranked, results = (json.loads((folder / f"{pair}.{what}.json").read_text()) for what in ("rankings", "results"))
        for name, task in measured(ranked).items():
            areas.append(task["areas"])
            accepted.append(results["tasks"][name]["acceptance"] == "accepted")
    drawn = [f"random {i + 1}" for i in range(N_RANDOM)]

    def means(name: str) -> list[float]:
        values = [np.mean([task[n][0] for n in (drawn if name == "random" else [name])]) for task in areas]
        return [float(np.mean(values)), float(np.mean(np.array(values)[accepted]))]

    found = {name: means(name) for name in (*(n for n in NAMES if n not in drawn), "random")}
    rows = [[name, *(f"{x:.3f}" for x in found[name])] for name in sorted(found, key=lambda name: -found[name][0])]
    return table(["ranked by", f"all {len(areas)} tasks", f"the {sum(accepted)} with accepted anchors"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the results")
    print(markdown(parser.parse_args().folder))


if __name__ == "__main__":
    main()
