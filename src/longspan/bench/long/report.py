"""A result of `longspan bench model --context` as one JSON value, and as a table for people. It measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.bench.journaled import one_result
from longspan.evals.journal import Entry

COLUMNS = (
    ">context", "attention", ">first token", ">prefill", ">decode", ">weights", ">KV", ">state", ">workspace", ">peak",
    ">prefill/floor", ">decode/floor",
)  # fmt: skip
"""Titles of the table; a title that begins with > stands over numbers. Prefill and decode are tokens/s, memory GiB."""


def result(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return environment, what was measured (`of`), and rows in order of context and attention.

    Of two rows of one context and attention the later one stands.

    Raises:
        UsageError: no row, or rows of different models or devices, which must not stand side by side.
    """
    return one_result(entries, lambda row: (row["context"], row["attention"]), lambda row: row["context"])


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table."""
    lines = []
    for row in rows:
        head = [f"{row['context']:,}", row["attention"]]
        if "left_out" in row:
            lines.append([*head, "left out", *[""] * 9])
            continue
        memory = row["memory"] or {}
        kinds = [memory.get(kind) for kind in ("weights", "kv", "state", "workspace", "peak")]
        shares = [row.get(f"{part}_floor_share") for part in ("prefill", "decode")]
        lines.append([
            *head,
            f"{row['first_token_s']:.2f} s",
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s'][0]:,.1f}",
            *("" if kind is None else f"{kind / 2**30:.1f}" for kind in kinds),
            *("" if share is None else f"{share:.0%}" for share in shares),
        ])  # fmt: skip
    return lines


def sentences(found: dict[str, Any]) -> list[str]:
    """Return what the table does not say."""
    told = []
    if "random weights" in found["of"].get("model", ""):
        told.append("The weights are random, of exactly the model's shape: speed and memory alone mean something.")
    parts = [row for row in found["rows"] if row.get("read", "whole") != "whole"]
    if parts:
        lengths = ", ".join(dict.fromkeys(f"{row['context']:,}" for row in parts))
        told.append(f"Prefill of {lengths} is the integral of chunks that were timed over filled pages.")
    told += [
        f"{row['attention']} at {row['context']:,}: {row['fewest']:,} tokens of a chunk were timed where it takes long."
        for row in parts
        if row["fewest"] < row["chunk"]
    ]
    told += [
        f"{row['attention']} at {row['context']:,} was read by {row['prefill']}."
        for row in found["rows"]
        if "prefill" in row
    ]
    told += [
        f"{row['attention']} at {row['context']:,}: {row['left_out']}" for row in found["rows"] if "left_out" in row
    ]
    return told
