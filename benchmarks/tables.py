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

from benchmarks import compress_tables, model_tables, parallel_tables, plan_tables
from longspan.attention import mechanisms
from longspan.bench.attention import report
from longspan.evals.asking.tables import of_all_tasks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION = "attention-*.json"
"""Results of `longspan bench attention`, one a device and kind of inputs; each has a picture of its name."""
FILES = (
    "README.md",
    "README.ru.md",
    "docs/results.md",
    "docs/compression.md",
    "docs/planning.md",
    "docs/citations.md",
    "docs/parallel_attention.md",
)
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
    return _markdown(["mechanism", *map(_long, lengths)], rows)


def _long(length: str) -> str:
    """Return a length in thousands of 1024 as people say it: `1M` for `1024K`."""
    thousands = int(length[:-1])
    return f"{thousands // 1024}M" if thousands % 1024 == 0 else length


def needle_kinds() -> str:
    """Retrieval by kind of question: right answers, page ranked first, fact in a citation."""
    rows = [
        [
            line["kind"],
            _long(line["length"]),
            *(f"{line[key]}/{line['questions']}" for key in ("right", "own_words", "ranked_first", "cited")),
        ]
        for line in _needles()
        if line["mechanism"] == "retrieval"
    ]
    return _markdown(["questions", "length", "answered", "in its own words", "page ranked first", "fact cited"], rows)


def speed() -> str:
    """Prefill and decode beside plain transformers, and llama.cpp, in the same run: a table a result."""
    return "\n".join(_speed(result) for result in reversed(_models(long=False)))


def _models(*, long: bool) -> list[dict[str, Any]]:
    """Return the committed results of whole models, on texts or at long contexts, by their files' names."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("model-*.json"))]
    return [result for result in found if model_tables.is_long(result) is long]


def _speed(result: dict[str, Any]) -> str:
    others = {"": "transformers", "_llama_cpp": "llama.cpp"}
    there = [key for key in others if any(f"prefill_ratio{key}" in row for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        line = [f"`{row['mechanism']}`", str(row["length"])]
        for what, digits in (("prefill", 0), ("decode", 1)):
            cells = [(f"{what}_tokens_per_s", digits), *((f"{what}_ratio{key}", 2) for key in there)]
            line += [f"{row[key]:.{places}f}" if key in row else "" for key, places in cells]
        rows.append(line)
    head = ["mechanism", "tokens"]
    for what in ("prefill", "decode"):
        head += [f"{what} tokens/s", *(f"ratio to {others[key]}" for key in there)]
    about = f"{result['device']}, {result.get('dtype', 'float32')}, torch {result['torch']}; `{result['command']}`"
    return _markdown(head, rows) + f"\n{about}\n"


def _rulers(count: Callable[[list[dict[str, Any]]], int]) -> dict[str, Any] | None:
    """Return the committed result of `python -m benchmarks.ruler` whose table has most of something, 0 being none."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("ruler-*.json"))]
    best: dict[str, Any] | None = max(found, key=lambda result: count(result["table"]), default=None)
    return best if best is not None and count(best["table"]) else None


_NOTHING = "No result is committed yet.\n"


def ruler() -> str:
    """RULER's tasks by length, attended to densely."""
    result = _rulers(lambda table: sum(line["contender"] == "dense" for line in table))
    if result is None:
        return _NOTHING
    lines = [line for line in result["table"] if line["contender"] == "dense"]
    return _by_length(lines, "task") + _ruler_about(result, lines)


def ruler_mechanisms() -> str:
    """The average of RULER's tasks for each mechanism at its share of the keys, by length."""
    result = _rulers(lambda table: len({line["contender"] for line in table} - {"dense"}))
    if result is None:
        return _NOTHING
    shares = {line["length"] for line in result["table"] if line["contender"] != "dense"}
    lines = [line for line in result["table"] if line["length"] in shares]
    whole = of_all_tasks(lines)
    averages = [line for line in whole if line["task"] == "average"]
    return _by_length(averages, "contender") + _ruler_about(result, whole)


def ruler_agreement() -> str:
    """Dense scores on our questions and on the independent generator's."""
    files = sorted(RESULTS.glob("agreement-*.json"))
    if not files:
        return _NOTHING
    result = json.loads(files[-1].read_text(encoding="utf-8"))
    head = ["task", "tokens", "independent", "ours", "difference", "standard error"]
    rows = [
        [
            f"`{line['task']}`",
            f"{line['length'] / 1024:g}K",
            *(f"{line[side]:.1f}" for side in ("independent", "ours")),
            f"{line['difference']:+.1f}",
            f"{line['error']:.1f}",
        ]
        for line in result["table"]
    ]
    return _markdown(head, rows) + (
        f"\n{result['model']}, {result['dtype']}, {result['device']}, torch {result['torch']}; `{result['command']}`\n"
    )


def _by_length(lines: list[dict[str, Any]], key: str) -> str:
    lengths = sorted({line["length"] for line in lines})
    found = {(line[key], line["length"]): line for line in lines}
    names = dict.fromkeys(line[key] for line in sorted(lines, key=lambda line: line["task"] == "average"))
    rows = [
        [f"`{name}`", *(f"{c['score']:.1f} ({c['low']:.0f}-{c['high']:.0f})" if c else "" for c in cells)]
        for name in names
        for cells in [[found.get((name, length)) for length in lengths]]
    ]
    return _markdown([key, *(f"{length / 1024:g}K" for length in lengths)], rows)


def _ruler_about(result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    counts = [line["questions"] for line in lines if line["task"] != "average"]
    return (
        f"\n{min(counts)} to {max(counts)} questions of each task and length; {result['model']}, {result['dtype']}, "
        f"{result['device']}, torch {result['torch']}; `{result['command']}`\n"
    )


def _attention_results() -> dict[str, dict[str, Any]]:
    """Return the committed results of `longspan bench attention` by name; there may be none yet."""
    files = sorted(RESULTS.glob(ATTENTION))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _where(result: dict[str, Any]) -> str:
    of = result["of"]
    scaled = any("*" in _ratio(row, name) for row in result["rows"] for name in _PEERS)
    note = "; * fewer queries, scaled" if scaled else ""
    heads = f"{of['heads']} query and {of['kv_heads']} KV heads of {of['head_dim']}"
    layer = f"`{of['mechanism']}`, {heads}, {of['dtype']}, {of['routing']} inputs"
    return f"\n{result['device']}, {layer}, torch {result['torch']}; `{result['command']}`{note}\n"


def attention_speed() -> str:
    """One layer's decode and prefill: our time, and how many times longer each other side takes."""
    return "\n".join(_speeds(result) + _where(result) for result in _attention_results().values())


_PEERS = {"superlinear": "superlinear 0.1.0", "sdpa-cudnn": "dense (cuDNN)", "sdpa-flash": "dense (flash)"}


def _speeds(result: dict[str, Any]) -> str:
    found = {(row["what"], row["length"]): row for row in result["rows"] if row["what"] != "backward"}
    parts = [part for part in ("decode", "prefill") if any(what == part for what, _ in found)]
    peers = [name for name in _PEERS if any(name in row["ratios"] for row in found.values())]
    queries = max(row["queries"] for row in result["rows"])
    head = ["context"]
    for part in parts:
        head.append("decode" if part == "decode" else f"prefill of {report.words(queries)}")
        head += [f"ratio to {_PEERS[name]}" for name in peers]
    rows = []
    for length in sorted({length for _, length in found}):
        line = [report.words(length)]
        for part in parts:
            row = found.get((part, length))
            seconds = "" if row is None else report.duration(row["sides"]["longspan"]["seconds"])
            line += [seconds, *("" if row is None else _ratio(row, name) for name in peers)]
        rows.append(line)
    return _markdown(head, rows)


def _ratio(row: dict[str, Any], name: str) -> str:
    scaled = "*" if row["sides"].get(name, {}).get("queries", row["queries"]) < row["queries"] else ""
    return f"{row['ratios'][name]:.1f}x{scaled}" if name in row["ratios"] else ""


def attention_reached() -> str:
    """What of the device each call of ours reaches, its memory, and how times grow: a table for each result."""
    return "\n".join(_reached(name, result) for name, result in _attention_results().items())


def _reached(name: str, result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        ours = row["sides"]["longspan"]
        begin = [row["what"], report.words(row["length"]), report.duration(ours["seconds"])]
        if row["what"] == "backward":
            reached = [f"{ours['seconds'] / ours['forward_seconds']:.1f}x forward", "", "", ""]
        else:
            shares = [f"{ours[key]:.0%}" for key in ("share_of_bandwidth", "share_of_matmul")]
            extra = "" if ours["extra_bytes"] is None else f"{ours['extra_bytes'] / 2**20:,.0f} MiB"
            reached = [report.duration(ours["floor"]["seconds"]), *shares, extra]
        rows.append([*begin, *reached, f"{ours['error']:.0e}"])
    head = ["part", "context", "time", "floor", "of bandwidth", "of matmul", "extra memory", "greatest error"]
    said = "".join(f"- {sentence}\n" for sentence in report.sentences(result))
    of = f"{result['device']}, {result['of']['routing']} inputs"
    return f"{_markdown(head, rows)}\n{of}:\n\n{said}\n![Time against context, {of}](pictures/{name}.png)\n"


def compare() -> str:
    """Mechanisms side by side, what reading less costs: a table a result."""
    files = sorted(RESULTS.glob("compare-*.json"), reverse=True)
    return "\n".join(_compared(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _compared(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['length']:,}",
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
        "tokens",
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


def sources() -> str:
    """How often the sentence that holds the answer is named first, and what naming costs."""
    found = json.loads((RESULTS / "sources-cpu.json").read_text(encoding="utf-8"))
    rows = []
    for one in found["table"]:
        row = [f"`{one['mechanism']}`", f"{one['length']:,}", "", "", ""]
        if "right" in one:
            row[2] = f"{round(one['first'] * one['right'])} of {one['right']} ({one['low']:.0%} to {one['high']:.0%})"
        if "absent" in one:
            row[3] = f"{one['absent_named']} of {one['absent']} ({one['absent_unsupported']})"
        if "ratio" in one:
            row[4] = f"{one['ratio'] - 1:+.1%} of {one['decode_ms']:.0f} ms a token"
        rows.append(row)
    return _markdown(["mechanism", "tokens", "first, of right answers", "absent, named", "cost"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "needle": needle,
    "needle-kinds": needle_kinds,
    "speed": speed,
    "compare": compare,
    "ruler": ruler,
    "ruler-mechanisms": ruler_mechanisms,
    "ruler-agreement": ruler_agreement,
    "sources": sources,
    "attention": attention,
    "attention-speed": attention_speed,
    "attention-reached": attention_reached,
    "models": lambda: model_tables.models(_models(long=True)),
    "models-short": lambda: model_tables.short(_models(long=True)),
    "models-kernels": lambda: model_tables.kernels(_models(long=True)),
    **compress_tables.TABLES,
    **plan_tables.TABLES,
    **parallel_tables.TABLES,
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
