"""What a report shows of one eval's scores: tables and pictures, in the order of reading.

First the answer (score against length for each who was asked), then differences, needles, bytes, single tasks, and last
what went wrong. It does not know HTML or files.
"""

from __future__ import annotations

from collections import Counter

from longspan.evals.report import heat
from longspan.evals.report.curves import GUESSING, by_bytes, by_length, by_task, short, size
from longspan.evals.report.drawing import Panel
from longspan.evals.report.page import Table, Value
from longspan.evals.report.samples import Asked, Sample
from longspan.evals.report.scale import PERCENT, number
from longspan.evals.report.scores import AVERAGE, Cell, Scores

TITLES = {
    "facts": "Facts in a haystack",
    "mrcr": "MRCR",
    "needle": "Needle in a haystack",
    "nolima": "NoLiMa",
    "passkey": "Passkey",
    "perplexity": "Perplexity by position",
    "rot": "Context rot",
    "ruler": "RULER",
}
"""Of an eval, where its name alone would not do."""

_CURVES = 8
"""Tasks of one who was asked that are drawn as curves in one picture; more have pictures of their own."""
_WORST = 12
"""Answers that are shown of those that scored least."""
_SHOWN = 300
"""Characters of an answer that are shown."""


def title(scores: Scores) -> str:
    """Return an eval's name for people."""
    return TITLES.get(scores.eval, scores.eval)


def overview(scores: Scores) -> list[Table]:
    """Return the scores of whoever was asked, by length: of all tasks together, or of each if nobody has them all."""
    return [by_asked(scores, task) for task in ([scores.whole] if scores.whole else scores.tasks)]


def by_asked(scores: Scores, task: str) -> Table:
    """Return the scores of a task (or `AVERAGE`), a row for each who was asked."""
    whole = f", average of {len(scores.tasks)} tasks" if task == AVERAGE else ""
    what = whole or ("" if task == scores.eval else f", {task}")
    rows = [(name, _row(scores, who, task)) for who, name in scores.names.items()]
    rows = [(name, row) for name, row in rows if any(value.text for value in row)]
    if any(guessed := [scores.guessed(task, length) for length in scores.lengths]):
        rows.append((GUESSING, [_guessed(scores, chance) for chance in guessed]))
    return Table(f"{title(scores)}{what}: {scores.scale.words}, 95 % interval", _head(scores, "asked"), rows)


def by_tasks(scores: Scores, who: Asked) -> Table:
    """Return the scores of one who was asked, a row for each task."""
    rows = [(task, _row(scores, who, task)) for task in scores.rows()]
    rows = [(name, row) for name, row in rows if any(value.text for value in row)]
    head = _head(scores, "task")
    # Of all lengths: what guessing scores hardly depends on how long the context is.
    chances = {task: [c for n in scores.lengths if (c := scores.guessed(task, n))] for task, _ in rows}
    if any(chances.values()):
        head = [*head, GUESSING]
        means = {task: sum(found) / len(found) if found else 0.0 for task, found in chances.items()}
        rows = [(task, [*row, _guessed(scores, means[task])]) for task, row in rows]
    caption = f"{title(scores)}, {scores.names[who]}: {scores.scale.words}, 95 % interval"
    return Table(caption, head, rows, strong=AVERAGE)


def differences(scores: Scores) -> Table | None:
    """Return how far each other is from the first on the same questions; None: nothing to compare."""
    found = scores.differences()
    if not found:
        return None
    first, *others = scores.names
    plus = scores.scale is PERCENT
    rows = []
    for who in others:
        cells = []
        for length in scores.lengths:
            between = found.get((who, length))
            if between is None:
                cells.append(Value(""))
                continue
            mean, low, high = (scores.scale.difference(v) for v in (between.mean, between.low, between.high))
            digits = scores.scale.digits
            ends = f"{number(low, max(0, digits - 1), plus)} to {number(high, max(0, digits - 1), plus)}"
            cells.append(Value(number(mean, digits, plus), f"{ends}, of {between.count}"))
        rows.append((scores.names[who], cells))
    caption = f"{scores.scale.difference_title} {scores.names[first]} on the same questions, 95 % interval, how many"
    return Table(caption[0].upper() + caption[1:], _head(scores, "asked"), rows)


def kept(scores: Scores) -> Table | None:
    """Return the bytes kept of a context, mean; None: unknown."""
    rows = []
    for who, name in scores.names.items():
        cells = [Value(_kept(scores, who, length)) for length in scores.lengths]
        if any(cell.text for cell in cells):
            rows.append((name, cells))
    return Table("Bytes kept of a context, mean of the tasks", _head(scores, "asked"), rows) if rows else None


def failures(scores: Scores) -> Table | None:
    """Return why questions got no answer, and how often; None: all did."""
    found = Counter((scores.names[sample.asked], sample.reason) for sample in scores.samples if sample.reason)
    rows = [(name, [Value(reason, words=True), Value(str(count))]) for (name, reason), count in found.most_common()]
    return Table("Questions without an answer", ["asked", "reason", "questions"], rows) if rows else None


def worst(scores: Scores) -> Table | None:
    """Return some answers that scored least, of every task in turn; None: all were right, or nothing was answered."""
    wrong = [sample for sample in scores.samples if sample.score < 1 and not sample.reason and sample.nll is None]
    queues: dict[str, list[Sample]] = {}
    for sample in sorted(wrong, key=lambda sample: sample.score):
        queues.setdefault(sample.task, []).append(sample)
    taken: list[Sample] = []
    while len(taken) < _WORST and any(queues.values()):
        taken += [queue.pop(0) for queue in queues.values() if queue]
    rows = [
        (
            f"{sample.task}, {short(sample.length)}",
            [
                Value(scores.names[sample.asked], words=True),
                Value(_cut(sample.wanted), words=True),
                Value(_cut(sample.answer) or "(nothing)", words=True),
                Value(f"{100 * sample.score:.0f}"),
            ],
        )
        for sample in taken[:_WORST]
    ]
    head = ["question", "asked", "wanted", "answered", "score, %"]
    return Table("Answers that scored least, of every task in turn", head, rows) if rows else None


def lengths(scores: Scores) -> list[Panel]:
    """Return the main pictures of scores against length."""
    if len(scores.names) == 1 and 1 < len(scores.tasks) <= _CURVES and not _depths(scores):
        return [by_task(scores, who) for who in scores.names]
    return [by_length(scores, task) for task in ([scores.whole] if scores.whole else scores.tasks)]


def single_tasks(scores: Scores) -> list[Panel]:
    """Return a picture a task, where the main ones do not tell them apart."""
    if _depths(scores) or scores.whole != AVERAGE or (len(scores.names) == 1 and len(scores.tasks) <= _CURVES):
        return []
    return [by_length(scores, task) for task in scores.tasks]


def maps(scores: Scores) -> list[Panel]:
    """Return the needle heat maps."""
    return heat.maps(scores)


def bytes_kept(scores: Scores) -> list[Panel]:
    """Return the pictures of scores against bytes kept, one a length."""
    found = (by_bytes(scores, length) for length in scores.lengths)
    return [panel for panel in found if panel is not None]


def counted(scores: Scores) -> str:
    """Return in a sentence what was asked."""
    questions = len({(sample.task, sample.length, sample.question) for sample in scores.samples})
    parts = ((questions, "question"), (len(scores.tasks), "task"), (len(scores.samples), "answer"))
    return ", ".join(f"{count:,} {what}" + "s" * (count != 1) for count, what in parts) + "."


def _depths(scores: Scores) -> bool:
    """Return whether tasks are depths of a grid: maps tell these apart, not curves."""
    return all(sample.kind for sample in scores.samples)


def _head(scores: Scores, first: str) -> list[str]:
    return [first, *(f"{length:,} tokens" for length in scores.lengths)]


def _row(scores: Scores, who: Asked, task: str) -> list[Value]:
    return [_value(scores, scores.cell(who, task, length)) for length in scores.lengths]


def _value(scores: Scores, cell: Cell | None) -> Value:
    if cell is None:
        return Value("")
    share = cell.score.mean if scores.scale is PERCENT else None
    return Value(scores.scale.written(cell.score.mean), scores.scale.ends(cell.score), share)


def _guessed(scores: Scores, chance: float) -> Value:
    return Value(scores.scale.written(chance) if chance else "")


def _kept(scores: Scores, who: Asked, length: int) -> str:
    cells = [scores.cell(who, task, length) for task in scores.tasks]
    counts = [cell.kept_bytes for cell in cells if cell and cell.kept_bytes]
    return size(sum(counts) / len(counts)) if counts else ""


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[:_SHOWN].rsplit(" ", 1)[0] + " …"
