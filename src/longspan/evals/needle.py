"""Needles: facts hidden in real prose at every depth, asked for one by one.

    longspan eval facts --lengths 4K,16K --mechanisms "streaming retrieval" --out needle.jsonl
    longspan eval facts --merge needle.jsonl --json > benchmarks/results/needle.json

The same is `python -m longspan.evals.needle`.

Each haystack is read once into a session and asked for each of its facts; every question starts from the same session.
A row a question says whether the answer is right, whether the page with the fact was ranked first, and whether a
citation contains it. Lengths are in the model's own tokens. With --out, a run that is stopped goes on where it was.
It measures finding, not reasoning. The grid of depth and length is `grid.py`'s, whose questions each have a context of
their own.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.attention import parse
from longspan.engine.llm import LLM
from longspan.errors import Cancelled, UsageError
from longspan.evals.arguments import DTYPES, Parser, dtype_of, guarded, parser, say, specs_of
from longspan.evals.environment import environment
from longspan.evals.facts import KINDS, Question, make
from longspan.evals.haystack import prose
from longspan.evals.journal import Journal
from longspan.evals.needle_rows import Key, Row, answered, of_one_model, summary
from longspan.evals.progress import Progress
from longspan.hf.loading import pick_device
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.lengths import lengths_of
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
class Options:
    """A command line's options, as they were written."""

    model: str | None
    device: str
    mechanisms: str
    lengths: str
    kinds: str
    haystacks: int
    seed: int
    dtype: str | None
    out: Path | None
    minutes: float | None
    merge: list[Path] | None
    adapter: str | None = None


@dataclass(frozen=True)
class Given:
    """What is to be asked."""

    specs: list[str]
    kinds: list[str]
    lengths: list[int]
    haystacks: int
    seed: int


@dataclass(frozen=True)
class Task:
    """A haystack for one mechanism, and what is left to ask of it."""

    spec: str
    """As the user wrote it."""
    keys: tuple[Key, ...]

    @property
    def group(self) -> str:
        """What its answers are counted with."""
        key = self.keys[0]
        return f"{key.mechanism} {key.kind} {key.requested}"


def build(model: CausalModel, kind: str, length: int, seed: int) -> Haystack:
    """Return a haystack of `length` tokens, its facts spread evenly over its depth, each between two sentences."""
    rng = random.Random(f"haystack-{kind}-{length}-{seed}")
    facts, questions = make(kind, seed)
    # Four characters a token is about what prose takes; the rest is cut or filled up exactly below.
    filler = prose()
    start = rng.randrange(len(filler))
    filler = filler[start:] + "\n\n" + filler[:start]
    # What is installed fills about 250K tokens: a longer haystack tells it again.
    filler = "\n\n".join([filler] * -(-length * 8 // len(filler)))
    _, offsets = model.tokens_with_offsets(filler[: length * 8])
    room = length - sum(len(model.tokens(" " + fact.text)) for fact in facts)
    if room < len(facts):
        raise UsageError(f"{length} tokens do not hold {len(facts)} facts and prose between them: ask for longer ones")
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


def plan(model: CausalModel, given: Given) -> list[Task]:
    """Return every haystack and question that is asked for, each question once."""
    fingerprint, dtype = model.fingerprint, str(model.dtype).removeprefix("torch.")
    seen: set[Key] = set()
    tasks = []
    for spec, kind, length in itertools.product(given.specs, given.kinds, given.lengths):
        mechanism = spec if spec == "auto" else parse(spec).describe()
        for haystack in range(given.seed, given.seed + given.haystacks):
            count = len(make(kind, haystack)[1])
            keys = [Key(fingerprint, dtype, mechanism, kind, length, haystack, i) for i in range(count)]
            # Two specifications may mean the same.
            if new := [key for key in keys if key not in seen]:
                tasks.append(Task(spec, tuple(new)))
                seen.update(new)
    return tasks


def ask(llm: LLM, task: Task, progress: Progress) -> Iterator[Row]:
    """Read a task's haystack and ask its questions; each starts from the same session."""
    first = task.keys[0]
    haystack = build(llm.model, first.kind, first.requested, first.haystack)
    session = llm.session()
    llm.add_text(session, haystack.text)
    started = time.perf_counter()
    llm.prefill(session)
    progress.read(first.requested, time.perf_counter() - started)
    for key in task.keys:
        started = time.perf_counter()
        question = haystack.questions[key.question]
        answer = llm.ask(question.text, session, max_tokens=_ANSWER * len(question.needs))
        chosen = [each for each in answer.citations if each.source != "attention"]
        spans = [haystack.spans[need] for need in question.needs]
        holding = [_pages(session, *span) for span in spans]
        row = Row(
            **asdict(key),
            spec=task.spec,
            length=len(session.tokens),
            depth=round(spans[0][0] / len(haystack.text), 3),
            right=question.right(answer.text),
            own_words=question.right(answer.own_words),
            ranked_first=bool(answer.pages) and any(answer.pages[0] in held for held in holding),
            cited=all(any(c.start <= a and b <= c.end for c in chosen) for a, b in spans),
            chosen_by=chosen[0].chosen_by if chosen else "",
            attention=answer.attention,
            first_token_s=round(answer.stats.first_token_seconds, 3),
            answer=answer.text.strip(),
            wanted=" / ".join(question.answers),
        )
        progress.asked(task.group, row.right, time.perf_counter() - started)
        yield row


def run(
    llm: LLM, tasks: Sequence[Task], journal: Journal, about: dict[str, Any], until: float, tell: Callable[[str], None]
) -> int:
    """Ask what the journal does not hold yet, and return how many questions are left.

    Args:
        llm: its model is asked.
        tasks: from `plan`.
        journal: gets a row a question.
        about: the environment of this run.
        until: when to stop, in seconds of `time.monotonic`. One question is asked before the first look at the clock,
            so that runs which are short beside a haystack's reading come to an end too.
        tell: told the progress.
    """
    done = answered(journal.entries)
    left = [Task(task.spec, tuple(key for key in task.keys if key not in done)) for task in tasks]
    left = [task for task in left if task.keys]
    count = sum(len(task.keys) for task in left)
    if not left:
        return 0
    total = sum(len(task.keys) for task in tasks)
    progress = Progress(total, sum(task.keys[0].requested for task in left), tell)
    for task in tasks:
        for key in filter(done.__contains__, task.keys):
            progress.before(task.group, bool(done[key].row["right"]))
    journal.begin(about)
    engine, spec = llm, ""
    for task in left:
        if task.spec != spec:
            engine, spec = LLM(llm.model, task.spec, say=tell), task.spec
            for note in llm.model.trained.lacks(engine.attention, llm.model.name):
                tell(f"note: {note}")
        for row in ask(engine, task, progress):
            journal.append(asdict(row))
            count -= 1
            if time.monotonic() >= until:
                return count
    return count


def _pages(session: Session, start: int, end: int) -> set[int]:
    """Return the pages of the context that hold the characters `start .. end - 1` of the session's only document."""
    touched = [i for i, (a, b) in enumerate(session.offsets) if a < end and b > start]
    return {(token + session.head) // PAGE for token in touched}


def measure(given: Options, command: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Do what a command line asks for, and return environment, table and rows (see `needle_rows.summary`).

    Args:
        given: its options.
        command: what measures the same again.
        tell: told the progress.

    Raises:
        UsageError: an option that can't be used.
        Cancelled: Ctrl-C.
    """
    began = time.monotonic()
    if given.merge:
        if given.out or given.minutes:
            raise UsageError("--merge asks nothing: leave out --out and --minutes")
        return summary(of_one_model(given.merge))
    wanted = Given(
        specs_of(given.mechanisms, auto=True),
        _kinds(given.kinds),
        lengths_of(given.lengths),
        _from_one(given.haystacks),
        given.seed,
    )
    if given.minutes is not None and not given.minutes > 0:
        raise UsageError(f"--minutes {given.minutes:g} leaves no time: give more than 0")
    until = math.inf if given.minutes is None else began + 60 * given.minutes
    dtype = _dtype(given.dtype, given.device)
    with Journal(given.out) as journal:
        answered(journal.entries)  # a file of another eval is refused before a model is loaded
        llm = LLM(given.model, device=given.device, dtype=dtype, adapter=given.adapter, say=tell)
        tasks = plan(llm.model, wanted)
        about = environment(llm.model.device, "", []) | {"command": command}
        about |= {"model": llm.model.name, "dtype": str(llm.model.dtype).removeprefix("torch.")}
        again = f"the same command goes on from {given.out}" if given.out else "nothing is kept without --out FILE"
        try:
            left = run(llm, tasks, journal, about, until, tell)
        except (KeyboardInterrupt, Cancelled) as error:
            raise Cancelled(f"stopped: {again}") from error
        if left:
            total = sum(len(task.keys) for task in tasks)
            tell(f"stopped after {given.minutes:g} minutes with {left} of {total} questions left: {again}")
        done = answered(journal.entries)
    return summary([done[key] for task in tasks for key in task.keys if key in done])


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; prints the rows' table, or with --json one JSON object."""
    return guarded("needle", lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    result = measure(Options(**given), f"python -m longspan.evals.needle {shlex.join(arguments)}", say)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for line in result["table"]:
            print("  ".join(f"{key} {value}" for key, value in line.items()))
    return 0


def _parser() -> Parser:
    made = parser("longspan.evals.needle", (__doc__ or "").splitlines()[0], mechanisms="retrieval", lengths="4K,16K")
    made.add_argument("--kinds", default="single", help=f"{', '.join(KINDS)}; default: %(default)s")
    made.add_argument("--haystacks", type=int, default=5, metavar="N", help="8 questions each; default: %(default)s")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the first haystack; default: %(default)s")
    made.add_argument("--dtype", choices=DTYPES, help="default: float32 on a GPU, else what the CPU is best at")
    made.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="append every answer to this file, and go on from what it holds"
    )
    made.add_argument("--minutes", type=float, metavar="M", help="stop after the question asked at that time")
    made.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE.jsonl", help="ask nothing: make one result of these files"
    )
    return made


def _kinds(text: str) -> list[str]:
    kinds = list(dict.fromkeys(kind.strip() for kind in text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown kind {kind!r}: use {', '.join(KINDS)}")
    return kinds


def _from_one(haystacks: int) -> int:
    if haystacks < 1:
        raise UsageError(f"--haystacks {haystacks} leaves nothing to ask: give at least 1")
    return haystacks


def _dtype(name: str | None, device: str) -> torch.dtype | None:
    """Return the type to compute in; None: what the engine chooses for a CPU (UsageError: no such device)."""
    on_gpu = pick_device(device).type == "cuda"
    if name is not None:
        return dtype_of(name)
    return torch.float32 if on_gpu else None


if __name__ == "__main__":
    sys.exit(main())
