"""The engine's face: a model, a way to attend, sessions to read into, questions and answers.

    llm = LLM("smollm2", attention="retrieval")
    session = llm.session("manual")
    llm.read(session, ["manual.pdf"])
    for piece in llm.generate("What does error 17 mean?", session): print(piece, end="")

It does not know the command line, HTTP, or how pages and mechanisms work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import torch

from longspan import settings
from longspan.attention import Hints, Mechanism, make, parse
from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts, saving
from longspan.engine.contexts import Context, IndexContext, KVContext
from longspan.engine.generation import Answer, Citation, Generation, Stats, decode
from longspan.engine.sampler import SamplingParams
from longspan.errors import Cancelled, ContextTooLongError, UsageError
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.retrieval import heads as heads_store
from longspan.retrieval.calibrate import calibrate
from longspan.retrieval.choose import Choice, choose_pages
from longspan.retrieval.documents import Reading, read_documents
from longspan.retrieval.heads import RetrievalHeads
from longspan.retrieval.lexical import LexicalIndex
from longspan.sessions.session import Session
from longspan.sessions.store import SessionStore

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many tokens are done, and how many there are."""

_AUTO = "auto"
_ANSWER_ROOM = 256
_CITED = 4
LEXICAL_WEIGHT = 0.25
"""Weight of the lexical vote beside the retrieval heads'; see docs/experiments.md."""


class LLM:
    """A model with a way to attend."""

    def __init__(
        self,
        model: str | CausalModel | None = None,
        attention: str | Mechanism | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        store: SessionStore | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load a model.

        Args:
            model: a short name, a hub name, a folder or a GGUF file; None: the default (`LONGSPAN_MODEL`).
            attention: a specification such as `superlinear:window=2024`, a mechanism, or None: dense as long as the
                context fits the window that the model was trained on, retrieval beyond.
            device: `auto`, `cpu` or `cuda`.
            dtype: None: chosen for the device.
            store: where sessions are saved; None: the user's folder.
            say: told in a line what takes long.

        Raises:
            UnknownNameError: unknown model, mechanism or option.
            ModelError: the model can't be loaded or run.
            UsageError: no such device.
        """
        chosen = None if attention in (None, _AUTO) else parse(attention)
        if (count := settings.threads()) is not None:
            torch.set_num_threads(count)
        name = model or settings.default_model()
        self.model = load(name, device=device, dtype=dtype, say=say) if isinstance(name, str) else name
        self.attention: Mechanism | None = chosen
        self.store = store or SessionStore()
        self._say = say
        self._heads: RetrievalHeads | None = None
        self._lexical: tuple[tuple[int, int, int], LexicalIndex] | None = None

    # --- sessions ---------------------------------------------------------------------------------------------

    def session(self, name: str | None = None) -> Session:
        """Return the saved session of that name, or a new one (None: a new one that is not saved).

        Raises:
            UsageError: a name that can't be one.
            SessionMismatchError: it was made with another model or attention.
            SessionCorruptError: its files are damaged.
        """
        if name is None:
            return Session()
        if not self.store.exists(name):
            return Session(name)
        saved = self.store.load(name, saving.identity(self.model, self._attention_name()))
        session = Session.from_saved(saved)
        saving.restore_memory(session, saved, self._context)
        return session

    def save(self, session: Session) -> None:
        """Save a session that has a name (SaveError: nothing that was saved before is lost)."""
        if session.name is None:
            raise UsageError("a session without a name can't be saved: call llm.session(NAME)")
        saving.save(self.store, session, saving.identity(self.model, self._attention_name()))

    # --- reading ----------------------------------------------------------------------------------------------

    def read(
        self,
        session: Session,
        paths: Sequence[str | os.PathLike[str]],
        progress: Progress | None = None,
        stdin: BinaryIO | None = None,
    ) -> Reading:
        """Add the documents of these paths to a session and prefill them; a document it holds already is left out.

        Raises:
            DocumentError: a path can't be read (see `read_documents`).
            Cancelled: Ctrl-C; what was read so far stays in the session.
        """
        reading = read_documents(paths, stdin=stdin)
        for document in reading.documents:
            self.add_text(session, document.text, document.name)
        self.prefill(session, progress)
        return reading

    def add_text(self, session: Session, text: str, name: str = "text") -> None:
        """Add a text to a session without prefilling it yet; one that it holds already is left out."""
        if session.has(name, text):
            return
        tokens, offsets = self.model.tokens_with_offsets(text)
        session.add_document(name, text, tokens, offsets, prompts.separator(self.model, name))

    def prefill(self, session: Session, progress: Progress | None = None) -> Stats:
        """Run through the model what the session holds and it has not read yet.

        Raises:
            Cancelled: Ctrl-C; the chunks read so far stay, and another call goes on from there.
        """
        stats = Stats()
        mechanism = self.mechanism_for(session)
        context = self._memory(session, mechanism, progress)
        wanted = self._context_tokens(session, context)
        stats.cached_tokens = context.length
        rest = wanted[context.length :]
        done = context.length
        started = time.perf_counter()

        def tick(count: int) -> None:
            nonlocal done
            done += count
            stats.read_tokens += count
            if progress:
                progress("reading", done, len(wanted))

        if progress and rest:
            progress("reading", done, len(wanted))
        try:
            context.extend(rest, tick)
        except KeyboardInterrupt as error:
            raise Cancelled(f"stopped after {done} of {len(wanted)} tokens: what was read is kept") from error
        finally:
            stats.read_seconds = time.perf_counter() - started
        stats.prompt_tokens = context.length
        return stats

    def mechanism_for(self, session: Session) -> Mechanism:
        """Return the mechanism for this session's documents."""
        if self.attention is not None:
            return self.attention
        fits = len(session.tokens) + 2 * _ANSWER_ROOM <= self.model.dimensions.window
        return make("dense") if fits else make("retrieval")

    def heads(self, progress: Progress | None = None) -> RetrievalHeads:
        """Return the model's retrieval heads, calibrating it first if that was never done."""
        if self._heads is None:
            self._heads = heads_store.stored(self.model.fingerprint)
        if self._heads is None:
            self._say(f"looking for the retrieval heads of {self.model.name} (once)")
            self._heads = calibrate(self.model, progress)
            heads_store.store(self.model.fingerprint, self._heads, {"model": self.model.name})
        return self._heads

    # --- answering --------------------------------------------------------------------------------------------

    def ask(
        self, question: str, session: Session | None = None, params: SamplingParams | None = None, **sampling: Any
    ) -> Answer:
        """Answer a question at once; arguments and errors as for `generate`."""
        return self.generate(question, session, params, **sampling).finish()

    def generate(
        self,
        question: str,
        session: Session | None = None,
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        remember: bool = False,
        **sampling: Any,
    ) -> Generation:
        """Answer a question about a session's documents, or without any, piece by piece.

        Args:
            question: what is asked.
            session: its documents are read first where that was not done.
            params: how to sample; None: greedy.
            progress: told how far reading is.
            remember: whether the answer joins the session's conversation, which later questions see.
            **sampling: fields of `SamplingParams`, instead of `params`.

        Raises:
            UsageError: an empty question, or a sampling value out of range.
            ContextTooLongError: the question alone is longer than the model's window.
            Cancelled: Ctrl-C while reading.
        """
        if params is not None and sampling:
            raise UsageError("give params, or its fields by name, not both")
        if not question.strip():
            raise UsageError("the question is empty: ask something")
        started = time.perf_counter()
        session = session if session is not None else Session()
        params = params or SamplingParams(**sampling)
        self._check_question(question)
        mechanism = self.mechanism_for(session) if session.documents else self.attention or make("dense")
        if isinstance(mechanism, Retrieval) and not session.documents:
            mechanism = make("dense")
        answer = Answer("", [], Stats(), "", mechanism.describe(), self.model.name)
        return Generation(answer, self._answer(question, session, params, answer, progress, remember, started))

    def choose(self, question: str, session: Session, count: int = _CITED) -> list[Choice]:
        """Return the pages of a session's context that matter most for a question, best first."""
        context: Context = session.memory
        tokens = prompts.search_question(self.model, question)
        mass = context.mass(tokens, self.heads())
        lexical = None
        if not isinstance(context.mechanism, Retrieval) or context.mechanism.lexical:
            scores = torch.from_numpy(self._index(session).scores(question))
            lexical = torch.where(mass.sum(0) > 0, scores, torch.zeros_like(scores))
        # Pages of the template alone are nobody's passage.
        mass[:, : session.head // PAGE] = 0
        return choose_pages(mass, count, lexical, LEXICAL_WEIGHT)

    def _answer(
        self,
        question: str,
        session: Session,
        params: SamplingParams,
        answer: Answer,
        progress: Progress | None,
        remember: bool,
        started: float,
    ) -> Iterator[str]:
        stats = answer.stats
        if not session.documents:
            prompt = self._fitting([prompts.plain(self.model, question, turns) for turns in _shorter(session.turns)])
            scratch = KVContext(self.model, self.attention_without_documents())
            yield from self._write(scratch, prompt, params, answer, started)
        else:
            read = self.prefill(session, progress)
            stats.cached_tokens = read.cached_tokens
            context: Context = session.memory
            mechanism = context_mechanism(context)
            count = mechanism.pages if isinstance(mechanism, Retrieval) else _CITED
            choices = self.choose(question, session, count)
            reach = mechanism.neighbours if isinstance(mechanism, Retrieval) else 0
            answer.citations = self._cite(session, choices, reach)
            stats.prompt_tokens = context.length
            if isinstance(context, IndexContext):
                prompt = self._prompt_over(session, choices, reach, question)
                scratch = KVContext(self.model, make("dense"))
                stats.prompt_tokens += len(prompts.search_question(self.model, question))
                yield from self._write(scratch, prompt, params, answer, started)
            else:
                assert isinstance(context, KVContext), "a context is an index or a KV context"
                context.hints = Hints(chosen_pages=tuple(choice.page for choice in choices))
                _, middle, tail = prompts.around_documents(self.model)
                suffix = middle + self.model.tokens(question) + tail
                try:
                    yield from self._write(context, suffix, params, answer, started)
                finally:
                    context.hints = Hints()
        if remember:
            session.turns.append(_turn(question, answer.text))

    def _write(
        self, context: KVContext, prompt: list[int], params: SamplingParams, answer: Answer, started: float
    ) -> Iterator[str]:
        """Read a prompt after a context, write the answer, and take both back."""
        before, stats = context.length, answer.stats
        bounded = context.mechanism.beyond_window
        room = self.model.dimensions.window - len(prompt) - (0 if bounded else before)
        if room < 1 and not bounded:
            answer.notes.append("the context is longer than the window the model was trained on: expect nonsense")
            room = params.max_tokens
        try:
            logits = context.step(prompt)
            stats.read_tokens, stats.read_seconds = len(prompt), time.perf_counter() - started
            stats.prompt_tokens = max(stats.prompt_tokens, before) + (len(prompt) if before else 0) or len(prompt)
            yield from decode(self.model, logits, context.step, params, answer, started, room)
        finally:
            context.truncate(before)

    # --- parts ------------------------------------------------------------------------------------------------

    def attention_without_documents(self) -> Mechanism:
        """Return the mechanism for a conversation without documents: retrieval has nothing to choose from there."""
        named = self.attention
        return make("dense") if named is None or isinstance(named, Retrieval) else named

    def _attention_name(self) -> str:
        return _AUTO if self.attention is None else self.attention.describe()

    def _memory(self, session: Session, mechanism: Mechanism, progress: Progress | None) -> Context:
        """Return the session's context, a new one where the mechanism changed as documents were added."""
        memory: Context | None = session.memory
        if memory is None or context_mechanism(memory) != mechanism:
            memory = session.memory = self._context(mechanism, progress)
            session.head = 0 if isinstance(memory, IndexContext) else len(prompts.around_documents(self.model)[0])
        return memory

    def _context(self, mechanism: Mechanism, progress: Progress | None = None) -> Context:
        if isinstance(mechanism, Retrieval) and mechanism.read == "again":
            return IndexContext(self.model, mechanism, self.heads(progress))
        return KVContext(self.model, mechanism)

    def _context_tokens(self, session: Session, context: Context) -> list[int]:
        """Return all tokens that the session's context should hold."""
        if isinstance(context, IndexContext):
            return session.tokens
        return prompts.around_documents(self.model)[0] + session.tokens

    def _index(self, session: Session) -> LexicalIndex:
        """Return the lexical index over the pages of the session's context."""
        length = session.memory.length
        key = (id(session), length, len(session.documents))
        if self._lexical is None or self._lexical[0] != key:
            pages = []
            for start in range(0, length, PAGE):
                found = session.passages(start - session.head, min(start + PAGE, length) - session.head)
                pages.append(" ".join(passage.text for passage in found))
            self._lexical = (key, LexicalIndex(pages))
        return self._lexical[1]

    def _cite(self, session: Session, choices: Sequence[Choice], reach: int) -> list[Citation]:
        """Return the passages of the chosen pages, best first; pages within reach of a better one are its passage."""
        citations: list[Citation] = []
        covered: set[int] = set()
        for choice in choices:
            if choice.page in covered:
                continue
            pages = range(choice.page - reach, choice.page + reach + 1)
            covered.update(pages)
            for passage in self._pages_text(session, pages.start, pages.stop):
                citations.append(
                    Citation(
                        session.documents[passage.document].name,
                        passage.start,
                        passage.end,
                        passage.text,
                        round(choice.score, 4),
                        choice.by,
                    )
                )
        return citations

    def _prompt_over(self, session: Session, choices: Sequence[Choice], reach: int, question: str) -> list[int]:
        """Return the prompt that reads the chosen pages again, in the text's order, as many as fit the window."""
        options = []
        for count in range(len(choices), 0, -1):
            wanted = sorted({page for c in choices[:count] for page in range(c.page - reach, c.page + reach + 1)})
            passages = [
                passage.text for first, last in _runs(wanted) for passage in self._pages_text(session, first, last + 1)
            ]
            for turns in _shorter(session.turns[-2:]):
                options.append((passages, turns))
        return self._fitting(
            [
                prompts.over_passages(self.model, passages, question, turns, len(turns))
                for passages, turns in options[:1]
            ]
            or [prompts.plain(self.model, question, [])],
            lambda: [prompts.over_passages(self.model, p, question, t, len(t)) for p, t in options[1:]],
        )

    def _pages_text(self, session: Session, first: int, last: int) -> Any:
        """Return the passages of the pages `first .. last - 1` of the session's context."""
        limit = session.memory.length
        return session.passages(max(0, first * PAGE) - session.head, min(last * PAGE, limit) - session.head)

    def _fitting(
        self, prompts_by_choice: list[list[int]], more: Callable[[], list[list[int]]] = lambda: []
    ) -> list[int]:
        """Return the first prompt that leaves room for an answer."""
        limit = self.model.dimensions.window - 1
        for prompt in prompts_by_choice:
            if len(prompt) <= limit:
                return prompt
        for prompt in more():
            if len(prompt) <= limit:
                return prompt
        raise ContextTooLongError(f"the question does not fit the model's window of {limit + 1} tokens: shorten it")

    def _check_question(self, question: str) -> None:
        count, window = len(self.model.tokens(question)), self.model.dimensions.window
        if count > window - 2 * PAGE:
            raise ContextTooLongError(
                f"the question has {count} tokens but {self.model.name}'s window holds {window}: "
                "shorten it, or give the long part as a document"
            )


def context_mechanism(context: Context) -> Mechanism:
    """Return the mechanism that a context was made for (an index reads by a window on its behalf)."""
    return context.wanted if isinstance(context, IndexContext) else context.mechanism


def _turn(question: str, text: str) -> Any:
    from longspan.sessions.session import Turn

    return Turn(question, text.strip())


def _shorter(turns: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the conversation, then without its oldest turn, and so on to none."""
    for start in range(len(turns) + 1):
        yield turns[start:]


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last page of each run of neighbouring pages."""
    start = previous = None
    for page in pages:
        if start is None or previous is None or page != previous + 1:
            if start is not None and previous is not None:
                yield start, previous
            start = page
        previous = page
    if start is not None and previous is not None:
        yield start, previous
