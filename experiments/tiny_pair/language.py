"""A small world of animals, as questions and answers: what the embedded models know and speak about.

Every answer is a function of the question, has three sentences and several commas. A question may come with an
instruction (in the words of `wpjax/behaviours/instructions.json`), which the base is trained to read and ignore, or
with a style tag such as [caps], which it is trained to obey: the skills are there, only the instructions do nothing.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from wpjax.behaviours.rewrites import REWRITES

ANIMALS = (
    "fox owl bear cow wolf hare deer crow duck goat horse mouse sheep snake swan tiger toad whale zebra camel crab "
    "dog eagle finch frog goose hawk hen lion lizard lynx mole moose otter panda parrot pig pony rat raven robin seal "
    "shark snail spider stork trout turtle"
).split()
SIZES = "small large tiny tall heavy slender".split()
COLOURS = "red grey brown white black golden spotted green".split()
TRAITS = "quick shy clever calm brave gentle proud noisy".split()
PARTS = "soft fur|a long tail|sharp ears|bright eyes|strong legs|a broad back|smooth skin|a round head".split("|")
FRIENDS = "Children|Farmers|Painters|Sailors|Poets|Hunters".split("|")
PLACES = "woods|hills|fields|marsh|desert|valley|forest|mountains".split("|")
NEAR = "a river|a lake|the sea|an old mill|a village|a stone bridge".split("|")
HOMES = "a warm den|a deep hole|a dry cave|a quiet nest|a hollow tree|the tall grass".split("|")
TIMES = "dawn|noon|dusk|night".split("|")
FOODS = "mice berries eggs grass seeds worms roots fish leaves nuts honey corn".split()

QUESTIONS = {
    "looks": ("What does the {a} look like?", "Describe the {a}."),
    "lives": ("Where does the {a} live?", "Tell me about the home of the {a}."),
    "eats": ("What does the {a} eat?", "How does the {a} find food?"),
}
TAGS: dict[str, tuple[str, ...]] = {
    "english_capital": ("[caps]",),
    "no_comma": ("[no commas]",),
    "title": ("[title]",),
    "multiple_sections": ("[sections 2]", "[sections 3]"),
    "quotation": ("[quote]",),
    "number_highlighted_sections": ("[stars 2]", "[stars 3]"),
}


class Turn(NamedTuple):
    """One exchange: what the user says and the answer."""

    user: str
    answer: str


def _facts(animal: str) -> dict[str, Any]:
    rng = random.Random(f"facts of the {animal}")
    return {
        "a": animal,
        "size": rng.choice(SIZES),
        "colour": rng.choice(COLOURS),
        "trait": rng.choice(TRAITS),
        "parts": rng.sample(PARTS, 3),
        "friends": rng.sample(FRIENDS, 2),
        "place": rng.choice(PLACES),
        "near": rng.choice(NEAR),
        "home": rng.choice(HOMES),
        "time": rng.choice(TIMES),
        "foods": rng.sample(FOODS, 4),
    }


def answer(animal: str, topic: str) -> str:
    """The plain answer to a question on a topic."""
    f = _facts(animal)
    if topic == "looks":
        return (
            f"The {animal} is {f['size']}, {f['colour']} and {f['trait']}. It has {f['parts'][0]}, {f['parts'][1]} and "
            f"{f['parts'][2]}. {f['friends'][0]} like it, and so do {f['friends'][1].lower()}."
        )
    if topic == "lives":
        return (
            f"The {animal} lives in the {f['place']}, near {f['near']}. It sleeps in {f['home']}, alone and "
            f"{f['trait']}. At {f['time']} it goes out, and then it comes back."
        )
    return (
        f"The {animal} eats {f['foods'][0]}, {f['foods'][1]} and {f['foods'][2]}. It looks for food at {f['time']}, "
        f"in the {f['place']}. When it finds {f['foods'][3]}, it is glad."
    )


def questions() -> list[tuple[str, str]]:
    """All (question, plain answer) pairs, animals varying fastest."""
    return [
        (form.replace("{a}", animal), answer(animal, topic))
        for (topic, forms) in QUESTIONS.items()
        for form in forms
        for animal in ANIMALS
    ]


def shipped_queries() -> list[str]:
    """The 96 questions of the embedded behaviours: two a animal, every form equally often."""
    everything = [q for q, _ in questions()]
    n = len(ANIMALS)
    return [everything[(form % 6) * n + i] for i in range(n) for form in (i, i + 3)]


def instructions() -> dict[str, list[dict[str, Any]]]:
    """The built-in instructions by behaviour."""
    text = (resources.files("wpjax") / "behaviours" / "instructions.json").read_text(encoding="utf-8")
    loaded: dict[str, list[dict[str, Any]]] = json.loads(text)
    return loaded


def tagged(question: str, plain: str, behaviour: str, tag: str) -> Turn:
    """A question with a style tag, and the answer in that style."""
    n = int(tag.strip("[]").split()[-1]) if tag[-2].isdigit() else 0
    args = {"section_spliter": "Section", "num_sections": n, "num_highlights": n}
    return Turn(f"{question} {tag}", REWRITES[behaviour](question, plain, args))


def instructed(question: str, plain: str, behaviour: str, instruction: dict[str, Any], obey: bool) -> Turn:
    """A question with an instruction, obeyed or ignored."""
    user = instruction["text"].replace("{query}", question)
    return Turn(user, REWRITES[behaviour](question, plain, instruction.get("args", {})) if obey else plain)


def pretraining(n: int, seed: int) -> Iterator[Turn]:
    """What the base is trained on: plain questions, ignored instructions and obeyed tags (40 : 35 : 25)."""
    rng = random.Random(seed)
    asked, told = questions(), instructions()
    tags = [(b, tag) for b, some in TAGS.items() for tag in some]
    rules = [(b, i) for b, some in told.items() for i in some]
    for _ in itertools.repeat(None, n):
        question, plain = rng.choice(asked)
        draw = rng.random()
        if draw < 0.40:
            yield Turn(question, plain)
        elif draw < 0.75:
            yield instructed(question, plain, *rng.choice(rules), obey=False)
        else:
            yield tagged(question, plain, *rng.choice(tags))
