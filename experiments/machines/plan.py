"""Which machine holds a pair of models, and what its sweeps cost there: the planner's estimates, nothing measured.

    python -m experiments.machines.plan --tokenizer work/smollm2/base --out experiments/machines/plan.json

Memory: the fewest devices for which `wpjax sweep` finds a mesh, and that mesh (`models.sharding.fewest_parts`): both
models in bfloat16, cut along heads, KV groups, neurons and the vocabulary, and what a usual sweep needs beside them.
Patches at once are what fits into a third of what the weights leave, as the engine takes it (`engines.memory`).

Time: the operations of all phases that `wpjax sweep` announces (`forecast`) with weights in bfloat16 and activations as
two such numbers, over the share of a device's peak that these phases reach on a CPU. Prompts are those of
english_capital, in the tokens of the tokenizer that is named.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments.loading.make import MODELS
from experiments.records import commit, table, write
from wpjax.arguments import SweepConfig
from wpjax.behaviours import behaviour
from wpjax.checkpoints.hf_config import parse_config
from wpjax.checkpoints.tokenizer import load_tokenizer
from wpjax.engines.memory import bytes_per_row
from wpjax.engines.packing import pack
from wpjax.forecast import ANCHOR_AT, Forecast, Pace
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.sharding import fewest_parts, weight_bytes
from wpjax.pairs import load_pair


class Device(NamedTuple):
    """What a device has, as its maker says.

    Attributes:
        memory: bytes that JAX gives to programs: of a GPU three quarters, of a TPU all but about 256 MiB.
        peak: operations a second in bfloat16, dense.
        sizes: how many of them make up a machine, or a slice.
        slice: what the launchers call so many of them; {n} is their number, {cores} twice that, {nodes} that of
            machines, {each} that on each.
    """

    memory: float
    peak: float
    sizes: tuple[int, ...]
    slice: str


DEVICES = {
    "TPU v5e": Device(15.75 * 2**30, 197e12, (1, 4, 8, 16, 32, 64, 128, 256), "v5litepod-{n}"),
    "TPU v5p": Device(94.75 * 2**30, 459e12, (4, 8, 16, 32, 64, 128, 256), "v5p-{cores}"),
    "TPU v6e": Device(31.75 * 2**30, 918e12, (1, 4, 8, 16, 32, 64, 128, 256), "v6e-{n}"),
    "H100": Device(0.75 * 80e9, 989e12, (1, 2, 4, 8, 16, 32), "{nodes} × H100:{each}"),
}
SWEEPS: dict[str, dict[str, Any]] = {"screen+exact": {}, "exact": {"method": "exact", "set_score": False}}
"""Methods, with the options besides."""

ON_HOST = 8
"""GPUs of a machine."""

PASSES = 2
"""Products in bfloat16 for each of float32's."""


def plan(tokenizer_folder: Path) -> dict[str, Any]:
    """The estimates of every model on every device."""
    tokenizer, task = load_tokenizer(tokenizer_folder), behaviour("english_capital")
    tiny = load_pair("tiny:base", "tiny:expert")
    found: dict[str, Any] = {**commit(), "prompts": 0, "models": {}}
    for name, raw in MODELS.items():
        cfg = dataclasses.replace(parse_config(raw, name), activation_splits=PASSES)
        # A forecast looks at the shape and the tokenizer of a pair, not at its weights.
        pair = dataclasses.replace(tiny, cfg=cfg, tokenizer=tokenizer)
        layer = round(ANCHOR_AT * (cfg.n_layers - 1))
        config = SweepConfig("base", "expert", task.name, out=Path("r.nc"), dtype="bfloat16x2")
        batch = task.encode(tokenizer, n_prompts=config.n_prompts)
        tokens = batch.with_instruction
        at, readout = jnp.asarray(tokens.last)[:, None], Projection(jnp.zeros(cfg.d_model))
        packing = pack(Metric(tokens, at, jnp.ones((len(batch), 1)), readout, layer, "plan"))
        found |= {"prompts": len(batch), "tokens": packing.n_tokens}
        devices: dict[str, Any] = {}
        for kind, device in DEVICES.items():
            parts = {n: fewest_parts(cfg, jnp.bfloat16, n, int(device.memory)) for n in device.sizes}
            n_devices, n_model = next(((n, of) for n, of in parts.items() if of is not None), (0, 0))
            if not n_devices:
                continue
            weights = 2 * weight_bytes(cfg, jnp.bfloat16, n_model)
            each = (device.memory - weights) / 3 // bytes_per_row(cfg, packing, n_model)
            forecast = Forecast(pair, task, config.max_new_tokens, Pace(device.peak / PASSES, compiling=0.0))
            hours = {
                sweep: sum(
                    phase.seconds or 0.0
                    for phase in forecast.study(dataclasses.replace(config, **options), batch, None).phases
                )
                / 3600
                for sweep, options in SWEEPS.items()
            }
            devices[kind] = {
                "devices": n_devices,
                "model": n_model,
                "weights": weights,
                "patches": int(each) * (n_devices // n_model),
                "device_hours": hours,
            }
        found["models"][name] = devices
    return found


def markdown(found: dict[str, Any]) -> str:
    """One row a model and kind of device."""
    rows = []
    for name, devices in found["models"].items():
        for kind in DEVICES:
            of = devices.get(kind)
            if of is None:
                rows.append([name, kind, "none holds it", *[""] * (3 + len(SWEEPS))])
                continue
            n = of["devices"]
            slice_ = DEVICES[kind].slice.format(n=n, cores=2 * n, nodes=-(-n // ON_HOST), each=min(n, ON_HOST))
            hours = [f"{of['device_hours'][sweep]:.3g}" for sweep in SWEEPS]
            gib = f"{of['weights'] / 2**30:.1f}"
            rows.append(
                [name, kind, slice_, f"`patch={n // of['model']},model={of['model']}`", gib, str(of["patches"]), *hours]
            )
    sweeps = [f"device-hours, `{sweep}`" for sweep in SWEEPS]
    return table(
        ["pair", "device", "fewest", "mesh of these", "weights a device, GiB", "patches at once", *sweeps], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = plan(args.tokenizer)
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
