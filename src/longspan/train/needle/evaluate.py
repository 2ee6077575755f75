"""How much of a text a needle model can tell, by length, kind of question and mechanism, read by the engine itself.

A text of an exact length is read once, in chunks, by the mechanism; each question is asked of a fork of that context,
and answered greedily. A question is right where the whole answer is. Seeds lie where training takes none
(`tasks.HELD_OUT`), and random guessing is right once in ten thousand codes. It does not know how models are trained.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.attention import Mechanism
from longspan.engine.kv_context import KVContext
from longspan.hf.model import CausalModel
from longspan.train.needle import tasks
from longspan.train.needle.tasks import END, Mix


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
    """Of one question, the median."""
    kept_bytes: int
    """Of a context after a text, the most."""


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
    tell: Callable[[str], None] = lambda _: None,
) -> list[Line]:
    """Return a line for each mechanism, length and kind of question, and one of all kinds.

    Args:
        model: a needle model.
        mechanisms: by which it reads and answers.
        lengths: tokens of the texts.
        haystack: real text, repeated where it is shorter.
        texts: of each length.
        questions: asked about each.
        facts: most facts of a text.
        seed: which texts.
        tell: told what is done.
    """
    lines = []
    for length in lengths:
        hay = haystack * (1 + length // max(1, len(haystack)))
        rng = random.Random(f"{seed} {length}")
        seeds = [tasks.HELD_OUT + rng.getrandbits(38) for _ in range(texts)]
        made = [tasks.make(s, length, hay, Mix(most_facts=facts), questions=questions) for s in seeds]
        for mechanism in mechanisms:
            found: list[tuple[str, bool]] = []
            read: list[float] = []
            answered: list[float] = []
            kept = 0
            for sequence in made:
                context = KVContext(model, mechanism)
                began = time.perf_counter()
                context.extend(sequence.tokens[: sequence.text])
                read.append(time.perf_counter() - began)
                kept = max(kept, context.nbytes)
                for asked in sequence.asked:
                    began = time.perf_counter()
                    start = asked.start - 1
                    while sequence.tokens[start] != tasks.ASK:
                        start -= 1
                    said = _said(context.fork(), sequence.tokens[start : asked.start], len(asked.answer))
                    answered.append(time.perf_counter() - began)
                    found.append((asked.kind, said == asked.answer))
            kinds = sorted({kind for kind, _ in found}, key=tasks.KINDS.index)
            for kind in (*kinds, "all"):
                rights = [right for each, right in found if kind in (each, "all")]
                low, high = wilson(sum(rights), len(rights))
                times = sorted(read)[len(read) // 2], sorted(answered)[len(answered) // 2]
                lines.append(
                    Line(mechanism.describe(), length, kind, sum(rights), len(rights), low, high, *times, kept)
                )
            tell(f"{length:,} tokens, {mechanism.describe()}: {lines[-1].right} of {lines[-1].count} right")
    return lines


def _said(context: KVContext, question: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the likeliest answer's tokens, up to the end mark or `most`."""
    logits = context.step(question)
    said: list[int] = []
    while True:
        said.append(int(logits.argmax()))
        if said[-1] == END or len(said) == most:
            return tuple(said)
        logits = context.step(said[-1:])


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a share."""
    z = 1.959963984540054
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
