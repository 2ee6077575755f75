"""What to change where a plan does not fit, in order of harm to answers: what costs only speed or money comes first.

Harm of formats and mechanisms is what the committed evals found (perplexity over dense's); where nothing was measured
it says so and comes later. Changes add up: the last one listed makes the plan fit, if any does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longspan.lengths import short
from longspan.planner import measured, parallel
from longspan.planner.devices import devices
from longspan.planner.memory import mechanism

if TYPE_CHECKING:
    from longspan.planner.plan import Asked

_MOST_GPUS = 8
"""Of one node."""
_ABOVE = 4e9
"""Bytes of keys and values that stay on the device where the others lie in host memory."""


@dataclass(frozen=True)
class Change:
    """One change, made together with those before it."""

    what: str
    option: str
    """As it is written on the command line."""
    harm: str
    total: float
    """Bytes a device needs with it."""
    fits: bool

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "change": self.what,
            "option": self.option,
            "harm": self.harm,
            "total": round(self.total),
            "fits": self.fits,
        }


def changes(asked: Asked) -> list[Change]:
    """Return what to change in what does not fit, until it does."""
    found: list[Change] = []
    last = asked.memory().total
    for what, option, harm, changed in _steps(asked):
        asked = changed(asked)
        total, room = asked.memory().total, asked.device.memory
        if total < 0.995 * last or total <= room:
            found.append(Change(what, option, harm, total, total <= room))
        if total <= room:
            break
        last = total
    return found


Step = tuple[str, str, str, "Callable[[Asked], Asked]"]


def _steps(asked: Asked) -> Iterator[Step]:
    """Yield changes in order of harm."""
    yield (
        "keep no rotated keys",
        "--kv-budget",
        "none to answers; dense decode rotates keys anew",
        _with(rotated=False),
    )
    if asked.concurrent > 1:
        yield ("hold one context at a time", "--concurrent 1", "none to answers; others wait", _with(concurrent=1))
    if asked.ranks.count > 1 and not asked.ranks.split:
        split = replace(asked.ranks, split=True)
        yield (
            "split the weights over the GPUs",
            "--split-weights",
            "none to answers; sends in every layer",
            _with(ranks=split),
        )
    larger = [
        each for each in devices().values()
        if each.gpu and asked.device.gpu and asked.ranks.count == 1 and each.memory > asked.device.memory
    ]  # fmt: skip
    for each in sorted(larger, key=lambda device: device.memory):
        if _fits(asked, device=each):
            yield (
                f"take a larger GPU: {each.title}",
                f"--gpu {each.name}",
                "none to answers; money",
                _with(device=each),
            )
            break
    if asked.device.gpu and asked.ranks.count == 1:
        how = next((each for each in parallel.PLACEMENTS.values() if parallel.fits(each, asked.attention)), None)
        if how is not None:
            for gpus in (2, 4, _MOST_GPUS):
                ranks = replace(asked.ranks, gpus=gpus)
                if _fits(asked, ranks=ranks, placement=how):
                    yield (
                        f"lay the context over {gpus} GPUs ({how.name})", f"--gpus {gpus}", "none to answers; money",
                        _with(ranks=ranks, placement=how),
                    )  # fmt: skip
                    break
    for kv in ("int8", "fp8", "int4"):
        if asked.kv in ("bf16", "fp16", "fp32"):
            yield (f"keep keys and values in {kv}", f"--kv {kv}", harm(kv), _with(kv=kv))
    if seconds := _from_host(asked):
        told = f"none to answers; dense decode reads {seconds:.3g} s a token over the bus"
        option = f"--kv-budget 4GB --kv-tier host={math.ceil(asked.memory().kv / 1e9)}GB"
        yield ("keep most pages in host memory", option, told, _with(above=_ABOVE))
    for weights in ("bf16",) if asked.weights == "fp32" else ("fp8", "int4") if asked.device.gpu else ("int8", "int4"):
        if asked.weights in ("fp32", "bf16", "fp16", "fp8"):
            told = "small; weights of that format were not measured here"
            yield (f"hold weights in {weights}", f"--weights {weights}", told, _with(weights=weights))
    for name in ("retrieval", "streaming"):
        if mechanism(asked.attention).name != name:
            yield (f"attend by {name}", f"--attention {name}", harm(name), _with(attention=name, placement=None))
    n = asked.context
    while (n := n // 2) >= 1024:
        yield (f"give at most {short(n)} tokens", f"--context {short(n)}", "the rest is not read", _with(context=n))


def harm(name: str) -> str:
    """Return what the committed evals say of a format of keys and values, or of a mechanism."""
    for entry in measured.entries()["evals"]:
        if entry["eval"] == "compress" and entry["way"] == name:
            told = f"perplexity {entry['perplexity_ratio']:.3f} times dense's at {short(entry['length'])}"
            return f"{told} ({entry['model']}, {entry['file']} row {entry['row']})"
    found = [e for e in measured.entries()["evals"] if e["eval"] == "needle" and e["mechanism"] == name]
    if found:
        best = max(found, key=lambda entry: entry["length"])
        told = f"{100 * best['score']:.0f} % of needles found at {short(best['length'])}"
        return f"{told} ({best['model']}, {best['file']} row {best['row']})"
    return "not measured here"


def _from_host(asked: Asked) -> float:
    """Return the seconds in which a dense step reads what lies in host memory; 0: there is no other memory."""
    below = asked.memory().kv - _ABOVE
    return max(0.0, below / asked.device.host) if asked.device.gpu and not mechanism(asked.attention).evicts else 0.0


def _with(**fields: Any) -> Callable[[Asked], Asked]:
    return lambda asked: replace(asked, **fields)


def _fits(asked: Asked, **fields: Any) -> bool:
    changed = replace(asked, rotated=False, **fields)
    return changed.memory().total <= changed.device.memory
