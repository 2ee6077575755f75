"""Contexts of requests that have ended, kept for those that begin alike: a conversation's next turn, a common preamble.

The one with most tokens in common is forked, which copies no page, and cut back to them. Those not used for longest go
first. It does not know budgets, nor sessions: a session keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.engine.contexts import alike
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError

_LEAST = 16
"""Tokens in common below which a fork costs more than it saves."""


class Cached:
    """Contexts by what they have read, those used last at the end."""

    def __init__(self, most: int) -> None:
        """Take how many are kept."""
        self._most = most
        self._kept: list[KVContext] = []

    @property
    def contexts(self) -> list[KVContext]:
        """Those that are kept."""
        return list(self._kept)

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def keep(self, context: KVContext) -> None:
        """Keep a context that nobody uses any more, or free it."""
        if not self._most or context.kept is not None or context.length < _LEAST:
            context.free()
            return
        # One that the new one continues has nothing more to give.
        for i, other in enumerate(self._kept):
            if alike(other.tokens, context.tokens) == other.length and context.cuttable:
                self._kept.pop(i).free()
                break
        self._kept.append(context)
        while len(self._kept) > self._most:
            self.shrink()

    def begin(self, fresh: KVContext, tokens: Sequence[int]) -> KVContext:
        """Return a context that has read as much of `tokens`, the last one left out, as one that is kept has.

        Args:
            fresh: an empty context, which is returned where none is alike; it reads as those that are kept.
            tokens: that will be read.
        """
        best, common = None, _LEAST - 1
        for context in self._kept:
            if context.mechanism != fresh.mechanism:
                continue
            found = context.common(tokens[: len(tokens) - 1])
            if found > common:
                best, common = context, found
        if best is None:
            return fresh
        self._kept.remove(best)
        self._kept.append(best)
        try:
            fork = best.fork()
        except PoolExhaustedError:
            return fresh
        fork.truncate(common)
        return fork

    def shrink(self) -> bool:
        """Let go of the one not used for longest; returns whether there was one."""
        if not self._kept:
            return False
        self._kept.pop(0).free()
        return True
