"""The tables of docs/parallel_attention.md: what the planner's model expects of one layer over several GPUs.

They are computed before anyone has run them, and beside them stands what `longspan.bench.parallel` has measured, where
a result is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.plan_tables import markdown
from longspan.lengths import short
from longspan.planner import devices, parallel, times
from longspan.planner.measured import Range
from longspan.planner.memory import GPU_CHUNK
from longspan.planner.model import Attention, Layer, Model
from longspan.planner.parallel import PLACEMENTS, Ranks
from longspan.planner.times import Work
from longspan.planner.words import size, time

RESULTS = Path(__file__).resolve().parent / "results"
HEADS, KV_HEADS, DIM = 32, 8, 128
LAYER = Model("layer", "", 4096, 1, [Layer(Attention(HEADS, KV_HEADS, DIM, DIM), None, None, 0, 1)], 1, 1, 0, None)
CASES = (
    *((n << 10, 2, 1) for n in (128, 256, 512, 1024, 2048)),
    (1 << 20, 8, 1),
    (10 << 20, 8, 8),
)
"""Tokens, GPUs of a node, nodes."""
WHOLE = 1 << 37
"""Pairs of a query and a key up to which the bench lets one GPU read a context whole."""


def predictions() -> str:
    """One layer's prefill and decode step on H100, by the planner's model."""
    rows = []
    for n, gpus, nodes in CASES:
        for name in ("ring", "context_parallel", "star"):
            ranks = Ranks(gpus, nodes, anchor=min(32 << 10, n // (gpus * nodes)) if name == "star" else None)
            work = Work(LAYER, n, "dense", "bf16", "bf16", 1, devices.device("h100"), GPU_CHUNK)
            sent = parallel.sent(PLACEMENTS[name], work, ranks)
            prefill = parallel.prefill(work, ranks, PLACEMENTS[name])
            alone = times.prefill_attention(work)
            rates = [sent.attention * 4 * HEADS * DIM * n**2 / 2 / each / 1e12 for each in (prefill.high, prefill.low)]
            anchor = f", anchor {_length(ranks.anchor)}" if ranks.anchor else ""
            rows.append(
                [
                    _length(n), f"{nodes} x {gpus}", name + anchor,
                    size(sent.bytes), time(prefill), f"{rates[0]:.0f} to {rates[1]:.0f}",
                    f"{alone.middle / prefill.middle:.3g}", time(_decode(work, ranks, name)),
                ]
            )  # fmt: skip
    head = ["tokens", "nodes x GPUs", "scheme", "sent by a GPU", "prefill", "TFLOP/s a GPU", "times one GPU", "decode"]
    return markdown(head, rows)


def _decode(work: Work, ranks: Ranks, name: str) -> Range:
    """Return a decode step of attention alone: no weights are read."""
    whole = parallel.decode(work, ranks, PLACEMENTS[name])
    rest = times.decode_rest(work)
    return Range(max(0.0, whole.low - rest.low), max(0.0, whole.high - rest.high))


def _length(n: int) -> str:
    return f"{n >> 20}Mi" if n % (1 << 20) == 0 else f"{n >> 10}Ki" if n % (1 << 10) == 0 else short(n)


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("parallel-*.json"))]


def measured() -> str:
    """Every committed result of `longspan.bench.parallel`."""
    found = _results()
    return "\n".join(map(_result, found)) if found else "No result is committed yet.\n"


def _result(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        line = [row["what"], _length(row["length"]), row["scheme"]]
        if "skipped" in row:
            rows.append([*line, row["skipped"], "", "", "", "", ""])
            continue
        rate, peak, reached = (row.get(name) for name in ("tflops_per_rank", "peak_bytes", "efficiency"))
        sent = "" if row["scheme"].startswith("torch") else size(row["sent_bytes"])  # nobody counts what it sends
        rows.append(
            [
                *line, time(Range(row["low"], row["high"])), f"{rate:.0f}" if rate else "",
                f"{100 * reached:.0f}%" if reached else "", f"{row['speedup']:.2g}" if row["speedup"] < 0.1
                else f"{row['speedup']:.2f}", sent, size(peak) if peak else "",
            ]
        )  # fmt: skip
    head = ["what", "tokens", "scheme", "time", "TFLOP/s a GPU", "of one GPU's rate", "times one GPU", "sent", "memory"]
    about = f"{result['ranks']} x {result['device']}, {result['dtype']}, torch {result['torch']}"
    commands = "\n".join(f"    {command}" for command in result.get("commands", [result["command"]]))
    return markdown(head, rows) + f"\n{about}:\n\n{commands}\n"


def checked() -> str:
    """What was measured beside the planner's predictions, and beside its model given one GPU's own rate."""
    rows = []
    for result in _results():
        device = devices.of(result["device"])
        for row in result["rows"]:
            if "skipped" in row or row["scheme"] not in (*PLACEMENTS, "merge"):
                continue
            n, name, decode = row["length"], row["scheme"], row["what"] == "decode"
            how = PLACEMENTS["ring" if decode else name]
            ranks = Ranks(result["ranks"], 1, anchor=result["anchor"] if name == "star" else None)
            work = Work(LAYER, n, "dense", "bf16", "bf16", 1, device, GPU_CHUNK)
            told = _decode(work, ranks, "ring") if decode else parallel.prefill(work, ranks, how)
            if decode:
                own = row["alone_seconds"] / ranks.count
            else:
                own = (
                    4
                    * HEADS
                    * DIM
                    * n**2
                    / 2
                    / (1e12 * row["alone_tflops"])
                    * parallel.sent(how, work, ranks).attention
                )
            rows.append(
                [
                    row["what"], _length(n), name, time(told), time(Range(row["seconds"], row["seconds"])),
                    "yes" if told.low <= row["seconds"] <= told.high else "no",
                    f"{100 * (told.middle / row['seconds'] - 1):+.0f}%", f"{100 * (own / row['seconds'] - 1):+.0f}%",
                ]
            )  # fmt: skip
    head = ["what", "tokens", "scheme", "predicted", "measured", "within", "middle off by", "one GPU's rate: off by"]
    return markdown(head, rows) if rows else "No result is committed yet.\n"


def latency() -> str:
    """By length: dense attention on one GPU, and each way over several, as the articles lay it out."""
    ways = ("ring", "context_parallel", "star", "torch")
    tables = []
    for result in _results():
        rows: dict[int, dict[str, str]] = {}
        for row in result["rows"]:
            cells = rows.setdefault(row["length"], {})
            told = time(Range(row["seconds"], row["seconds"])) if "seconds" in row else ""
            if row["what"] == "prefill":
                cells[row["scheme"]] = told
                if "alone_tflops" in row and "one" not in cells:
                    one = 4 * HEADS * DIM * row["length"] ** 2 / 2 / (1e12 * row["alone_tflops"])
                    cells["one"] = time(Range(one, one)) + ("*" if row["length"] ** 2 / 2 > WHOLE else "")
            elif row["scheme"] == "merge":
                cells |= {"decode": told, "decode one": time(Range(row["alone_seconds"], row["alone_seconds"]))}
        head = ["tokens", "dense, one GPU", *ways, "decode, one GPU", "decode"]
        names = ("one", *ways, "decode one", "decode")
        body = [[_length(n), *(cells.get(name, "") for name in names)] for n, cells in sorted(rows.items())]
        tables.append(f"{result['ranks']} x {result['device']}\n\n{markdown(head, body)}")
    return "\n".join(tables) if tables else "No result is committed yet.\n"


TABLES = {
    "parallel-predictions": predictions,
    "parallel-measured": measured,
    "parallel-checked": checked,
    "parallel-latency": latency,
}
