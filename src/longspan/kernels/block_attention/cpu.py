"""Chosen blocks on a CPU that multiplies bfloat16 natively: each block of queries is two products with a softmax.

Its keys are copied side by side, its own block last, and read as `causal_attention/cpu.py` says. Rows that read many
blocks need no batch for that: copying and small operations are a tenth of the products.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from longspan.kernels.block_attention import gathered
from longspan.kernels.causal_attention import cpu as causal
from longspan.kernels.side_by_side import side_by_side

serves = causal.fits


def block_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, scale: float) -> Tensor:
    """Attend from whole blocks of queries; arguments and results as in the reference."""
    batch, heads, count, dim = q.shape
    kv_heads, blocks = k.shape[1], chosen.shape[2]
    block = count // blocks
    rows = (q * scale).to(k.dtype).reshape(batch, kv_heads, -1, blocks, block, dim)
    hidden = torch.ones(block, block, dtype=torch.bool).triu(1)
    own = k[:, :, -count:].unflatten(2, (blocks, block)).unsqueeze(2)
    near = causal.references(rows, k[:, :, None, None, :-count], own, hidden)

    # Every block that a row reads, ascending: its own comes last.
    reads = torch.nn.functional.pad(chosen, (0, k.shape[2] // block - chosen.shape[3]))
    reads[..., -blocks:] |= torch.eye(blocks, dtype=torch.bool)
    lists = reads.nonzero()[:, -1].split(reads.sum(-1).flatten().tolist())
    out = rows.new_empty(*rows.shape[:-1], v.shape[-1])
    # A block is one row of memory here, so that copying it is one plain copy.
    keys, values = (x.unflatten(2, (-1, block)).flatten(3) for x in (k, v))
    places = itertools.product(*(range(size) for size in rows.shape[:4]))

    def attend(at: tuple[int, ...], index: Tensor) -> None:
        key, value = (torch.embedding(x[at[:2]], index).view(len(index) * block, -1) for x in (keys, values))
        torch.mm(causal.weights(rows[at], key, near[at]), value, out=out[at])

    side_by_side(attend, places, lists)
    out = out.view(batch, heads, count, -1).to(q.dtype)
    # A finite sum has only finite terms. What is hidden was multiplied by 0, which hides neither NaN nor infinity.
    return out if torch.isfinite(out.sum()) else gathered.block_attention(q, k, v, chosen, scale=scale)
