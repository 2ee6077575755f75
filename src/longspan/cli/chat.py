"""`longspan chat`: questions and answers about documents, one after the other.

On a terminal it edits lines and keeps a history; from a pipe it reads lines and asks nothing of a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longspan.cli import options, output, work
from longspan.cli.ask import prefill_speed
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, LongspanError, SaveError, UsageError

if TYPE_CHECKING:
    from longspan.engine.generation import Answer, Stats
    from longspan.engine.llm import LLM
    from longspan.engine.sampler import SamplingParams
    from longspan.sessions.session import Session

_HELP = """\
/doc PATH      read a file or folder
/stats         tokens and speed of the last answer, and what the session holds
/save [NAME]   save the session, under a new name if one is given
/quit          leave (also Ctrl-D)
Anything else is a question. Ctrl-C stops an answer.
"""
_CITED = 3


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: longspan chat --doc handbook.pdf --session hb")(options.sampled(chat))


def chat(
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
) -> None:
    """Ask question after question, about documents or without any.

    With --session the conversation is kept as well. Commands: /help, /doc PATH, /stats, /save NAME, /quit.
    """
    work.spread(gpus)
    if work.follows():
        work.follow(model, attention, device, prefill=prefill, weights=weights, adapter=adapter, parallel=parallel)
        return
    if "-" in (doc or []):
        raise UsageError("chat reads questions from standard input: give the document as a file")
    work.check_session(session, bool(doc), needs_documents=False)
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
        talk = _Chat(llm, llm.session(session), params, progress)
        talk.read(reading.documents)
        talk.greet()
        for line in _lines():
            if not talk.answer(output.readable(line).strip()):
                break


class _Chat:
    """One conversation."""

    def __init__(self, llm: LLM, session: Session, params: SamplingParams, progress: Progress) -> None:
        self.llm, self.session, self.params, self.progress = llm, session, params, progress
        self.last: tuple[Answer, Stats] | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: output.write(_HELP),
            "/doc": self._doc,
            "/stats": self._stats,
            "/save": self._save,
        }

    def greet(self) -> None:
        """Tell what this is."""
        count = len(self.session.documents)
        about = output.counted(count, "document") if count else "no documents yet (/doc PATH reads one)"
        self.progress.say(f"{self.llm.model.name}, {about}. /help lists the commands, Ctrl-D leaves.")

    def answer(self, line: str) -> bool:
        """Do what a line asks for; an error is told and the chat goes on. Returns whether it goes on."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command.startswith("/"):
                if command not in self.commands:
                    raise UsageError(f"unknown command {command}: use {', '.join([*self.commands, '/quit'])}")
                self.commands[command](rest.strip())
            elif line:
                self._question(line)
        except LongspanError as error:
            self.progress.stop()
            output.failure(error)
        except KeyboardInterrupt:
            self.progress.stop()
            output.write("\n")
            output.say("(stopped)")
        finally:
            self.progress.stop()
        return True

    def read(self, documents: Any) -> bool:
        """Read documents into the session, and return whether any of them is new to it."""
        from longspan.engine.generation import Stats

        before = len(self.session.documents)
        self.read_stats = Stats()
        try:
            changed = work.add(self.llm, self.session, documents, self.progress)
            if self.session.documents:
                self.read_stats = work.prefill(self.llm, self.session, self.progress, changed=changed)
        except (Cancelled, SaveError):
            raise
        except LongspanError:
            # One document that can't be kept must not fail every question after it.
            self.llm.keep_documents(self.session, before)
            raise
        self.progress.stop()
        return changed

    def _question(self, question: str) -> None:
        generation = self.llm.generate(question, self.session, self.params, remember=True)
        # Nothing to read but what an interrupted /doc left.
        self.read(())
        self.progress.busy("answering")
        answer = work.stream(generation, self.progress)
        self.last = answer, self.read_stats
        output.write(output.passages(answer.citations, f"{question} {answer.text}", _CITED))
        for note in answer.notes:
            output.say(f"note: {note}")
        if sys.stdout.isatty():
            output.write("\n")
        if self.session.name is not None:
            self.llm.save(self.session)

    def _doc(self, path: str) -> None:
        if not path:
            raise UsageError("/doc needs a path: /doc report.pdf")
        if path == "-":
            raise UsageError("chat reads questions from standard input: give the document as a file")
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        with suppress(RuntimeError):  # no such user's home
            path = str(Path(path).expanduser())
        if not self.read(work.read_files([path], self.progress).documents) and not self.read_stats.read_tokens:
            self.progress.say("nothing new: the session holds it already")

    def _stats(self, _: str) -> None:
        session = self.session
        name = session.name or "not saved (/save NAME)"
        output.write(
            f"session {name}: {output.counted(len(session.documents), 'document')}, {len(session.tokens):,} tokens, "
            f"{output.counted(len(session.turns), 'question')} remembered\n"
        )
        if self.last is not None:
            answer, read = self.last
            speed, cached = prefill_speed(answer, read), read.cached_tokens
            output.write(output.stats_line(answer.stats, cached, speed, answer.attention, answer.model) + "\n")
        if told := work.tiers_line(self.llm):
            output.write(told + "\n")

    def _save(self, name: str) -> None:
        before = self.session.name
        if not name and before is None:
            raise UsageError("the session has no name yet: /save NAME")
        if name and name != before:
            if self.llm.store.exists(name):
                raise UsageError(f"a session {name!r} is saved already: choose another name, or remove that one")
            self.session.name = name
        try:
            self.llm.save(self.session)
        except LongspanError:
            self.session.name = before
            raise
        output.write(f"saved as {self.session.name}\n")


def _lines() -> Iterator[str]:
    """Yield what the user types, line by line, until Ctrl-D."""
    if sys.stdin is None:
        raise UsageError("there is no standard input to read questions from: start it in a terminal, or pipe them in")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield from sys.stdin
        return
    prompt = _prompt()
    interrupted = False
    while True:
        try:
            line = prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            output.say("(Ctrl-C again, or Ctrl-D, leaves)")
            continue
        interrupted = False
        yield line


def _prompt() -> Callable[[], str]:
    """Return what reads a line from the terminal, with a history where one can be kept."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    from longspan import settings

    file = settings.history_file()
    history: History = InMemoryHistory()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # questions are nobody else's business
        history = FileHistory(str(file))
    except OSError as error:
        output.say(f"longspan: no history is kept: {file} can't be written ({error.strerror})")
    commands: dict[str, Any] = {"/help": None, "/stats": None, "/save": None, "/quit": None}
    completer = NestedCompleter({**commands, "/doc": PathCompleter(expanduser=True)})
    session: PromptSession[str] = PromptSession(history=history, completer=completer, complete_while_typing=False)
    return lambda: session.prompt("> ")
