"""Blocks of rows brought by Hopper's copy engine (TMA): which tensors it can read, and how they are described to it.

A tensor is described as rows one after another, all batches and heads; a kernel asks for a block by its first row's
number, and masks what the block has of other heads. What lies outside the tensor is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


def can_copy(x: Tensor) -> bool:
    """Return whether the engine can bring rows of x `[B, H, N, D]`: aligned, of a power of two of half numbers."""
    batch, head, token, one = x.stride()
    dim, size = x.shape[-1], x.element_size()
    whole = one == 1 and token >= dim and head % token == 0 and batch % token == 0 and token * size % 16 == 0
    return whole and size == 2 and dim >= 16 and dim & (dim - 1) == 0 and x.data_ptr() % 16 == 0


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x `[B, H, N, D]`, of which blocks of `rows` rows are copied; row n of head h of batch b has number
    `(b * stride(0) + h * stride(1)) / stride(2) + n`.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    token, dim = x.stride(2), x.shape[-1]
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)) // token
    return TensorDescriptor(x, [reach, dim], [token, 1], [rows, dim])


def can_copy_tokens(x: Tensor) -> bool:
    """Return whether the engine can bring tokens of x `[B, T, H, D]`, whose heads' channels lie together."""
    batch, token, head, one = x.stride()
    size = x.element_size()
    whole = one == 1 and (head == x.shape[3] or x.shape[2] == 1) and token * size % 16 == 0
    return whole and size == 2 and (batch * size % 16 == 0 or x.shape[0] == 1) and x.data_ptr() % 16 == 0


def described_tokens(x: Tensor, tokens: int, channels: int) -> TensorDescriptor:
    """Describe x `[B, T, H, D]`, of which blocks of one sequence's tokens and neighbouring channels are copied, by
    sequence, token, and channel of all heads'. What lies behind the last token is 0.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, count, heads, dim = x.shape
    token = x.stride(1)
    sequence = x.stride(0) if batch > 1 else count * token
    return TensorDescriptor(x, [batch, count, heads * dim], [sequence, token, 1], [1, tokens, channels])
