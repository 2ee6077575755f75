"""The registry: every mechanism by name, loaded on first use. Nothing else lists mechanisms.

A specification is a name and its options as one word, `superlinear:window=2024,spans=3`.
"""

from __future__ import annotations

import importlib
import types
import typing
from dataclasses import fields
from typing import Any

from longspan.attention.base import Mechanism
from longspan.errors import UnknownNameError, UsageError

_HOMES: dict[str, str] = {}
_MOST = 1 << 40
"""Largest whole number of an option: more tokens than any context has, and no sum of a few of them overflows."""


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
register("tree", "longspan.attention.tree:Tree")
register("infini", "longspan.attention.infini:Infini")
register("h2o", "longspan.attention.h2o:H2O")
register("snapkv", "longspan.attention.snapkv:SnapKV")
register("rocketkv", "longspan.attention.rocketkv:RocketKV")
register("expected", "longspan.attention.expected:Expected")
register("keydiff", "longspan.attention.keydiff:KeyDiff")
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
    known = {field.name for field in fields(cls)}
    for option in options:
        if option not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise UnknownNameError(f"attention {name!r} has no option {option!r}; its options: {listed}")
    hints = typing.get_type_hints(cls)
    checked = {option: _checked(name, option, value, hints[option]) for option, value in options.items()}
    for option, value in checked.items():
        if isinstance(value, int) and value > _MOST:
            raise UsageError(f"option {option!r} of attention {name!r} is {value}: give at most {_MOST}")
    return cls(**checked)


def parse(spec: str | Mechanism) -> Mechanism:
    """Make a mechanism from a specification such as `streaming:window=1000,sinks=8`."""
    if isinstance(spec, Mechanism):
        return spec
    name, _, rest = spec.strip().partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, text = item.partition("=")
        if not equals or not text:
            raise UsageError(f"option {item!r} of attention {name!r} must be written name=value")
        if option in options:
            raise UsageError(f"option {option!r} of attention {name!r} is given twice")
        options[option.strip()] = text.strip()
    return make(name, **options)


def _checked(name: str, option: str, value: Any, kind: Any) -> Any:
    """Return an option's value in its declared type: text is read, another type is refused."""
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for wanted in allowed:
        if wanted is bool or isinstance(value, bool):
            if wanted is bool and isinstance(value, bool):
                return value
            if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            continue
        if isinstance(value, wanted):
            return value
        if wanted in (int, float) and isinstance(value, (str, int)):
            try:
                return wanted(value)
            except ValueError:
                continue
    words = " or ".join(getattr(wanted, "__name__", str(wanted)) for wanted in allowed)
    raise UsageError(f"option {option!r} of attention {name!r} must be {words}, not {value!r}")
