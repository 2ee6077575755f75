"""A committed result from the journals of `longspan eval compress`: one comparison, of one run or of several.

    python -m benchmarks.compress found/compress.jsonl more/compress.jsonl > benchmarks/results/compress-h200.json

Rows of the same questions are put together; a way that was measured twice keeps its last row. Where journals hold other
comparisons beside (other lengths, say), the one with the most rows is taken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from longspan.evals.arguments import guarded
from longspan.evals.journal import Entry, read


def result(entries: list[Entry]) -> dict[str, Any]:
    """Return environment, what was asked, and rows: dense first, then ways as they were measured."""
    of = max((entry.row["of"] for entry in entries), key=lambda of: sum(entry.row["of"] == of for entry in entries))
    mine = [entry for entry in entries if entry.row["of"] == of]
    rows = {(row["who"], row["way"], row["ratio"]): row for row in (entry.row["row"] for entry in mine)}
    about: dict[str, Any] = {}
    for entry in mine:
        about = {**about, **entry.environment}
    commands = dict.fromkeys(entry.environment["command"] for entry in mine)
    about["model"] = Path(about["model"]).name
    kept = sorted(rows.values(), key=lambda row: row["ratio"] != 1)
    return {**about, "command": "; ".join(commands), "of": of, "rows": kept}


def main(files: list[str]) -> int:
    """Print the result of these journals."""
    entries = [entry for file in files for entry in read(Path(file))]
    if not entries:
        print("usage: python -m benchmarks.compress JOURNAL...: no row in what was given", file=sys.stderr)
        return 2
    print(json.dumps(result(entries), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("compress", lambda: main(sys.argv[1:])))
