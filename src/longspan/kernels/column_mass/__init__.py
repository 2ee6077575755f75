"""How much attention each key gets from a stretch of queries; see `reference.py`."""

from __future__ import annotations

from longspan.kernels.column_mass.reference import column_mass, column_most

__all__ = ["column_mass", "column_most"]
