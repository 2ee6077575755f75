"""Compile a Mamba-2 layer's kernels for a chip that is not here; prints shared memory by kernel.

Run by `test_compiled.py` in its own process.
"""

import json
import sys

import torch
from chip import pretend, zeros

from longspan.kernels.causal_conv import triton_kernels as convolution
from longspan.kernels.mamba2 import triton_decode, triton_norm, triton_scan
from longspan.kernels.rmsnorm import triton_kernels as norm

CAPABILITY = int(sys.argv[1])
HOPPER = CAPABILITY >= 90


def main():
    taken = pretend(CAPABILITY)
    heads, dim, tokens = 64, 64, 4096
    groups, size = (8, 128) if HOPPER else (1, 256)
    shared, inner = groups * size, heads * dim
    mixed = inner + 2 * shared
    projected, through = zeros(1, tokens, inner + mixed + heads), zeros(1, tokens, mixed)
    x, b, c = through.split([inner, shared, shared], -1)
    state, one = zeros(1, heads, dim, size, dtype=torch.float32), zeros(heads, dtype=torch.float32)
    small = {"D": one, "dt_bias": one}
    triton_scan.scan(
        x.unflatten(-1, (heads, dim)), projected[..., -heads:], one,
        b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size)),
        state=state, tile=triton_scan.scan_tile(x.dtype, dim, size, HOPPER), engine=HOPPER, **small,
    )  # fmt: skip
    if HOPPER:  # the others hold nothing that grows with the chip
        weight, bias, held = zeros(mixed, 4), zeros(mixed), zeros(1, mixed, 3)
        convolution.causal_conv(through, weight, bias, held)
        triton_norm.gated_rmsnorm(x, projected[..., :inner], zeros(inner), groups, 1e-5)
        triton_decode.mixer_step(
            projected[:, 0], weight, bias, held, one, state, zeros(inner),
            groups=groups, norm_groups=groups, eps=1e-5, early=HOPPER, **small,
        )  # fmt: skip
        norm.rmsnorm(zeros(tokens, 2688), zeros(2688), 1e-5, zeros(tokens, 2688))
    print(json.dumps(taken))


main()
