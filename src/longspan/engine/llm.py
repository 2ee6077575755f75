"""The engine's face: a model, a way to attend, sessions to read into, questions and answers.

    llm = LLM("smollm2", attention="retrieval")
    session = llm.session("manual")
    llm.read(session, ["manual.pdf"])
    for piece in llm.generate("What does error 17 mean?", session): print(piece, end="")

It does not know the command line, HTTP, or how pages and mechanisms work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from longspan.attention.retrieval import Retrieval
from longspan.engine import answering, prompts, quoting, rereading, sources
from longspan.engine.choosing import Chosen
from longspan.engine.contexts import Context
from longspan.engine.generation import Answer, Citation, Generation, Stats, decode
from longspan.engine.kv_context import KVContext
from longspan.engine.making import Progress, context_mechanism
from longspan.engine.reading import Reads
from longspan.engine.sampler import SamplingParams
from longspan.errors import ContextTooLongError, UsageError
from longspan.retrieval.heads import RetrievalHeads
from longspan.sessions.session import Session, Turn

_CITED = 4


class LLM(Reads):
    """A model with a way to attend."""

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
        self._check_question(question, bool(session.documents))
        mechanism = self.mechanism_for(session) if session.documents else self.without_documents()
        answer = Answer("", [], Stats(), "", mechanism.describe(), self.model.name)
        answer.notes += self.model.trained.lacks(mechanism, self.model.name)
        return Generation(answer, self._answer(question, session, params, answer, progress, remember, started))

    def choose(self, question: str, session: Session) -> Chosen:
        """Return what of a session's documents matters for a question: pages, citations and sentences, best first.

        The session must have been read (`prefill`).
        """
        mechanism = context_mechanism(session.memory)
        if isinstance(mechanism, Retrieval):
            count, reach, lexical = mechanism.pages, mechanism.neighbours, mechanism.lexical
            heads: RetrievalHeads | None = self.heads()
        else:
            count, reach, lexical = max(_CITED, mechanism.wanted_pages), 1, True
            heads = self.heads_or_none()
        chosen = self._chooser.choose(question, session, heads, count=count, reach=reach, lexical=lexical)
        if not isinstance(mechanism, Retrieval):
            # A mechanism may want many pages; a person wants few passages.
            del chosen.citations[_CITED:]
        return chosen

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
        if not session.documents:
            prompted = answering.without_documents(self.model, self.without_documents(), question, session.turns)
            yield from self._write(prompted, params, answer, started)
        else:
            answer.stats.cached_tokens = self.prefill(session, progress).cached_tokens
            chosen = self.choose(question, session)
            prompted = answering.about_documents(self.model, session, chosen, question, session.turns)
            answer.citations, answer.pages = chosen.citations, [choice.page for choice in chosen.pages]
            answer.read_again = prompted.read_again
            yield from self._write(prompted, params, answer, started, session, chosen)
            if self._quotes(session.memory) and not params.stop:  # nothing may follow what the caller said to stop at
                answer.quote, note = quoting.quotation(question, answer, prompted.best)
                if answer.quote:
                    answer.text += answer.quote
                    answer.notes.append(note)
                    yield answer.quote
        if remember:
            session.turns.append(Turn(question, answer.text.strip()))

    def _write(
        self,
        prompted: answering.Prompted,
        params: SamplingParams,
        answer: Answer,
        started: float,
        session: Session | None = None,
        chosen: Chosen | None = None,
    ) -> Iterator[str]:
        """Read a prompt after a context, write the answer, name its sources, and take both back."""
        stats = answer.stats
        room, note = prompted.room(params.max_tokens)
        answer.notes += note
        heads: RetrievalHeads | None = None
        if session is not None:
            heads, answer.unsourced = self.source_heads(prompted.context)
        with prompted as context:
            prompted.note(heads)
            since = time.perf_counter()
            logits = context.step(prompted.tokens)
            stats.read_tokens, stats.read_seconds = len(prompted.tokens), time.perf_counter() - since
            stats.prompt_tokens = prompted.remembered + len(prompted.tokens)
            yield from decode(self.model, logits, context.step, params, answer, started, room)
            mass = prompted.mass(heads) if stats.decoded_tokens else None
        if mass is not None and session is not None and chosen is not None:
            answer.citations, answer.unsourced = self.named(answer.citations, session, mass, prompted, chosen)

    def source_heads(self, context: KVContext) -> tuple[RetrievalHeads | None, str]:
        """Return the heads whose attention names the sources of an answer that is written on a context.

        None where nobody asks or none does; behind it why, where it could have been told.
        """
        if not self.sources:
            return None, ""
        if context.untold:
            return None, context.untold
        heads = self.heads_or_none()
        return heads, "" if heads is not None else f"no retrieval heads are known of {self.model.name}"

    def named(
        self,
        citations: Sequence[Citation],
        session: Session,
        mass: Tensor,
        prompted: answering.Prompted,
        chosen: Chosen,
    ) -> tuple[list[Citation], str]:
        """Return an answer's citations, the sentences that it was read from first, and why none is (`sources.named`).

        Args:
            citations: of what was chosen for the question.
            session: that the answer is about.
            mass: from `prompted`, taken before that is left.
            prompted: what the answer was written after.
            chosen: for the question.
        """
        again = bool(prompted.read_again)
        return sources.named(citations, session, mass, prompted.tokens, self._chooser, chosen, read_again=again)

    def _quotes(self, context: Context) -> bool:
        """Return whether the text is quoted after an answer that does not rest on it."""
        mechanism = context_mechanism(context)
        return self.quote and (mechanism.quote if isinstance(mechanism, Retrieval) else True)

    def _check_question(self, question: str, documents: bool) -> None:
        """Refuse before documents are read what could not be answered after that either."""
        shortest = prompts.over_passages(self.model, [], question, []) if documents else None
        try:
            rereading.fitting(self.model, [shortest or prompts.plain(self.model, question, [])])
        except ContextTooLongError as error:
            count, window = len(self.model.tokens(question)), self.model.dimensions.window
            raise ContextTooLongError(
                f"the question has {count} tokens, and {self.model.name}'s window holds {window}, the answer's among "
                "them: shorten it, or give the long part as a document"
            ) from error
