"""The smallest patch: the search against brute force, harm against transformers, and the planted pair."""

import itertools
import json
from importlib import resources

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from wpjax.behaviours import behaviour
from wpjax.components import enumerate_components, n_parameters, parse_component
from wpjax.errors import WpjaxError
from wpjax.estimators.sets import add_set_score, set_metrics
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.extract import GoalMissed, extract
from wpjax.evaluation.harm import Neutral, perplexity, text_nll, windows_of
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.smallest import COARSE, drop_blocks, prefix_sizes, smallest_prefix
from wpjax.evaluation.trials import Trials, recovery
from wpjax.metrics.answers import kl_metric
from wpjax.pairs import load_pair, planted_components
from wpjax.patchfiles import load_patch
from wpjax.patching import PatchMask, materialize
from wpjax.results.sweep_result import SweepResult

KINDS = ("head", "kv_group", "neuron")
N_NEW = 12


# --- the search, on made-up tests of a set


def test_sizes_to_try_are_those_of_the_budgets():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 50, rng.integers(1, 40))
        budgets = np.geomspace(sizes[0], sizes.sum(), 16)
        expected = {max(1, max(k for k in range(len(sizes) + 1) if sizes[:k].sum() <= b + 1e-6)) for b in budgets}
        assert prefix_sizes(sizes, 16) == sorted(expected)


def test_the_shortest_beginning_is_that_of_brute_force():
    points = [1, 2, 4, 7, 12, 20, 40]
    for least in range(1, 42):
        asked = []

        def reaches(k, least=least, asked=asked):
            asked.append(k)
            return k >= least

        assert smallest_prefix(points, reaches) == min((p for p in points if p >= least), default=None)
        assert len(asked) == len(set(asked)) <= 4 or least > 40


def test_a_goal_that_the_whole_ranking_misses_is_looked_for_in_the_middle():
    points = list(range(1, 20))
    reached = range(5, 5 + COARSE)
    assert smallest_prefix(points, lambda k: k in reached) in reached
    assert smallest_prefix(points, lambda k: False) is None


def test_nothing_can_be_dropped_from_what_is_left():
    """Larger sets never do less; which are enough is random: each that holds one of a few."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 10))
        sizes = rng.integers(1, 20, n)
        enough = [set(rng.choice(n, rng.integers(1, min(n, 4) + 1), replace=False)) for _ in range(rng.integers(1, 4))]

        def reaches(members, enough=enough):
            return any(one <= set(members) for one in enough)

        found = drop_blocks(tuple(range(n)), sizes, reaches, most=1000)
        assert reaches(found)
        assert not any(reaches(rest) for k in range(len(found)) for rest in itertools.combinations(found, k))
        if len(enough) == 1:  # then the smallest of all subsets is known
            assert set(found) == enough[0]


def test_blocks_are_dropped_with_few_tests():
    """8 of 1,000 components are needed. Testing each alone takes 1,000 tests; no more are made than are allowed."""
    needed = {3, 4, 100, 101, 500, 700, 701, 999}
    asked = []

    def reaches(members):
        asked.append(members)
        return needed <= set(members)

    sizes = np.ones(1000, int)
    assert set(drop_blocks(tuple(range(1000)), sizes, reaches, most=200)) == needed
    assert len(asked) <= 130
    asked.clear()
    some = drop_blocks(tuple(range(1000)), sizes, reaches, most=20)
    assert len(asked) == 20
    assert needed <= set(some)
    assert len(some) < 600
    assert drop_blocks(tuple(range(1000)), sizes, reaches, most=0) == tuple(range(1000))


def test_recovery_by_hand():
    """Of eight queries with two phrasings each the expert passes all, the base those of the first."""
    queries = np.arange(16) // 2
    base, expert, passes = queries < 1, queries < 8, np.arange(16) < 9
    found = recovery(passes, base, expert, queries)
    assert found.mean == pytest.approx((9 - 2) / (16 - 2))
    assert 0 <= found.low < found.mean < found.high <= 1
    assert np.isnan(recovery(passes, base, base, queries).mean)


# --- harm, against transformers


def torch_model(name):
    with resources.as_file(resources.files("wpjax") / "assets" / "tiny" / name) as folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def torch_pair():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that more threads only wait for each other
    yield torch_model("base"), torch_model("expert")
    torch.set_num_threads(threads)


def test_divergence_is_that_of_transformers(tiny_pair, torch_pair):
    """Prompt by prompt: the base answers greedily, and both models read the answer."""
    task = behaviour("tiny:english_capital")
    batch = task.encode(tiny_pair.tokenizer, "test", 4)
    neutral = Neutral.of(tiny_pair, batch, max_new_tokens=5)
    found = neutral.divergence(tiny_pair, tiny_pair.expert)
    base, expert = torch_pair
    first = {query: i for i, query in reversed(list(enumerate(batch.queries.tolist())))}
    assert sorted(first) == neutral.queries.tolist()
    for query, value in zip(neutral.queries.tolist(), found, strict=True):
        row, n = batch.without.ids[first[query]], batch.without.lengths[first[query]]
        ids = torch.tensor(row[:n].astype(np.int64))[None]
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, base(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                if int(ids[0, -1]) in tiny_pair.stop_tokens:
                    break
            log_p, log_q = (m(ids).logits[0, n - 1 : -1].log_softmax(-1) for m in (base, expert))
        assert value == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), abs=1e-5)
    assert found.max() > 1e-6
    np.testing.assert_allclose(neutral.divergence(tiny_pair, tiny_pair.base), 0, atol=1e-5)


def test_perplexity_is_that_of_transformers(tiny_pair, torch_pair):
    text = " ".join(p.without for p in behaviour("tiny:title").pairs[:40])
    windows = windows_of(tiny_pair.tokenizer, text, tiny_pair.cfg.n_ctx)
    ids, width = tiny_pair.tokenizer(text)["input_ids"], tiny_pair.cfg.n_ctx
    expected = []
    for model in torch_pair:
        total = n = 0
        for row in (ids[i : i + width] for i in range(0, len(ids), width)):
            row = torch.tensor(row)[None]
            with torch.no_grad():
                total, n = total + float(model(row, labels=row).loss) * (row.shape[1] - 1), n + row.shape[1] - 1
        expected.append(np.exp(total / n))
    assert len(windows.n_predicted) > 1
    nll = {m: text_nll(tiny_pair.cfg, getattr(tiny_pair, m), windows) for m in ("base", "expert")}
    found = perplexity(nll | {"patched": nll["expert"]}, windows)
    assert found.n_tokens == n
    np.testing.assert_allclose([found.models["base"], found.models["expert"]], expected, rtol=1e-4)
    assert found.ratio.mean == pytest.approx(expected[1] / expected[0], rel=1e-4)
    assert found.ratio.low <= found.ratio.mean <= found.ratio.high


def test_windows_open_as_the_tokenizer_opens_a_text():
    words = {w: i for i, w in enumerate(["<s>", "</s>", "<unk>", "a", "b", "c"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    windows = windows_of(tokenizer, "a b c " * 30, n_ctx=32)
    ids, lengths = windows.tokens
    assert windows.n_opening == 1
    assert (ids[:, 0] == 0).all()
    assert [i for row, n in zip(ids, lengths, strict=True) for i in row[1:n]] == [3, 4, 5] * 30
    assert windows.n_predicted.sum() == 90
    with pytest.raises(WpjaxError, match=r"notes.txt has 3 tokens, at least 64"):
        windows_of(tokenizer, "a b c", 32, "notes.txt")


# --- the planted pair, whose truth is known


@pytest.fixture(scope="module")
def planted():
    return load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")


@pytest.fixture(scope="module")
def result(planted):
    """All heads, KV groups and neurons, ranked for sets by the divergence along the expert's answers."""
    pair, task = planted
    metric = kl_metric(pair, task.encode(pair.tokenizer, "sweep", 16), N_NEW)
    swept = sweep(pair, task.encode(pair.tokenizer, "sweep", 16), metric, kinds=KINDS, method="screen")
    return add_set_score(pair, swept, [metric])


@pytest.fixture(scope="module")
def parts():
    return {}


@pytest.fixture(scope="module")
def found(planted, result, parts):
    return extract(*planted, result, n_prompts=16, max_new_tokens=N_NEW, n_random=1, done=parts)


def size_of(pair, names):
    return sum(n_parameters(pair.cfg, parse_component(pair.cfg, name)) for name in names)


def test_what_is_extracted_was_planted(planted, found):
    pair, _ = planted
    names = [c.name for c in found.components]
    assert set(names) < set(planted_components())  # some are enough: the others do too little for the checker
    assert found.n_parameters == size_of(pair, names) <= size_of(pair, planted_components())
    assert found.share == found.n_parameters / size_of(pair, [c.name for c in enumerate_components(pair.cfg, KINDS)])
    assert found.recovery["patched"].high >= 0.9
    assert found.recovery["complement"].high <= 0.2
    assert found.recovery["random 1"].high <= 0.2
    assert f"bring back {found.recovery['patched'].mean:.0%}" in found.summary


def test_a_patch_of_half_as_many_again_holds_what_was_planted(planted, result):
    """By size, along the set score that a sweep makes: at least 90 % of the planted components within 1.5 times their
    parameters. The smallest patch that brings 90 % of the behaviour back holds fewer of them."""
    pair, task = planted
    usual = add_set_score(pair, result, set_metrics(pair, task.encode(pair.tokenizer, "sweep", 16), N_NEW))
    assert usual.set_ranking == "set_score"
    sizes = np.array([n_parameters(pair.cfg, parse_component(pair.cfg, str(n))) for n in usual.dataset["name"].values])
    np.testing.assert_allclose(usual.dataset["set_share"], usual.values("set_score") * sizes / sizes.sum(), rtol=1e-6)
    n_all, truth = size_of(pair, [c.name for c in enumerate_components(pair.cfg, KINDS)]), set(planted_components())
    most = 1.5 * size_of(pair, truth)
    by_size = extract(*planted, usual, share=most / n_all, n_prompts=4, max_new_tokens=N_NEW, n_random=0)
    names = {c.name for c in by_size.components}
    assert size_of(pair, names) <= most
    assert len(names & truth) >= 0.9 * len(truth)


def test_pass_rates_are_those_of_patched_models(planted, found):
    """The set in the base; everything else in the base, which is the expert with the base's set."""
    pair, task = planted
    judge = Judge(pair, task, task.encode(pair.tokenizer, "test", 16), N_NEW)
    mask = PatchMask.of(pair.cfg, found.components)
    patched, complement = materialize(pair.base, pair.expert, mask), materialize(pair.expert, pair.base, mask)
    for name, params in (("base", pair.base), ("patched", patched), ("complement", complement)):
        assert found.passes[name].mean == judge.passes(judge.answers(params)).mean()
    neutral = Neutral.of(pair, judge.batch, N_NEW)
    assert found.harm.divergence["patched"].mean == pytest.approx(neutral.divergence(pair, patched).mean(), abs=1e-7)


def test_the_search_says_what_it_tried(planted, found):
    """The set that is left is the smallest of those that reach the goal by their own figures."""
    reach = [t for t in found.tried if t.reaches]
    assert min(t.n_parameters for t in reach) == found.n_parameters
    assert all(t.recovery.mean >= found.goal - 1e-9 for t in reach)
    assert all(t.recovery.mean < found.goal for t in found.tried if t.n_prompts == 16 and not t.reaches)
    assert found.searched_on == ("sweep", 16)
    assert found.measured_on == ("test", 16)


def test_finished_parts_are_used(planted, result, found, parts):
    before = dict(parts)
    again = extract(*planted, result, n_prompts=16, max_new_tokens=N_NEW, n_random=1, done=parts)
    assert str(again) == str(found)  # NaN, too
    assert parts.keys() == before.keys()
    damaged = dict.fromkeys(parts, np.zeros(3))
    with pytest.raises(WpjaxError, match="damaged"):
        extract(*planted, result, n_prompts=16, max_new_tokens=N_NEW, done=damaged)


def test_hopeless_sets_answer_no_more_prompts_than_they_must(planted):
    pair, task = planted
    done = {}
    trials = Trials.of(Judge(pair, task, task.encode(pair.tokenizer, "sweep", 32), N_NEW), done)
    none = [parse_component(pair.cfg, "L5.neuron.0")]
    assert len(trials.passes(none, need=20)) == 16
    assert len(trials.passes(none)) == 32
    assert len(done) == 2


def test_a_goal_that_no_set_reaches_says_what_the_best_reached(planted, result):
    """Only components that were not planted are ranked."""
    inert = [i for i, n in enumerate(result.dataset["name"].values.tolist()) if n not in planted_components()]
    poor = SweepResult(result.dataset.isel(component=inert[:40]))
    with pytest.raises(GoalMissed, match=r"brings back 90% of .* the best, .* brings back 0% .*--recover") as error:
        extract(*planted, poor, n_prompts=16, max_new_tokens=N_NEW)
    assert error.value.tried
    assert not any(t.reaches for t in error.value.tried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover": 0.5, "top": 3}, "give one of recover, share and top"),
        ({"recover": 1.5}, "recover=1.5: above 0, and at most 1"),
        ({"share": 1e-7}, "share=1e-07: the best component, .* has .* by itself"),
        ({"top": 10**6}, "the ranking set_score has 2,656 components"),
        ({"by": "ig"}, "no ranking 'ig'"),
        ({"text": "too short"}, "the text has .* tokens, at least 64"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(planted, result, options, message):
    def working(what, done, total):
        raise AssertionError(f"{what} began")

    with pytest.raises(WpjaxError, match=message):
        extract(*planted, result, progress=working, **options)


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, result):
    """A folder with the result, a text, and prompts of the user's own."""
    folder = tmp_path_factory.mktemp("extract")
    result.to_netcdf(folder / "r.nc")
    queries = [p.without for p in behaviour("tiny:title").pairs]
    (folder / "notes.txt").write_text(" ".join(queries))
    lines = {json.dumps({"with": f"{q} Shout!", "without": q}) for q in queries}
    (folder / "mine.jsonl").write_text("\n".join(sorted(lines)))
    return folder


@pytest.fixture
def workplace(folder):
    return folder


SMALL = ["--n-prompts", "16", "--max-new-tokens", str(N_NEW), "--n-random", "1"]


def test_a_patch_is_extracted_by_the_command(wpjax, found, folder):
    more = ["--text", "notes.txt", "--others", "tiny:english_capital"]
    asked = ["extract", "r.nc", *SMALL, *more, "--out", "p.safetensors"]
    code, out, err = wpjax(*asked, "--dry-run")
    assert code == 0
    assert "sets along the ranking" in err
    assert not list(folder.glob("*p.safetensors*"))
    code, out, err = wpjax(*asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["components"] == [c.name for c in found.components]
    assert told["recovery"]["patched"]["mean"] == found.recovery["patched"].mean
    assert told["perplexity"]["n_tokens"] > 64
    itself = told["others"]["tiny:english_capital"]["passes"]
    assert itself == {name: told["passes"][name] for name in ("base", "patched", "expert")}
    patch = load_patch("p.safetensors")
    assert list(patch.info.components) == told["components"]
    assert patch.info.measured["recovery"] == told["recovery"]
    assert (told["encoding"], told["error"]) == ("exact", 0)
    code, out, _ = wpjax("extract", "r.nc", "--top", "3", "--int8", *SMALL, "--out", "top.safetensors")
    assert code == 0
    stored = load_patch("top.safetensors").info
    assert 0 < stored.error < 0.01
    assert f"wrote top.safetensors: {stored.encoding}, relative error {stored.error:.2g}" in out
    best = [row.name for row in SweepResult.from_netcdf("r.nc").top(3, by="set_score")]
    assert list(load_patch("top.safetensors").info.components) == best
    assert "wrote top.safetensors" in out


def test_what_the_command_refuses_leaves_nothing(wpjax, result, folder):
    inert = [i for i, n in enumerate(result.dataset["name"].values.tolist()) if n not in planted_components()]
    SweepResult(result.dataset.isel(component=inert[:40])).to_netcdf(folder / "inert.nc")
    before = sorted(folder.iterdir())
    small = [*SMALL, "--out", "x.safetensors"]
    for arguments, message in (
        (["r.nc", "--top", "2", "--share", "0.1"], "give one of recover, share and top"),
        (["r.nc", "--recover", "2"], "--recover"),
        (["r.nc", "--text", "absent.txt"], "absent.txt: cannot be read"),
        (["r.nc", "--others", "nothing"], "unknown behaviour 'nothing'"),
        (["r.nc", "--others", "mine.jsonl"], "mine.jsonl: no checker"),
        (["r.nc", "--behaviour", "mine.jsonl"], "without a checker"),
        (["inert.nc"], "no set along set_score that was tried brings back 90%"),
    ):
        code, _, err = wpjax("extract", *arguments, *small)
        assert code == 2
        assert message in err
        assert sorted(folder.iterdir()) == before
