"""Needles: facts hidden in real prose at every depth, asked for one by one.

    python -m longspan.evals.needle --lengths 4K,16K --mechanisms dense,retrieval --kinds single --json

Each haystack is read once into a session and asked for each of its facts; every question starts from the same session.
A row a question says whether the answer is right, whether the page with the fact was ranked first, and whether a
citation contains it. Lengths are in the model's own tokens. It measures finding, not reasoning.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from longspan.engine.llm import LLM
from longspan.errors import LongspanError, UsageError
from longspan.evals.environment import environment
from longspan.evals.facts import KINDS, Question, make
from longspan.evals.haystack import prose
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.sessions.session import Session

_ANSWER = 28
"""Tokens of an answer for each fact needed: a sentence that holds it."""


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First character of each fact and the one after its last."""
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Row:
    """One question's outcome."""

    mechanism: str
    kind: str
    length: int
    haystack: int
    depth: float
    right: bool
    ranked_first: bool
    """The best citation's page holds (the first of) the facts needed."""
    cited: bool
    """Every fact needed stands in a citation."""
    chosen_by: str
    first_token_s: float
    answer: str
    wanted: str


def build(model: CausalModel, kind: str, length: int, seed: int) -> Haystack:
    """Return a haystack of `length` tokens, its facts spread evenly over its depth, each between two sentences."""
    rng = random.Random(f"haystack-{kind}-{length}-{seed}")
    facts, questions = make(kind, seed)
    # Four characters a token is about what prose takes; the rest is cut or filled up exactly below.
    filler = prose()
    start = rng.randrange(len(filler))
    filler = filler[start:] + "\n\n" + filler[:start]
    _, offsets = model.tokens_with_offsets(filler[: length * 8])
    room = length - sum(len(model.tokens(" " + fact.text)) for fact in facts)
    filler = filler[: offsets[min(room, len(offsets)) - 1][1]]
    pieces, spans, done, size = [], [], 0, 0
    for i, fact in enumerate(facts):
        depth = (i + 0.1 + 0.8 * rng.random()) / len(facts)
        cut = filler.find(". ", int(depth * len(filler))) + 1
        cut = max(cut, done) if cut else len(filler)
        pieces += [filler[done:cut], " " + fact.text]
        size += cut - done
        spans.append((size + 1, size + 1 + len(fact.text)))
        size += 1 + len(fact.text)
        done = cut
    return Haystack("".join([*pieces, filler[done:]]), tuple(spans), tuple(questions))


def run(
    llm: LLM, kind: str, length: int, haystacks: int, seed: int = 0, say: Callable[[str], None] = print
) -> list[Row]:
    """Ask for every fact of some haystacks (`haystacks * 8` questions, half as many for `twofact`)."""
    rows = []
    for i in range(haystacks):
        haystack = build(llm.model, kind, length, seed + i)
        session = llm.session()
        llm.add_text(session, haystack.text)
        started = time.perf_counter()
        llm.prefill(session)
        seconds = time.perf_counter() - started
        right = 0
        for question in haystack.questions:
            answer = llm.ask(question.text, session, max_tokens=_ANSWER * len(question.needs))
            pages = answer.pages
            spans = [haystack.spans[need] for need in question.needs]
            holding = [_pages(session, *span) for span in spans]
            row = Row(
                answer.attention,
                kind,
                len(session.tokens),
                seed + i,
                round(spans[0][0] / len(haystack.text), 3),
                question.right(answer.text),
                bool(pages) and any(pages[0] in held for held in holding),
                all(any(c.start <= a and b <= c.end for c in answer.citations) for a, b in spans),
                answer.citations[0].chosen_by if answer.citations else "",
                round(answer.stats.first_token_seconds, 3),
                answer.text.strip(),
                " / ".join(question.answers),
            )
            right += row.right
            rows.append(row)
        spec = llm.attention.describe() if llm.attention else "auto"
        say(f"{spec} {kind} {length}: haystack {i}: {right}/{len(haystack.questions)}, read in {seconds:.1f} s")
    return rows


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one line a mechanism, kind and length: counts, and shares in percent."""
    lines = []
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.kind, round(row.length / 1024)), []).append(row)
    for (mechanism, kind, thousands), group in groups.items():
        count = len(group)
        lines.append(
            {
                "mechanism": mechanism,
                "kind": kind,
                "length": f"{thousands}K",
                "questions": count,
                "right": sum(row.right for row in group),
                "ranked_first": sum(row.ranked_first for row in group),
                "cited": sum(row.cited for row in group),
            }
        )
    return lines


def _pages(session: Session, start: int, end: int) -> set[int]:
    """Return the pages of the context that hold the characters `start .. end - 1` of the session's only document."""
    touched = [i for i, (a, b) in enumerate(session.offsets) if a < end and b > start]
    return {(token + session.head) // PAGE for token in touched}


def tokens_of(text: str) -> int:
    """Read a length such as `16K` or `1M`."""
    units = {"K": 1024, "M": 1024 * 1024}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"{text!r} is no length: write 8192, 8K or 1M")
    return int(number) * unit


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; prints rows' table, or with --json one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m longspan.evals.needle", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mechanisms", default="retrieval", help="specifications, separated by semicolons or spaces")
    parser.add_argument("--kinds", default="single", help=", ".join(KINDS))
    parser.add_argument("--lengths", default="4K,16K")
    parser.add_argument("--haystacks", type=int, default=5, help="8 questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        import torch

        dtype = torch.float32 if given.device == "cuda" else None
        base = LLM(given.model, device=given.device, dtype=dtype)
        rows: list[Row] = []
        for spec in given.mechanisms.replace(";", " ").split():
            for kind in given.kinds.split(","):
                if kind not in KINDS:
                    raise UsageError(f"unknown kind {kind!r}: use {', '.join(KINDS)}")
                for length in map(tokens_of, given.lengths.split(",")):
                    llm = LLM(base.model, spec)
                    rows += run(
                        llm, kind, length, given.haystacks, given.seed, lambda text: print(text, file=sys.stderr)
                    )
    except LongspanError as error:
        print(f"needle: {error}", file=sys.stderr)
        return 1
    lines = table(rows)
    if given.json:
        about = environment(base.model.device, "longspan.evals.needle", arguments)
        print(json.dumps({**about, "table": lines, "rows": [asdict(row) for row in rows]}, ensure_ascii=False))
        return 0
    for line in lines:
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
