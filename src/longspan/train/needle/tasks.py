"""What the needle model learns from: real text with facts in it, then many questions about them, in bytes.

A fact is an assignment as settings files have them, ` nopek=4829; `; a question has marks of its own,
`<ask>nopek=4829<end>`. What a fact and its question share stands in the same letters directly before the answer, where
a layer that looks a few tokens back sees it (docs/training.md). Kinds of questions, all about facts of one text:

- `key`: one name, one code, among all the other names (with one fact in the text: a needle);
- `values`: a name with several codes, ` nopek+=4829; ` each, asked by `nopek+=` and told from the least to the
  greatest, `1132,4829`; their first digits differ, so that which comes next can be told from what was said, without
  knowing which stood first in the text;
- `chain`: `nopek=sulim;` and `sulim=7715;`, told link by link, `sulim=7715`;
- `none`: a name that is not in the text, `none`.

All questions stand behind the text, and none is asked twice: an answer could be copied from the earlier one, a few
tokens back. One sequence so teaches as many answers as there are facts. Everything follows from a seed: training and
evaluation take theirs from ranges that share none (`HELD_OUT`). It does not know models.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

START, ASK, END = 256, 257, 258
"""Token ids behind the 256 bytes."""
VOCABULARY = 259
KINDS = ("key", "values", "chain", "none")
HELD_OUT = 1 << 40
"""Seeds from here on are for evaluation alone."""
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
_MOST_VALUES, _MOST_LINKS = 3, 2
_FACT, _QUESTION = 16, 12
"""Tokens of a short fact, and of its question with the answer."""


@dataclass(frozen=True)
class Mix:
    """How a sequence is made up."""

    asked: int = 128
    """Tokens at the end of a sequence that are for questions; before them stands text with facts."""
    density: float = 1.0
    """Most facts, as a share of what the text would hold were it facts alone."""
    kinds: Sequence[str] = KINDS
    most_facts: int = 256


@dataclass(frozen=True)
class Asked:
    """A question as it stands in a sequence."""

    kind: str
    start: int
    """Where its answer's first token stands."""
    answer: tuple[int, ...]
    """Tokens, the end mark included."""
    depth: float
    """Where its fact (the last, of several) stands, as a share of the text; -1: nowhere."""


@dataclass(frozen=True)
class Sequence_:
    """Tokens, and the questions among them."""

    tokens: list[int]
    asked: tuple[Asked, ...]
    text: int
    """Tokens of the text; questions stand behind it."""


@dataclass(frozen=True)
class _Fact:
    kind: str
    name: str
    sentences: tuple[str, ...]
    answer: str


def make(seed: int, length: int, haystack: bytes, mix: Mix, *, questions: int | None = None) -> Sequence_:
    """Make a sequence of at most `length` tokens.

    Args:
        seed: the same gives the same.
        length: tokens; where `questions` is given, of the text alone.
        haystack: text to hide facts in.
        mix: how.
        questions: how many; None: as many as fit. Where they are more than the facts, these are asked about again.
    """
    rng = random.Random(seed)
    room = length if questions is not None else length - mix.asked
    most = max(1, min(mix.most_facts, int((room - 1) * mix.density / _FACT)))
    if questions is None:
        most = min(most, max(1, mix.asked // _QUESTION))
    facts, names = _facts(rng, room - 1, most, mix)
    text, places = _hidden(rng, room - 1, haystack, facts)
    tokens = [START, *text]
    asked: list[Asked] = []
    order = rng.sample(facts, len(facts))
    while questions is None or len(asked) < questions:
        if "none" in mix.kinds and rng.random() < 1 / (2 * len(mix.kinds)):
            kind, name, answer, depth = "none", _new(rng, names), "none", -1.0
        elif order:
            fact = order.pop()
            kind, name, answer, depth = fact.kind, fact.name, fact.answer, places[fact.name]
        elif questions is None:
            break
        else:
            order = rng.sample(facts, len(facts))
            continue
        before = [ASK, *f"{name}{'+' * (kind == 'values')}=".encode()]
        told = (*answer.encode(), END)
        if questions is None and len(tokens) + len(before) + len(told) > length:
            break
        tokens += before
        asked.append(Asked(kind, len(tokens), told, depth))
        tokens += told
    return Sequence_(tokens, tuple(asked), 1 + len(text))


def name_of(rng: random.Random) -> str:
    """Return a name that can be said: five letters."""
    return "".join(rng.choice(_VOWELS if i % 2 else _CONSONANTS) for i in range(5))


def _new(rng: random.Random, names: set[str]) -> str:
    """Return a name that is not among these, and add it to them."""
    while (name := name_of(rng)) in names:
        pass
    names.add(name)
    return name


def _facts(rng: random.Random, room: int, most: int, mix: Mix) -> tuple[list[_Fact], set[str]]:
    """Draw facts: `most`, or any smaller number, as often few as many."""
    count = round(most ** rng.random()) if rng.random() < 0.5 else most
    kinds = [kind for kind in mix.kinds if kind != "none"]
    names: set[str] = set()
    facts: list[_Fact] = []
    used = 0
    while len(facts) < count:
        kind, name = rng.choice(kinds), _new(rng, names)
        if kind == "values":
            firsts = sorted(rng.sample(range(10), rng.randint(2, _MOST_VALUES)))
            codes = [f"{first}{rng.randrange(1000):03d}" for first in firsts]
            sentences = tuple(_sentence(f"{name}+", code) for code in rng.sample(codes, len(codes)))
            answer = ",".join(codes)
        elif kind == "chain":
            links = [name, *(_new(rng, names) for _ in range(rng.randint(1, _MOST_LINKS)))]
            code = _code(rng)
            sentences = tuple(_sentence(a, b) for a, b in itertools.pairwise(links))
            sentences += (_sentence(links[-1], code),)
            answer = "=".join([*links[1:], code])
        else:
            code = _code(rng)
            sentences, answer = (_sentence(name, code),), code
        used += sum(map(len, sentences))
        if used > room and facts:
            break
        facts.append(_Fact(kind, name, sentences, answer))
    return facts, names


def _hidden(rng: random.Random, room: int, haystack: bytes, facts: list[_Fact]) -> tuple[bytes, dict[str, float]]:
    """Put the facts' sentences into a piece of the haystack; return the text and where each fact's last one stands."""
    # A fact's own sentences keep their order; those of different facts are shuffled together.
    turns = [i for i, fact in enumerate(facts) for _ in fact.sentences]
    rng.shuffle(turns)
    left = [list(fact.sentences) for fact in facts]
    order = [(i, left[i].pop(0)) for i in turns]
    filler = max(0, room - sum(len(sentence) for _, sentence in order))
    start = rng.randrange(max(1, len(haystack) - filler))
    hay = haystack[start : start + filler]
    cuts = sorted(rng.randint(0, len(hay)) for _ in order)
    text, places, before = bytearray(), {}, 0
    for (i, sentence), cut in zip(order, cuts, strict=True):
        text += hay[before:cut]
        places[facts[i].name] = len(text) / max(1, room)
        text += sentence.encode()
        before = cut
    return bytes(text + hay[before:]), places


def _sentence(name: str, told: str) -> str:
    return f" {name}={told}; "


def _code(rng: random.Random) -> str:
    return f"{rng.randrange(10000):04d}"
