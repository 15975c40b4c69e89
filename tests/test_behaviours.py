"""Checkers cell by cell against if-verifiable, rewrites against checkers, splits and encodings."""

import itertools
import json
import re
import signal

import numpy as np
import pytest
from if_verifiable.common import evaluate_instructions
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

from wpjax.behaviours import BUILT_IN, behaviour, checkers, loose, parse_checker, strict
from wpjax.behaviours.checkers import CHECKERS, multiple_sections
from wpjax.behaviours.prompts import SPLITS
from wpjax.errors import BehaviourError

IDS = {
    "no_comma": "punctuation:no_comma",
    "title": "detectable_format:title",
    "multiple_sections": "detectable_format:multiple_sections",
    "quotation": "startend:quotation",
    "number_highlighted_sections": "detectable_format:number_highlighted_sections",
    "english_capital_official": "change_case:english_capital",
}
ARGS = {
    "multiple_sections": [
        {"section_spliter": s, "num_sections": n} for s in ("Section", "SECTION ") for n in (1, 2, 3)
    ],
    "number_highlighted_sections": [{"num_highlights": n} for n in (1, 2, 3)],
}
PIECES = [
    "",
    "plain words",
    "one, two",
    "<<a title>>",
    "<< >>",
    "<<broken\ntitle>>",
    "<<<<>>",
    '"quoted"',
    '"',
    '""',
    "“curly”",
    ' "spaced" ',
    "*high* and *low*",
    "**bold** words",
    "***",
    "* *",
    "*a\nb*",
    "Section 1\nfirst\nSection 2\nsecond",
    "Section1 Section2",
    "SECTION 1 x SECTION 2 y SECTION 3 z",
    "Section one",
    "THE OWL SLEEPS IN A WARM AND QUIET NEST UNDER THE OLD TREES BY THE RIVER AND WAKES AT NIGHT TO FIND SOME FOOD",
    "The owl sleeps",
    "123",
    "  \n ",
]


@pytest.mark.parametrize("name", IDS)
def test_checkers_equal_if_verifiable_cell_by_cell(name):
    import langdetect

    langdetect.DetectorFactory.seed = 0
    texts = PIECES + ["\n".join(pair) for pair in itertools.permutations(PIECES, 2)]
    for text, args in itertools.product(texts, ARGS.get(name, [{}])):
        results, _ = evaluate_instructions(text, [IDS[name]], [args], "", INSTRUCTION_DICT)
        expected = (results[0].strict_pass, results[0].loose_pass) if results else (False, False)
        # if-verifiable strips the response first (it removes "thinking"); IFEval's own checkers do not.
        got = tuple(bool(f(CHECKERS[name], text.strip(), args)) for f in (strict, loose))
        assert got == expected, (name, text, args)


def test_capitals_do_not_need_langdetect():
    assert strict(CHECKERS["english_capital"], "YES, 3 OWLS.", {})
    assert not strict(CHECKERS["english_capital"], "Yes", {})
    assert not strict(CHECKERS["english_capital"], "123", {})
    assert not strict(CHECKERS["english_capital"], " ", {})


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("prefix", ["", "tiny:"])
def test_every_rewrite_passes_its_checker_and_no_plain_answer_does(name, prefix):
    task = behaviour(prefix + name)
    answer = 'The fox is small, quick and red. It lives in the "woods", by a river. At night it hunts.'
    for pair in task.pairs:
        assert strict(task.checker, task.rewrite(pair.without, answer, pair.args), pair.args)
        assert not strict(task.checker, answer, pair.args)


@pytest.mark.parametrize("name", BUILT_IN)
def test_enough_prompts_and_splits_by_query(name):
    task = behaviour(name)
    queries = {p.query for p in task.pairs}
    assert len(queries) >= 64
    assert len(task.pairs) >= 4 * len(queries)
    parts = [{p.query for p in task.select(split)} for split in SPLITS]
    assert set.union(*parts) == queries
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    few = task.select("sweep", 32)
    assert len({p.query for p in few}) == 32
    assert len({p.with_instruction.replace(p.without, "") for p in few}) == 4


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_users_file_in_both_forms(tmp_path):
    lines = [{"with": f"Q{i}? Shout.", "without": f"Q{i}?"} for i in range(12)]
    lines += [{"prompt": "Q0?", "instruction": "Yell.", "args": {"n": 2}, "response": "AH"}]
    task = behaviour(write(tmp_path / "mine.jsonl", *lines), "regex:^[A-Z ]+$")
    assert [p.query for p in task.pairs] == [*range(12), 0]
    assert task.pairs[12].with_instruction == "Q0? Yell."
    assert (task.pairs[12].args, task.pairs[12].response) == ({"n": 2}, "AH")
    assert strict(task.checker, "SHOUT", {})
    assert not strict(task.checker, "shout", {})


GOOD = [{"with": f"Q{i}? Shout.", "without": f"Q{i}?"} for i in range(12)]


def test_only_newlines_end_a_line_and_a_byte_order_mark_is_not_text(tmp_path):
    lines = [{"with": f"Q{i}?\u2028Shout.\x85", "without": f"Q{i}?"} for i in range(12)]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "mine.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert behaviour(tmp_path / "mine.jsonl").pairs[11].with_instruction == "Q11?\u2028Shout.\x85"


def test_checkers_are_tried_with_every_prompts_arguments(tmp_path):
    path = write(tmp_path / "mine.jsonl", *GOOD, {"with": "a b", "without": "a", "args": {"num_highlights": 2}})
    with pytest.raises(BehaviourError, match=r"fails with args {} \(KeyError: 'num_highlights'\)"):
        behaviour(path, "number_highlighted_sections").check_checker()
    with pytest.raises(BehaviourError, match="without a checker"):
        behaviour(path).check_checker()
    behaviour(path, "contains:x").check_checker()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "0 different queries, at least 12"),
        (GOOD[:1], "1 different query, at least 12"),
        ([*GOOD, "{oops"], "line 13: not JSON"),
        ([*GOOD, "[1]"], "line 13: expected a JSON object"),
        ([*GOOD, {"with": "a"}], "line 13: keys must be"),
        ([*GOOD, {"with": " ", "without": "b"}], "line 13: prompts must be text"),
        ([*GOOD, {"with": "b", "without": "b"}], "line 13: the prompt is the same"),
        ([*GOOD, {"with": "a", "without": 3}], "line 13: prompts must be text"),
        ([*GOOD, {"with": "a", "without": "b", "args": 1}], 'line 13: "args" must be'),
        ([*GOOD, {"prompt": "a", "instruction": None}], "line 13: prompts must be text"),
        ([*GOOD, '{"with": "a \\ud800", "without": "a"}'], "line 13: prompts must be text"),
        ([*GOOD, '{"with": "a b", "without": "a", "response": "\\ud800"}'], 'line 13: .*"response" text'),
        ([*GOOD, "[" * 100_000], "line 13: not JSON"),
    ],
)
def test_bad_files_say_which_line(tmp_path, lines, says):
    with pytest.raises(BehaviourError, match=says):
        behaviour(write(tmp_path / "bad.jsonl", *lines))


@pytest.mark.parametrize(
    "spec",
    ["regex:(", "regex:a{99999999999}", "contains:", "nosuchmodule:f", "json:nosuch", "..:f", "nonsense"],
)
def test_bad_checkers_are_refused(spec):
    with pytest.raises(BehaviourError, match="checker"):
        parse_checker(spec)


@pytest.mark.parametrize("spec", [r"regex:^(\w+\s?)*$", "regex:(a|aa)+$", "regex:(.*o){30}x"])
def test_a_pattern_that_does_not_end_is_refused_before_the_models_answer(spec, monkeypatch):
    monkeypatch.setattr(checkers, "PATTERN_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(
        BehaviourError, match=f"checker {re.escape(repr(spec))}: no end after 0.2 s on a text of .* cha"
    ):
        parse_checker(spec)
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == before


def test_what_does_not_end_on_some_text_only_is_refused_there(monkeypatch, tmp_path):
    monkeypatch.setattr(checkers, "PATTERN_SECONDS", 0.2)
    monkeypatch.setattr(checkers, "FUNCTION_SECONDS", 0.2)
    check, text = parse_checker(r"regex:^(\d+)+$"), "7" * 50 + "?"
    assert check("1234", {})
    with pytest.raises(BehaviourError, match=r"checker 'regex:.*': no end after 0.2 s on a text of 51 characters"):
        loose(check, f"A first line\n{text}", {})
    with pytest.raises(BehaviourError, match=r"section_spliter '\(7\+\)\+x': no end after 0.2 s"):
        multiple_sections(text, {"section_spliter": "(7+)+x", "num_sections": 2})
    (tmp_path / "waits.py").write_text(
        "def never(text):\n"
        "    while text:\n"
        "        try: len(text)\n"
        "        except Exception: pass  # it hears of no exception\n"
        "    return True\n"
    )
    monkeypatch.chdir(tmp_path)
    never = parse_checker("waits:never")
    assert never("", {})
    with pytest.raises(BehaviourError, match=r"checker 'waits:never': no end after 0.2 s on a text of 5 characters"):
        never("Hello", {})


def test_checkers_from_users():
    assert parse_checker("contains:owl")("an owl", {})
    assert parse_checker("keyword:iskeyword")("for", {})
    assert not parse_checker("keyword:iskeyword")("four", {})


def test_prompts_that_are_not_divided_serve_every_purpose(tmp_path):
    lines = [json.dumps({"with": f"{i}? Shout.", "without": f"{i}?"}) for i in range(5)]
    path = write(tmp_path / "few.jsonl", *lines)
    with pytest.raises(BehaviourError, match=r"5 different queries, at least 12 are needed .*--split none"):
        behaviour(path)
    task = behaviour(path, split="none")
    assert sorted(p.query for p in task.select("fit")) == [0, 1, 2, 3, 4]
    assert task.select("fit") == task.select("sweep") == task.select("test") == task.select("all")
    with pytest.raises(BehaviourError, match="3 different queries, at least 4 are needed"):
        behaviour(write(tmp_path / "fewer.jsonl", *lines[:3]), split="none")
    thirds = behaviour("tiny:title")
    parts = [{p.query for p in thirds.select(split)} for split in ("fit", "sweep", "test")]
    assert set.union(*parts) == {p.query for p in thirds.select("all")}
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_unknown_behaviours_and_missing_files(tmp_path):
    with pytest.raises(BehaviourError, match="unknown behaviour 'caps'"):
        behaviour("caps")
    with pytest.raises(BehaviourError, match="cannot be read"):
        behaviour(str(tmp_path / "none.jsonl"))
    with pytest.raises(BehaviourError, match="has its own checker"):
        behaviour("title", "contains:x")
    with pytest.raises(BehaviourError, match="without a checker"):
        behaviour(write(tmp_path / "mine.jsonl", *GOOD)).checker("text", {})


def test_encoding_goes_through_the_chat_template():
    from wpjax.pairs import load_model

    tokenizer = load_model("tiny:base").tokenizer
    batch = behaviour("tiny:title").encode(tokenizer, "sweep", 8)
    assert len(batch) == 8
    for text, ids, n, pair in zip(
        batch.texts, batch.with_instruction.ids, batch.with_instruction.lengths, batch.pairs, strict=True
    ):
        assert text == f"<|user|>{pair.with_instruction}<|end|><|assistant|>"
        assert tokenizer.decode(ids[:n]) == text
        assert not ids[n:].any()
    np.testing.assert_array_equal(batch.with_instruction.last, batch.with_instruction.lengths - 1)
    with pytest.raises(BehaviourError, match="takes 8; shorten"):
        batch.check_fits(8, 10**6)
    with pytest.raises(BehaviourError, match="outside the model's vocabulary"):
        batch.check_fits(10**6, 100)
    with pytest.raises(BehaviourError, match="too few"):
        behaviour("tiny:title").encode(tokenizer, "sweep", 1)


@pytest.mark.parametrize("body", ["raise RuntimeError('boom')", "raise SystemExit(3)", "def ("])
def test_a_module_that_fails_when_imported(tmp_path, monkeypatch, body):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_checker.py").write_text(body)
    with pytest.raises(BehaviourError, match="cannot be imported"):
        parse_checker("broken_checker:f")


def test_a_function_that_fails_on_some_text_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "picky_checker.py").write_text("def f(text):\n    return 1 / (len(text) - 3)\n")
    checker = parse_checker("picky_checker:f")
    assert checker("four", {})
    with pytest.raises(BehaviourError, match=r"picky_checker:f' fails on the text 'abc' \(ZeroDivisionError"):
        checker("abc", {})


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ '\\ud800' }}"],
)
def test_a_chat_template_that_fails(template):
    from wpjax.errors import CheckpointError
    from wpjax.pairs import load_model

    tokenizer = load_model("tiny:base").tokenizer
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match="the chat template fails"):
        behaviour("tiny:title").encode(tokenizer)
