"""Compile kernels for chips that are not here, in a process without Triton's interpreter; prints one JSON line each.

Run by `test_compiled.py`. Arguments are named alike in all kernels: pointers `p_`, strides `s_`.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.kernels.anchor_scores import triton_kernels as anchors
from longspan.kernels.span_attention import triton_backward as spans
from longspan.kernels.window_attention import triton_kernels as windows

NUMBERS = {"bf16": torch.bfloat16, "fp32": torch.float32}
OF_INPUTS = ("p_q", "p_k", "p_v", "p_do", "p_dk", "p_dv", "p_dq")
INTEGERS = ("p_order", "p_facts", "p_row", "p_anchor", "p_first", "p_last")


def compiled(kernel, kind, dim, capability, tile, **constants):
    """Return bytes of shared memory that a program takes."""
    constants |= {"D": dim, "DV": dim, "B_D": dim, "B_DV": dim, "BLOCK_R": tile.rows, "BLOCK_N": tile.keys}
    constants["PRECISION"] = "tf32x3" if kind == "fp32" else "ieee"
    signature, known, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(i,)] = "constexpr", constants[name]
            continue
        if name.startswith("p_"):
            signature[name] = "*" + (kind if name in OF_INPUTS else "i32" if name in INTEGERS else "fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "exponent") else "i32"
        if name.startswith(("p_", "s_")):
            aligned[(i,)] = [["tt.divisibility", 16]]
        if constants.get("TMA") and name in ("p_k", "p_v"):
            signature[name] = f"tensordesc<{kind}[{tile.keys},{dim}]>"
            del aligned[(i,)]
    source = ASTSource(kernel, signature, known, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main():
    kind, dim, capability = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    roomy = capability == 90
    engine = roomy and kind != "fp32"
    queries, keys = spans.backward_tiles(NUMBERS[kind], dim, roomy, engine)
    flags = {"ADD": True, "PRODUCTS": False, "SPARSE": False, "TMA": engine}
    window = windows.forward_tile(NUMBERS[kind], dim, roomy)
    found = {
        "window": compiled(windows._window_attention_kernel, kind, dim, capability, window, G=4, TMA=engine),
        "queries": compiled(spans._queries_kernel, kind, dim, capability, queries, **flags),
        "keys": compiled(spans._keys_kernel, kind, dim, capability, keys),
        "anchors": compiled(anchors._keys_kernel, kind, dim, capability, anchors.tile(dim), G=4),
    }
    print(json.dumps(found))


main()
