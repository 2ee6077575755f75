"""The tables of docs/compression.md: ways to keep fewer bytes, ours and kvpress', from the committed comparison."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plan_tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
COMPRESS = "compress-*.json"
"""Results of `longspan eval compress`; each has a picture of its name."""

SAME = (
    ("StreamingLLM", "streaming", "streaming_llm"),
    ("SnapKV", "snapkv", "snapkv"),
    ("Ada-KV over SnapKV", "snapkv:heads=adaptive", "ada_snapkv"),
    ("expected attention", "expected", "expected_attention"),
    ("Ada-KV over expected attention", "expected:heads=adaptive", "ada_expected_attention"),
    ("KeyDiff", "keydiff:every=0", "keydiff"),
    ("KVzip", "kvzip", "kvzip"),
    ("KVzip, ours with equal budgets", "kvzip:heads=same", "kvzip"),
    ("H2O", "h2o:every=0", "observed_attention"),
)
"""Methods that both sides have: our way, their press."""


def _compressed() -> dict[str, Any]:
    """Return the committed comparison of ways to compress, of several the one with the most rows."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(COMPRESS))]
    largest: dict[str, Any] = max(found, key=lambda result: len(result["rows"]))
    return largest


def _lost(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return a row's perplexity over that of the same side's dense attention, with its standard error over texts."""
    dense = next(each for each in rows if each["who"] == row["who"] and each["way"] == "dense")
    own, whole = row.get("text_nlls", ()), dense.get("text_nlls", ())
    if len(own) < 3 or row is dense:
        return f"{row['perplexity_ratio']:.3f}"
    worse = [a - b for a, b in zip(own, whole, strict=True)]
    error = row["perplexity_ratio"] * statistics.stdev(worse) / len(worse) ** 0.5
    return f"{row['perplexity_ratio']:.3f} ± {error:.3f}"


def compress_best() -> str:
    """The best of each side within the bytes of each ratio: by perplexity, and by score."""
    rows = _compressed()["rows"]
    lines = []
    for ratio in sorted({row["ratio"] for row in rows if row["ratio"] > 1}):
        line = [f"{ratio:g}"]
        for who in ("longspan", "kvpress"):
            # A way may keep a twentieth more than was asked for: positions, scales, pages that are not full.
            fits = [r for r in rows if r["who"] == who and r["ratio"] == ratio and r["kept_share"] <= 1.05 / ratio]
            best = min(fits, key=lambda row: row["perplexity_ratio"], default=None)
            line.append(f"`{best['way']}` {_lost(best, rows)}" if best else "")
            best = max(fits, key=lambda row: (row["score"], -row["perplexity_ratio"]), default=None)
            line.append(f"`{best['way']}` {100 * best['score']:.1f}" if best else "")
        lines.append(line)
    names = ("perplexity / dense", "score")
    return markdown(["ratio", *(f"{who}: {name}" for who in ("longspan", "kvpress") for name in names)], lines)


def compress() -> str:
    """Ways to keep fewer bytes, ours and kvpress', by ratio: the best scores first."""
    result = _compressed()
    rows = [
        [
            f"{row['ratio']:g}",
            row["who"],
            f"`{row['way']}`",
            f"{row['kept_share']:.1%}",
            f"{100 * row['score']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})",
            _lost(row, result["rows"]),
            f"{row['agreement']:.1%}",
        ]
        for row in sorted(result["rows"], key=lambda row: (row["ratio"], -row["score"], row["perplexity_ratio"]))
    ]
    head = ["ratio", "who", "way", "bytes kept", "score (95 %)", "perplexity / dense", "tokens as dense"]
    of = result["of"]
    said = (
        f"\n{of['length']:,} tokens of context, {of['questions']} questions of each of {len(of['tasks'])} tasks, "
        f"{of['texts']} texts; {result['model']}, {result['dtype']}, {result['device']}, kvpress "
        f"{result['kvpress']['kvpress']}; commands in the file\n"
    )
    return markdown(head, rows) + said


def compress_same() -> str:
    """Methods that both sides have, at the same bytes: how much worse ours makes the next tokens, and the scores."""
    result = _compressed()
    known = {(row["who"], row["way"], row["ratio"]): row for row in result["rows"]}
    lines = []
    for method, way, press in SAME:
        for ratio in sorted({row["ratio"] for row in result["rows"] if row["ratio"] > 1}):
            ours, theirs = known.get(("longspan", way, ratio)), known.get(("kvpress", press, ratio))
            if ours is None or theirs is None:
                continue
            worse, error = _worse(ours, theirs, known)
            kept = f"{ours['kept_share']:.1%}", f"{theirs['kept_share']:.1%}"
            ratios = f"{ours['perplexity_ratio']:.3f}", f"{theirs['perplexity_ratio']:.3f}"
            scores = (f"{100 * each['score']:.1f}" for each in (ours, theirs))
            at_least = "yes" if worse <= 1.96 * error else "no"
            lines.append([method, f"{ratio:g}", *kept, *ratios, f"{worse:+.1%} ± {error:.1%}", at_least, *scores])
    head = ["method", "ratio", "kept", "kvpress", "perplexity / dense", "kvpress", "difference", "as good", "score"]
    return markdown([*head, "kvpress"], lines)


def _worse(ours: dict[str, Any], theirs: dict[str, Any], known: dict[Any, dict[str, Any]]) -> tuple[float, float]:
    """Return by what share our perplexity over dense's is above theirs, and its standard error over texts."""
    losses = [
        [
            lost - whole
            for lost, whole in zip(row["text_nlls"], known[row["who"], "dense", 1.0]["text_nlls"], strict=True)
        ]
        for row in (ours, theirs)
    ]
    each = [mine - other for mine, other in zip(*losses, strict=True)]
    return math.expm1(statistics.mean(each)), statistics.stdev(each) / len(each) ** 0.5


CLAIMS = (
    ("StreamingLLM", "constant memory; perplexity stable to 4M tokens", ("streaming", "streaming:sinks=64")),
    ("H2O", "a fifth of the keys, accuracy comparable to all of them", ("h2o", "h2o:every=0")),
    ("SnapKV", "8.2 times less memory at 16K tokens, negligible loss", ("snapkv", "snapkv:when=question")),
    (
        "Ada-KV",
        "better than equal budgets for all heads, at the same bytes",
        ("snapkv:heads=adaptive", "expected:heads=adaptive"),
    ),
    ("RocketKV", "up to 400 times fewer keys read, negligible loss", ("rocketkv", "rocketkv:when=question")),
    (
        "expected attention",
        "keys that later queries look at, without the question",
        ("expected", "expected:when=question"),
    ),
    ("KeyDiff", "23 % fewer keys within 0.04 % of dense on LongBench", ("keydiff", "keydiff:every=0")),
    (
        "KVzip",
        "3 to 4 times fewer bytes, negligible loss, whatever is asked",
        ("kvzip", "kvzip:heads=adaptive", "kvzip:heads=same"),
    ),
    (
        "KIVI",
        "2 bits: 2.6 times less peak memory, almost the same quality",
        ("int4", "int3", "int2:keys=3,residual=0", "int2:residual=0", "int2"),
    ),
    (
        "eviction in 4 bits",
        "no paper: both together, ours",
        ("kvzip+int4:residual=0", "expected+int4:residual=0", "snapkv+int4:residual=0", "snapkv+int4"),
    ),
    (
        "eviction in 2 and 3 bits",
        "no paper: both together, ours",
        (
            "kvzip+int3:residual=0",
            "kvzip+int2:keys=3,residual=0",
            "kvzip:heads=adaptive+int2:keys=3,residual=0",
            "kvzip:heads=same+int2:keys=3,residual=0",
            "keydiff:every=0+int2:keys=3,residual=0",
            "snapkv+int2:keys=3,residual=0",
            "expected+int2:keys=3,residual=0",
        ),
    ),
)
"""Methods of the survey literature: what their own papers claim, and which of our ways they are."""


def survey() -> str:
    """What papers claim beside what we measured: loss against dense at the ratios that were measured."""
    result = _compressed()
    dense = next(row for row in result["rows"] if row["way"] == "dense" and row["who"] == "longspan")
    lines = []
    for method, claim, ways in CLAIMS:
        own = [row for row in result["rows"] if row["who"] == "longspan" and row["way"] in ways]
        for row in sorted(own, key=lambda row: (ways.index(row["way"]), row["ratio"])):
            fewer = f"{1 / row['kept_share']:.1f}x" if row["kept_share"] < 1 else f"none; {row['ratio']:g}x fewer read"
            loss = f"{100 * (row['score'] - dense['score']):+.1f} points"
            lines.append([method, claim, f"`{row['way']}`", fewer, loss, _lost(row, result["rows"])])
        if not own:
            lines.append([method, claim, "not measured in this run", "", "", ""])
    head = ["method", "its paper says", "here", "fewer bytes", "score", "perplexity / dense"]
    return markdown(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "compress-best": compress_best,
    "compress-same": compress_same,
    "compress": compress,
    "survey": survey,
}
