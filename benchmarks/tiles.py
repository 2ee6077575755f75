"""How fast the kernels of window attention and of superlinear's gradients are by how they are cut: for tuning on a GPU.

    python -m benchmarks.tiles --what queries --length 256K --tile 128,64,8,2 --tile 128,128,8,2

prints one JSON line a tile (rows, keys, warps, stages): milliseconds, and TFLOP/s of what must be multiplied. Random
spans, the worst case. It does not check results: tests do, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch

from longspan.kernels.span_attention import triton_backward
from longspan.kernels.span_attention.order import SpanOrder, bands
from longspan.kernels.tiles import Tile, roomy
from longspan.kernels.window_attention import triton_kernels as window_kernels
from longspan.lengths import tokens_of

WHATS = ("window", "queries", "keys", "products")


def spans_of(length: int, count: int, heads: int, spans: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random spans `[1, heads, count, spans]` as long as superlinear's, behind the window."""
    at = torch.arange(length - count, length, device="cuda").view(1, 1, -1, 1).expand(1, heads, -1, spans)
    reach = (at + 1).double().sqrt()
    older = (at - window + 1).clamp(min=0)
    anchor = (torch.rand(at.shape, device="cuda") * older).long()
    lo = (anchor - (3 * reach).ceil().long()).clamp(min=0)
    return lo.int(), torch.minimum(anchor + reach.ceil().long(), at - window).int()


def calls(options: argparse.Namespace) -> tuple[Callable[[Tile | None], Any], float]:
    """Return the call that is timed, given a tile, and the FLOPs that it must do."""
    length, count = tokens_of(options.length), tokens_of(options.chunk)
    kind, dim, heads = getattr(torch, options.dtype), options.head_dim, options.heads
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(rows: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, rows, tokens, dim, generator=generator, device="cuda", dtype=kind)

    q, do = normal(heads, count), normal(heads, count)
    k, v = normal(options.kv_heads, length), normal(options.kv_heads, length)
    scale = 1 / math.sqrt(dim)
    if options.what == "window":
        flops = 4.0 * heads * count * min(options.window, length) * dim

        def window(tile: Tile | None) -> Any:
            return window_kernels.window_attention(
                q, k, v, window=options.window, scale=scale, out_dtype=kind, tile=tile, engine=options.engine
            )

        return window, flops
    lo, hi = spans_of(length, count, heads, options.spans, options.window)
    lse = torch.full(lo.shape, 8.0, device="cuda")
    keys = float((hi - lo + 1).clamp(min=0).sum())
    reach = [math.ceil(3 * math.sqrt(n)) + math.ceil(math.sqrt(n)) for n in (length, length - count + 1)]
    cut = options.bands or bands(length - count, count, heads // options.kv_heads, *reach)
    order = SpanOrder.of(lo, hi, options.kv_heads, length, cut)
    usual = triton_backward.backward_tiles(kind, dim, roomy(k.device))

    def products(tile: Tile | None) -> Any:
        return triton_backward.span_products(q, k, v, lo, hi, lse, do, scale=scale, order=order, tile=tile)

    def both(tile: Tile | None) -> Any:
        tiles = usual if tile is None else (tile, usual[1]) if options.what == "queries" else (usual[0], tile)
        return triton_backward.span_attention_backward(
            q, k, v, lo, hi, lse, torch.zeros_like(lse), do, scale=scale, order=order, tiles=tiles
        )

    return (products, 4.0 * keys * dim) if options.what == "products" else (both, 14.0 * keys * dim)


def milliseconds(call: Callable[[], Any], times: int = 10) -> float:
    """Return the median of some runs, the first two left out."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(times):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return sorted(taken)[times // 2]


def main() -> None:
    """Time each tile that is asked for, or the one that is used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=WHATS, required=True, help="queries, keys: dq, dk and dv together")
    parser.add_argument("--tile", action="append", metavar="ROWS,KEYS,WARPS,STAGES", help="any number of them")
    parser.add_argument("--length", default="64K")
    parser.add_argument("--chunk", default="32K")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=2024)
    parser.add_argument("--spans", type=int, default=3)
    parser.add_argument("--bands", type=int, default=0, help="0: as many as the kernels' caller takes")
    parser.add_argument("--engine", action=argparse.BooleanOptionalAction, help="copies by Hopper's engine (window)")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "there is no GPU here: tiles are tuned on one\n")
    call, flops = calls(options)
    for text in options.tile or [None]:
        tile = None if text is None else Tile(*map(int, text.split(",")))
        line: dict[str, Any] = {"what": options.what, "tile": text, "device": torch.cuda.get_device_name()}
        try:
            ms = milliseconds(lambda tile=tile: call(tile))  # type: ignore[misc]
            line |= {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)}
        except Exception as error:  # a tile that does not fit: the next may
            line["error"] = str(error).splitlines()[0][:200]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
