"""The registry: every mechanism by name, loaded on first use. Nothing else lists mechanisms.

A specification is a name and its options as one word, `superlinear:window=2024,spans=3` (`specs.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from longspan import specs
from longspan.attention.base import Mechanism
from longspan.errors import UnknownNameError, UsageError

_HOMES: dict[str, str] = {}


def register(name: str, home: str) -> None:
    """Register a mechanism: its name and `module:Class`. A name can be taken once."""
    if name in _HOMES:
        raise UsageError(f"a mechanism named {name!r} is registered already ({_HOMES[name]})")
    _HOMES[name] = home


register("dense", "longspan.attention.dense:Dense")
register("streaming", "longspan.attention.streaming:Streaming")
register("sparse", "longspan.attention.sparse:Sparse")
register("superlinear", "longspan.attention.superlinear:Superlinear")
register("quest", "longspan.attention.quest:Quest")
register("sparq", "longspan.attention.sparq:SparQ")
register("tree", "longspan.attention.tree:Tree")
register("infini", "longspan.attention.infini:Infini")
register("h2o", "longspan.attention.h2o:H2O")
register("snapkv", "longspan.attention.snapkv:SnapKV")
register("rocketkv", "longspan.attention.rocketkv:RocketKV")
register("expected", "longspan.attention.expected:Expected")
register("keydiff", "longspan.attention.keydiff:KeyDiff")
register("kvzip", "longspan.attention.kvzip:KVzip")
register("retrieval", "longspan.attention.retrieval:Retrieval")
register("xattention", "longspan.attention.xattention:XAttention")


def names() -> list[str]:
    """Return the names of all mechanisms, in the order of registration."""
    return list(_HOMES)


def mechanism_class(name: str) -> type[Mechanism]:
    """Return the class registered under a name (UnknownNameError lists the names)."""
    if name not in _HOMES:
        raise UnknownNameError(f"unknown attention {name!r}: use one of {', '.join(_HOMES)}")
    module, _, cls = _HOMES[name].partition(":")
    loaded: type[Mechanism] = getattr(importlib.import_module(module), cls)
    return loaded


def mechanisms() -> dict[str, type[Mechanism]]:
    """Return every mechanism's class by name."""
    return {name: mechanism_class(name) for name in _HOMES}


def make(name: str, **options: Any) -> Mechanism:
    """Make a mechanism from its name and options; an unknown option is an error that lists the known ones."""
    cls = mechanism_class(name)
    return cls(**specs.checked(cls, options, "attention", name, (field.name for field in fields(cls))))


def parse(spec: str | Mechanism) -> Mechanism:
    """Make a mechanism from a specification such as `streaming:window=1000,sinks=8`."""
    if isinstance(spec, Mechanism):
        return spec
    name, options = specs.split(spec, "attention")
    return make(name, **options)
