"""Makes the tables in README and docs from committed results and from the registry.

    python -m benchmarks.tables          write them
    python -m benchmarks.tables --check  exit with 1 if a file is out of step

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. Nothing between these is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.attention import mechanisms

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("README.md", "README.ru.md", "docs/results.md")
_PLACE = re.compile(r"(<!-- table:([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _needles() -> list[dict[str, Any]]:
    """Return a line a mechanism, kind and length: of several committed results the one with the most questions."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for file in sorted(RESULTS.glob("needle*.json")):
        for line in json.loads(file.read_text(encoding="utf-8"))["table"]:
            key = (line["mechanism"], line["kind"], int(line["length"][:-1]))
            if key not in best or line["questions"] > best[key]["questions"]:
                best[key] = line
    return [best[key] for key in sorted(best)]


def needle() -> str:
    """Right answers by mechanism and length, for facts asked in their own words."""
    lines = [line for line in _needles() if line["kind"] == "single"]
    lengths = sorted({line["length"] for line in lines}, key=lambda length: int(length[:-1]))
    found = {(line["mechanism"], line["length"]): line for line in lines}
    rows = []
    for name in dict.fromkeys(line["mechanism"] for line in lines):
        cells = [found.get((name, length)) for length in lengths]
        rows.append([f"`{name}`", *(f"{c['right']}/{c['questions']}" if c else "" for c in cells)])
    return _markdown(["mechanism", *lengths], rows)


def needle_kinds() -> str:
    """Retrieval by kind of question: right answers, page ranked first, fact in a citation."""
    rows = [
        [
            line["kind"],
            line["length"],
            *(f"{line[key]}/{line['questions']}" for key in ("right", "own_words", "ranked_first", "cited")),
        ]
        for line in _needles()
        if line["mechanism"] == "retrieval"
    ]
    return _markdown(["questions", "length", "answered", "in its own words", "page ranked first", "fact cited"], rows)


def speed() -> str:
    """Prefill and decode beside plain transformers in the same run."""
    result = json.loads((RESULTS / "model-cpu.json").read_text(encoding="utf-8"))
    rows = []
    for row in result["rows"]:
        decode = row.get("decode_tokens_per_s")
        rows.append(
            [
                f"`{row['mechanism']}`",
                str(row["length"]),
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['prefill_ratio']:.2f}",
                f"{decode:.1f}" if decode else "",
                f"{row['decode_ratio']:.2f}" if decode else "",
            ]
        )
    head = [
        "mechanism",
        "tokens",
        "prefill tokens/s",
        "ratio to transformers",
        "decode tokens/s",
        "ratio to transformers",
    ]
    return _markdown(head, rows) + f"\n{result['device']}, torch {result['torch']}; `{result['command']}`\n"


def compare() -> str:
    """Mechanisms side by side: what reading less costs."""
    result = json.loads((RESULTS / "compare-cpu.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{row['mechanism']}`",
            row["budget"],
            f"{row['keys']:.0f}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['agreement']:.0%}",
            f"{row['needles']}/{row['questions']}",
        ]
        for row in result["rows"]
    ]
    head = [
        "mechanism",
        "budget",
        "keys a query head reads",
        "perplexity / dense",
        "greedy tokens as dense",
        "multi-key needles",
    ]
    lengths = sorted({row["length"] for row in result["rows"]})
    said = f"\n{', '.join(f'{length:,}' for length in lengths)} tokens, {result['device']}; `{result['command']}`\n"
    return _markdown(head, rows) + said


def demo() -> str:
    """What the demo took."""
    found = json.loads((RESULTS / "demo-cpu.json").read_text(encoding="utf-8"))
    rows = [
        [one["question"], one["answer"].strip().splitlines()[0], f"{one['time_to_first_token_s']:.1f} s"]
        for one in found["questions"]
    ]
    said = (
        f"\n{found['tokens']:,} tokens read at {found['prefill_tokens_per_s']:.0f} tokens/s; "
        f"the second question's first token came {found['first_over_last']:.0f} times sooner ({found['device']}).\n"
    )
    return _markdown(["question", "answer", "first token"], rows) + said


def attention() -> str:
    """The registry."""
    rows = []
    for name, cls in mechanisms().items():
        said = {"exact": cls.exact, "bounded memory": cls.bounded_memory, "needs training": cls.needs_training}
        flags = [text for text, on in said.items() if on]
        options = ", ".join(f"{key}={value}" for key, value in cls.options().items())
        page = f"[`{name}`](https://github.com/longspan/longspan/blob/main/docs/mechanisms/{name}.md)"
        rows.append([page, cls.about, ", ".join(flags), cls.decode_order, options, cls.source])
    return _markdown(["mechanism", "reads", "is", "decode step", "options", "source"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "needle": needle,
    "needle-kinds": needle_kinds,
    "speed": speed,
    "compare": compare,
    "attention": attention,
}


def filled(text: str) -> str:
    """Return a document with every table made anew."""
    return _PLACE.sub(lambda found: found.group(1) + TABLES[found.group(2)]() + found.group(3), text)


def main(arguments: list[str]) -> int:
    """Write, or check, every file."""
    stale = []
    for name in FILES:
        file = ROOT / name
        old = file.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(name)
            if "--check" not in arguments:
                file.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of step with benchmarks/results: {', '.join(stale)}; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
