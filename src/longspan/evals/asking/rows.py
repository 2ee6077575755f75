"""Rows of evals: what makes two questions the same, who was asked, and what came out.

A journal (`evals/journal.py`) holds a row a question, one JSON object a line with the fields of `Row`; a line
`{"environment": {...}}` stands before the rows of each run and holds what is constant for it: `run` (the same as in its
rows), `device`, `threads`, `python`, `torch`, `transformers`, `longspan`, `command`. The fields of `Key` tell whether a
question was answered before; of two rows with one key the first counts, so that merging files counts nothing twice.
Rows to be compared with one another (one line of a table, one curve) agree in `contender` and `task`.

It does not know how questions are made or asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from longspan.errors import UsageError
from longspan.evals.journal import Entry


@dataclass(frozen=True)
class Key:
    """What a question is, and who is asked, whenever that is."""

    eval: str
    """A name of `questions.registry`."""
    task: str
    length: int
    """Tokens asked for, of prompt and answer."""
    seed: int
    question: int
    """Its number among those of its task, length and seed."""
    setup: str
    """How it is put, see `Setup.describe`; empty: as the eval has it."""
    questions: str
    """A hash of what questions are made of: version, sources, tokenizer, template."""
    fingerprint: str
    """This field and those after it: see `Identity`."""
    dtype: str
    mechanism: str
    budget: str
    attention: str
    prefill: str
    kv: str
    kv_budget: int
    endpoint: str


KEY = tuple(field.name for field in fields(Key))


@dataclass(frozen=True)
class Row(Key):
    """One question's outcome; by the fields of its key a later run knows it."""

    run: str
    """Names the run, as its environment does."""
    model: str
    """A name for people."""
    parameters: dict[str, Any]
    """The task's configuration: the fields of its family, such as `depth` (from 0 to 1), `distractors`, `haystack`."""
    tokens: int
    """Of prompt and answer as it was made: at most `length`."""
    depths: list[float]
    """Where each needle begins, as a share of the context's characters."""
    scoring: str
    """See `questions.scoring`."""
    score: float
    """From 0 to 1. Of `probability`, which is no share of right answers: 1 / score is the perplexity."""
    chance: float
    """The mean score of answers in the right form by one who has not read."""
    error: str
    """Why there is no answer (the score is 0); empty: there is one."""
    read_by: str
    """The mechanism that read: tells what `auto` was."""
    read_tokens: int
    """Tokens of the context that the model read: fewer than it has where a setup chooses, more where it sums up."""
    read_tokens_per_s: float
    kept_bytes: int
    """Of what was kept of the context when the question came; 0: unknown."""
    first_token_s: float
    decode_tokens_per_s: float
    seconds: float
    """For all of it: making the question, reading and answering."""
    measures: dict[str, float]
    """Further figures: `nll` (mean negative log-likelihood a token), and those of `Reply.measures`."""
    answer: str
    wanted: list[str]

    @property
    def key(self) -> Key:
        """What was asked, and of whom."""
        return Key(**{name: getattr(self, name) for name in KEY})


_WRITTEN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "list[str]": (list,)}
_WRITTEN |= {"list[float]": (list,), "dict[str, Any]": (dict,), "dict[str, float]": (dict,)}
_KINDS = {field.name: _WRITTEN[str(field.type)] for field in fields(Row)}


def answered(entries: Iterable[Entry]) -> dict[Key, Entry]:
    """Return the rows of journals by their questions; of several answers to one question the first counts.

    Raises:
        UsageError: rows of another kind of eval, or of a version with other fields.
    """
    found: dict[Key, Entry] = {}
    for entry in entries:
        found.setdefault(row_of(entry).key, entry)
    return found


def row_of(entry: Entry) -> Row:
    """Return a journal's row (UsageError: it is of another kind)."""
    try:
        row = Row(**entry.row)
    except TypeError:
        row = None  # other fields
    if row is None or not all(isinstance(getattr(row, name), kind) for name, kind in _KINDS.items()):
        raise UsageError("the file holds rows of another eval, or of another version of this one: name another folder")
    return row


def contender(asked: Key) -> str:
    """Return in a few words who is asked and how, such as `quest at 1/4, kv int4, question=both`.

    The model is not among them: where rows of several are told apart, name it beside this.
    """
    how = asked.mechanism + (f" at {asked.budget}" if asked.budget else "")
    parts = {"prefill": asked.prefill, "kv": asked.kv.removeprefix("auto"), "kv-budget": str(asked.kv_budget or "")}
    parts["from"] = asked.endpoint
    words = [how, *(f"{name} {value}" for name, value in parts.items() if value), asked.setup]
    return ", ".join(filter(None, words))
