"""Saving a session with what the model remembers of it, and restoring both.

What must match on restore is its identity: the model's weights and tokenizer, the attention with its options, what
reads documents (`prefill`), how keys and values are kept (`kv`), the number type, and the format of what is saved.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.attention import Mechanism, parse
from longspan.engine.contexts import Context
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.errors import SessionCorruptError
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.saved import rows_of as saved_rows
from longspan.sessions.session import Session
from longspan.sessions.store import JSON, Rows, SavedSession, SessionStore

FORMAT = 1
"""Changes whenever what is kept changes its meaning."""


def identity(
    model: CausalModel, attention: Mechanism | None, prefill: Mechanism | None, kv: str | None
) -> dict[str, JSON]:
    """Return what a saved session must agree with to be continued; the options are as `LLM` takes them."""
    return {
        "model": model.fingerprint,
        "tokenizer": model.tokenizer_hash,
        "attention": "auto" if attention is None else attention.describe(),
        "prefill": None if prefill is None else prefill.describe(),
        "kv": kv,
        "dtype": str(model.dtype).removeprefix("torch."),
        "format": FORMAT,
    }


def save(
    store: SessionStore,
    session: Session,
    same: dict[str, JSON],
    model_name: str,
    *,
    kept: bool | None = None,
    ttl: float | None = None,
) -> None:
    """Commit a session; of the memory only what changed is written, and nothing looked at where nothing was read since.

    Args:
        store: where to.
        session: one with a name.
        same: its identity.
        model_name: for people.
        kept: whether it stays until it is removed; None: as it was promised before.
        ttl: seconds after its last use in which one that is not kept stays.
    """
    assert session.name is not None, "only a session with a name is saved"
    state, tensors, texts = session.to_saved()
    state["model_name"] = model_name  # for people: what must match is the fingerprint
    memory: Context | None = session.memory
    groups: dict[str, Mapping[str, Tensor | Rows]] = {"documents": tensors}
    unchanged, tokens = [], None
    if memory is not None:
        mechanism = memory.wanted if isinstance(memory, IndexContext) else memory.mechanism
        state["memory"] = {"mechanism": mechanism.describe(), "length": memory.length, "partly": _partly(memory)}
        if session.saved_length == memory.length and store.exists(session.name):
            unchanged = ["memory"]
        else:
            groups["memory"], tokens = in_rows(memory.tensors()), memory.tokens
    store.save(
        session.name,
        same,
        state,
        groups,
        texts,
        unchanged,
        tokens=tokens,
        prefix_identity=None if memory is None else prefix_identity(same, memory),
        versions=versions(),
        kept=kept,
        ttl=ttl,
    )
    session.saved_length = -1 if memory is None else memory.length


class Pace:
    """When reading that takes long is committed on the way: every so often, for a twentieth of the time at most."""

    def __init__(self, seconds: float) -> None:
        """Take the least time between two commits."""
        self.seconds, self._cost, self._last = seconds, 0.0, time.perf_counter()

    def due(self) -> bool:
        """Whether it is time."""
        return time.perf_counter() - self._last > max(self.seconds, 20 * self._cost)

    def commit(self, save: Callable[[], None]) -> None:
        """Save, and note how long that took."""
        started = time.perf_counter()
        save()
        self._last = time.perf_counter()
        self._cost = self._last - started


def fork(store: SessionStore, source: Session, name: str | None) -> bool:
    """Save a fork of a session that is saved as it stands; returns whether its memory need not be written again."""
    memory: Context | None = source.memory
    whole = memory is not None and memory.length == source.saved_length
    if name is None or source.name is None or not whole or not store.exists(source.name):
        return False
    return store.fork_seen(source.name, name)


def in_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Rows]:
    """Return a memory's tensors, those in rows that grow with the context: of these only what changed is written."""
    out: dict[str, Tensor | Rows] = dict(tensors)
    for name, (axis, step, numbers) in saved_rows(tensors).items():
        out[name] = Rows(tensors[name], axis, step, numbers)
    if "index" in tensors:
        out["index"] = Rows(tensors["index"], 1, PAGE)
    return out


def prefix_identity(same: Mapping[str, JSON], memory: Context) -> dict[str, JSON]:
    """Return what must match for one context to begin where another stood: the mechanism that was chosen, too."""
    mechanism = memory.wanted if isinstance(memory, IndexContext) else memory.mechanism
    return dict(same) | {"attention": mechanism.describe()}


def versions() -> dict[str, str]:
    """Return what a commit tells of what wrote it."""
    import longspan

    return {"longspan": longspan.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _partly(memory: Context) -> bool:
    """Whether a part of the memory can be used where another context begins alike; else all of it or none.

    Not where keys were dropped or evicted, and not where pages were written down in a smaller format, or moved, by a
    rule that looks at the whole length.
    """
    if isinstance(memory, IndexContext):
        return memory.dropped(memory.length) == (0, 0)
    assert isinstance(memory, KVContext), "a context is an index or a KV context"
    return memory.cuttable and not memory.budget.limited


def restore_memory(session: Session, saved: SavedSession, make_context: Callable[[Mechanism], Context]) -> None:
    """Give a restored session its memory back."""
    state: Any = saved.state
    kept = state.get("memory")
    if kept is None:
        return
    try:
        mechanism, length = parse(str(kept["mechanism"])), int(kept["length"])
    except (KeyError, TypeError, ValueError) as error:
        raise SessionCorruptError(f"session {saved.name!r} has a damaged memory: remove it and read again") from error
    context = make_context(mechanism)
    context.restore(tokens_read(session, context, length), saved.tensors["memory"])
    session.memory = context
    session.saved_length = context.length


def tokens_read(session: Session, context: Context, length: int) -> list[int]:
    """Return the tokens that the memory holds: the template's head, then documents."""
    from longspan.engine import prompts

    head = [] if isinstance(context, IndexContext) else prompts.before_documents(context.model)
    tokens = (head + session.tokens)[:length]
    if len(tokens) != length:
        raise SessionCorruptError(f"session {session.name!r} remembers more than it holds: remove it and read again")
    return tokens
