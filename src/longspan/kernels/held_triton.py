"""Loading rows of keys or values in a Triton kernel, wherever they are held; see `held.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    p_rows, p_table, p_codes, p_scales,
    s_head, s_slot, s_token, slots,
    i_head, o_n, m_n, o_d,
    D: tl.constexpr, KIND: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Return the rows `[len(o_n), len(o_d)]` of the tokens o_n of one KV head; 0 where m_n is false or o_d >= D.

    `p_rows` and `p_table` point to the sequence's own.
    """
    m_d = o_d < D
    if KIND == 0:
        p = p_rows + i_head * s_head + o_n.to(tl.int64)[:, None] * s_token + o_d[None, :]
        b_x = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0)
    else:
        handle = tl.load(p_table + o_n // 64, mask=m_n, other=0)  # int64: slots times a page pass 2^31
        if KIND == 1:
            p = p_rows + i_head * s_head + (handle * s_slot + (o_n % 64) * s_token)[:, None] + o_d[None, :]
            b_x = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0)
        else:
            coded = handle >= (1 << SHIFT)
            slot = tl.where(coded, 0, handle)
            p = p_rows + i_head * s_head + (slot * s_slot + (o_n % 64) * s_token)[:, None] + o_d[None, :]
            b_x = tl.load(p, mask=(m_n & (coded == 0))[:, None] & m_d[None, :], other=0.0)
            row = i_head * slots + tl.where(coded, handle & ((1 << SHIFT) - 1), 0)
            b_scale = tl.load(p_scales + row, mask=m_n & coded, other=0.0)
            p = p_codes + ((row * 64 + o_n % 64) * D)[:, None] + o_d[None, :]
            b_code = tl.load(p, mask=(m_n & coded)[:, None] & m_d[None, :], other=0).to(tl.int16)
            # e4m3's four bits of exponent, put into float16's five, are 2^8 too small; 0x7f is NaN. No chip is asked
            # for float8 of its own, which Ampere lacks.
            b_half = (((b_code & 0x7F) << 7) | ((b_code & 0x80) << 8)).to(tl.float16, bitcast=True)
            b_number = b_half.to(tl.float32) * 256.0 * b_scale[:, None]
            b_number = tl.where((b_code & 0x7F) == 0x7F, float("nan"), b_number)
            b_x = tl.where(coded[:, None], b_number.to(b_x.dtype), b_x)
    return b_x
