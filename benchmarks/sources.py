"""How often the sentence that holds the answer is named first as its source, and what naming costs.

    python -m benchmarks.sources --lengths 2K --haystacks 4 --seed 100 --out sources.jsonl --minutes 6
    python -m benchmarks.sources --cost --lengths 2K,7800 --out cost.jsonl
    python -m benchmarks.sources --merge sources.jsonl cost.jsonl --json > benchmarks/results/sources-cpu.json

A haystack (`evals.needle`) is read once, densely; every mechanism answers its questions over the same pages. Counted
are right answers: whether the first sentence that attention names holds the fact. Then other facts are asked about
(`absent`), which the haystack does not hold: how often a sentence is named all the same, and how often one in which the
answer's own words do not stand (`support` below a half), so that it can't come from there. With --out, a run that is
stopped goes on where it was.

The cost is of pairs: one question is answered with sources and without by turns, from the first token to the end of the
answer, what is computed after its last token included. It measures no quality of answers.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longspan.attention import make, parse
from longspan.bench.journaled import one_result
from longspan.engine import prompts
from longspan.engine.generation import Answer
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.evals.arguments import guarded, parser, say, specs_of
from longspan.evals.environment import environment
from longspan.evals.facts import KINDS
from longspan.evals.journal import Journal, read
from longspan.evals.needle import Haystack, build
from longspan.evals.statistics import interval
from longspan.lengths import lengths_of
from longspan.retrieval.grounding import support
from longspan.sessions.session import Session

_ANSWER = 28
_PAIRS = 8
_OTHER = 5000
"""Added to a haystack's seed: the facts of another, which it does not hold."""


def opened(llm: LLM, haystack: Haystack, specs: Sequence[str]) -> Session:
    """Return a session that read a haystack densely, with what any of the mechanisms needs of its pages."""
    mechanisms = [parse(spec) for spec in specs]
    summaries = sorted({what for each in mechanisms for what in each.summaries})
    blocks = next((each for each in mechanisms if each.summaries), make("dense"))
    session = llm.session()
    llm.add_text(session, haystack.text)
    session.memory = KVContext(llm.model, blocks, make("dense"), summaries=summaries)
    session.memory.attend_by(make("dense"))
    session.head = len(prompts.before_documents(llm.model))
    llm.prefill(session)
    return session


def ask(llm: LLM, session: Session, question: str) -> Answer:
    """Answer a question by an engine's mechanism over the same pages."""
    assert llm.attention is not None, "engines here are made for a mechanism"
    session.memory.attend_by(llm.attention)
    return llm.ask(question, session, max_tokens=_ANSWER, stop=("\n",))


def ranked(llm: LLM, specs: list[str], kind: str, length: int, seed: int, done: set[Any]) -> Iterator[dict[str, Any]]:
    """Ask a haystack's questions, and those of another, by every mechanism."""
    haystack = build(llm.model, kind, length, seed)
    others = build(llm.model, kind, length, seed + _OTHER).questions
    session: Session | None = None
    numbered = list(enumerate(zip(haystack.questions, others, strict=False)))
    engines = {spec: LLM(llm.model, spec, quote=False) for spec in specs}
    for absent, spec, (number, (own, other)) in itertools.product((False, True), specs, numbered):
        question = other if absent else own
        row = {"of": {"what": "sources"}, "mechanism": spec, "kind": kind, "length": length, "haystack": seed}
        row |= {"question": number, "absent": absent}
        if key(row) in done or any(text in haystack.text for text in (question.answers if absent else ())):
            continue
        session = session or opened(llm, haystack, specs)
        answer = ask(engines[spec], session, question.text)
        named = [each for each in answer.citations if each.source == "attention"]
        holding = haystack.spans[own.needs[0]]
        first = bool(named) and not absent and named[0].start < holding[1] and named[0].end > holding[0]
        yield row | {
            "right": not absent and question.right(answer.own_words),
            "first": first,
            "named": len(named),
            "mass": named[0].mass if named else None,
            "support": support(answer.own_words, question.text, [named[0].text]) if named else None,
            "answer": answer.own_words.strip(),
            "source": named[0].text if named else answer.unsourced,
        }


def costs(llm: LLM, specs: list[str], length: int) -> Iterator[dict[str, Any]]:
    """Answer one question by turns with sources and without."""
    haystack = build(llm.model, "single", length, 0)
    session = opened(llm, haystack, specs)
    for spec in specs:
        question = haystack.questions[-1].text
        engines = {on: LLM(llm.model, spec, quote=False, sources=on) for on in (True, False)}
        seconds: dict[bool, list[float]] = {True: [], False: []}
        tokens = 0
        for turn in range(2 * _PAIRS + 2):
            sources = turn % 2 == (turn // 2) % 2  # A B, B A, A B: who comes first changes
            began = time.perf_counter()
            answer = ask(engines[sources], session, question)
            if turn >= 2:
                seconds[sources].append(time.perf_counter() - began - answer.stats.first_token_seconds)
            tokens = answer.stats.decoded_tokens
        pairs = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
        yield {
            "of": {"what": "sources"},
            "mechanism": spec,
            "length": length,
            "tokens": tokens,
            "decode_ms": round(1000 * statistics.median(seconds[False]) / tokens, 2),
            "ratio": round(statistics.median(pairs), 4),
            "least": round(min(pairs), 4),
            "most": round(max(pairs), 4),
            "pairs": len(pairs),
        }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two rows share that measure the same."""
    return tuple(row.get(name) for name in ("mechanism", "length", "kind", "haystack", "question", "absent"))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with a table: rates of every mechanism and length, and its cost."""
    rows, table = result["rows"], []
    for mechanism, length in dict.fromkeys((row["mechanism"], row["length"]) for row in rows):
        own = [row for row in rows if (row["mechanism"], row["length"]) == (mechanism, length)]
        line = {"mechanism": mechanism, "length": length}
        if right := [row for row in own if row.get("right")]:
            rate = interval([float(row["first"]) for row in right])
            line |= {"right": len(right), "first": round(rate.mean, 4)}
            line |= {"low": round(rate.low, 4), "high": round(rate.high, 4)}
            line["unnamed"] = sum(not row["named"] for row in right)
        if absent := [row for row in own if row.get("absent")]:
            line |= {"absent": len(absent), "absent_named": sum(bool(row["named"]) for row in absent)}
            line["absent_unsupported"] = sum((row["support"] or 0.0) < 0.5 for row in absent if row["named"])
        for row in own:
            if "ratio" in row:
                line |= {name: row[name] for name in ("ratio", "least", "most", "decode_ms", "tokens")}
        table.append(line)
    return {**{name: value for name, value in result.items() if name != "rows"}, "table": table, "rows": rows}


def _order(row: dict[str, Any]) -> Any:
    return ("ratio" in row, row["length"], row["mechanism"], *(str(part) for part in key(row)[2:]))


def _main(arguments: list[str]) -> int:
    made = parser(
        "benchmarks.sources",
        (__doc__ or "").splitlines()[0],
        mechanisms="dense superlinear:window=768,sinks=4 quest:budget=1024 streaming:window=1536",
        lengths="2K",
    )
    made.add_argument("--kinds", default="single", help=f"{', '.join(KINDS)}; default: %(default)s")
    made.add_argument("--haystacks", type=int, default=2, metavar="N", help="default: %(default)s")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the first haystack; default: %(default)s")
    made.add_argument("--cost", action="store_true", help="measure what naming costs instead")
    made.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="stop after the row at that time")
    made.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row, and go on from what it holds")
    made.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE.jsonl", help="measure nothing: one result of these"
    )
    given = made.parse_args(arguments)
    until = time.monotonic() + 60 * given.minutes
    with Journal(given.out) as journal:
        entries = [entry for file in given.merge for entry in read(file)] if given.merge else journal.entries
        if not given.merge:
            llm = LLM(given.model, "dense", device=given.device)
            about = environment(llm.model.device, "", [])
            about |= {"command": f"python -m benchmarks.sources {shlex.join(arguments)}"}
            about |= {"model": llm.model.name, "dtype": str(llm.model.dtype).removeprefix("torch.")}
            journal.begin(about)
            done, specs, lengths = {key(entry.row) for entry in entries}, specs_of(given.mechanisms), given.lengths
            for row in _measured(llm, specs, lengths_of(lengths), given, done):
                journal.append(row)
                say("  ".join(f"{name} {value}" for name, value in row.items() if name != "of"))
                if time.monotonic() > until:
                    break
            entries = journal.entries
    result = summary(one_result(entries, key, _order))
    if given.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for line in result["table"]:
            print("  ".join(f"{name} {value}" for name, value in line.items()))
    return 0


def _measured(
    llm: LLM, specs: list[str], lengths: Sequence[int], given: Any, done: set[Any]
) -> Iterator[dict[str, Any]]:
    for length in lengths:
        if given.cost:
            yield from costs(llm, specs, length)
            continue
        for kind, seed in itertools.product(given.kinds.split(","), range(given.seed, given.seed + given.haystacks)):
            yield from ranked(llm, specs, kind, length, seed, done)


if __name__ == "__main__":
    sys.exit(guarded("sources", lambda: _main(sys.argv[1:])))
