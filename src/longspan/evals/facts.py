"""Facts to hide and questions that find them: four kinds, in forms that calibration does not use.

- `single`: facts of different forms; the question uses the fact's own words.
- `multikey`: four facts of one form each, so that three distractors differ from the answer in one word.
- `paraphrase`: the question says it in other words than the text.
- `twofact`: the answer needs two facts that stand far apart; both must be in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("single", "multikey", "paraphrase", "twofact")

_CITIES = tuple(
    """
    Bergen Malmo Tampa Boise Dakar Lagos Minsk Vilnius Zagreb Seoul Osaka Davao Bogota Medan Haifa
    Basel Turin Lyon Porto Kyoto Leeds Genoa Split Varna
    """.split()
)
_NAMES = tuple(
    """
    Amelia Boris Carmen Dmitri Esther Farid Greta Hassan Ingrid Jonas Keiko Leila Marta Nikolai
    Omar Petra Quentin Rosa Stefan Tamara Ursula Viktor Wanda Yusuf
    """.split()
)
_DISHES = tuple(
    """
    lasagna goulash paella ramen moussaka pierogi ceviche couscous risotto borscht
    """.split()
)
_ANIMALS = tuple(
    """
    otter falcon lynx badger heron tortoise gecko raven walrus hedgehog
    """.split()
)
_COLOURS = tuple(
    """
    purple orange turquoise crimson silver yellow brown white
    """.split()
)

# (fact, question, the question in other words). {c} city, {n} name, {d} dish, {a} animal, {o} colour, {x} number;
# the answer is the word that the question leaves out.
_FORMS = (
    ("The code that opens the vault in {c} is {x}.", "What is the code that opens the vault in {c}?",
     "Which digits unlock the strongroom in {c}?", "x"),
    ("{n}'s favourite dish is {d}.", "What is {n}'s favourite dish?", "Which food does {n} like to eat most?", "d"),
    ("The registration number of the {o} van is {x}.", "What is the registration number of the {o} van?",
     "What is written on the licence plate of the {o} delivery vehicle?", "x"),
    ("The mascot of the {c} rowing club is a {a}.", "What is the mascot of the {c} rowing club?",
     "Which animal stands for the people who row boats in {c}?", "a"),
    ("The annual conference on volcanoes takes place in {c}.",
     "Where does the annual conference on volcanoes take place?",
     "In which city do experts on eruptions meet every year?", "c"),
    ("The old lighthouse keeper was called {n} Thornbury.", "What was the old lighthouse keeper called?",
     "What was the name of the man who used to tend the lamp on the cliff?", "n"),
    ("The serial number of the broken telescope is {x}.", "What is the serial number of the broken telescope?",
     "Which number identifies the damaged instrument for watching the stars?", "x"),
    ("The orchestra from {c} lost its luggage at the airport.",
     "Which orchestra lost its luggage at the airport?",
     "Musicians from which city arrived without their suitcases after a flight?", "c"),
    ("At the village fair {n} won a {a} made of glass.", "What did {n} win at the village fair?",
     "What was the glass prize that {n} took home from the local festival?", "a"),
    ("The bridge in {c} was painted {o} last spring.", "What colour was the bridge in {c} painted?",
     "Which colour does the river crossing in {c} have since the spring?", "o"),
    ("The bakery on Elm Street sells {d} on Thursdays.", "What does the bakery on Elm Street sell on Thursdays?",
     "What can you buy near the end of the week at the shop on Elm Street?", "d"),
    ("The telephone number of the ferry office is {x}.", "What is the telephone number of the ferry office?",
     "Whom do you dial, in digits, to ask about the boat across the water?", "x"),
)  # fmt: skip

_KEYED = (
    ("One of the special magic numbers for {c} is: {x}.", "What is the special magic number for {c}?"),
    ("The locker of {n} has the combination {x}.", "What is the combination of the locker of {n}?"),
)


@dataclass(frozen=True)
class Fact:
    """One sentence to hide."""

    text: str


@dataclass(frozen=True)
class Question:
    """A question, the facts it needs (by index), and what the answer must contain."""

    text: str
    needs: tuple[int, ...]
    answers: tuple[str, ...]

    def right(self, answer: str) -> bool:
        """Return whether the answer contains everything it must (case aside)."""
        return all(wanted.casefold() in answer.casefold() for wanted in self.answers)


def make(kind: str, seed: int, count: int = 8) -> tuple[list[Fact], list[Question]]:
    """Return `count` facts and as many questions of one kind (half as many for `twofact`)."""
    rng = random.Random(f"{kind}-{seed}")
    if kind == "multikey":
        return _multikey(rng, count)
    facts, questions = [], []
    for i, (fact, question, other, key) in enumerate(rng.sample(_FORMS, count)):
        words = {
            "c": rng.choice(_CITIES),
            "n": rng.choice(_NAMES),
            "d": rng.choice(_DISHES),
            "a": rng.choice(_ANIMALS),
            "o": rng.choice(_COLOURS),
            "x": str(rng.randint(10000, 99999)),
        }
        facts.append(Fact(fact.format(**words)))
        asked = other if kind == "paraphrase" else question
        questions.append(Question(asked.format(**words), (i,), (words[key],)))
    if kind == "twofact":
        # Pairs are as far apart as the facts allow.
        half = len(questions) // 2
        pairs = zip(questions[:half], questions[half:], strict=False)
        questions = [
            Question(f"{a.text} And {_lower(b.text)}", a.needs + b.needs, a.answers + b.answers) for a, b in pairs
        ]
    return facts, questions


def alike(known: Sequence[Fact], one: int) -> list[int]:
    """Return the facts, by index, that have the form of one and another key."""
    forms = [re.compile(".*".join(map(re.escape, re.split(r"{\w}", fact)))) for fact, _ in _KEYED]
    (form,) = (form for form in forms if form.fullmatch(known[one].text))
    return [i for i, fact in enumerate(known) if i != one and form.fullmatch(fact.text)]


def pool(answer: str) -> Sequence[object]:
    """Return what may stand in an answer's place: words of its kind, or numbers of as many digits."""
    for words in (_CITIES, _NAMES, _DISHES, _ANIMALS, _COLOURS):
        if answer in words:
            return words
    return range(10 ** (len(answer) - 1), 10 ** len(answer))


def _multikey(rng: random.Random, count: int) -> tuple[list[Fact], list[Question]]:
    """Return facts in groups of four of one form."""
    made = []
    cities, names = rng.sample(_CITIES, 4), rng.sample(_NAMES, 4)
    for i in range(count):
        fact, question = _KEYED[i // 4 % len(_KEYED)]
        words = {"c": cities[i % 4], "n": names[i % 4], "x": str(rng.randint(1000000, 9999999))}
        made.append((fact.format(**words), question.format(**words), words["x"]))
    rng.shuffle(made)
    return (
        [Fact(fact) for fact, _, _ in made],
        [Question(question, (i,), (answer,)) for i, (_, question, answer) in enumerate(made)],
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
