"""How fast the kernels of a model's layers are, one by one, on a GPU: time, rate, share of what the chip can do.

    python -m benchmarks.model_kernels --what scan,conv --json
    python -m benchmarks.model_kernels --what scan --tile chunk=64,segments=4 --tile chunk=128,segments=2

Shapes are Nemotron-3-Nano-30B-A3B's. Each row's output is first compared with plain PyTorch in float32 on the same
inputs; a row that is wrong says so and has no time. Prefill: the median of single launches. Decode: a CUDA graph that
goes round through as many layers' tensors as the second cache cannot hold. Peaks are measured in the same run: a copy,
and a product of bf16 matrices. What is timed is listed in `CASES`; each case lives in a module of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.model_cases.frame import Case, Options
from longspan.lengths import tokens_of

CASES = {
    "conv": "benchmarks.model_cases.mamba",
    "scan": "benchmarks.model_cases.mamba",
    "gated": "benchmarks.model_cases.mamba",
    "step": "benchmarks.model_cases.mamba",
    "norm": "benchmarks.model_cases.mamba",
    "route": "benchmarks.model_cases.experts",
    "experts": "benchmarks.model_cases.experts",
    "gemv": "benchmarks.model_cases.experts",
}
"""By name, the module whose function `cases(what, options)` yields it."""


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative error of any output; NaN where one was not written."""
    apart = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True)]
    return max(apart, key=lambda x: float("inf") if math.isnan(x) else x)


def eager_us(call: Callable[[], Any], times: int = 20) -> float:
    """Return the median time of single launches."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[times // 2] * 1e3


def graph_us(calls: Sequence[Callable[[], Any]], times: int = 20) -> float:
    """Return the median time of one call where all are replayed as one CUDA graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return eager_us(graph.replay, times) / len(calls)


def peaks() -> tuple[float, float]:
    """Return measured GB/s of a copy (read and written) and TFLOP/s of a product of bf16 matrices."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    copy = torch.empty_like(big)
    rate = 2 * big.numel() / eager_us(lambda: copy.copy_(big)) / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return rate, 2 * 8192**3 / eager_us(lambda: a @ b) / 1e6


def timed(case: Case, tile: dict[str, Any], peak: tuple[float, float]) -> dict[str, Any]:
    """Return a case's row."""
    row: dict[str, Any] = {"case": case.name, "tile": tile or None}
    try:
        error = distance(case.found(**tile), case.wanted())
        row["error"] = float(f"{error:.2e}")
        if not error <= case.tolerance:
            return row | {"wrong": f"above {case.tolerance}"}
        calls = [lambda call=call: call(**tile) for call in case.calls]  # type: ignore[misc]
        us = graph_us(calls) if case.graph else eager_us(calls[0])
    except Exception as failure:  # a tile that does not fit: the next may
        return row | {"failed": str(failure).splitlines()[0][:200]}
    row |= {"us": round(us, 2), "gbps": round(case.bytes / us / 1e3, 1), "tflops": round(case.flops / us / 1e6, 1)}
    floor = max(case.bytes / peak[0] / 1e3, case.flops / peak[1] / 1e6)
    return row | {"floor_us": round(floor, 2), "share": round(floor / us, 3)}


def cases(names: Sequence[str], options: Options) -> Iterator[Case]:
    """Make the cases that are asked for, one after another."""
    for name in names:
        yield from importlib.import_module(CASES[name]).cases(name, options)


def _tile(text: str) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {key: int(value) for key, _, value in pairs}


def main() -> None:
    """Check and time each case, with each tile that is asked for or the one that is used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--tile", action="append", metavar="NAME=NUMBER,...", help="how a kernel is cut; any number")
    parser.add_argument("--tokens", default="32K", help="tokens of a prefill chunk (default: 32K)")
    parser.add_argument("--batch", default="1,8", help="sequences of a decode step (default: 1,8)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--json", action="store_true", help="one JSON line a row, instead of a table")
    options = parser.parse_args()
    names = options.what.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--what: unknown {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    try:
        tiles = [_tile(text) for text in options.tile or ()] or [{}]
    except ValueError:
        parser.error("--tile: say NAME=NUMBER,NAME=NUMBER")
    if not torch.cuda.is_available():
        parser.exit(2, "there is no GPU here: kernels are timed on one\n")
    shapes = Options(
        tokens_of(options.tokens), tuple(int(n) for n in options.batch.split(",")), getattr(torch, options.dtype)
    )
    peak = peaks()
    versions = {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__}
    first = {"device": torch.cuda.get_device_name(), "gbps": round(peak[0]), "tflops": round(peak[1]), **versions}
    print(json.dumps(first), flush=True)
    for case in cases(names, shapes):
        if options.only not in case.name:
            continue
        for tile in tiles:
            row = timed(case, tile, peak)
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                cut = ",".join(f"{key}={value}" for key, value in tile.items())
                rest = " ".join(f"{key}={value}" for key, value in row.items() if key not in ("case", "tile", "us"))
                print(f"{case.name:<32}{cut:<40}{row.get('us', '-'):>10} us  {rest}", flush=True)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
