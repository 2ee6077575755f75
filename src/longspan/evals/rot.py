"""Context rot: the same question, its answer in plain sight, while the context around it grows.

Hong, Troynikov and Huber, "Context Rot: How Increasing Input Tokens Impacts LLM Performance" (Chroma, 2025). As there:
a needle that answers the question almost in its words; no distractor, one or four, each of the needle's form and topic
but no answer to the question; a haystack of prose that is coherent, or whose sentences are shuffled. A question's
number stands for one question at every length and in every task: place in the prose, depths and values are the same, so
that lengths, distractors and order are compared on the same questions.

Here: questions, needles and distractors are written for this project (`_ITEMS`, 12 of them, with values drawn by seed),
and the score is whether the answer holds the needle's value. Chance: one of the values that may stand there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longspan.evals.questions.example import Draft, Eval, Setting, in_turn
from longspan.evals.questions.hiding import in_prose

_ADVICE = (
    "count every breath", "listen with the knees", "buy better goggles", "sit on both hands", "hum while waiting",
    "sleep before noon", "begin with the ending", "carry a spare button", "trust the slow clock", "walk home backwards",
)  # fmt: skip
_COLOURS = "scarlet turquoise amber violet ivory emerald crimson indigo saffron charcoal".split()
_CITIES = "Bergen Tampere Boise Dakar Minsk Zagreb Osaka Bogota Haifa Turin".split()
_FOODS = "lentil-soup plum-cake rye-bread goulash risotto dumplings borscht paella ramen pancakes".split()
_ANIMALS = "otter falcon lynx badger heron tortoise gecko raven walrus hedgehog".split()
_NUMBERS = tuple(str(n) for n in (1384, 2719, 3056, 4421, 5893, 6237, 7548, 8162, 9075, 9930))

# (question, needle, four distractors, what may stand in the gap).
_ITEMS = (
    ("What was the best advice that my swimming teacher gave me?",
     "The best advice that my swimming teacher gave me was to {}.",
     ("The best advice that my dancing teacher gave me was to {}.",
      "The worst advice that my swimming teacher gave me was to {}.",
      "The best advice that my swimming partner gave me was to {}.",
      "The best advice that my swimming teacher never gave me was to {}."), _ADVICE),
    ("What colour is the door of the post office in winter?",
     "In winter the door of the post office is {}.",
     ("In summer the door of the post office is {}.",
      "In winter the door of the police office is {}.",
      "In winter the roof of the post office is {}.",
      "In winter the letters in the post office are {}."), _COLOURS),
    ("In which city was the glass harmonica repaired?",
     "The glass harmonica was repaired in {}.",
     ("The glass harmonica was built in {}.",
      "The brass harmonium was repaired in {}.",
      "The glass harmonica was stolen in {}.",
      "The glass harmonica was almost repaired in {}."), _CITIES),
    ("What do the bell ringers eat after the evening practice?",
     "After the evening practice the bell ringers eat {}.",
     ("Before the evening practice the bell ringers eat {}.",
      "After the morning practice the bell ringers eat {}.",
      "After the evening practice the choir eats {}.",
      "After the evening practice the bell ringers sell {}."), _FOODS),
    ("Which animal is carved on the lid of the smaller chest?",
     "On the lid of the smaller chest a {} is carved.",
     ("On the lid of the larger chest a {} is carved.",
      "On the side of the smaller chest a {} is carved.",
      "On the lid of the smaller chest a {} is painted.",
      "On the lid of the smaller cupboard a {} is carved."), _ANIMALS),
    ("How many steps lead up to the old observatory?",
     "To the old observatory {} steps lead up.",
     ("To the new observatory {} steps lead up.",
      "To the old lighthouse {} steps lead up.",
      "From the old observatory {} steps lead down to the river.",
      "Around the old observatory {} stones are laid."), _NUMBERS),
    ("What was the captain's advice to the youngest sailor?",
     "The captain's advice to the youngest sailor was to {}.",
     ("The captain's advice to the oldest sailor was to {}.",
      "The cook's advice to the youngest sailor was to {}.",
      "The captain's order to the youngest sailor was to {}.",
      "The captain's advice to the youngest passenger was to {}."), _ADVICE),
    ("What colour was the second lantern on the ferry?",
     "The second lantern on the ferry was {}.",
     ("The third lantern on the ferry was {}.",
      "The second lantern on the pier was {}.",
      "The second flag on the ferry was {}.",
      "The second lantern on the ferry should have been {}."), _COLOURS),
    ("Where will the society of map collectors meet next spring?",
     "Next spring the society of map collectors will meet in {}.",
     ("Next autumn the society of map collectors will meet in {}.",
      "Last spring the society of map collectors met in {}.",
      "Next spring the society of stamp collectors will meet in {}.",
      "Next spring the society of map printers will meet in {}."), _CITIES),
    ("What did the baker's apprentice burn on the first day?",
     "On the first day the baker's apprentice burned the {}.",
     ("On the second day the baker's apprentice burned the {}.",
      "On the first day the baker burned the {}.",
      "On the first day the baker's apprentice tasted the {}.",
      "On the first day the miller's apprentice burned the {}."), _FOODS),
    ("Which animal does the night watchman keep in the tower?",
     "In the tower the night watchman keeps a {}.",
     ("In the cellar the night watchman keeps a {}.",
      "In the tower the bell founder keeps a {}.",
      "In the tower the night watchman once saw a {}.",
      "In the tower the day watchman keeps a {}."), _ANIMALS),
    ("What is the number of the locker by the north entrance?",
     "The number of the locker by the north entrance is {}.",
     ("The number of the locker by the south entrance is {}.",
      "The number of the bicycle by the north entrance is {}.",
      "The number of the locker by the north staircase is {}.",
      "The old number of the locker by the north entrance was {}."), _NUMBERS),
)  # fmt: skip
_DISTRACTORS = 4


@dataclass(frozen=True)
class Rot:
    """A question, its answer, and what looks like it."""

    distractors: int = 0
    shuffled: bool = False
    """Whether the prose's sentences stand in another order."""
    max_tokens: int = 24
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        source = setting.sources.words
        question, needle, others, pool = in_turn(_ITEMS, setting)
        # All is drawn whether it is used or not: tasks differ in nothing else.
        values = rng.sample(pool, 1 + _DISTRACTORS)
        order = rng.sample(range(_DISTRACTORS), _DISTRACTORS)[: self.distractors]
        depths = [rng.random() for _ in range(1 + _DISTRACTORS)]
        start, places = rng.randrange(len(source)), rng.getrandbits(64)
        told = [(depths[0], needle.format(values[0]))]
        told += [(depths[1 + i], others[i].format(values[1 + i])) for i in order]
        told.sort()
        hidden = [text for _, text in told]
        shuffled = places if self.shuffled else None
        hay = in_prose(source, start, hidden, [depth for depth, _ in told], shuffled=shuffled)
        head = "Read the text below. I will ask about something in it later.\n"
        return Draft(
            context=lambda count: f"{head}{hay(count)}\n",
            question=f"{question} Answer from the text above, in a few words.",
            answer_prefix="Answer:",
            outputs=(values[0],),
            least=len(hidden),
            needles=(needle.format(values[0]),),
            head=head,
            chance=1 / len(pool),
            guess=lambda own: own.choice(pool),
        )


_TASKS = {
    f"{kind}_{count}": Rot(count, kind == "shuffled")
    for kind in ("coherent", "shuffled")
    for count in (0, 1, _DISTRACTORS)
}

ROT = Eval(
    "rot",
    "the same question as the context around its answer grows",
    "Chroma 2025, Context Rot",
    version=1,
    tasks=_TASKS,
    paired=True,
    ordered=frozenset(_TASKS),
)
