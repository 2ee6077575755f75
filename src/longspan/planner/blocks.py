"""How many parameters the parts of layers have, by their published equations, and what recurrent ones keep.

Each function takes sizes and returns counts as (products, plain): numbers of matrices that tokens are multiplied with,
which formats make smaller, and the rest (norms, biases, decay rates), which they leave.
"""

from __future__ import annotations

from longspan.planner.model import Recurrent

Count = tuple[int, int]


def add(*counts: Count) -> Count:
    """Return the sum of counts."""
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


def linear(inputs: int, outputs: int, bias: bool = False) -> Count:
    """Return the parameters of a matrix, with a bias or without."""
    return inputs * outputs, outputs if bias else 0


def attention(
    hidden: int, heads: int, kv_heads: int, dim: int, *, bias: bool, out_bias: bool, gate: bool, norm: str
) -> Count:
    """Return the parameters of multi-head, grouped-query or multi-query attention.

    Args:
        hidden: numbers of a token.
        heads: query heads.
        kv_heads: KV heads.
        dim: numbers of a head.
        bias: whether queries, keys and values have one.
        out_bias: whether the output has one.
        gate: whether the query's projection also makes a gate for the output (Qwen3-Next).
        norm: what norms queries and keys have: `head` (one for every head alike), `whole` (over all heads), or none.
    """
    norms = {"head": 2 * dim, "whole": (heads + kv_heads) * dim}.get(norm, 0)
    return add(
        linear(hidden, heads * dim * (2 if gate else 1), bias),
        linear(hidden, 2 * kv_heads * dim, bias),
        linear(heads * dim, hidden, out_bias),
        (0, norms),
    )


def latent_attention(
    hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int, *, bias: bool
) -> Count:
    """Return the parameters of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    queries = linear(hidden, heads * (nope + rope))
    if q_rank:
        queries = add(linear(hidden, q_rank, bias), (0, q_rank), linear(q_rank, heads * (nope + rope)))
    return add(
        queries,
        linear(hidden, kv_rank + rope, bias),
        (0, kv_rank),
        linear(kv_rank, heads * (nope + value)),
        linear(heads * value, hidden, bias),
    )


def feed_forward(hidden: int, width: int, *, gated: bool, bias: bool = False) -> Count:
    """Return the parameters of a feed-forward part: two matrices, or three where it is gated."""
    up = linear(hidden, width, bias)
    return add(up, up if gated else (0, 0), linear(width, hidden, bias))


def mamba2(
    hidden: int, heads: int, dim: int, state: int, groups: int, kernel: int, *, bias: bool, conv_bias: bool, norm: bool
) -> tuple[Count, Recurrent]:
    """Return parameters and state of Mamba-2 (arXiv 2405.21060)."""
    inner = heads * dim
    mixed = inner + 2 * groups * state
    count = add(
        linear(hidden, inner + mixed + heads, bias),
        (0, mixed * (kernel + (1 if conv_bias else 0)) + 3 * heads + (inner if norm else 0)),
        linear(inner, hidden, bias),
    )
    # Decay, outer product and sum, read-out: six FLOPs a number of the state.
    return count, Recurrent(inner * state, mixed * kernel, 6.0 * inner * state + 2.0 * mixed * kernel)


def mamba1(hidden: int, inner: int, state: int, rank: int, kernel: int, *, bias: bool, conv_bias: bool) -> tuple[
    Count, Recurrent
]:  # fmt: skip
    """Return parameters and state of Mamba (arXiv 2312.00752) as Jamba has it, with norms of time step, B and C."""
    count = add(
        linear(hidden, 2 * inner, bias),
        (0, inner * (kernel + (1 if conv_bias else 0)) + inner * state + inner + rank + 2 * state),
        linear(inner, rank + 2 * state),
        linear(rank, inner, True),
        linear(inner, hidden, bias),
    )
    return count, Recurrent(inner * state, inner * kernel, 9.0 * inner * state)


def delta_net(
    hidden: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int
) -> tuple[Count, Recurrent]:
    """Return parameters and state of a gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it."""
    keys, values = key_heads * key_dim, value_heads * value_dim
    mixed = 2 * keys + values
    count = add(
        linear(hidden, mixed + values + 2 * value_heads),
        (0, mixed * kernel + 2 * value_heads + value_dim),
        linear(values, hidden),
    )
    numbers = value_heads * key_dim * value_dim
    return count, Recurrent(numbers, mixed * kernel, 8.0 * numbers)


def short_convolution(hidden: int, kernel: int, *, bias: bool) -> tuple[Count, Recurrent]:
    """Return parameters and state of LFM2's gated short convolution."""
    count = add(
        linear(hidden, 3 * hidden, bias), (0, hidden * (kernel + (1 if bias else 0))), linear(hidden, hidden, bias)
    )
    return count, Recurrent(0, hidden * kernel, 2.0 * hidden * kernel)
