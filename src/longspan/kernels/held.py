"""Keys or values as a kernel finds them: one tensor of rows, or the pages of a pool behind a page table.

A kernel asks for rows by the number of their token; where these lie, and in which of two formats, is read here: rows
one after another (`TENSOR`), pages in the model's own type (`PAGES`), or pages of which some are fp8 (`MIXED`: e4m3
codes times a scale a page and KV head; the newest pages of such a context are still in the model's own type).
It does not know attention, nor how pages come and go.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 64
"""Tokens in a page (as `kv.base.PAGE`, which is above this room)."""

TENSOR, PAGES, MIXED = 0, 1, 2


@dataclass(frozen=True)
class Held:
    """Keys (or values) of one layer for every sequence of a batch.

    Attributes:
        rows: `[B, Hkv, N, D]`, or the pages of a pool `[Hkv, slots, PAGE, D]`; the last axis without gaps.
        table: int64 `[B, pages]`: each page's slot in `rows`; or its slot in `codes`, with any bit from `shift` on set;
            None: `rows` is a tensor of rows.
        codes: uint8 `[Hkv, slots, PAGE, D]`, fp8 e4m3 pages; None: there are none.
        scales: float32 `[Hkv, slots]` of `codes`.
        shift: see `table`.
    """

    rows: Tensor
    table: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    shift: int = 0

    def __post_init__(self) -> None:
        """Check shapes: what a kernel reads wrongly it reads silently."""
        assert self.rows.dim() == 4 and self.rows.stride(-1) == 1, f"rows {tuple(self.rows.shape)}"
        if self.table is not None:
            assert self.rows.shape[2] == PAGE and self.table.dtype == torch.int64 and self.table.stride(-1) == 1
        if self.codes is not None:
            assert self.table is not None and self.scales is not None, "fp8 pages come with a table and scales"
            assert self.codes.dtype == torch.uint8 and self.codes.is_contiguous() and self.scales.is_contiguous()

    @property
    def kind(self) -> int:
        """`TENSOR`, `PAGES` or `MIXED`."""
        return TENSOR if self.table is None else PAGES if self.codes is None else MIXED

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.rows.shape[1] if self.table is None else self.rows.shape[0]

    @property
    def dim(self) -> int:
        """Numbers a row."""
        return self.rows.shape[-1]

    @property
    def capacity(self) -> int:
        """Tokens that there may be at most."""
        return self.rows.shape[2] if self.table is None else self.table.shape[1] * PAGE

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, int, int, int]:
        """Return what `held_triton.load_rows` takes: pointers, then strides.

        The pointers are those of rows, table, codes and scales (any tensor where there is none); the strides those of a
        sequence, head, slot, token, of a sequence in the table, and the slots of a head of codes.
        """
        codes = self.rows if self.codes is None else self.codes
        scales = self.rows if self.scales is None else self.scales
        slots = 0 if self.codes is None else self.codes.shape[1]
        if self.table is None:
            sequence, head, token, _ = self.rows.stride()
            return self.rows, self.rows, codes, scales, sequence, head, 0, token, 0, slots
        head, slot, token, _ = self.rows.stride()
        return self.rows, self.table, codes, scales, 0, head, slot, token, self.table.stride(0), slots

    def repeated(self, times: int) -> Held:
        """Return every sequence `times` times, one after the other; only rows of several sequences are copied."""
        if times == 1:
            return self
        if self.table is not None:
            return dataclasses.replace(self, table=self.table.repeat_interleave(times, 0))
        batch, heads, tokens, dim = self.rows.shape
        if batch == 1:
            return Held(self.rows.expand(times, heads, tokens, dim))
        return Held(self.rows.repeat_interleave(times, 0))

    def gathered(self, sequence: int, length: int) -> Tensor:
        """Return the first `length` rows of one sequence, `[Hkv, length, D]`, in the rows' type: for references."""
        if self.table is None:
            return self.rows[sequence, :, :length]
        handles = self.table[sequence, : -(-length // PAGE)]
        native = handles < (1 << self.shift) if self.codes is not None else torch.ones_like(handles, dtype=torch.bool)
        pages = self.rows[:, torch.where(native, handles, 0)]
        if self.codes is not None:
            assert self.scales is not None
            slots = torch.where(native, 0, handles & ((1 << self.shift) - 1))
            numbers = self.codes.view(torch.float8_e4m3fn)[:, slots].float() * self.scales[:, slots, None, None]
            pages = torch.where(native[None, :, None, None], pages, numbers.to(pages.dtype))
        return pages.flatten(1, 2)[:, :length]
