"""How much of a text a needle model can tell, by length, kind of question and mechanism, read by the engine itself.

A text of an exact length is read once, in chunks, by the mechanism; each question is asked of a fork of that context.
It is right where every token of the answer is the likeliest behind those before it: what greedy decoding would say,
seen in one reading of question and answer. Seeds lie where training takes none
(`tasks.HELD_OUT`), and random guessing is right once in ten thousand codes. It does not know how models are trained.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from longspan.attention import Mechanism
from longspan.engine.kv_context import KVContext
from longspan.hf.model import CausalModel
from longspan.train.needle import tasks
from longspan.train.needle.tasks import Asked, Mix, Sequence_


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    attention: str
    length: int
    kind: str
    right: int
    count: int
    low: float
    """Ends of the 95 % interval of the share that is right (Wilson 1927)."""
    high: float
    read_seconds: float
    """Of one text, the median."""
    answer_seconds: float
    """Of one question with its answer, read at once, the median."""
    kept_bytes: int
    """Of a context after a text, the most."""
    texts: int
    """How many were read."""
    depths: tuple[tuple[int, int], ...]
    """Right ones and all of those whose fact stands in each fifth of the text, from its beginning."""


def evaluate(
    model: CausalModel,
    mechanisms: Sequence[Mechanism],
    lengths: Sequence[int],
    haystack: bytes,
    *,
    texts: int = 4,
    questions: int = 8,
    facts: int = 16,
    seed: int = 0,
    until: float = math.inf,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Line]]:
    """Yield, for each length and mechanism, a line for each kind of question and one of all kinds.

    Args:
        model: a needle model.
        mechanisms: by which it reads and answers.
        lengths: tokens of the texts.
        haystack: real text, repeated where it is shorter.
        texts: of each length.
        questions: asked about each.
        facts: most facts of a text.
        seed: which texts.
        until: `time.monotonic()` from which on no other text is begun; lines are of those that were read, if any.
        tell: told what is done.
    """
    for length in lengths:
        hay = haystack * (1 + length // max(1, len(haystack)))
        rng = random.Random(f"{seed} {length}")
        seeds = [tasks.HELD_OUT + rng.getrandbits(38) for _ in range(texts)]
        made = [tasks.make(s, length, hay, Mix(most_facts=facts), questions=questions) for s in seeds]
        for mechanism in mechanisms:
            tried = _Tried()
            for sequence in made:
                if time.monotonic() >= until:
                    break
                tried.text(model, mechanism, sequence)
            if not tried.read:
                continue
            lines = tried.lines(mechanism.describe(), length)
            tell(f"{length:,} tokens, {mechanism.describe()}: {lines[-1].right} of {lines[-1].count} right")
            yield lines


@dataclass
class _Tried:
    """Questions about some texts."""

    found: list[tuple[Asked, bool]] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    kept: int = 0

    def text(self, model: CausalModel, mechanism: Mechanism, sequence: Sequence_) -> None:
        """Read a text and ask its questions."""
        context = KVContext(model, mechanism)
        began = time.perf_counter()
        context.extend(sequence.tokens[: sequence.text])
        _settled(model)
        self.read.append(time.perf_counter() - began)
        self.kept = max(self.kept, context.nbytes)
        for asked in sequence.asked:
            began = time.perf_counter()
            start = asked.start - 1
            while sequence.tokens[start] != tasks.ASK:
                start -= 1
            right = _told(context.fork(), sequence.tokens[start : asked.start], asked.answer)
            self.answered.append(time.perf_counter() - began)
            self.found.append((asked, right))

    def lines(self, attention: str, length: int) -> list[Line]:
        """Return the lines of a table."""
        lines = []
        kinds = sorted({asked.kind for asked, _ in self.found}, key=tasks.KINDS.index)
        for kind in (*kinds, "all"):
            these = [(asked.depth, right) for asked, right in self.found if kind in (asked.kind, "all")]
            rights = sum(right for _, right in these)
            fifths = [[right for depth, right in these if depth >= 0 and min(4, int(5 * depth)) == i] for i in range(5)]
            counted = attention, length, kind, rights, len(these), *wilson(rights, len(these))
            depths = tuple((sum(each), len(each)) for each in fifths)
            times = median(self.read), median(self.answered)
            lines.append(Line(*counted, *times, self.kept, len(self.read), depths))
        return lines


def _settled(model: CausalModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _told(context: KVContext, question: Sequence[int], answer: Sequence[int]) -> bool:
    """Return whether greedy decoding would give an answer."""
    logits = context.score([*question, *answer[:-1]])
    return tuple(logits[len(question) - 1 :].argmax(-1).tolist()) == tuple(answer)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a share."""
    z = 1.959963984540054
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
