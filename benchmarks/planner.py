"""Makes what the planner knows of measurements from committed results: `src/longspan/planner/measured.json`.

    python -m benchmarks.planner          write it
    python -m benchmarks.planner --check  exit with 1 if it is out of step

An installed package has no `benchmarks/results`, so what the planner needs of it comes along: times of one layer's
attention, of whole models, and what evals found, each with the file and the number of the row that it stands in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspan.attention import names
from longspan.evals.asking.tables import of_all_tasks
from longspan.evals.statistics import interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MADE = ROOT / "src" / "longspan" / "planner" / "measured.json"
_DENSE = ("sdpa-cudnn", "sdpa-flash")
"""Sides of `longspan bench attention` that are what our own dense attention runs: PyTorch's fused kernels."""


def _results(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(RESULTS.glob(pattern)):
        yield f"benchmarks/results/{file.name}", json.loads(file.read_text(encoding="utf-8"))


def attention() -> Iterator[dict[str, Any]]:
    """Yield seconds of one layer's attention, of a mechanism or of dense attention by one of PyTorch's kernels."""
    for file, result in _results("attention-*.json"):
        of = result["of"]
        shape = {key: of[key] for key in ("heads", "kv_heads", "head_dim")}
        for number, row in enumerate(result["rows"]):
            if row["what"] not in ("decode", "prefill"):
                continue
            for name, side in row["sides"].items():
                ours = name == "longspan"
                if "seconds" not in side or not (ours or name in _DENSE):
                    continue
                yield {
                    "file": file, "row": number, "device": result["device"], "what": row["what"], **shape,
                    "mechanism": of["mechanism"] if ours else "dense", "by": "" if ours else name,
                    "length": row["length"], "queries": row["queries"], "seconds": side["seconds"],
                }  # fmt: skip


def models() -> Iterator[dict[str, Any]]:
    """Yield tokens a second of whole models, in the form of `longspan bench model`."""
    for file, result in _results("model-*.json"):
        for number, row in enumerate(result["rows"]):
            if found := model_row(result, row):
                yield {"file": file, "row": number, **found}


def model_row(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the planner takes of one row of `longspan bench model`; None: it says nothing of ours.

    Of figures that are medians with their quartiles the medians count.
    """
    of = {**result, **result.get("of", {}), **row}
    found = {
        "device": of["device"],
        "threads": of.get("threads"),
        "model": of.get("model") or "smollm2",
        "dtype": str(of.get("dtype", "float32")).removeprefix("torch."),
        "mechanism": row.get("mechanism", row.get("attention")),
        "prefill": row.get("prefill"),
        "length": row.get("length", row.get("context")),
        "chunk": row.get("chunk"),
    }
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        if (value := row.get(name)) is not None:
            found[name] = value[0] if isinstance(value, list) else value
    memory = row.get("memory")
    if isinstance(memory, dict) and memory.get("peak"):
        found["peak_bytes"] = memory["peak"]
    ours = str(found["mechanism"]).partition(":")[0] in names()
    if not ours or found["length"] is None or "prefill_tokens_per_s" not in found:
        return None
    return {key: value for key, value in found.items() if value is not None}


def evals() -> Iterator[dict[str, Any]]:
    """Yield what evals found of mechanisms: shares of needles found, and perplexity over dense's."""
    for file, result in _results("needle*.json"):
        model = (result.get("model") or "SmolLM2-135M-Instruct").split(".")[0]
        for number, line in enumerate(result["table"]):
            if line["kind"] == "single":
                found = interval([1.0] * line["right"] + [0.0] * (line["questions"] - line["right"]), 0.0, 1.0)
                yield {
                    "file": file, "row": number, "eval": "needle", "model": model, "mechanism": line["mechanism"],
                    "length": 1024 * int(line["length"][:-1]), "questions": line["questions"],
                    "score": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4),
                }  # fmt: skip
    for file, result in _results("compress-*.json"):
        for number, row in enumerate(result["rows"]):
            if row["who"] == "longspan":
                yield {
                    "file": file, "row": number, "eval": "compress", "model": result["model"].split(".")[0],
                    "way": row["way"], "length": result["of"]["length"], "kept_share": row["kept_share"],
                    "perplexity_ratio": row["perplexity_ratio"], "score": row["score"],
                }  # fmt: skip
    for file, result in _results("ruler-*.json"):
        whole = of_all_tasks(result["table"])
        for number, line in enumerate(result["table"]):
            if line["task"] == "average" and line in whole:
                yield {
                    "file": file, "row": number, "eval": "ruler", "model": result["model"].split(".")[0],
                    "mechanism": line["contender"], "length": line["length"], "questions": line["questions"],
                    **{name: round(line[name] / 100, 4) for name in ("score", "low", "high")},
                }  # fmt: skip


def made() -> str:
    """Return the file's text: one entry a line."""
    parts = {"attention": attention(), "models": models(), "evals": evals()}
    texts = []
    for name, entries in parts.items():
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        texts.append(f' "{name}": [\n{lines}\n ]')
    return "{\n" + ",\n".join(texts) + "\n}\n"


def main(arguments: list[str]) -> int:
    """Write the file, or with --check compare it."""
    text = made()
    if "--check" in arguments:
        return int(not MADE.is_file() or MADE.read_text(encoding="utf-8") != text)
    MADE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
