"""Prices: of hosted models for a million tokens, of GPUs for an hour. A dated data file, or the user's own of its form.

Nothing is fetched. It does not know what is asked of a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import UnknownNameError, UsageError

_FILE = Path(__file__).with_name("prices.json")
_MILLION = 1e6
DEAREST = 1e9
"""Dollars that anybody may ask for a million tokens, or an hour."""


@dataclass(frozen=True)
class Prices:
    """What a hosted model costs: US dollars for a million tokens."""

    name: str
    input: float
    output: float
    cached: float | None = None
    """Of input that a cache holds; None: as other input."""
    write: float | None = None
    """Of input that is written to a cache; None: as other input."""
    long_from: int | None = None
    """Tokens of a request from which on the next three hold; None: they never do."""
    long_input: float | None = None
    long_cached: float | None = None
    long_output: float | None = None
    context: int | None = None
    """Tokens that a request may have; None: unknown."""
    date: str = ""
    source: str = ""

    def request(self, fresh: float, held: float, answer: float, *, write: bool = False) -> float:
        """Return the dollars of one request.

        Args:
            fresh: tokens that no cache holds.
            held: tokens that one does.
            answer: tokens that come back.
            write: whether the fresh ones are written to a cache.
        """
        long = self.long_from is not None and fresh + held > self.long_from
        given = (self.long_input if long else None) or self.input
        cached = (self.long_cached if long else None) or (given if self.cached is None else self.cached)
        output = (self.long_output if long else None) or self.output
        if write and self.write is not None:
            given = given * self.write / self.input if self.input else self.write
        return (fresh * given + held * cached + answer * output) / _MILLION


@dataclass(frozen=True)
class PriceList:
    """All that a price file holds."""

    models: dict[str, Prices]
    embedding: float
    """Of a million tokens made searchable."""
    gpu_hours: dict[str, float]
    date: str
    """Of the GPU prices."""

    def model(self, name: str) -> Prices:
        """Return the prices of a model (UnknownNameError lists the names)."""
        if name not in self.models:
            raise UnknownNameError(f"no price of {name!r} is known: use one of {', '.join(self.models)}, or --price-in")
        return self.models[name]


def price_list(file: Path | None = None) -> PriceList:
    """Return the prices of the data file, those of a user's file above them.

    Args:
        file: JSON of the same form, `{"models": {NAME: {"input": 2, "output": 8}}}`; any part may be left out.

    Raises:
        UsageError: it can't be read, or holds something else; the message names what.
    """
    told = _read(_FILE)
    if file is not None:
        own = _read(file)
        if unknown := [part for part in own if part not in told]:
            raise UnknownNameError(f"the price file {file} has {unknown[0]!r}: its parts are {', '.join(told)}")
        for part in ("models", "gpu_hours", "embedding"):
            if part in own:
                told[part] = {**told[part], **_dict(own[part], part, file)}
    models = {name: _prices(name, _dict(entry, name, file), file) for name, entry in told["models"].items()}
    hours = {
        name: _number(value, name, file) for name, value in told["gpu_hours"].items() if name not in ("date", "source")
    }
    embedding = _number(told["embedding"].get("input"), "embedding", file)
    return PriceList(models, embedding, hours, str(told["gpu_hours"].get("date", "")))


def own(base: Prices, given: float | None, output: float | None, cached: float | None) -> Prices:
    """Return prices that were given one by one (UsageError: out of range), those left out from a base.

    Cached input that has no price of its own costs the same share of other input as the base's.
    """
    for name, value in (("--price-in", given), ("--price-out", output), ("--price-cached", cached)):
        if value is not None and not 0 <= value <= DEAREST:
            raise UsageError(f"{name} {value} is no price: give dollars for a million tokens")
    if given is None and output is None and cached is None:
        return base
    price = base.input if given is None else given
    share = 1.0 if base.cached is None or not base.input else base.cached / base.input
    return Prices(
        f"{base.name} with prices of your own",
        price,
        base.output if output is None else output,
        share * price if cached is None else cached,
        context=base.context,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the price file {file} can't be read: {error}") from error
    return _dict(told, "the file", file)


def _dict(value: Any, name: str, file: Path | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{name} of the price file {file} must be an object")
    return value


def _number(value: Any, name: str, file: Path | None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= DEAREST:
        raise UsageError(f"the price {value!r} of {name} in {file or 'the price file'} must be a number of dollars")
    return float(value)


def _prices(name: str, entry: dict[str, Any], file: Path | None) -> Prices:
    known = Prices.__dataclass_fields__
    unknown = [key for key in entry if key not in known or key == "name"]
    if unknown:
        raise UnknownNameError(f"{name} in {file} has {unknown[0]!r}: a price has {', '.join(list(known)[1:])}")
    if "input" not in entry or "output" not in entry:
        raise UsageError(f"{name} in {file} needs both 'input' and 'output', dollars for a million tokens")
    texts = ("date", "source")
    said: dict[str, Any] = {key: str(entry[key]) for key in texts if key in entry}
    for key in (key for key in entry if key not in texts):
        number = _number(entry[key], f"{name}.{key}", file)
        said[key] = int(number) if key in ("long_from", "context") else number
    return Prices(name=name, **said)
