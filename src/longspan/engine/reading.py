"""Sessions of an engine: opened, forked and saved, documents added to them and read.

It does not answer: `llm.py` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from longspan.engine import prompts, reuse, saving
from longspan.engine.contexts import Context, Most
from longspan.engine.generation import Stats
from longspan.engine.making import INDEX_ALONE, Contexts, Progress
from longspan.errors import Cancelled, LongspanError, SaveError, UsageError
from longspan.retrieval.documents import Reading, read_documents
from longspan.sessions.session import Session

Split = tuple[list[int], list[tuple[int, int]]]
"""A text's tokens, and where each begins and ends in it."""

COMMIT_EVERY = 30.0
"""Seconds of reading after which a session with a name is saved on the way."""
_LETTERS = 8
"""Characters that a token has at most in all but odd texts."""


class Reads(Contexts):
    """Reads documents into sessions."""

    def session(self, name: str | None = None) -> Session:
        """Return the saved session of that name, or a new one (None: a new one that is not saved).

        Raises:
            UsageError: a name that can't be one.
            SessionMismatchError: it was made with another model, attention, prefill or format of keys and values.
            SessionCorruptError: its files are damaged.
        """
        if name is None or not self.store.exists(name):
            return Session(name, engine=self)
        saved = self.store.load(name, self._identity(), lazily=True)
        session = Session.from_saved(saved)
        session.engine = self
        saving.restore_memory(session, saved, self.new_context)
        return session

    def fork(self, source: Session | str, name: str | None = None) -> Session:
        """Return a session that has read and been asked the same, and goes its own way; pages are not copied.

        Args:
            source: a session, or the name of a saved one.
            name: of the new session; None: it is not saved. Where the source is saved as it stands, so is the fork, and
                they share their files; else `save` saves it.

        Raises:
            SessionNotFoundError: no session of that name is saved.
            UsageError: a session of the new name is saved already.
            PoolExhaustedError: the fork would pass the KV budget.
        """
        if name is not None and self.store.exists(name):
            raise UsageError(f"a session {name!r} is saved already: choose another name, or remove it first")
        if isinstance(source, str):
            self.store.show(source)  # names those that are saved where there is none of this name
            source = self.session(source)
        other = source.shared(name)
        if saving.fork(self.store, source, name):
            other.saved_length = source.saved_length
        return other

    def save(self, session: Session) -> None:
        """Save a session that has a name (SaveError: nothing that was saved before is lost)."""
        if session.name is None:
            raise UsageError("a session without a name can't be saved: call llm.session(NAME)")
        saving.save(self.store, session, self._identity(), self.model.name)

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
            UsageError, PoolExhaustedError: documents that can't be kept as was asked for; the session is as it was.
            Cancelled: Ctrl-C; what was read so far stays in the session.
        """
        reading, before = read_documents(paths, stdin=stdin), len(session.documents)
        try:
            for document in reading.documents:
                self.add_text(session, document.text, document.name)
            self.prefill(session, progress)
        except Cancelled:
            raise
        except LongspanError:
            self.keep_documents(session, before)
            raise
        return reading

    def keep_documents(self, session: Session, count: int) -> None:
        """Forget all but the first `count` documents of a session: others would be read again before every answer."""
        session.keep_documents(count)
        memory: Context | None = session.memory
        if memory is None or memory.length <= session.head + len(session.tokens):
            return
        if count and memory.dropped(memory.length) == (0, 0):
            memory.truncate(session.head + len(session.tokens))
        else:
            # What a window left behind can't be taken back: what stays is read again.
            session.memory = None
        session.saved_length = -1

    def add_text(self, session: Session, text: str, name: str = "text", split: Split | None = None) -> None:
        """Add a text to a session without prefilling it yet; one that it holds already, by any name, is left out.

        Args:
            session: to add it to.
            text: of the document.
            name: of the document.
            split: its tokens and where each stands (`CausalModel.tokens_with_offsets`), where they are known already.

        Raises:
            UsageError: a text so long that retrieval would read it, which can't keep it as was asked for.
        """
        if session.has(text):
            return
        if self.attention is None and self._keeps_as_asked:
            # A beginning is enough: splitting all of a long text into tokens takes minutes.
            beginning = self.model.tokens(text[: _LETTERS * self.model.dimensions.window])
            if not self._fits(len(session.tokens) + len(beginning)):
                raise UsageError(f"{name} is longer than {self.model.name}'s window, and beyond it {INDEX_ALONE}")
        tokens, offsets = split or self.model.tokens_with_offsets(text)
        session.add_document(name, text, tokens, offsets, prompts.separator(self.model, name))

    def prefill(self, session: Session, progress: Progress | None = None) -> Stats:
        """Run through the model what the session holds and it has not read yet.

        A session with a name is saved on the way, about every half minute: what was read before a crash stays.

        Raises:
            Cancelled: Ctrl-C; the chunks read so far stay, and another call goes on from there.
        """
        stats, done, wanted = Stats(), 0, 0
        started = time.perf_counter()
        try:
            for done, wanted in self.prefilling(session, stats, progress):
                if progress:
                    progress("reading", done, wanted)
        except KeyboardInterrupt as error:
            raise Cancelled(f"stopped after {done} of {wanted} tokens: what was read is kept") from error
        finally:
            stats.read_seconds = time.perf_counter() - started
        return stats

    def prefilling(
        self, session: Session, stats: Stats, progress: Progress | None = None, most: Most | None = None
    ) -> Iterator[tuple[int, int]]:
        """Do what `prefill` does chunk by chunk: yields how many tokens are read, and how many there will be.

        Args:
            session: what it has not read yet is read.
            stats: filled on the way.
            progress: told what is done before reading.
            most: see `Context.extending`.
        """
        pace = saving.Pace(COMMIT_EVERY)
        context = self._memory(session, self.mechanism_for(session), progress)
        tokens = self._context_tokens(session, context)
        if self.reuse and context.length == 0:
            reuse.begin(self.store, self._identity(), context, tokens)
        wanted = len(tokens)
        stats.cached_tokens = stats.prompt_tokens = context.length
        if context.length < wanted:
            yield context.length, wanted
        for count in context.extending(tokens[context.length :], most):
            stats.read_tokens += count
            stats.prompt_tokens = context.length
            yield context.length, wanted
            if session.name is not None and context.length < wanted and pace.due():
                try:
                    pace.commit(lambda: self.save(session))
                except SaveError as error:  # told again, and raised, when all is read and saved
                    self._say(str(error))
                    pace.seconds = float("inf")
