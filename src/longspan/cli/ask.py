"""`longspan ask`: one question about documents, an answer, and the passages it rests on."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options, output, work
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from longspan.engine.generation import Answer, Stats
    from longspan.retrieval.documents import Reading


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog='Example: longspan ask "When does the lease end?" --doc lease.pdf')(options.sampled(ask))


def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.")],
    doc: options.Documents = None,
    model: options.Model = None,
    attention: options.Attention = None,
    prefill: options.Prefill = None,
    kv: options.KVFormat = "auto",
    kv_budget: options.KVBudget = None,
    kv_tier: options.KVTier = None,
    weights: options.Weights = "auto",
    adapter: options.Adapter = None,
    quote: options.Quote = True,
    sources: options.Sources = True,
    session: options.SessionName = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    parallel: options.Parallel = None,
    *,
    sampling: options.Sampling,
    json: options.AsJson = False,
) -> None:
    """Ask a question about documents, or about a saved session.

    The answer comes with the passages it rests on. With --session, what was read is kept: the next question about the
    same documents is answered at once.
    """
    work.spread(gpus)
    if work.follows():
        work.follow(model, attention, device, prefill=prefill, weights=weights, adapter=adapter, parallel=parallel)
        return
    question = output.readable(question)
    if not question.strip():
        raise UsageError("the question is empty: ask something")
    work.check_session(session, bool(doc), needs_documents=True)
    with Progress() as progress, ExitStack() as closing:
        reading = work.read_files(doc or [], progress)
        progress.busy("starting")
        params = sampling.params()
        llm = work.load(
            model,
            attention,
            device,
            progress,
            prefill=prefill,
            kv=kv,
            kv_budget=kv_budget,
            kv_tier=kv_tier,
            weights=weights,
            adapter=adapter,
            quote=quote,
            sources=sources,
            parallel=parallel,
        )
        closing.callback(llm.close)
        if session is not None:
            progress.busy(f"opening the session {session}")
        opened = llm.session(session)
        changed = work.add(llm, opened, reading.documents, progress)
        if not opened.documents:
            raise UsageError(f"session {session!r} holds no documents: give one with --doc PATH")
        # Made before reading, which may take long: a question that can't be answered is refused first.
        generation = llm.generate(question, opened, params)
        read = work.prefill(llm, opened, progress, changed=changed)
        progress.busy("answering")
        try:
            answer = generation.finish() if json else work.stream(generation, progress)
        except KeyboardInterrupt as error:
            if not json:
                output.write("\n")
            kept = f": what was read is saved; ask again with --session {session}" if session else ""
            raise Cancelled(f"stopped{kept}") from error
    if json:
        output.write_json(_as_json(answer, read, session, reading) | work.tiers_json(llm))
    else:
        output.write(output.passages(answer.citations, f"{question} {answer.text}"))
        tell(answer, read)
        if told := work.tiers_line(llm):
            output.say(told, dim=True)


def tell(answer: Answer, read: Stats) -> None:
    """Write what the user should know of an answer, and its speed, to standard error."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        output.say("")
    for note in answer.notes:
        output.say(f"note: {note}")
    speed = prefill_speed(answer, read)
    output.say(output.stats_line(answer.stats, read.cached_tokens, speed, answer.attention, answer.model), dim=True)


def prefill_speed(answer: Answer, read: Stats) -> float:
    """Return the speed of reading documents where any were read, else that of reading the prompt."""
    return read.prefill_tokens_per_s if read.read_tokens else answer.stats.prefill_tokens_per_s


def _as_json(answer: Answer, read: Stats, session: str | None, reading: Reading) -> dict[str, Any]:
    return {
        "answer": answer.text.strip(),
        "citations": work.citations_json(answer),
        "session": session,
        "prompt_tokens": answer.stats.prompt_tokens,
        "cached_tokens": read.cached_tokens,
        "prefill_tokens_per_s": round(prefill_speed(answer, read), 2),
        "decode_tokens_per_s": round(answer.stats.decode_tokens_per_s, 2),
        "time_to_first_token_s": round(answer.stats.first_token_seconds, 4),
        "attention": answer.attention,
        "model": answer.model,
        "finish_reason": answer.finish_reason,
        "stopped_by": answer.stopped_by,
        "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in reading.skipped],
        "unsourced": answer.unsourced or None,
        "quote": answer.quote.strip() or None,
        "notes": list(answer.notes),
    }
