"""How many bytes pages may take: for one session, and for all of them together.

Budgets form a chain. The last of it, the root, counts memory: a page that several contexts share is counted once. Every
other one, a session's, counts what its contexts refer to: a shared page is counted for each session.
A charge is checked along the whole chain before anything is counted, so that one that fails changes nothing.
It does not know pages: whoever takes and releases them says how many bytes they are.
"""

from __future__ import annotations

import threading

from longspan.errors import PoolExhaustedError, UsageError

_CHARGING = threading.RLock()
"""Held while bytes are counted: sessions come and go in several threads. A charge may collect a context that gives some
back."""


class Budget:
    """A number of bytes and how many of them are used."""

    def __init__(
        self, limit: int | None = None, name: str = "KV", parent: Budget | None = None, option: str = "--kv-budget"
    ) -> None:
        """Start with nothing used.

        Args:
            limit: bytes; None: no limit.
            name: whose budget it is, as errors name it.
            parent: the budget of all sessions, where this is one session's.
            option: by which it is set, as errors name it.
        """
        if limit is not None and limit <= 0:
            raise UsageError(f"a KV budget of {limit} bytes holds nothing: give a number above 0 ({option})")
        self.limit, self.name, self.parent, self.option = limit, name, parent, option
        self.used = 0
        self.reserved = 0
        """Bytes of the memory that was set aside, free slots included (only a root knows)."""
        self.planes = 0
        """How many planes share this budget's memory (only a root knows)."""

    @property
    def root(self) -> Budget:
        """The budget that counts memory."""
        return self if self.parent is None else self.parent.root

    @property
    def limited(self) -> bool:
        """Whether this budget or one above it has a limit."""
        return self.limit is not None or (self.parent is not None and self.parent.limited)

    @property
    def left(self) -> int | None:
        """Bytes that can still be charged along the chain; None: no limit."""
        above = None if self.parent is None else self.parent.left
        own = None if self.limit is None else self.limit - self.used
        return min((left for left in (own, above) if left is not None), default=None)

    def charge(self, referred: int, memory: int) -> None:
        """Count bytes that a context refers to (every budget but the root) and bytes of memory (the root).

        Negative numbers give back, and are never refused.

        Raises:
            PoolExhaustedError: a budget of the chain would be passed; nothing was counted.
        """
        with _CHARGING:
            self._charge(referred, memory)

    def _charge(self, referred: int, memory: int) -> None:
        budget: Budget | None = self
        while budget is not None:
            more = memory if budget.parent is None else referred
            if budget.limit is not None and more > 0 and budget.used + more > budget.limit:
                raise PoolExhaustedError(
                    f"the {budget.name} budget of {size(budget.limit)} is spent ({size(budget.used)} used, "
                    f"{size(more)} more needed): raise it ({budget.option}), or close a session"
                )
            budget = budget.parent
        budget = self
        while budget is not None:
            budget.used += memory if budget.parent is None else referred
            assert budget.used >= 0, "more was given back than was charged"
            budget = budget.parent

    def require(self, least: int, what: str) -> None:
        """Refuse a budget that could never hold `least` bytes (UsageError)."""
        budget: Budget | None = self
        while budget is not None:
            if budget.limit is not None and budget.limit < least:
                raise UsageError(
                    f"the {budget.name} budget of {size(budget.limit)} is below {what} ({size(least)}): "
                    f"raise it (--kv-budget)"
                )
            budget = budget.parent

    def slack(self, page_bytes: int) -> int | None:
        """Return how many pages one plane may set aside beyond what it needs now; None: as many as it likes.

        The memory that no plane has set aside is shared out evenly among the planes.
        """
        if self.limit is None:
            return None
        return max(0, self.limit - self.reserved) // max(1, self.planes) // max(1, page_bytes)


def size(count: int) -> str:
    """Return a number of bytes as people read it: `640 bytes`, `1.5 GiB`."""
    if count < 1024:
        return f"{count} bytes"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(len(units), (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.4g} {units[power - 1]}"
