"""One request on its way: what it reads, then the tokens of its answers, one after another.

It does not know other requests, nor when it is its turn: the scheduler does.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longspan.attention import Hints
from longspan.engine import prompts, rereading
from longspan.engine.contexts import Context
from longspan.engine.generation import Citation
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.sampler import Sampler
from longspan.engine.serving.events import Delta, Done, Event, Progress, PromptRead, TokenLogprob, Usage
from longspan.engine.serving.handle import Handle
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.requests import Request
from longspan.engine.stops import TextStream
from longspan.errors import UsageError
from longspan.sessions.session import Session, Turn

if TYPE_CHECKING:
    from longspan.engine.llm import LLM


class Job:
    """A request, who is told of it, and whether it was stopped."""

    def __init__(self, request: Request) -> None:
        """Note when it came."""
        self.request, self.submitted, self.cancelled = request, time.perf_counter(), False
        self.handle = Handle(self.cancel, request.n)

    def cancel(self) -> None:
        """Ask the engine to stop it at the next chunk or token."""
        self.cancelled = True

    def events(self, llm: LLM, session: Session, metrics: Metrics) -> Generator[Event, None, None]:
        """Read and write; between two events it may be left, and closing it takes back what was not to stay."""
        request = self.request
        for name, text in request.documents:
            llm.add_text(session, text, name)
        cached = 0
        if session.documents:
            cached = llm.prefill(session).cached_tokens
            yield Progress(session.memory.length, session.memory.length)
        if request.reads_only:
            usage = Usage(session.memory.length, cached)
            for index in range(request.n):
                yield Done(index, "read", usage)
            return
        context, prompt, citations = self._prompt(llm, session)
        before, hints = context.length, context.hints
        try:
            if request.prompt_logprobs is not None:
                rows = context.score(prompt)
                told = logprobs(rows[:-1], prompt[1:], request.prompt_logprobs)
                yield PromptRead(tuple(prompt), tuple(told))
                first = rows[-1]
            else:
                first = context.step(prompt)
            read = context.length
            yield Progress(read, read)
            for index in range(request.n):
                yield from self._write(llm, context, first, index, read, cached, citations, session, metrics)
                context.truncate(read)
        finally:
            context.truncate(before)
            context.hints = Hints() if hints.chosen_pages else hints

    def _prompt(self, llm: LLM, session: Session) -> tuple[KVContext, list[int], tuple[Citation, ...]]:
        request, model = self.request, llm.model
        if not session.documents:
            context = llm.new_context(llm._without_documents())
            assert isinstance(context, KVContext), "what has no documents keeps its keys"
            if request.messages is not None:
                return context, model.tokens(model.chat([dict(m) for m in request.messages])), ()
            return context, list(request.tokens or model.tokens(request.text or "")), ()
        question, turns = question_of(request, session.turns)
        chosen = llm.choose(question, session)
        memory: Context = session.memory
        if isinstance(memory, IndexContext):
            prompt, _ = rereading.prompt_again(model, memory.wanted, session, chosen, question)
            scratch = llm.new_context(llm._without_documents())
            assert isinstance(scratch, KVContext), "what is read again keeps its keys"
            return scratch, prompt, tuple(chosen.citations)
        assert isinstance(memory, KVContext), "a context is an index or a KV context"
        memory.hints = Hints(chosen_pages=tuple(choice.page for choice in chosen.pages))
        options = (prompts.after_documents(model, question, some) for some in rereading.shorter(turns))
        return memory, rereading.fitting(model, options), tuple(chosen.citations)

    def _write(
        self,
        llm: LLM,
        context: KVContext,
        logits: Tensor,
        index: int,
        read: int,
        cached: int,
        citations: tuple[Citation, ...],
        session: Session,
        metrics: Metrics,
    ) -> Iterator[Event]:
        request, params, model = self.request, self.request.params, llm.model
        sampler, stream = Sampler(params, logits.device), TextStream(model.decode, params.stop)
        constraint = None if request.constraint is None else request.constraint()
        said: list[int] = []
        reason, first, text = "length", 0.0, ""
        while len(said) < params.max_tokens:
            history = torch.tensor(said, device=logits.device) if said and params.looks_back else None
            token = sampler(logits, history, None if constraint is None else constraint.allowed())
            if not said:
                first = time.perf_counter() - self.submitted
                metrics.first_token.observe(first)
            if token in model.end_tokens:
                reason = "stop"
                break
            if constraint is not None:
                constraint.accept(token)
            told = () if request.logprobs is None else tuple(logprobs(logits[None], [token], request.logprobs))
            said.append(token)
            metrics.written_tokens += 1
            piece = stream.push(token)
            text += piece
            yield Delta(index, piece, (token,), told)
            if stream.stopped is not None:
                break
            if len(said) < params.max_tokens:
                logits = context.step([token])
        rest = stream.finish()
        if rest:
            yield Delta(index, rest)
        if stream.stopped is not None:
            reason = "stop"
        if request.remember and index == 0 and request.messages is not None:
            session.turns.append(Turn(question_of(request, ())[0], (text + rest).strip()))
        yield Done(index, reason, Usage(read, cached, len(said), first), citations, stream.stopped)


def question_of(request: Request, turns: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
    """Return what is asked of documents, and the conversation before it: the request's own, or else the session's."""
    if request.messages is None:
        if request.text is None:
            raise UsageError("token ids can't ask about documents: give messages or a text")
        return request.text, turns
    told = [(str(m.get("role")), _words(m)) for m in request.messages]
    if told[-1][0] != "user":
        raise UsageError(f"the last message is of the role {told[-1][0]!r}: what asks about documents is the user's")
    system = [words for role, words in told if role in ("system", "developer")]
    own: list[Turn] = []
    asked: str | None = None
    for role, words in told[:-1]:
        if role == "user":
            asked = words
        elif role == "assistant" and asked is not None:
            own.append(Turn(asked, words))
            asked = None
    return "\n\n".join([*system, told[-1][1]]), own or turns


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UsageError("a message about documents must have a text as its content")
    return content


def logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> Iterator[TokenLogprob]:
    """Return how likely tokens were by float32 logits `[T, V]`, and the `count` likeliest beside each."""
    rows = logits.log_softmax(-1)
    own = rows.gather(1, torch.tensor([list(tokens)], device=rows.device).T)[:, 0].tolist()
    values, ids = (x.tolist() for x in rows.topk(count)) if count else ([[]] * len(tokens), [[]] * len(tokens))
    for token, mine, each, likely in zip(tokens, own, ids, values, strict=True):
        yield TokenLogprob(token, mine, tuple(zip(each, likely, strict=True)))
