"""Compile superlinear's kernels for a chip that is not here; prints shared memory by kernel.

Run by `test_compiled.py` in its own process.
"""

import json
import sys

import torch
from chip import pretend, zeros

from longspan.kernels.append import Place
from longspan.kernels.append import triton_kernels as append
from longspan.kernels.dense_decode import triton_kernels as dense_decode
from longspan.kernels.held import Held
from longspan.kernels.span_attention import launch as spans
from longspan.kernels.superlinear import Search, triton_decode, triton_prefill
from longspan.kernels.tiles import Tile

CAPABILITY, DIM = int(sys.argv[1]), 128
HOPPER = CAPABILITY >= 90
taken = pretend(CAPABILITY)
pages = 1 << 14  # of which the table speaks: a million tokens
table = zeros(1, pages, dtype=torch.int64)
k = Held(zeros(2, 4, 64, DIM), table)
mixed = Held(zeros(2, 4, 64, DIM), table, zeros(2, 4, 64, DIM, dtype=torch.uint8), zeros(2, 4, dtype=torch.float32), 40)
q, lengths = zeros(1, 32, DIM), torch.tensor([pages * 64])
for search in (Search(2024), Search(2024, gate="routed", share="group", sinks=4)):
    triton_decode.decode(q, k, k, lengths, search, scale=0.1, early=HOPPER)
triton_decode.decode(q, mixed, mixed, lengths, Search(2024), scale=0.1, early=HOPPER)
dense_decode.decode(
    q, k, k, lengths, scale=0.1, stages=3 if HOPPER else 2, per_token=zeros(DIM // 2, dtype=torch.float64)
)
rows, weight = zeros(1, 36 * DIM), zeros(DIM)
place = Place(k.rows, k.rows, table, zeros(1, 2, 4 * 64, DIM), zeros(DIM // 2, dtype=torch.float64))
append.append(rows, place, lengths, q_weight=weight, k_weight=weight, eps=1e-6)
queries, tokens = 64, 8192
k = Held(zeros(1, 2, tokens, DIM))
rows = zeros(1, 2, 16 * queries * 3, dtype=torch.int32)
triton_prefill.search_spans(zeros(1, 32, queries, DIM), k, tokens - queries, Search(2024))
order = zeros(2, rows.shape[-1], dtype=torch.int64)
tiles = [spans.forward_tile(torch.bfloat16, DIM, HOPPER, few) for few in (False, True)]
assert all(isinstance(tile, Tile) for tile in tiles)
for tile in tiles:
    spans.span_attention(
        zeros(1, 2, 16 * queries, DIM), k, k, rows, rows, scale=0.1, order=order, out_dtype=torch.bfloat16,
        tile=tile, engine=HOPPER, beat=int(HOPPER),
    )  # fmt: skip
if HOPPER:
    slots = Held(zeros(2, pages, 64, DIM), table)
    for held in (k, slots):
        spans.span_attention(
            zeros(1, 2, 16 * queries, DIM), held, held, rows, rows, scale=0.1, order=order, out_dtype=torch.bfloat16,
            parted=True,
        )  # fmt: skip
print(json.dumps(taken))
