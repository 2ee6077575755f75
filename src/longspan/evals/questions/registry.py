"""The registry: every eval of generated questions by name, loaded on first use. Nothing else lists evals."""

from __future__ import annotations

import importlib

from longspan.errors import UnknownNameError, UsageError
from longspan.evals.questions.example import Eval

_HOMES: dict[str, str] = {}


def register(name: str, home: str) -> None:
    """Register an eval: its name and `module:OBJECT`. A name can be taken once."""
    if name in _HOMES:
        raise UsageError(f"an eval named {name!r} is registered already ({_HOMES[name]})")
    _HOMES[name] = home


register("passkey", "longspan.evals.passkey:PASSKEY")
register("needle", "longspan.evals.grid:NEEDLE")
register("ruler", "longspan.evals.ruler.tasks:RULER")
register("mrcr", "longspan.evals.mrcr:MRCR")
register("nolima", "longspan.evals.nolima:NOLIMA")
register("rot", "longspan.evals.rot:ROT")
register("perplexity", "longspan.evals.perplexity:PERPLEXITY")


def names() -> list[str]:
    """Return the names of all evals, in the order of registration."""
    return list(_HOMES)


def evaluation(name: str) -> Eval:
    """Return the eval registered under a name (UnknownNameError lists the names)."""
    if name not in _HOMES:
        raise UnknownNameError(f"unknown eval {name!r}: use one of {', '.join(_HOMES)}")
    module, _, found = _HOMES[name].partition(":")
    loaded: Eval = getattr(importlib.import_module(module), found)
    return loaded
