"""The tables of whole models at long contexts, from results of `longspan bench model --context`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from longspan.bench.long import report

_HEAD = [title.removeprefix(">") for title in report.COLUMNS]
_SHOWN = 6
"""Kernels of a chunk and of a step that are named."""


def is_long(result: dict[str, Any]) -> bool:
    """Return whether a result is of long contexts; others of whole models are of texts."""
    return any("context" in row for row in result["rows"])


def models(results: Iterable[dict[str, Any]]) -> str:
    """First token, prefill, decode and memory: a table a result."""
    return "\n".join(_table(result) for result in results)


def _table(result: dict[str, Any]) -> str:
    of = result["of"]
    commands = dict.fromkeys(run["command"] for run in result.get("runs", [result]))
    said = "".join(f"- {sentence}\n" for sentence in report.sentences(result))
    about = f"{result['device']}, {of['model']}, {of['dtype']}, torch {result['torch']}; "
    about += ", ".join(f"`{command}`" for command in commands)
    return f"{_markdown(_HEAD, report.table(result['rows']))}\n{about}\n\n{said}"


def short(results: Iterable[dict[str, Any]]) -> str:
    """What people look for first, of the model that was measured at the longest context."""
    longest = max(results, key=lambda result: max(row["context"] for row in result["rows"]))
    rows = [
        [
            f"{row['context']:,}", row["attention"], f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s'][0]:,.0f}", f"{row['memory']['peak'] / 2**30:.1f} GiB",
        ]
        for row in longest["rows"]
        if "left_out" not in row
    ]  # fmt: skip
    head = ["context", "attention", "prefill, tokens/s", "decode, tokens/s", "peak memory"]
    about = f"{longest['device']}, {longest['of']['model']}, {longest['of']['dtype']}"
    return f"{_markdown(head, rows)}\n{about}. {' '.join(report.sentences(longest))}\n"


def kernels(results: Iterable[dict[str, Any]]) -> str:
    """What takes the time of a chunk and of a decode step, where it was profiled."""
    rows = []
    for result in results:
        for row in result["rows"]:
            for what, found in row.get("top_kernels", {}).items():
                whole = next(each["us"] for each in found if each["kernel"] == "all")
                named = [each for each in found if each["kernel"] != "all"][:_SHOWN]
                told = ", ".join(f"`{_name(each['kernel'])}` {each['us'] / whole:.0%}" for each in named)
                begin = [f"{row['context']:,}", row["attention"], "a chunk" if what == "prefill" else "a step"]
                rows.append([*begin, f"{whole / 1000:.2f} ms", told])
    return _markdown(["context", "attention", "of", "kernels together", "most of it"], rows)


def _name(kernel: str) -> str:
    """Return a kernel's name as short as it still says something."""
    return kernel.split("(", maxsplit=1)[0].removeprefix("void ").split("<")[0].rpartition("::")[2].strip()[:40]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
