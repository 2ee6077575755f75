"""Scores of one eval: by who was asked, task and length, with intervals, averages and differences.

An average is given where every task of the eval was asked: fewer tasks are not comparable. It does not know how scores
are shown.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.evals.report.samples import Asked, Sample, names
from longspan.evals.report.scale import PERCENT, PERPLEXITY
from longspan.evals.statistics import Interval, averaged, interval, shared

AVERAGE = "average"
"""Stands for all tasks."""
SEEN = 0.01
"""What guessing scores, from which on a report tells it."""


@dataclass(frozen=True)
class Cell:
    """One task at one length, or the average of all tasks."""

    score: Interval
    """Of values, see `Scores.scale`."""
    chance: float = 0.0
    """The mean score of guessing; 0: unknown, or none."""
    kept_bytes: float = 0.0
    """Mean; 0: unknown."""
    failed: int = 0
    """Questions without an answer: they score 0, and have no perplexity."""


class Scores:
    """Cells of one eval's samples."""

    def __init__(self, eval_name: str, every: Sequence[Sample]) -> None:
        """Group samples of one eval (at least one)."""
        self.eval, self.samples = eval_name, list(every)
        self.scale = PERPLEXITY if any(sample.nll is not None for sample in every) else PERCENT
        self.names = names(every)
        self.tasks = list(dict.fromkeys(sample.task for sample in every))
        self.lengths = sorted({sample.length for sample in every})
        groups: dict[tuple[Asked, str, int], list[Sample]] = {}
        for sample in every:
            groups.setdefault((sample.asked, sample.task, sample.length), []).append(sample)
        self._groups = groups
        self.cells = {key: cell for key, group in groups.items() if (cell := self._cell(group)) is not None}
        self.averages = {
            (who, length): self._average(who, length)
            for who in self.names
            for length in self.lengths
            if all((who, task, length) in self.cells for task in self.tasks)
        }

    def cell(self, who: Asked, task: str, length: int) -> Cell | None:
        """Return a cell, of `AVERAGE` as well; None: nothing was asked, or not every task."""
        return self.averages.get((who, length)) if task == AVERAGE else self.cells.get((who, task, length))

    def rows(self) -> list[str]:
        """Return the tasks, and `AVERAGE` where there are several and someone was asked them all."""
        return self.tasks + [AVERAGE] * (len(self.tasks) > 1 and bool(self.averages))

    def guessed(self, task: str, length: int) -> float:
        """Return what guessing scores in a task (or `AVERAGE`), from 0 to 1, over all who were asked; 0: nothing."""
        found = [cell.chance for who in self.names if (cell := self.cell(who, task, length))]
        return _mean(found) if self.scale is PERCENT and _mean(found) >= SEEN else 0.0

    @property
    def whole(self) -> str | None:
        """What stands for the eval: `AVERAGE`, or its only task; None: somebody was asked every task at no length."""
        if len(self.tasks) == 1:
            return self.tasks[0]
        return AVERAGE if {who for who, _ in self.averages} == set(self.names) else None

    def differences(self) -> dict[tuple[Asked, int], Interval]:
        """Return how far each other is from the first on the questions that both were asked.

        The same questions' scores are subtracted before they are averaged, so that how hard these are falls out: such
        an interval is far narrower than the difference of two intervals. Empty where only one was asked.
        """
        first, *others = self.names
        found = {}
        for who in others:
            for length in self.lengths:
                parts = [self._differences(first, who, task, length) for task in self.tasks]
                if there := [part for part in parts if part]:
                    found[who, length] = self._together(there, self.scale.difference_bounds)
        return found

    def lines(self) -> list[dict[str, Any]]:
        """Return every cell as a line for JSON: percent, rounded to a tenth, or perplexity."""
        found = []
        for who in self.names:
            for task in self.rows():
                for length in self.lengths:
                    if cell := self.cell(who, task, length):
                        found.append(
                            {"eval": self.eval, **who._asdict(), "task": task, "length": length, **self._told(cell)}
                        )
        return found

    def _differences(self, first: Asked, who: Asked, task: str, length: int) -> dict[Hashable, float]:
        base, own = (self._by_question(each, task, length) for each in (first, who))
        return {question: own[question] - base[question] for question in own if question in base}

    def _by_question(self, who: Asked, task: str, length: int) -> dict[Hashable, float]:
        """Return values by question; by what tasks share of it, where they ask the same."""
        group = self._groups.get((who, task, length), ())
        return {s.shared or s.question: value for s in group if (value := self._value(s)) is not None}

    def _together(self, parts: Sequence[dict[Hashable, float]], bounds: tuple[float | None, float | None]) -> Interval:
        """Return the mean of tasks, each counted once, and its interval."""
        if self.samples[0].shared and (found := shared(parts, *bounds)) is not None:
            return found
        return averaged([interval(list(part.values()), *bounds) for part in parts])

    def _value(self, sample: Sample) -> float | None:
        return sample.score if self.scale is PERCENT else sample.nll

    def _cell(self, group: Sequence[Sample]) -> Cell | None:
        values = [value for sample in group if (value := self._value(sample)) is not None]
        if not values:
            return None
        return Cell(
            score=interval(values, *self.scale.bounds),
            chance=_mean([sample.chance for sample in group]),
            kept_bytes=_mean([sample.kept_bytes for sample in group if sample.kept_bytes]),
            failed=sum(bool(sample.reason) for sample in group),
        )

    def _average(self, who: Asked, length: int) -> Cell:
        cells = [self.cells[who, task, length] for task in self.tasks]
        return Cell(
            score=self._together([self._by_question(who, task, length) for task in self.tasks], self.scale.bounds),
            chance=_mean([cell.chance for cell in cells]),
            kept_bytes=_mean([cell.kept_bytes for cell in cells if cell.kept_bytes]),
            failed=sum(cell.failed for cell in cells),
        )

    def _told(self, cell: Cell) -> dict[str, Any]:
        ends = {self.scale.name: cell.score.mean, "low": cell.score.low, "high": cell.score.high}
        return {
            "questions": cell.score.count,
            **{name: round(self.scale.shown(value), self.scale.digits) for name, value in ends.items()},
            **({"chance": round(100 * cell.chance, 1)} if cell.chance else {}),
            **({"kept_bytes": round(cell.kept_bytes)} if cell.kept_bytes else {}),
            **({"failed": cell.failed} if cell.failed else {}),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
