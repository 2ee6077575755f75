"""Attention mechanisms: one file each, one registry, one functional face."""

from __future__ import annotations

from longspan.attention.base import Cost, Hints, Mechanism, Shape
from longspan.attention.functional import attend
from longspan.attention.registry import make, mechanism_class, mechanisms, names, parse, register

__all__ = [
    "Cost",
    "Hints",
    "Mechanism",
    "Shape",
    "attend",
    "make",
    "mechanism_class",
    "mechanisms",
    "names",
    "parse",
    "register",
]
