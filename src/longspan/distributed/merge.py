"""Partial outputs and their log-sum-exps, merged in float32: what `kernels/lse_merge` says, by the name it has here."""

from __future__ import annotations

from longspan.kernels.lse_merge import merge_into, merge_packed, merged

__all__ = ["merge_into", "merge_packed", "merged"]
