"""The 2x2 of weights and input: cells against HF torch with activations swapped by hooks, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.oracles import NAMES, hf_layers
from tests.tiny import as_pair, build_pair
from wpjax.components import Component, enumerate_components
from wpjax.engines.exact import exact_changes
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import run_packed
from wpjax.estimators.factorial import two_by_two
from wpjax.estimators.screens import output_linearised
from wpjax.patching import PatchMask, materialize

KINDS = ("head", "kv_group", "neuron", "attn", "mlp", "layer", "norm")
LAYER = 1


@pytest.fixture(scope="module", params=["llama-gqa3", "gpt2-untied"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def cell(pair, metric, components, weights, inputs, host=None, donor=None):
    """Changes [C, B] in one cell."""
    host, donor = host or pair.base, donor or pair.expert
    packing = pack(metric)
    runs = tuple(run_packed(pair.cfg, model, metric, packing) for model in (host, donor))
    plan = make_plan(pair.cfg, components, packing)
    found = {}
    for chunk, delta, _ in exact_changes(
        pair.cfg, host, donor, runs, metric, packing, plan, weights=weights, inputs=inputs
    ):
        found |= dict(zip(chunk.components, delta, strict=True))
    return np.stack([found[c] for c in components])


CELLS = {"exact": ("donor", "host"), "activation": ("donor", "donor"), "relay": ("host", "donor")}


def kinds_of(pair):
    """Modules in one family: beside their parts they do nothing that depends on it."""
    return KINDS if pair.cfg.gated else KINDS[:3]


def of_the_layer(pair):
    """Components of layer `LAYER`, of neurons some; one list for all tests, so that programs are compiled once."""
    every = [enumerate_components(pair.cfg, [kind], [LAYER]) for kind in kinds_of(pair)]
    return [c for members in every for c in members[:: 9 if members[0].kind == "neuron" else 1]]


def cells(pair, metric, donor=None):
    return {name: cell(pair, metric, of_the_layer(pair), *sides, donor=donor) for name, sides in CELLS.items()}


class Hooked:
    """A torch model whose layer `LAYER` can be listened to and whose outputs there can be replaced."""

    def __init__(self, model):
        self.model = model
        self.layer, self.next = hf_layers(model)[LAYER:]
        attention, _, projection = NAMES[model.config.model_type].w_o.partition(".")
        self.attn = self.layer.get_submodule(attention)
        self.out = self.attn.get_submodule(projection)

    def modules(self):
        return {"attn": self.attn, "mlp": self.layer.mlp, "layer": self.layer}

    def run(self, ids, vector, add=None):
        """Anchor score; what the modules put out; the input of the output projection. `add`: module -> change."""
        kept, handles = {}, []

        def listen(name):
            def hook(module, args, kwargs, out):
                whole = out[0] if isinstance(out, tuple) else out
                x = args[0] if args else kwargs["hidden_states"]
                kept[name] = whole - x if name == "layer" else whole
                if name not in (add or {}):
                    return None
                return (whole + add[name], *out[1:]) if isinstance(out, tuple) else whole + add[name]

            return hook

        for name, module in self.modules().items():
            handles.append(module.register_forward_hook(listen(name), with_kwargs=True))
        handles.append(
            self.next.register_forward_pre_hook(
                lambda m, a, k: kept.__setitem__("resid", a[0] if a else k["hidden_states"]), with_kwargs=True
            )
        )
        handles.append(self.out.register_forward_pre_hook(lambda m, a: kept.__setitem__("z", a[0])))
        with torch.no_grad():
            self.model(ids)
        for handle in handles:
            handle.remove()
        return float(kept["resid"][0, -1].numpy() @ vector), kept

    def head(self, z, h, d_head):
        """What one head writes."""
        at = slice(h * d_head, (h + 1) * d_head)
        w = self.out.weight.T if isinstance(self.out, torch.nn.Linear) else self.out.weight  # [in, out]
        return (z[..., at] @ w[at]).detach()


@pytest.mark.parametrize("name", ["llama-gqa3", "gpt2-untied", "olmo2", "gpt-neox"])
def test_activation_patches_equal_hf_torch_with_activations_swapped(name, tmp_path, batch):
    hf_pair = build_pair(name, tmp_path)
    pair = as_pair(hf_pair)
    anchor = make_anchor(pair, LAYER)
    heads = enumerate_components(pair.cfg, ["head"], [LAYER])
    modules = [Component(kind, LAYER) for kind in ("attn", "mlp", "layer")]
    got = cell(pair, anchor.metric_along(batch), heads + modules, "donor", "donor")
    base, expert = Hooked(hf_pair.base.model), Hooked(hf_pair.expert.model)
    vector, tokens = np.asarray(anchor.vector), batch.with_instruction
    for i, n in enumerate(tokens.lengths):
        ids = torch.tensor(tokens.ids[i : i + 1, :n], dtype=torch.long)
        (before, ours), (_, theirs) = base.run(ids, vector), expert.run(ids, vector)
        changes = {
            c: (
                "attn",
                expert.head(theirs["z"], c.index, pair.cfg.d_head) - base.head(ours["z"], c.index, pair.cfg.d_head),
            )
            for c in heads
        } | {c: (c.kind, theirs[c.kind] - ours[c.kind]) for c in modules}
        for row, c in zip(got, heads + modules, strict=True):
            module, change = changes[c]
            after, _ = base.run(ids, vector, {module: change})
            assert row[i] == pytest.approx(after - before, abs=1e-4), c.name


def test_an_expert_changed_upstream_only_is_all_relay(pair, batch):
    """Where the component's own weights are the base's, the weight patch is nothing and activation is relay."""
    upstream = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, ["embed", "L0"]))
    found = cells(pair, make_anchor(pair, LAYER).metric_along(batch), upstream)
    parts = two_by_two(found)
    assert np.abs(found["exact"]).max() < 1e-5
    assert np.abs(parts["source"]).max() < 2e-5
    np.testing.assert_allclose(parts["relay"], found["activation"], atol=2e-5)
    assert (np.abs(parts["relay"]).max(1) > 1e-4).all()


def test_an_expert_changed_in_one_component_is_all_source(pair, batch):
    """Where the input is the base's, activation patching is weight patching and the relay is nothing."""
    metric = make_anchor(pair, LAYER).metric_along(batch)
    for i, c in enumerate(of_the_layer(pair)):
        if c.index > 0:
            continue
        found = cells(pair, metric, materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, [c])))
        np.testing.assert_allclose(found["activation"][i], found["exact"][i], atol=2e-5, err_msg=c.name)
        assert np.abs(found["relay"][i]).max() < 1e-5, c.name


def test_the_cells_add_up(pair, batch):
    found = cells(pair, make_anchor(pair, LAYER).metric_along(batch))
    parts = two_by_two(found)
    np.testing.assert_allclose(parts["source"] + parts["relay"], found["activation"], atol=1e-12)
    whole = found["exact"] + found["relay"] + parts["interaction"]
    np.testing.assert_allclose(whole, found["activation"], atol=1e-12)


def test_neurons_of_the_layer_that_is_read_add_up_to_their_mlp(pair, batch):
    """There the metric is linear in what they write; the MLP has its output bias besides."""
    metric = make_anchor(pair, LAYER).metric_along(batch)
    bias = {"mlp_bias": jnp.ones(pair.cfg.n_layers, bool)} if pair.cfg.mlp_bias else {}
    expert = materialize(pair.expert, pair.base, PatchMask(bias))
    neurons = enumerate_components(pair.cfg, ["neuron"], [LAYER])
    for sides in (("donor", "donor"), ("host", "donor")):
        each = cell(pair, metric, neurons, *sides, donor=expert)
        whole = cell(pair, metric, [Component("mlp", LAYER)], *sides, donor=expert)
        np.testing.assert_allclose(each.sum(0), whole[0], atol=1e-4)
        screen = output_linearised(pair.cfg, pair.base, expert, neurons, metric, weights=sides[0], inputs=sides[1])
        np.testing.assert_allclose(screen, each, atol=2e-5)


def test_attribution_patching_approaches_activation_patching(pair, batch):
    metric = make_anchor(pair, LAYER).metric_along(batch)
    near = jax.tree.map(lambda b, e: b + 1e-2 * (e - b), pair.base, pair.expert)
    components = of_the_layer(pair)
    effect = cell(pair, metric, components, "donor", "donor", donor=near)
    got = output_linearised(pair.cfg, pair.base, near, components, metric, inputs="donor")
    for kind in kinds_of(pair):
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        error = np.abs(got[mine] - effect[mine]).max() / np.abs(effect[mine]).max()
        assert error < 0.06, (kind, error)
