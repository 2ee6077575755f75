"""Beginning where a stored session stood that had read the same first tokens: nobody has to ask for it.

A context that keeps every key can be cut back to any page; on a hybrid model it is read on from the state checkpoint
before that. One that drops, evicts or rewrites by its whole length is taken whole or not at all.
It does not know how hashes find sessions: the store does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.engine import saving
from longspan.engine.contexts import Context, alike
from longspan.errors import LongspanError
from longspan.kv.base import PAGE
from longspan.sessions.session import Session
from longspan.sessions.store import JSON, SavedSession, SessionStore

_TRIED = 3
"""Sessions looked at, those with most in common first."""
_SHARE = 8
"""A session is not read from disk for less than this part of it: its bytes come up whole."""


def begin(store: SessionStore, same: dict[str, JSON], context: Context, tokens: Sequence[int]) -> int:
    """Let an empty context begin with what a stored session has read of these tokens.

    Args:
        store: of the sessions.
        same: the identity that sessions are saved with here.
        context: empty; it stays so where nothing is found or what was found can't be used.
        tokens: that it will read.

    Returns:
        How many tokens it holds then.
    """
    assert context.length == 0, "only an empty context begins"
    identity = saving.prefix_identity(same, context)
    for found in store.longest_prefix(tokens, identity, leave=0)[:_TRIED]:
        try:
            saved = store.load(found.name, lazily=True)
            held = _take(saved, context, tokens)
        except LongspanError:  # damaged, of a later version, larger than the budget: it was only looked at
            context.free()
            continue
        if held:
            store.hit(found.name, held)
            return held
    return 0


def _take(saved: SavedSession, context: Context, tokens: Sequence[int]) -> int:
    """Restore what of a session begins as the tokens do, and return how much; 0: nothing can be used."""
    state: Any = saved.state
    memory = state["memory"]
    length, partly = int(memory["length"]), bool(memory.get("partly"))
    read = saving.tokens_read(Session.from_saved(saved), context, length)
    common = alike(read, tokens)
    if common < length:
        common = common // PAGE * PAGE if partly and common * _SHARE >= length else 0
    if common:
        context.restore(read, saved.tensors["memory"])
        if common < length:
            context.truncate(common)
    return common
