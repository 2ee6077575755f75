"""RULER's 13 tasks made a second time, from the paper and its published configurations alone, to check the first.

Nothing of `longspan.evals` is called: what is drawn, counted, placed and cut to length is written anew here, after
arXiv 2404.06654 (section 3, appendix B) and the figures of NVIDIA/RULER's `synthetic.yaml` and `constants.py`. The same
on both sides are the data (words, passages, prose: any would do) and the wording of what is asked, on which a small
model's answers depend much. It does not know models: it is told how to count tokens.
"""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

_DATA = Path(__file__).resolve().parents[1] / "src/longspan/evals/questions"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens of an answer (`tokens_to_generate`), by the first part of a task's name."""
NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"hay": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"value": "uuids"},
    "niah_multikey_1": {"keys": 4},
    "niah_multikey_2": {"hay": "needle"},
    "niah_multikey_3": {"hay": "needle", "key": "uuids", "value": "uuids"},
    "niah_multivalue": {"values": 4},
    "niah_multiquery": {"keys": 4, "queries": 4},
}
TASKS = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")


@dataclass(frozen=True)
class Question:
    """One question; its prompt is the context, what is asked, and the beginning of the answer."""

    task: str
    context: str
    asked: str
    prefix: str
    answers: tuple[str, ...]
    needles: tuple[str, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Tokens that an answer may take."""
        return TOKENS[self.task.partition("_")[0]]

    @property
    def any_counts(self) -> bool:
        """Whether one of the answers is enough (`string_match_part`); else the share of all counts."""
        return self.task.startswith("qa")

    def score(self, answer: str) -> float:
        """Return the share of the answers that stand in a text, case aside; of alternatives, whether one does."""
        there = [right.lower() in answer.lower() for right in self.answers]
        return float(any(there)) if self.any_counts else sum(there) / len(there)


@dataclass
class Maker:
    """Makes questions for one way of counting tokens."""

    count: Callable[[Question], int]
    """Tokens of a question's whole prompt."""
    plain: Callable[[str], int]
    """Tokens of a text."""
    rng: random.Random = field(default_factory=random.Random)

    def made(self, task: str, length: int) -> Question:
        """Return a question whose prompt and answer take at most `length` tokens, with as much haystack as fits."""
        draw = {"niah": self._niah, "vt": self._vt, "cwe": self._cwe, "fwe": self._fwe, "qa": self._qa}
        of_size = draw[task.partition("_")[0]](task, length)
        return of_size(largest(lambda size: self.count(of_size(size)) + of_size(size).max_tokens, length))

    def _niah(self, task: str, _: int) -> Callable[[int], Question]:
        rng, config = (
            self.rng,
            {"hay": "essay", "key": "words", "value": "numbers", "keys": 1, "values": 1, "queries": 1},
        )
        config |= NIAH[task]
        keys = Endless(lambda: self._key(config["key"])).first(config["keys"])
        held = {key: [self._value(config["value"]) for _ in range(config["values"])] for key in keys}
        needles = [_needle(config["value"], key, value) for key, values in held.items() for value in values]
        rng.shuffle(needles)
        asked = rng.sample(keys, config["queries"])
        answers = tuple(value for key in asked for value in held[key])
        others = Endless(
            lambda: _needle(config["value"], self._key(config["key"]), self._value(config["value"])), taken=keys
        )
        start, depths, places = rng.random(), rng.sample(range(40), len(needles)), rng.getrandbits(60)
        kind = config["value"] if len(answers) > 1 else config["value"][:-1]
        several = len(answers) > 1
        who = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        head = f"Some special magic {kind} are hidden in the text below. Keep them in mind: I will ask for them later."
        if not several:
            head = f"A special magic {kind} is hidden in the text below. Keep it in mind: I will ask for it later."

        def of_size(size: int) -> Question:
            if config["hay"] == "essay":
                text = _with(prose_from(start, size), needles, sorted(depths))
            else:
                lines = [_NOISE] * size if config["hay"] == "noise" else others.first(size)
                slots = sorted(random.Random(places).sample(range(size + len(needles)), len(needles)))
                for slot, needle in zip(slots, needles, strict=True):
                    lines.insert(slot, needle)
                text = "\n".join(lines)
            what = f"What are all the special magic {kind}" if several else f"What is the special magic {kind}"
            said = f"The special magic {kind} for {who} in the text above {'are' if several else 'is'}"
            return Question(
                task, f"{head}\n{text}\n", f"{what} for {who} in the text above?", said, answers, tuple(needles)
            )

        return of_size

    def _vt(self, task: str, _: int) -> Callable[[int], Question]:
        shown_chain, shown_value = self._chain(3)
        chain, value = self._chain(5)
        while value == shown_value:
            chain, value = self._chain(5)
        places = self.rng.getrandbits(60)

        def puzzle(names: list[str], value: str, size: int) -> tuple[str, str, str]:
            sources = [value, *(f"VAR {name}" for name in names[:-1])]
            told = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
            lines = [_NOISE] * size
            slots = sorted(random.Random(places).sample(range(size + len(told)), len(told)))
            for slot, line in zip(slots, told, strict=True):
                lines.insert(slot, line)
            text = "Follow the chain of variable assignments that is hidden in the text below.\n\n" + "\n".join(lines)
            asked = f"Question: Which variables have the value {value} in the text above? Name all of them."
            prefix = (
                f"Answer: By the chain of assignments in the text above, {len(names)} variables have the value "
                f"{value}. They are:"
            )
            return f"{text}\n", asked, prefix

        def solved(size: int) -> str:
            text, asked, prefix = puzzle(shown_chain, shown_value, size)
            return f"{text}{asked} {prefix} {' '.join(shown_chain)}\n\n"

        before = solved(largest(lambda size: self.plain(solved(size)), 500))

        def of_size(size: int) -> Question:
            text, asked, prefix = puzzle(chain, value, size)
            return Question(task, before + text, asked, prefix, tuple(chain))

        return of_size

    def _chain(self, letters: int) -> tuple[list[str], str]:
        names: list[str] = []
        while len(names) < 5:
            name = "".join(self.rng.choice(ascii_uppercase) for _ in range(letters))
            if name not in names:
                names.append(name)
        return names, str(self.rng.randrange(10000, 100000))

    def _cwe(self, task: str, length: int) -> Callable[[int], Question]:
        short = length < 4096
        asked = "Question: Which 10 words stand most often in the list above?"
        prefix = "Answer: The 10 words that stand most often in the list are:"
        (shown, right), size = self._list(*((3, 1) if short else (10, 3))), 20 if short else 40
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(right, 1))
        before = f"{shown(size - 10)}{asked} {prefix} {numbered}\n\n"
        told, answers = self._list(*((6, 1) if short else (30, 3)))
        return lambda size: Question(task, before + told(size), asked, prefix, tuple(answers))

    def _list(self, often: int, seldom: int) -> tuple[Callable[[int], str], list[str]]:
        """Return what makes a list of ten common words and so many others, and the common ones."""
        rng, found, single = self.rng, list[str](), words("adjectives", "nouns", "verbs")
        while len(found) < 10:
            word = rng.choice(single)
            if all(word not in other and other not in word for other in found):
                found.append(word)
        rest = [word for word in rng.sample(single, len(single)) if not any(common in word for common in found)]
        pairs = Endless(lambda: f"{rng.choice(words('adjectives'))}-{rng.choice(words('nouns'))}", taken=found)
        places = rng.getrandbits(60)

        def told(size: int) -> str:
            others = rest[:size] if size <= len(rest) else [*rest, *pairs.first(size - len(rest))]
            listed = [word for word in found for _ in range(often)] + [word for word in others for _ in range(seldom)]
            random.Random(places).shuffle(listed)
            return (
                "Below is a numbered list of words, some of which stand in it more often than others. Keep in mind "
                f"those that stand in it most often.\n{' '.join(f'{i}. {word}' for i, word in enumerate(listed, 1))}\n"
            )

        return told, found

    def _fwe(self, task: str, length: int) -> Callable[[int], Question]:
        vocabulary = ["..."]
        while len(vocabulary) < (length - TOKENS["fwe"]) // 50:
            word = "".join(self.rng.choice(ascii_lowercase) for _ in range(6))
            if word not in vocabulary:
                vocabulary.append(word)
        whole, places = 3.14159265358979**2 / 6, self.rng.getrandbits(60)  # zeta(2)

        def of_size(size: int) -> Question:
            # A unit is so many words that each of the three asked for is ahead of the next one.
            listed = [w for rank, w in enumerate(vocabulary, 1) for _ in range(int((size + 80) / rank**2 / whole))]
            random.Random(places).shuffle(listed)
            text = (
                "Below is a coded text. Count how often each coded word stands in it, and find the three most frequent "
                f"ones. {' '.join(listed)}\n"
            )
            asked = (
                "Question: Explain nothing, and leave out the dots '...'. Which three words are the most frequent in "
                "the coded text above?"
            )
            said = "Answer: By the coded text above, the three most frequent words are:"
            return Question(task, text, asked, said, tuple(vocabulary[1:4]))

        return of_size

    def _qa(self, task: str, _: int) -> Callable[[int], Question]:
        rng, documents, one, two = self.rng, *passages()
        asked, answers, needs, article = rng.choice(one if task == "qa_1" else two)
        # Those of the same article first, then any others.
        apart = [
            [text for i, text in enumerate(documents) if i not in needs and (i in article) == near] for near in (1, 0)
        ]
        rest = [text for some in apart for text in rng.sample(some, len(some))]
        places = rng.getrandbits(60)
        how = "Answer the question from the documents {}. Give the answer alone and no other words."

        def of_size(size: int) -> Question:
            # RULER tells the same documents again where there are too few.
            others = [rest[i % len(rest)] for i in range(size)]
            told = [*(documents[i] for i in needs), *others]
            random.Random(places).shuffle(told)
            text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(told, 1))
            context = f"{how.format('below')}\n\nThese are the documents.\n\n{text}\n\n"
            question = f"{how.format('above')}\n\nQuestion: {asked}"
            return Question(task, context, question, "Answer:", answers, tuple(documents[i] for i in needs))

        return of_size

    def _key(self, kind: str) -> str:
        if kind == "uuids":
            return self._value(kind)
        return f"{self.rng.choice(words('adjectives'))}-{self.rng.choice(words('nouns'))}"

    def _value(self, kind: str) -> str:
        if kind == "uuids":
            return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        return str(self.rng.randrange(10**6, 10**7))


class Endless:
    """Texts that are drawn as they are needed, none twice, and kept."""

    def __init__(self, draw: Callable[[], str], taken: Sequence[str] = ()) -> None:
        """Draw nothing yet; none that holds one of `taken`."""
        self._draw, self._taken, self._kept = draw, taken, dict[str, None]()

    def first(self, count: int) -> list[str]:
        """Return the first so many."""
        while len(self._kept) < count:
            text = self._draw()
            if not any(word in text for word in self._taken):
                self._kept[text] = None
        return list(self._kept)[:count]


def largest(tokens: Callable[[int], int], limit: int) -> int:
    """Return the greatest size whose tokens do not pass a limit; tokens grow with the size."""
    low, high = 0, 16
    assert tokens(low) <= limit, "the smallest question is too long"
    while tokens(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= limit else (low, middle)
    return low


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """Return the words of these kinds."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^\[", (_DATA / "words.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("]")
        found[name] = [word for line in text.splitlines() if not line.startswith("#") for word in line.split()]
    return tuple(sorted({word for kind in kinds for word in found[kind]}))


@cache
def passages() -> tuple[list[str], list[Any], list[Any]]:
    """Return documents, and questions that need one or two of them: text, answers, indexes, those of the article."""
    documents: list[str] = []
    one: list[Any] = []
    two: list[Any] = []
    for article in json.loads((_DATA / "passages.json").read_text(encoding="utf-8"))["articles"]:
        first = len(documents)
        own = range(first, first + len(article["passages"]))
        for text, asked in article["passages"]:
            one += [(question, tuple(answers), [len(documents)], own) for question, answers in asked]
            documents.append(text)
        two += [(question, tuple(answers), [first + i for i in at], own) for question, answers, at in article["hops"]]
    return documents, one, two


@cache
def prose() -> list[str]:
    """Return the words of the prose in which needles are hidden: Python's language reference."""
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics)).split()


def prose_from(start: float, count: int) -> list[str]:
    """Return so many words of prose that begin at a share of it."""
    every = prose()
    first = int(start * len(every))
    return [every[(first + i) % len(every)] for i in range(count)]


def _with(text: list[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Return words with each needle behind the sentence that ends nearest to its depth, in 39ths."""
    ends = [0, *(i for i, word in enumerate(text, 1) if word[-1] in ".!?"), len(text)]
    at = [min(ends, key=lambda end: abs(end - depth / 39 * len(text))) for depth in depths]
    out: list[str] = []
    done = 0
    for place, needle in zip(at, needles, strict=True):
        out += [*text[done:place], needle]
        done = place
    return " ".join([*out, *text[done:]])


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."
