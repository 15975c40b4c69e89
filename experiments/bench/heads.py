r"""Exact head sweep against PyTorch, same prompts, same anchor, same numbers.

    python -m experiments.bench.heads --base work/smollm2/base --expert work/smollm2/caps --n-prompts 4 \
        --out experiments/bench/heads.json

(a) copies one head's slices into the base and runs the whole HF forward; (b) does the same but starts from the cached
residual stream of the patched layer and stops at the anchor's layer. The runs alternate within each repeat; medians
are reported, compilation left out.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModelForCausalLM

from experiments.records import made, table, write
from wpjax import Anchor, behaviour, enumerate_components, fit_anchor, load_pair
from wpjax.behaviours import PromptBatch
from wpjax.components import Component
from wpjax.pairs import Pair
from wpjax.sweeps.exact import exact_changes, make_plan
from wpjax.sweeps.packing import pack
from wpjax.sweeps.replay import run_packed


def ours(pair: Pair, batch: PromptBatch, anchor: Anchor, heads: list[Component]) -> Float[np.ndarray, "C B"]:
    """The exact sweep of the package."""
    metric = anchor.on(batch)
    packing = pack(metric)
    plan = make_plan(pair.cfg, heads, packing)
    run = run_packed(pair.cfg, pair.base, metric, packing)
    parts = exact_changes(pair.cfg, pair.base, pair.expert, (run, None), metric, packing, plan)
    return np.concatenate([part.delta for part in parts])


class TorchSweep:
    """The same effects by copying slices in HF models (Llama family)."""

    def __init__(self, base: str, expert: str, batch: PromptBatch, anchor: Anchor):
        self.base, self.expert = (
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (base, expert)
        )
        self.ids = torch.tensor(np.asarray(batch.with_instruction.ids), dtype=torch.long)
        self.last = torch.tensor(np.asarray(batch.with_instruction.last), dtype=torch.long)
        self.vector = torch.tensor(np.asarray(anchor.vector))
        self.anchor = anchor.layer
        self.dh = self.base.config.head_dim

    def score(self, resid: torch.Tensor) -> torch.Tensor:
        """Anchor score of each prompt."""
        return resid[torch.arange(len(resid)), self.last] @ self.vector

    def swapped(self, head: Component, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run with one head's rows of q_proj and columns of o_proj from the expert, then put them back."""
        attn, donor = (m.model.layers[head.layer].self_attn for m in (self.base, self.expert))
        rows = slice(head.index * self.dh, (head.index + 1) * self.dh)
        q, o = attn.q_proj.weight[rows].clone(), attn.o_proj.weight[:, rows].clone()
        attn.q_proj.weight[rows] = donor.q_proj.weight[rows]
        attn.o_proj.weight[:, rows] = donor.o_proj.weight[:, rows]
        result = run()
        attn.q_proj.weight[rows], attn.o_proj.weight[:, rows] = q, o
        return result

    def whole(self) -> torch.Tensor:
        """(a) the whole forward, logits included."""
        out = self.base(self.ids, use_cache=False, output_hidden_states=True)
        return self.score(out.hidden_states[self.anchor + 1])

    def suffix(self, resid: torch.Tensor, layer: int) -> torch.Tensor:
        """(b) from a layer's cached input up to the anchor's layer."""
        positions = torch.arange(self.ids.shape[1])[None]
        rotary = self.base.model.rotary_emb(resid, positions)
        for module in self.base.model.layers[layer : self.anchor + 1]:
            out = module(resid, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            resid = out[0] if isinstance(out, tuple) else out
        return self.score(resid)

    @torch.no_grad()
    def sweep(self, heads: list[Component], cached: bool) -> Float[np.ndarray, "C B"]:
        """Changes of score of all heads, by (b) if `cached`, else by (a)."""
        states = self.base(self.ids, use_cache=False, output_hidden_states=True).hidden_states
        before = self.score(states[self.anchor + 1])
        rows = [
            self.swapped(h, functools.partial(self.suffix, states[h.layer], h.layer) if cached else self.whole)
            for h in heads
        ]
        return (torch.stack(rows) - before).numpy()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


def markdown(result: dict[str, Any]) -> str:
    """The medians as a table, with the ratio to ours and the largest difference of any number."""
    rows = []
    for name, median in result["median_seconds"].items():
        ratio = f"{result['speed_up'][name]:.2f}" if name in result["speed_up"] else "1"
        difference = f"{result['max_difference'][name]:.1e}" if name in result["max_difference"] else ""
        rows.append([name, f"{median:.1f}", ratio, difference])
    return table(["exact head sweep", "seconds", "times ours", "largest difference of a score"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="HF folder")
    parser.add_argument("--expert", required=True, help="HF folder")
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--n-prompts", type=int, default=8)
    parser.add_argument("--layer", type=int, help="anchor layer; chosen if absent")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair, task = load_pair(args.base, args.expert), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, layer=args.layer, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=args.n_prompts)
    heads = enumerate_components(pair.cfg, ["head"], range(anchor.layer + 1))
    reference = TorchSweep(args.base, args.expert, batch, anchor)
    ours(pair, batch, anchor, heads)  # compiles
    seconds: dict[str, list[float]] = {"ours": [], "torch, cached prefix": [], "torch, whole forward": []}
    for _ in range(args.repeats):
        took, effects = timed(lambda: ours(pair, batch, anchor, heads))
        seconds["ours"].append(took)
        took, cached = timed(lambda: reference.sweep(heads, cached=True))
        seconds["torch, cached prefix"].append(took)
        took, whole = timed(lambda: reference.sweep(heads, cached=False))
        seconds["torch, whole forward"].append(took)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    scale = float(np.abs(whole).max())
    result = {
        "what": "exact sweep of all heads up to the anchor",
        "model": {"base": Path(args.base).name, "layers": pair.cfg.n_layers, "d_model": pair.cfg.d_model},
        "anchor_layer": anchor.layer,
        "heads": len(heads),
        "prompts": len(batch),
        "tokens": int(batch.with_instruction.ids.shape[1]),
        "seconds": seconds,
        "median_seconds": median,
        "speed_up": {name: median[name] / median["ours"] for name in median if name != "ours"},
        "max_difference": {"torch, cached prefix": float(np.abs(effects - cached).max()),
                           "torch, whole forward": float(np.abs(effects - whole).max())},
        "largest_change_of_score": scale,
        **made(),
        "device": f"{jax.devices()[0].platform}, {torch.get_num_threads()} threads",
        "machine": platform.processor() or platform.machine(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "dtype": "float32",
    }  # fmt: skip
    print(markdown(result))
    write(args.out, result)


if __name__ == "__main__":
    jnp.zeros(1).block_until_ready()  # start the backend before any timing
    main()
