"""Journals of a benchmark as one result: rows of one task alone, the later of two that measure the same.

It does not know what is measured: whoever calls says which rows are the same, and in which order they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from longspan.errors import UsageError
from longspan.evals.journal import Entry, merged


def one_result(
    entries: Sequence[Entry],
    same: Callable[[dict[str, Any]], Hashable],
    place: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """Return environment, rows and what they have in common (`of`).

    Args:
        entries: of any number of journals.
        same: what two rows share that measure the same; the later one stands.
        place: what rows are sorted by.

    Raises:
        UsageError: no row, or rows of different tasks or devices, which must not stand side by side.
    """
    if not entries:
        raise UsageError("there is no row yet: give --minutes more time, or files that hold rows")
    of = entries[0].row.get("of", {})
    for entry in entries:
        other = entry.row.get("of", {})
        if differs := [key for key in {**of, **other} if other.get(key) != of.get(key)]:
            key = differs[0]
            raise UsageError(
                f"rows with {key} {of.get(key)} and {other.get(key)} can't be one result: merge them apart"
            )
    latest = {same(entry.row): entry for entry in entries}
    kept = sorted(latest.values(), key=lambda entry: place(entry.row))
    made = merged([replace(entry, row={key: entry.row[key] for key in entry.row if key != "of"}) for entry in kept])
    return {**made, "of": of}
