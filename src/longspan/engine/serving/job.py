"""One request on its way: what it reads, chunk by chunk, and the answers that are written after it.

It does not know other requests, nor when it is its turn: the scheduler does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.engine import answering
from longspan.engine.answering import Prompted
from longspan.engine.choosing import Chosen
from longspan.engine.contexts import Most
from longspan.engine.generation import Citation, Stats
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.serving.cached import Cached
from longspan.engine.serving.choice import Choice, told
from longspan.engine.serving.events import Delta, Done, Progress, PromptRead, TokenLogprob, Usage
from longspan.engine.serving.handle import Handle, Wakes
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.prepared import Prepared, prompt_of, question_of
from longspan.engine.serving.requests import Request
from longspan.errors import ContextTooLongError, LongspanError, UsageError
from longspan.retrieval.heads import RetrievalHeads
from longspan.sessions.session import Session, Turn

if TYPE_CHECKING:
    from longspan.engine.llm import LLM

_TELL = 0.1
"""Seconds between two events that say how far reading is."""
_SCORED = 64
"""Tokens of a prompt whose logits are held together."""


class Job:
    """A request, what is known of it by now, and who is told."""

    def __init__(self, request: Request, metrics: Metrics, changed: Callable[[], None], wakes: Wakes) -> None:
        """Note when it came; `changed` wakes the engine when it is cancelled, `wakes` whoever reads events."""
        self.request, self.submitted, self.cancelled = request, time.perf_counter(), False
        self.handle = Handle(self.cancel, request.n, wakes)
        self.begun = False
        """Whether its turn has come."""
        self.prepared: Prepared | None = None
        self.choices: list[Choice] = []
        """Answers that are being written."""
        self.changed_session = False
        """Whether the session is another than before."""
        self.left = 0
        """Tokens that are still to be read, as far as they are known."""
        self.needs = 0
        """Bytes that its contexts may take, once it was admitted."""
        self.refused: LongspanError | None = None
        """Why it can't be worked on, though it was its turn."""
        self.holds_session = False
        """Whether its session is in use because of it."""
        self.last = 0.0
        """When its answers' last tokens came."""
        self._metrics, self._changed = metrics, changed
        self._session = Session()
        self._prompted: Prompted | None = None
        self._keep: KVContext | None = None
        self._citations: tuple[Citation, ...] = ()
        self._chosen: Chosen | None = None
        self._heads: RetrievalHeads | None = None
        self._unsourced = ""
        self._notes: tuple[str, ...] = ()
        self._question = ""
        self._read = self._cached = 0
        self._first = self._told = 0.0
        self._open = set(range(request.n))

    @property
    def key(self) -> str:
        """See `queueing.Queued`."""
        return self.request.key

    @property
    def priority(self) -> int:
        """See `queueing.Queued`."""
        return self.request.priority

    @property
    def session(self) -> str | None:
        """See `queueing.Queued`."""
        return self.request.session

    @property
    def contexts(self) -> list[KVContext]:
        """Contexts that hold pages for this request."""
        held = [choice.context for choice in self.choices]
        if not held and self._prompted is not None:
            held = [self._prompted.context]
        if not held and isinstance(self._session.memory, KVContext):
            held = [self._session.memory]
        return held

    def cancel(self) -> None:
        """Ask the engine to stop it at the next chunk or token."""
        self.cancelled = True
        self._changed()

    # --- reading -----------------------------------------------------------------------------------------------------

    def reading(self, llm: LLM, session: Session | None, cached: Cached, most: Most) -> Iterator[int]:
        """Read chunk by chunk: yields how many tokens each had; at the end `choices` have their first token.

        Args:
            llm: who reads.
            session: the one that is named; None: the documents are this request's own.
            cached: contexts that may be gone on from.
            most: how many tokens a chunk may have.
        """
        assert self.prepared is not None, "texts are tokens by now"
        if session is not None:
            self._session = session
        known = len(self._session.documents)
        try:
            for name, text, split in self.prepared.documents:
                llm.add_text(self._session, text, name, split)
            self.changed_session = len(self._session.documents) > known
            if self._session.documents:
                yield from self._read_documents(llm, most)
        except LongspanError:
            # Others would be read again, and fail again, before every answer.
            llm.keep_documents(self._session, known)
            raise
        if not self.request.reads_only:
            yield from self._read_prompt(llm, cached, most)

    def _read_documents(self, llm: LLM, most: Most) -> Iterator[int]:
        stats, before = Stats(), 0
        for done, total in llm.prefilling(self._session, stats, most=most):
            self._tell(done, total)
            self.changed_session |= stats.read_tokens > 0
            if stats.read_tokens > before:
                yield stats.read_tokens - before
            before, self.left = stats.read_tokens, total - done
        self._cached, self._read = stats.cached_tokens, stats.prompt_tokens

    def _read_prompt(self, llm: LLM, cached: Cached, most: Most) -> Iterator[int]:
        prompted = self._prompt(llm, cached)
        request, model, tokens = self.request, llm.model, prompted.tokens
        total = prompted.remembered + len(tokens)
        room, notes = prompted.room(request.params.max_tokens)
        if room < 1 or (notes and not self._session.documents):
            raise ContextTooLongError(
                f"the prompt has {total} tokens, and the model's window holds {model.dimensions.window}, the "
                "answer's among them: shorten it, or give the long part as a document"
            )
        self._prompted, self._notes = prompted, tuple(notes)
        context = prompted.__enter__()
        if self._chosen is not None:
            self._heads, self._unsourced = llm.source_heads(context)
            prompted.note(self._heads)
        if self._keep is not None:
            self._cached = prompted.remembered
        first: Tensor | None = None
        self.left = len(tokens)
        if request.prompt_logprobs is not None:
            scored: list[TokenLogprob] = []
            while self.left:
                piece = tokens[len(tokens) - self.left :][:_SCORED]
                rows = context.score(piece)
                before = rows[:-1] if first is None else torch.cat([first.unsqueeze(0), rows[:-1]])
                scored += told(before, piece[len(piece) - len(before) :], request.prompt_logprobs)
                first, self.left = rows[-1], self.left - len(piece)
                yield len(piece)
            self.handle.put(PromptRead(tuple(tokens), tuple(scored)))
        else:
            for count, out in context.stepping(tokens, most):
                first = out
                self.left -= count
                self._tell(total - self.left, total)
                yield count
        assert first is not None, "a prompt has tokens"
        self._read = total
        self._metrics.prompt_tokens += total
        self._metrics.cached_tokens += self._cached
        self._metrics.prefix_hits += bool(self._cached)
        self._begin(llm, context, first, room)

    def _prompt(self, llm: LLM, cached: Cached) -> Prompted:
        """Return what is read after which context."""
        request, model, session = self.request, llm.model, self._session
        assert self.prepared is not None, "texts are tokens by now"
        if session.documents:
            if request.prompt_logprobs is not None:
                raise UsageError("a question about documents has no prompt of its own whose logprobs could be told")
            self._question, turns = question_of(request, session.turns)
            memory = session.memory
            if request.citations or isinstance(memory, IndexContext) or memory.mechanism.wanted_pages:
                chosen = llm.choose(self._question, session)
            else:
                chosen = Chosen([], [], [])
            if request.citations:
                self._citations, self._chosen = tuple(chosen.citations), chosen
            return answering.about_documents(model, session, chosen, self._question, turns)
        tokens = self.prepared.prompt or prompt_of(model, request)
        mechanism = llm.without_documents()
        if session.turns and request.messages is not None and request.session is not None:
            self._question, turns = question_of(request, session.turns)
            tokens = answering.without_documents(model, mechanism, self._question, turns).tokens
        elif request.remember and request.messages is not None:
            self._question = question_of(request, ())[0]
        fresh = llm.new_context(mechanism)
        assert isinstance(fresh, KVContext), "what has no documents keeps its keys"
        context = fresh if request.prompt_logprobs is not None else cached.begin(fresh, tokens)
        self._keep = context
        return Prompted(context, tokens[context.length :], context.length)

    def _begin(self, llm: LLM, context: KVContext, first: Tensor, room: int) -> None:
        """Give every choice a context of its own and its first token; pages of the prompt are shared."""
        request = self.request
        contexts = [context]
        try:
            while len(contexts) < request.n:
                contexts.append(context.fork())
        except BaseException:
            for other in contexts[1:]:
                other.free()
            raise
        now = time.perf_counter()
        self._first, self.last = now - self.submitted, now
        self._metrics.first_token.observe(self._first)
        for index, each in enumerate(contexts):
            params = request.params if not index else request.params.another(index)
            limit = None if request.constraint is None else request.constraint()
            self.choices.append(Choice(llm.model, each, index, params, room, request.logprobs, limit))
        for choice in self.choices:
            self.write(choice, *choice.draw(first))

    def _tell(self, read: int, total: int) -> None:
        now = time.perf_counter()
        if read == total or now - self._told > _TELL:
            self._told = now
            self.handle.put(Progress(read, total))

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, choice: Choice, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Add a token to an answer, and tell it."""
        piece = choice.take(token)
        if piece is not None:
            self._metrics.written_tokens += 1
            self.handle.put(Delta(choice.index, piece, (token,), logprobs))

    def ended(self, llm: LLM, choice: Choice) -> None:
        """Tell that an answer has ended, and what it rests on; its context holds by now all that it has read."""
        rest = choice.finish()
        if rest:
            self.handle.put(Delta(choice.index, rest))
        citations, unsourced = self._citations, self._unsourced
        prompted, chosen = self._prompted, self._chosen
        if choice.tokens and prompted is not None and chosen is not None:
            mass = prompted.mass(self._heads, choice.context)
            if mass is not None:
                named, unsourced = llm.named(citations, self._session, mass, prompted, chosen)
                citations = tuple(named)
        reason = choice.reason or "cancelled"
        self._count(reason)
        self._open.discard(choice.index)
        if choice.index == 0 and self.request.remember and self._question and reason != "cancelled":
            self._session.turns.append(Turn(self._question, choice.text.strip()))
            self.changed_session = True
        usage = Usage(self._read, self._cached, len(choice.tokens), self._first)
        self.handle.put(Done(choice.index, reason, usage, citations, choice.stopped_by, self._notes, unsourced))

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self, cached: Cached) -> None:
        """Take back what was read for the answers alone; contexts that are kept for others are whole by now."""
        for choice in self.choices[1:]:
            choice.context.free()
        self.choices = []
        prompted, self._prompted = self._prompted, None
        if prompted is None:
            return
        if self._keep is not None:
            prompted.context.hints = type(prompted.hints)()
            cached.keep(self._keep)
            self._keep = None
        else:
            prompted.__exit__(None, None, None)

    def end(self) -> None:
        """Tell that choices which were not told to have ended have."""
        reason = "read" if self.request.reads_only and not self.cancelled else "cancelled"
        for index in sorted(self._open):
            self._count(reason)
            self.handle.put(Done(index, reason, Usage(self._read, self._cached), notes=self._notes))
        self._open.clear()

    def fail(self, error: BaseException) -> None:
        """Tell what went wrong."""
        self._open.clear()
        self._count("error")
        self.handle.put(error)

    def _count(self, reason: str) -> None:
        self._metrics.finished[reason] = self._metrics.finished.get(reason, 0) + 1
