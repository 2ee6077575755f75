"""What `ask`, `chat` and `demo` have in common: loading a model, reading documents into a session, writing answers.

It does not know arguments or tables.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longspan.cli import output
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, LongspanError, UsageError
from longspan.lengths import bytes_of

if TYPE_CHECKING:
    from longspan.engine.generation import Answer, Generation, Stats
    from longspan.engine.llm import LLM
    from longspan.retrieval.documents import Document, Reading
    from longspan.sessions.session import Session


def read_files(paths: Sequence[str], progress: Progress) -> Reading:
    """Return the text of documents; what was skipped in folders is named (DocumentError: see `read_documents`)."""
    from longspan.retrieval.documents import read_documents

    if paths:
        progress.busy("reading the files")
    stdin = getattr(sys.stdin, "buffer", None)
    if "-" in paths and stdin is not None and sys.stdin.isatty():
        progress.say("reading from the terminal: end with Ctrl-D")
    reading = read_documents(paths, stdin=stdin, progress=lambda name: progress.busy(f"reading the file {name}"))
    for skipped in reading.skipped:
        progress.say(f"skipped {skipped.name}: {skipped.reason}")
    return reading


def prose_of(paths: Sequence[str] | None, progress: Progress) -> str:
    """Return the text of these paths for an eval; without any, the Python language reference."""
    if not paths:
        from longspan.evals.haystack import prose

        return prose()
    return "\n\n".join(document.text for document in read_files(paths, progress).documents)


def check_session(name: str | None, has_documents: bool, *, needs_documents: bool) -> None:
    """Refuse early, before a model is loaded, what can't work with this session.

    Raises:
        UsageError: a name that can't be one; nothing to ask.
        SessionCorruptError: it is damaged.
        SaveError: what is read could not be saved.
    """
    from longspan.sessions.store import SessionStore

    if name is None:
        if needs_documents and not has_documents:
            raise UsageError(
                "nothing to ask about: give a document with --doc PATH, or a saved session with --session NAME "
                "(longspan session ls lists them)"
            )
        return
    store = SessionStore()
    if has_documents or not needs_documents:  # a chat keeps its questions in any case
        store.check_writable(name)
    if store.exists(name):
        store.show(name)
    elif needs_documents and not has_documents:
        known = ", ".join(store.names())
        raise UsageError(
            f"no session {name!r} is saved: give --doc PATH to make it" + (f", or use one of {known}" if known else "")
        )


def load(
    model: str | None,
    attention: str | None,
    device: str,
    progress: Progress,
    *,
    prefill: str | None = None,
    kv: str = "auto",
    kv_budget: str | None = None,
    kv_tier: str | None = None,
    weights: str = "auto",
    adapter: str | None = None,
    quote: bool = True,
    sources: bool = True,
    dtype: str | None = None,
    parallel: str | None = None,
) -> LLM:
    """Load the model (errors as `LLM`); where there are several ranks, `close` lets the others go."""
    from longspan import settings

    limit = None if kv_budget is None else bytes_of(kv_budget)
    if parallel is not None and settings.ranks() == 1:
        raise UsageError("--parallel is for several GPUs: give --gpus N, or start longspan with torchrun")

    progress.busy(f"loading {model or settings.default_model()}")
    from longspan.engine.llm import LLM

    number = None
    if dtype is not None:
        from longspan.evals.arguments import dtype_of

        number = dtype_of(dtype)
    return LLM(
        model,
        attention,
        device,
        number,
        prefill=prefill,
        kv=kv,
        kv_budget=limit,
        kv_tier=kv_tier,
        weights=weights,
        adapter=adapter,
        quote=quote,
        sources=sources,
        parallel=parallel or ("auto" if settings.ranks() > 1 else None),
        say=progress.say,
    )


def spread(gpus: int | None) -> None:
    """Run this command again, once for each of several GPUs, unless that was done already; then leave.

    Raises:
        UsageError: more of them than there are.
        typer.Exit: all have ended.
    """
    from longspan import settings

    if gpus is None or settings.ranks() > 1:
        return
    import typer

    from longspan.distributed.launch import launch

    raise typer.Exit(launch(gpus, "longspan.cli", sys.argv[1:]))


def follows() -> bool:
    """Return whether this process works for another that reads input and answers."""
    from longspan import settings

    return settings.ranks() > 1 and settings.rank() > 0


def follow(
    model: str | None,
    attention: str | None,
    device: str,
    *,
    prefill: str | None,
    weights: str,
    adapter: str | None,
    parallel: str | None,
) -> None:
    """Work for rank 0 until it ends; what goes wrong is told by it.

    Raises:
        typer.Exit: something did.
    """
    import typer

    from longspan.engine.llm import LLM

    try:
        engine = LLM(
            model, attention, device, prefill=prefill, weights=weights, adapter=adapter, parallel=parallel or "auto"
        )
        engine.follow()
    except (LongspanError, KeyboardInterrupt):
        raise typer.Exit(1) from None


def add(llm: LLM, session: Session, documents: Sequence[Document], progress: Progress) -> bool:
    """Add documents to a session, and return whether any of them is new to it."""
    before = len(session.documents)
    for document in documents:
        progress.busy(f"splitting {document.name} into tokens")
        llm.add_text(session, document.text, document.name)
    return len(session.documents) > before


def prefill(llm: LLM, session: Session, progress: Progress, *, changed: bool) -> Stats:
    """Run through the model what it has not read of a session yet, and save the session if it has a name.

    Raises:
        Cancelled: Ctrl-C. What was read is saved if the session has a name; the message says how to go on.
        SaveError: it can't be saved.
    """
    started = time.perf_counter()
    try:
        stats = llm.prefill(session, progress)
    except (Cancelled, KeyboardInterrupt) as error:  # the second: while the model was being calibrated, say
        progress.stop()
        raise Cancelled(_stopped(llm, session)) from error
    if stats.read_tokens:
        seconds = time.perf_counter() - started
        progress.say(
            f"read {stats.read_tokens:,} tokens in {seconds:.1f} s ({stats.prefill_tokens_per_s:,.0f} tokens/s)"
        )
    if session.name is not None and (stats.read_tokens or changed):
        progress.busy(f"saving the session {session.name}")
        llm.save(session)
    return stats


def stream(generation: Generation, progress: Progress) -> Answer:
    """Write an answer to standard output as it comes; Ctrl-C raises KeyboardInterrupt, with all taken back."""
    begun = False
    try:
        for piece in generation:
            progress.stop()
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            output.write(shown)
    except BaseException:
        generation.close()
        progress.stop()
        raise
    progress.stop()
    output.write("\n" if begun else "(the model gave no answer)\n")
    return generation.answer


def citations_json(answer: Answer) -> list[dict[str, Any]]:
    """Return the passages of an answer for JSON."""
    return [dataclasses.asdict(citation) for citation in answer.citations]


def tiers_json(llm: LLM) -> dict[str, Any]:
    """Return what lies below the device and what moved, for JSON; nothing where no tier was asked for."""
    tiers = llm.tiers
    if tiers is None:
        return {}
    held = {f"{tier}_bytes": budget.used for tier, budget in tiers.budgets.items()}
    return {"tiers": held | dataclasses.asdict(tiers.traffic)}


def tiers_line(llm: LLM) -> str:
    """Return the same in one line; empty where no tier was asked for."""
    if llm.tiers is None:
        return ""
    traffic, used = llm.tiers.traffic, {tier: budget.used for tier, budget in llm.tiers.budgets.items()}
    told = [
        f"{tier} {output.size(used[tier])} (moved down {output.size(down)}, up {output.size(up)})"
        for tier, down, up in (
            ("host", traffic.host_down, traffic.host_up),
            ("disk", traffic.disk_down, traffic.disk_up),
        )
        if down
    ]
    if traffic.hits or traffic.waits or traffic.misses:
        told.append(f"prefetched {traffic.hits:,}, waited for {traffic.waits:,}, not prefetched {traffic.misses:,}")
    return "tiers: " + (", ".join(told) or "nothing lies below")


def _stopped(llm: LLM, session: Session) -> str:
    """Save what was read of a session with a name; return what the user should know."""
    done = session.memory.length if session.memory is not None else 0
    told = f"stopped after {done:,} of {session.head + len(session.tokens):,} tokens"
    if session.name is None:
        return f"{told}: nothing is saved (with --session NAME the next call goes on from where this one stopped)"
    llm.save(session)
    return f"{told}: what was read is saved; go on with --session {session.name}"
