"""Saving a session with what the model remembers of it, and restoring both.

What must match on restore is its identity: the model's weights and tokenizer, the attention with its options, what
reads documents (`prefill`), how keys and values are kept (`kv`), the number type, and the format of what is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longspan.attention import Mechanism, parse
from longspan.engine.contexts import Context
from longspan.engine.index_context import IndexContext
from longspan.errors import SessionCorruptError
from longspan.hf.model import CausalModel
from longspan.sessions.session import Session
from longspan.sessions.store import JSON, SavedSession, SessionStore

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


def save(store: SessionStore, session: Session, same: dict[str, JSON], model_name: str) -> None:
    """Commit a session; the memory's tensors are not written again where nothing was read since."""
    assert session.name is not None, "only a session with a name is saved"
    state, tensors, texts = session.to_saved()
    state["model_name"] = model_name  # for people: what must match is the fingerprint
    memory: Context | None = session.memory
    groups = {"documents": tensors}
    unchanged = []
    if memory is not None:
        mechanism = memory.wanted if isinstance(memory, IndexContext) else memory.mechanism
        state["memory"] = {"mechanism": mechanism.describe(), "length": memory.length}
        if session.saved_length == memory.length and store.exists(session.name):
            unchanged = ["memory"]
        else:
            groups["memory"] = memory.tensors()
    store.save(session.name, same, state, groups, texts, unchanged)
    session.saved_length = -1 if memory is None else memory.length


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
    context.restore(_tokens_read(session, context, length), dict(saved.tensors["memory"]))
    session.memory = context
    session.saved_length = context.length


def _tokens_read(session: Session, context: Context, length: int) -> list[int]:
    """Return the tokens that the memory holds: the template's head, then documents."""
    from longspan.engine import prompts

    head = [] if isinstance(context, IndexContext) else prompts.before_documents(context.model)
    tokens = (head + session.tokens)[:length]
    if len(tokens) != length:
        raise SessionCorruptError(f"session {session.name!r} remembers more than it holds: remove it and read again")
    return tokens
