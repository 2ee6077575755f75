"""Compile the kernels of experts and of `gemv` for a chip that is not here; prints shared memory by kernel.

Run by `test_compiled.py` in its own process.
"""

import json
import sys

import torch
from chip import pretend, zeros

from longspan.kernels.experts import triton_decode, triton_kernels, triton_prefill
from longspan.kernels.experts.reference import Routing
from longspan.kernels.gemv import triton_kernels as gemv_kernels

CAPABILITY = int(sys.argv[1])
HOPPER = CAPABILITY >= 90


def main():
    taken = pretend(CAPABILITY)
    depth, inner, number, top, tokens = 2688, 1856, 3, 2, 64
    x, logits, bias = zeros(tokens, depth), zeros(tokens, 128, dtype=torch.float32), zeros(128, dtype=torch.float32)
    ids, weights = zeros(tokens, top, dtype=torch.int32), zeros(tokens, top, dtype=torch.float32)
    triton_kernels.route(logits, bias, Routing(6))
    for gated in (False, True):
        up, down = zeros(number, inner * (1 + gated), depth), zeros(number, depth, inner)
        kind = {"activation": "silu" if gated else "relu2"}
        cuts = triton_prefill.cuts_for(x.dtype, 1000.0 if gated else 1.0, gated, HOPPER)
        triton_prefill.experts(x, up, down, ids, weights, cuts=cuts, engine=HOPPER, **kind)
        if HOPPER and not gated:
            cuts = (triton_prefill.PARTED, triton_prefill.PARTED)
            triton_prefill.experts(x, up, down, ids, weights, cuts=cuts, engine=True, **kind)
        shared = (zeros(2 * inner * (1 + gated), depth), zeros(depth, 2 * inner))
        triton_decode.experts(x[:1], up, down, ids[:1], weights[:1], shared=shared, early=HOPPER, **kind)
    triton_decode.mixture(
        x[:1], logits[:1], bias, zeros(128, 16, depth), zeros(128, depth, 16), routing=Routing(6), early=HOPPER
    )
    for count in (1, 8):
        gemv_kernels.gemv(x[:count], zeros(64, depth), early=HOPPER)
    print(json.dumps(taken))


main()
