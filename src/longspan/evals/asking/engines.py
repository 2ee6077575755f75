"""One loaded model attending in several ways, each an asker: mechanisms, and shares of the context that they may read.

A share becomes a mechanism's own options at each length (`Mechanism.within`). It does not know what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from longspan.attention import Mechanism, mechanisms, parse
from longspan.engine.llm import LLM
from longspan.errors import UsageError
from longspan.evals.asking.local import Local


@dataclass(frozen=True)
class Way:
    """A way to attend, as it was asked for."""

    spec: str
    """A specification; empty: the engine chooses."""
    budget: str = ""
    """A share such as `1/4`; empty: as the specification says."""


class Engines:
    """Askers around one model."""

    def __init__(
        self,
        make: Callable[[Mechanism | None], LLM],
        ways: list[Way],
        kv: str = "auto",
        leave_out: Callable[[str], None] | None = None,
        local: Callable[..., Local] = Local,
    ) -> None:
        """Take what is asked for.

        Args:
            make: returns an engine around the model that attends by a mechanism, or as it chooses itself.
            ways: how to attend.
            kv: the format of keys and values as the engines are told.
            leave_out: told which way can't work at which length; None: that is an error.
            local: makes what asks, as `Local` does.
        """
        self._make, self._ways, self._kv, self._leave_out, self._local = make, ways, kv, leave_out, local

    def at(self, length: int) -> list[Local]:
        """Return the askers at a length.

        Raises:
            UsageError: a mechanism that can't work within its share, or with how keys and values are kept.
        """
        found = []
        for way in self._ways:
            try:
                found.append(self._asker(way, length))
            except UsageError as error:
                if self._leave_out is None:
                    raise
                self._leave_out(f"left out: {way.spec} at {way.budget or 'its own budget'}, {length} tokens: {error}")
        return found

    def _asker(self, way: Way, length: int) -> Local:
        if not way.spec:
            return self._local(self._make(None), self._kv)
        asked = attending = parse(way.spec)
        if way.budget:
            attending = asked.within(max(1, int(Fraction(way.budget) * length)), length)
        return self._local(self._make(attending), self._kv, asked.describe(), way.budget)


def ways(specs: list[str], budgets: list[str]) -> list[Way]:
    """Return every mechanism at every share; one that is exact, or for which there are none, stands once as it is.

    Raises:
        UsageError: no such mechanism, or one that makes prefill cheaper and nothing else.
    """
    found: dict[Way, None] = {}
    for spec in specs:
        mechanism = parse(spec)
        if mechanism.prefill_only:
            raise UsageError(f"{spec} makes prefill cheaper and decodes densely: give it with --prefill")
        shares = [""] if mechanism.exact or not budgets else budgets
        found.update(dict.fromkeys(Way(spec, share) for share in shares))
    return list(found)


def choosing() -> Iterator[str]:
    """Yield a specification for every mechanism that reads within a budget, for each who can choose in it."""
    for name, cls in mechanisms().items():
        if cls.prefill_only or cls.exact or cls.needs_training or cls.within is Mechanism.within:
            continue
        if "read" in cls.options():
            yield f"{name}:read=place"
        elif "who" in cls.options():
            yield from (f"{name}:who={who}" for who in ("head", "layer", "model"))
        elif "summary" in cls.options():
            yield from (f"{name}:sinks=4,summary={summary}" for summary in ("key", "bounds"))
        else:
            yield name
