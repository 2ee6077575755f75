"""The formats that pages can be written in, by name, and the specifications that give them options.

A specification is a name and options as one word, `int4:group=32,residual=128` (`specs.py`). A name without options
stands for one and the same object, wherever it is asked for. How numbers are written down: `encodings.py` (float types,
fp8) and `integers.py` (int8, int4, int3, int2).
"""

from __future__ import annotations

import dataclasses

import torch

from longspan import specs
from longspan.errors import UnknownNameError, UsageError
from longspan.kv.encodings import BFloat16, Float8, Float8Again, Float16, Float32, Float64, Format
from longspan.kv.integers import Int2, Int3, Int4, Int8

_FORMATS: dict[str, Format] = {}
AUTO = "auto"
"""Not a format but the wish for the float type's own."""


def register(made: Format) -> None:
    """Register a format under its name, which can be taken once (UsageError)."""
    if made.name in _FORMATS:
        raise UsageError(f"a format named {made.name!r} is registered already")
    _FORMATS[made.name] = made


for _made in (Float64(), Float32(), Float16(), BFloat16(), Float8(), Float8Again(), Int8(), Int4(), Int3(), Int2()):
    register(_made)


def names() -> list[str]:
    """Return the names of all formats, in the order of registration."""
    return list(_FORMATS)


def named(name: str) -> Format:
    """Return the format of a name (UnknownNameError lists the names)."""
    if name not in _FORMATS:
        raise UnknownNameError(f"unknown KV format {name!r}: use one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def parse(spec: str) -> Format:
    """Return the format of a specification such as `int4:group=64` (errors: as `named` and `specs.checked`)."""
    name, options = specs.split(spec, "KV format")
    made = named(name)
    if not options:
        return made
    given = specs.checked(type(made), options, "KV format", name, made.options())
    return dataclasses.replace(made, **given)


def written_again(spec: str | None) -> str | None:
    """Return the specification for rows that move between pages, given the one that was asked for."""
    if spec is None or spec == AUTO:
        return spec
    name, options = specs.split(spec, "KV format")
    return specs.written(named(name).again or name, options)


def format_for(dtype: torch.dtype) -> Format:
    """Return the format that holds a float type as it is (UsageError if none does)."""
    for made in _FORMATS.values():
        if made.code_dtype == dtype and dtype.is_floating_point:
            return made
    raise UsageError(f"keys and values of type {dtype} can't be kept: use float32, float16 or bfloat16")


def format_of(spec: str | None, dtype: torch.dtype) -> Format:
    """Return the format of a specification (`auto`, None: the float type's own), for what is computed in `dtype`.

    Raises:
        UnknownNameError: no such format, or no such option of it.
        UsageError: it is not narrower than the float type, so that it could only lose and never gain; an option out of
            range.
    """
    own = format_for(dtype)
    if spec is None or spec == AUTO:
        return own
    suiting = [made.name for made in _FORMATS.values() if made is own or made.bits < own.bits]
    told = ", ".join([AUTO, *suiting])
    name, options = specs.split(spec, "KV format")
    if name not in _FORMATS:
        raise UnknownNameError(f"unknown KV format {name!r}: use one of {told}")
    if name not in suiting:
        raise UsageError(f"KV format {name!r} does not suit keys and values of type {own.name}: use one of {told}")
    if name == own.name and options:
        raise UsageError(f"KV format {name!r} is how the model computes, and takes no options: leave them out")
    return parse(spec)
