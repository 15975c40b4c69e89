r"""Exact head sweep against what a user would write instead, same prompts, same anchor, same numbers.

    python -m experiments.bench.heads --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 4 --out experiments/bench/heads.json

PyTorch: (a) copies one head's slices into the base and runs the whole HF forward; (b) does the same but starts from the
cached residual stream of the patched layer and stops at the anchor's layer; (c) runs all heads of a layer at once by
`torch.func.functional_call` under `vmap`. JAX without this package's engine: whole patched models under `vmap`, with
copies of the query and output matrices alone. TransformerLens: one hooked forward a head, from the first layer, which
patches activations (another quantity, so its numbers are not compared). Everything is where JAX is, on a GPU or the
CPU, and in one dtype. The runs alternate within each repeat; medians are reported, compilation left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import torch
from jaxtyping import Float
from transformers import AutoModelForCausalLM

from experiments.records import machine, made, table, write
from wpjax import Anchor, PatchMask, behaviour, enumerate_components, fit_anchor, load_pair, materialize
from wpjax.behaviours import PromptBatch
from wpjax.components import Component
from wpjax.engines.exact import exact_changes
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import run_packed
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.pairs import Pair


def ours(pair: Pair, batch: PromptBatch, anchor: Anchor, heads: list[Component]) -> Float[np.ndarray, "C B"]:
    """The exact sweep of the package."""
    metric = anchor.metric_along(batch)
    packing = pack(metric)
    plan = make_plan(pair.cfg, heads, packing)
    run = run_packed(pair.cfg, pair.base, metric, packing)
    parts = exact_changes(pair.cfg, pair.base, pair.expert, (run, None), metric, packing, plan)
    return np.concatenate([part.delta for part in parts])


class TorchSweep:
    """The same effects by copying slices in HF models (Llama family)."""

    def __init__(self, pair: tuple[str, str], dtype: str, device: str, batch: PromptBatch, anchor: Anchor):
        def load(path: str, **options: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options)
            return model.to(device).eval()

        self.base, self.expert = (load(path) for path in pair)
        self.vectorised = load(pair[0], attn_implementation="eager")
        self.ids = torch.tensor(np.asarray(batch.with_instruction.ids), dtype=torch.long, device=device)
        self.last = torch.tensor(np.asarray(batch.with_instruction.last), dtype=torch.long, device=device)
        self.vector = torch.tensor(np.asarray(anchor.vector), device=device)
        self.anchor = anchor.layer
        self.dh = self.base.config.head_dim

    def score(self, resid: torch.Tensor) -> torch.Tensor:
        """Anchor score of each prompt."""
        return resid[torch.arange(len(resid), device=resid.device), self.last].float() @ self.vector

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
        positions = torch.arange(self.ids.shape[1], device=resid.device)[None]
        rotary = self.base.model.rotary_emb(resid, positions)
        for module in self.base.model.layers[layer : self.anchor + 1]:
            out = module(resid, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            resid = out[0] if isinstance(out, tuple) else out
        return self.score(resid)

    @torch.no_grad()
    def together(self, heads: list[Component]) -> Float[np.ndarray, "C B"]:
        """(c) changes of score of all heads, those of a layer in one vectorised forward."""
        names = [f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qo"]
        ours, theirs = (dict(m.named_parameters()) for m in (self.vectorised, self.expert))
        rows = []
        for layer, group in itertools.groupby(heads, lambda h: h.layer):
            q_name, o_name = (name.format(layer) for name in names)
            stacks = []
            for h in group:
                part = slice(h.index * self.dh, (h.index + 1) * self.dh)
                q, o = ours[q_name].clone(), ours[o_name].clone()
                q[part], o[:, part] = theirs[q_name][part], theirs[o_name][:, part]
                stacks.append((q, o))

            def run(q: torch.Tensor, o: torch.Tensor, q_name: str = q_name, o_name: str = o_name) -> torch.Tensor:
                options = {"use_cache": False, "output_hidden_states": True}
                out = torch.func.functional_call(self.vectorised, {q_name: q, o_name: o}, (self.ids,), options)
                return self.score(out.hidden_states[self.anchor + 1])

            rows.append(torch.vmap(run)(*(torch.stack(some) for some in zip(*stacks, strict=True))))
        states = self.base(self.ids, use_cache=False, output_hidden_states=True).hidden_states
        return (torch.cat(rows) - self.score(states[self.anchor + 1])).cpu().numpy()

    @torch.no_grad()
    def sweep(self, heads: list[Component], cached: bool) -> Float[np.ndarray, "C B"]:
        """Changes of score of all heads, by (b) if `cached`, else by (a)."""
        states = self.base(self.ids, use_cache=False, output_hidden_states=True).hidden_states
        before = self.score(states[self.anchor + 1])
        rows = [
            self.swapped(h, functools.partial(self.suffix, states[h.layer], h.layer) if cached else self.whole)
            for h in heads
        ]
        return (torch.stack(rows) - before).cpu().numpy()


@functools.partial(jax.jit, static_argnames="cfg")
def scores_of_copies(cfg: ModelConfig, base: Params, expert: Params, masks: PatchMask, metric: Metric) -> jax.Array:
    """The metric of several patched models; the leaves that the masks name are copied for each."""
    return jax.vmap(lambda mask: metric(cfg, materialize(base, expert, mask)))(masks)


def copied(pair: Pair, batch: PromptBatch, anchor: Anchor, heads: list[Component]) -> Float[np.ndarray, "C B"]:
    """Whole patched models under `vmap`, with their own query and output matrices and the base's other weights."""
    metric = anchor.metric_along(batch)
    every = [PatchMask.of(pair.cfg, some) for some in ([], *([h] for h in heads))]
    masks = [PatchMask({"head": mask.units["head"]}) for mask in every]  # units that stay closed would be copied too
    masks += masks[:1] * (-len(masks) % AT_ONCE)
    rows = []
    for first in range(0, len(masks), AT_ONCE):
        stacked = jax.tree.map(lambda *m: jnp.stack(m), *masks[first : first + AT_ONCE])
        rows.append(np.asarray(scores_of_copies(pair.cfg, pair.base, pair.expert, stacked, metric)))
    scores = np.concatenate(rows)[: len(heads) + 1]
    return scores[1:] - scores[0]


VERSIONS = ("jax", "jaxlib", "torch", "transformer-lens")
"""What a result says the versions of, where it is installed."""

AT_ONCE = 9
"""Patched models that `copied` holds at a time: a layer's heads of the smallest SmolLM2."""


class LensSweep:
    """TransformerLens' head patching: the expert's head outputs in the base, one hooked forward a head."""

    def __init__(self, pair: tuple[str, str], dtype: str, device: str, batch: PromptBatch):
        from transformer_lens.model_bridge import TransformerBridge  # of the extra "bench" only

        self.ids = torch.tensor(np.asarray(batch.with_instruction.ids), dtype=torch.long, device=device)
        self.base, theirs = (
            TransformerBridge.boot_transformers(path, device=device, dtype=getattr(torch, dtype)).eval()
            for path in pair
        )
        with torch.no_grad():
            _, self.cache = theirs.run_with_cache(self.ids, names_filter=lambda name: name.endswith("hook_z"))

    @torch.no_grad()
    def sweep(self, heads: list[Component]) -> np.ndarray:
        """A number a head; of the logits, as that package's metrics are."""
        from transformer_lens.patching import generic_activation_patch, layer_head_vector_patch_setter

        places = pandas.DataFrame([(h.layer, h.index) for h in heads], columns=["layer", "head"])
        return generic_activation_patch(
            self.base, self.ids, self.cache, lambda logits: logits[:, -1, 0].mean(),
            patch_setter=layer_head_vector_patch_setter, activation_name="z", index_df=places,
        ).float().cpu().numpy()  # fmt: skip


def torch_device() -> str:
    """Where PyTorch's models go: where JAX is."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise SystemExit(f"JAX is on the {jax.default_backend()} and torch cannot be: install a torch that has CUDA")
    return "cuda"


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    start = time.perf_counter()
    value = run()
    if device == "cuda":
        torch.cuda.synchronize()
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
    parser.add_argument("--every", type=int, default=1, help="take the heads of every so many layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of every model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch_device()
    pair, task = load_pair(args.base, args.expert, args.dtype), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, layer=args.layer, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=args.n_prompts)
    heads = enumerate_components(pair.cfg, ["head"], range(anchor.layer, -1, -args.every))
    models = (args.base, args.expert), args.dtype, device
    reference = TorchSweep(*models, batch, anchor)
    runs: dict[str, Callable[[list[Component]], np.ndarray]] = {
        "ours": lambda heads: ours(pair, batch, anchor, heads),
        "torch, cached prefix": lambda heads: reference.sweep(heads, cached=True),
        "torch, whole forward": lambda heads: reference.sweep(heads, cached=False),
        "torch, functional_call under vmap": reference.together,
        f"JAX, weights copied under vmap, {AT_ONCE} at once": lambda heads: copied(pair, batch, anchor, heads),
    }
    if importlib.util.find_spec("transformer_lens"):
        runs["TransformerLens, hooked forwards"] = LensSweep(*models, batch).sweep
    else:
        print("transformer-lens is not installed, and left out")
    for name, run in runs.items():
        run(heads if name == "ours" else heads[:1])  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    effects: dict[str, np.ndarray] = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            took, effects[name] = timed(functools.partial(run, heads), device)
            seconds[name].append(took)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    scale = float(np.abs(effects["ours"]).max())
    compared = [name for name in runs if name != "ours" and not name.startswith("TransformerLens")]
    result = {
        "what": f"exact sweep of the heads of every {args.every} layers up to the anchor",
        "model": {"base": Path(args.base).name, "layers": pair.cfg.n_layers, "d_model": pair.cfg.d_model},
        "anchor_layer": anchor.layer,
        "heads": len(heads),
        "prompts": len(batch),
        "tokens": int(batch.with_instruction.ids.shape[1]),
        "packed_tokens": pack(anchor.metric_along(batch)).n_tokens,
        "seconds": seconds,
        "median_seconds": median,
        "speed_up": {name: median[name] / median["ours"] for name in median if name != "ours"},
        "max_difference": {name: float(np.abs(effects["ours"] - effects[name]).max()) for name in compared},
        "largest_change_of_score": scale,
        "patched_at_once": AT_ONCE,
        **made(),
        "device": f"{jax.devices()[0].platform}, {torch.get_num_threads()} threads",
        "machine": machine(),
        "versions": {name: version(name) for name in VERSIONS if importlib.util.find_spec(name.replace("-", "_"))},
        "dtype": args.dtype,
    }  # fmt: skip
    print(markdown(result))
    write(args.out, result)


if __name__ == "__main__":
    jnp.zeros(1).block_until_ready()  # start the backend before any timing
    main()
