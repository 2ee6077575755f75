"""Samples: one question's outcome, whichever eval asked it.

Every form of rows that score single questions has a reader here, which knows them by their fields. Rows of the same
question, asked of the same model in the same way, are one sample: of several the first counts. It does not know means.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from longspan import specs
from longspan.errors import UsageError
from longspan.evals.asking import rows
from longspan.evals.journal import Entry
from longspan.evals.questions import registry


class Asked(NamedTuple):
    """Who was asked, and how contexts were read and kept."""

    model: str
    fingerprint: str
    dtype: str
    how: str
    """Attention with its options, then prefill, KV format and budget as far as they were given."""
    family: str
    """The same without numbers in the attention's options: who differs in these alone makes one curve over bytes."""


@dataclass(frozen=True)
class Sample:
    """One question's outcome."""

    eval: str
    task: str
    length: int
    """Tokens asked for."""
    question: Hashable
    """Which of the task's questions at this length: the same for everybody who is asked it."""
    asked: Asked
    score: float
    """From 0 to 1."""
    shared: Hashable = None
    """The question apart from its task, where every task of the eval asks the same; None: each asks its own."""
    nll: float | None = None
    """Where a text's probability was measured: the mean negative log-likelihood of its tokens, natural logarithm."""
    chance: float = 0.0
    """The mean score of whoever guesses; 0: unknown, or none."""
    kind: str = ""
    """Of tasks that differ in depth alone: what they have in common; empty: a task is not one depth of several."""
    made_of: str = ""
    """A hash of what the question was made of; empty: unknown."""
    depth: float | None = None
    """Where the only needle lies, from 0 to 1; None: there is none, or several."""
    kept_bytes: int = 0
    """Of what was kept of the context when the question came; 0: unknown."""
    reason: str = ""
    """Why there was no answer; empty: there was one."""
    answer: str = ""
    wanted: str = ""

    @property
    def key(self) -> Hashable:
        """What makes two rows the same sample."""
        return (
            self.eval,
            self.task,
            self.length,
            self.question,
            self.asked.fingerprint,
            self.asked.dtype,
            self.asked.how,
        )


def samples(entries: Iterable[Entry]) -> tuple[list[Sample], list[Entry]]:
    """Return the samples in rows, each question once, and the rows that are no single question's.

    Raises:
        UsageError: a row of a form that is known lacks what it must have.
    """
    found: dict[Hashable, Sample] = {}
    others: list[Entry] = []
    for entry in entries:
        for fields, reader in _READERS:
            if fields <= entry.row.keys():
                try:
                    sample = reader(entry)
                except UsageError:
                    raise
                except (TypeError, ValueError, KeyError, IndexError) as error:
                    raise UsageError(f"a row can't be read ({error}): {str(entry.row)[:80]}") from error
                found.setdefault(sample.key, sample)
                break
        else:
            others.append(entry)
    return list(found.values()), others


def names(every: Sequence[Sample]) -> dict[Asked, str]:
    """Return a name for whoever was asked, as short as tells them apart, in the order of their first sample.

    Where there is one model, how it attends is enough. Dense attention comes first: all others are beside it.
    """
    asked = sorted(dict.fromkeys(sample.asked for sample in every), key=lambda who: who.how != "dense")
    models = {(who.model, who.fingerprint, who.dtype) for who in asked}
    found = {}
    for who in asked:
        alike = [each for each in models if each[0] == who.model]
        parts = [who.model] if len(models) > 1 else []
        if len({dtype for _, _, dtype in alike}) > 1:
            parts.append(who.dtype)
        if len({fingerprint for _, fingerprint, _ in alike}) > 1:
            parts.append(who.fingerprint[:6])
        found[who] = " ".join([*parts, who.how])
    return found


def _generated(entry: Entry) -> Sample:
    """Read a row of an eval of generated questions (`evals/asking/rows.py`)."""
    row = rows.row_of(entry)
    wanted = row.parameters.get("depth")
    depth = row.depths[0] if wanted is None and len(row.depths) == 1 else wanted
    family = replace(row, mechanism=_unnumbered(row.mechanism), budget="")
    return Sample(
        eval=row.eval,
        task=row.task,
        length=row.length,
        question=(row.questions, row.seed, row.question),
        asked=Asked(
            Path(row.model).name, row.fingerprint, row.dtype, rows.contender(row) or "auto", rows.contender(family)
        ),
        score=row.score,
        shared=(row.seed, row.question) if _paired(row.eval) else None,
        nll=row.measures.get("nll"),
        chance=row.chance,
        made_of=row.questions,
        kind=str(row.parameters.get("kind", "")) if wanted is not None else "",
        depth=float(depth) if isinstance(depth, int | float) else None,
        kept_bytes=row.kept_bytes,
        reason=row.error,
        answer=row.answer,
        wanted=", ".join(map(str, row.wanted)),
    )


def _ruler(entry: Entry) -> Sample:
    """Read a row of RULER as it was before evals shared one form."""
    row = entry.row
    given = {"prefill": row["prefill"], "kv": str(row["kv"]).removeprefix("auto"), "kv-budget": row["kv_budget"] or ""}
    told = [f"{name} {value}" for name, value in given.items() if value]
    how, family = (", ".join([spec, *told]) for spec in (row["attention"], _unnumbered(row["attention"])))
    return Sample(
        eval="ruler",
        task=row["task"],
        length=int(row["length"]),
        question=(row["questions"], row["seed"], row["question"]),
        asked=Asked(_model(entry), row["fingerprint"], row["dtype"], how, family),
        score=float(row["score"]),
        depth=float(row["depths"][0]) if len(row["depths"]) == 1 else None,
        kept_bytes=int(row["kept_bytes"]),
        answer=str(row["answer"]),
        wanted=", ".join(map(str, row["wanted"])),
    )


def _needle(entry: Entry) -> Sample:
    """Read a row of facts that are asked in sessions (`evals/needle_rows.py`)."""
    row = entry.row
    return Sample(
        eval="facts",
        task=row["kind"],
        length=int(row["requested"]),
        question=(row["haystack"], row["question"]),
        asked=Asked(_model(entry), row["fingerprint"], row["dtype"], row["mechanism"], _unnumbered(row["mechanism"])),
        score=float(row["right"]),
        # Two facts lie at two depths, of which the row has the first.
        depth=float(row["depth"]) if row["kind"] != "twofact" else None,
        answer=str(row["answer"]),
        wanted=str(row["wanted"]),
    )


@cache
def _paired(name: str) -> bool:
    return name in registry.names() and registry.evaluation(name).paired


def _model(entry: Entry) -> str:
    return Path(str(entry.environment.get("model", "a model"))).name


def _unnumbered(spec: str) -> str:
    """Return a mechanism's specification without the options that are numbers."""
    name, options = specs.split(spec, "attention")
    return specs.written(name, {key: value for key, value in options.items() if not _number(value)})


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: tuple[tuple[frozenset[str], Callable[[Entry], Sample]], ...] = (
    (frozenset({"eval", "task", "setup", "questions", "scoring"}), _generated),
    (frozenset({"questions", "task", "length", "seed", "question", "score", "attention"}), _ruler),
    (frozenset({"mechanism", "kind", "requested", "haystack", "question", "right"}), _needle),
)
"""Fields by which a form of rows is known, and its reader."""
