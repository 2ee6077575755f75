"""How long a decode step takes by the length of the context, over a cache that is filled without reading a text.

    python -m benchmarks.decode --lengths 8000,32K,128K --json > benchmarks/results/decode-cpu.json

The model's own weights run, over keys and values that are random numbers: what a step costs hangs on how many are read,
not on what they say (what is chosen is scattered more than in a text, which costs more). Mechanisms take turns.
Filling takes seconds where a prefill of 128K takes many minutes. It measures no quality.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from longspan.attention import Mechanism, make, parse
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.evals.arguments import guarded, parser, say, specs_of
from longspan.evals.environment import environment
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.lengths import lengths_of

_TOGETHER = 4096
"""Tokens that are written at a time."""
_TURNS, _STEPS = 4, 6


def filled(model: CausalModel, length: int, mechanisms: Sequence[Mechanism]) -> KVContext:
    """Return a context of random keys and values, with the summaries that the mechanisms read."""
    summaries = sorted({what for each in mechanisms for what in each.summaries})
    block = min((each.block for each in mechanisms if each.summaries), default=PAGE)
    context = KVContext(model, next((m for m in mechanisms if m.block == block), make("dense")), summaries=summaries)
    generator = torch.Generator().manual_seed(0)
    for kv in context.layers:
        for start in range(0, length, _TOGETHER):
            shape = 1, kv.kv_heads, min(_TOGETHER, length - start), model.dimensions.head_dim
            kv.append(*(torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2)))
        kv.commit()
    context.tokens = [0] * length
    return context


def rows(llm: LLM, specs: list[str], length: int) -> Iterator[dict[str, Any]]:
    """Measure every mechanism at one length: median milliseconds of a step, all over the same context."""
    mechanisms = [parse(spec) for spec in specs]
    context = filled(llm.model, length, mechanisms)
    found: dict[str, list[float]] = {spec: [] for spec in specs}
    for _ in range(_TURNS):
        for spec, mechanism in zip(specs, mechanisms, strict=True):
            context.attend_by(mechanism)
            context.step([1])  # rotates and summarises what the others did not ask for
            for _ in range(_STEPS):
                began = time.perf_counter()
                context.step([1])
                found[spec].append(1000 * (time.perf_counter() - began))
            context.truncate(length)
    for spec, times in found.items():
        yield {"mechanism": spec, "length": length, "decode_ms": round(statistics.median(times), 1)}


def _main(arguments: list[str]) -> int:
    made = parser(
        "benchmarks.decode",
        (__doc__ or "").splitlines()[0],
        mechanisms="quest:budget=1024 superlinear:sinks=4 streaming",
        lengths="8000,32K,128K",
    )
    given = made.parse_args(arguments)
    llm = LLM(given.model, device=given.device)
    measured = []
    for length in lengths_of(given.lengths):
        measured += rows(llm, specs_of(given.mechanisms), length)
        say(f"{length} done")
    first = {row["mechanism"]: row["decode_ms"] for row in reversed(measured)}
    for row in measured:
        row["ratio_to_first"] = round(row["decode_ms"] / first[row["mechanism"]], 2)
    about = environment(llm.model.device, "", []) | {"command": f"python -m benchmarks.decode {shlex.join(arguments)}"}
    about |= {"model": llm.model.name, "dtype": str(llm.model.dtype).removeprefix("torch."), "cache": "random"}
    if given.json:
        print(json.dumps({**about, "rows": measured}))
        return 0
    for row in measured:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("decode", lambda: _main(sys.argv[1:])))
