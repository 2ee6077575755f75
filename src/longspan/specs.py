"""Specifications: a name and its options as one word, such as `superlinear:window=2024,spans=3` or `int4:group=32`.

What takes options is a dataclass whose fields they are. It does not know which names there are: registries do.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from longspan.errors import UnknownNameError, UsageError

_MOST = 1 << 40
"""Largest whole number of an option: more tokens than any context has, and no sum of a few of them overflows."""


def split(spec: str, kind: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options of a specification, as text (UsageError: it is none, or says a thing twice).

    Args:
        spec: `name`, or `name:option=value,option=value`.
        kind: what it specifies, as errors name it: `attention`.
    """
    name, _, rest = spec.strip().partition(":")
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, text = item.partition("=")
        if not equals or not text:
            raise UsageError(f"option {item!r} of {kind} {name!r} must be written name=value")
        if option in options:
            raise UsageError(f"option {option!r} of {kind} {name!r} is given twice")
        options[option.strip()] = text.strip()
    return name, options


def checked(cls: type, given: Mapping[str, Any], kind: str, name: str, known: Iterable[str]) -> dict[str, Any]:
    """Return options in the types that a class declares for them: text is read, another type is refused.

    Args:
        cls: whose fields are annotated.
        given: the options, as text or as values.
        kind: see `split`.
        name: of what takes the options, as errors name it.
        known: which fields are options.

    Raises:
        UnknownNameError: an unknown option; the message lists the known ones.
        UsageError: a value of another type, or a whole number that is too large for anything.
    """
    names = set(known)
    for option in given:
        if option not in names:
            listed = ", ".join(sorted(names)) or "none"
            raise UnknownNameError(f"{kind} {name!r} has no option {option!r}; its options: {listed}")
    hints, owner = typing.get_type_hints(cls), f"{kind} {name!r}"
    values = {option: _value(owner, option, value, hints[option]) for option, value in given.items()}
    for option, value in values.items():
        if isinstance(value, int) and value > _MOST:
            raise UsageError(f"option {option!r} of {owner} is {value}: give at most {_MOST}")
    return values


def _value(owner: str, option: str, value: Any, kind: Any) -> Any:
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
    raise UsageError(f"option {option!r} of {owner} must be {words}, not {value!r}")


def written(name: str, options: Mapping[str, Any]) -> str:
    """Return the specification of a name with options: what `split` reads."""
    words = ",".join(f"{option}={_text(value)}" for option, value in options.items())
    return f"{name}:{words}" if words else name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
