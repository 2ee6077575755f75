"""`longspan demo`: two questions about the Python language reference, answered with the default model.

It shows the main job on real text: reading takes a while, once; after that, questions are answered at once. It says
honestly whether the answers hold the right word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from longspan.cli import options, output, work
from longspan.cli.progress import Progress

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("Which exception is raised when a name is not found at all?", "NameError"),
    ("What is the default encoding of Python source files?", "UTF-8"),
)
"""Each question, and a word that a right answer contains."""

NAME = "demo"
_CITED = 2
_ANSWER = 48
"""Most tokens of an answer: a small model goes on and on after the right one."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: longspan demo --json")(demo)


def demo(json: options.AsJson = False) -> None:
    """See it work on the Python language reference."""

    def tell(text: str) -> None:
        if not json:
            progress.stop()
            output.write(text + "\n")

    with Progress() as progress:
        document = write_reference()
        text = document.read_text(encoding="utf-8")
        tell(
            f"Longspan reads the language reference that every Python has, {len(text):,} characters,\n"
            f"and answers {len(QUESTIONS)} questions about it. Everything runs on this machine.\n"
            f"The text: {document}\nWhat is read is kept as the session {NAME!r}.\n"
        )
        from longspan.sessions.session import Session
        from longspan.sessions.store import SessionStore

        SessionStore().check_writable(NAME)
        llm = work.load(None, None, "auto", progress)

        # A new session whatever was saved before, and nothing of it used: the first figure must include the reading.
        llm.reuse = False
        session = Session(NAME)
        llm.add_text(session, text, document.name)
        asked: list[dict[str, Any]] = []
        read: Any = None
        for question, word in QUESTIONS:
            tell(f"Question: {question}")
            generation = llm.generate(question, session, max_tokens=_ANSWER)
            done = work.prefill(llm, session, progress, changed=False)
            read = read or done
            progress.busy("answering")
            answer = generation.finish() if json else work.stream(generation, progress)
            tell(output.passages(answer.citations, f"{question} {answer.text}", _CITED))
            asked.append(
                {
                    "question": question,
                    "answer": answer.text.strip(),
                    "expected": word,
                    "answer_has_it": word.lower() in answer.text.lower(),
                    "citation_has_it": any(word.lower() in each.text.lower() for each in answer.citations),
                    "citations": work.citations_json(answer),
                    "time_to_first_token_s": round(answer.stats.first_token_seconds, 4),
                    "decode_tokens_per_s": round(answer.stats.decode_tokens_per_s, 2),
                    "attention": answer.attention,
                }
            )
    first, last = (each["time_to_first_token_s"] for each in (asked[0], asked[-1]))
    right = all(each["answer_has_it"] and each["citation_has_it"] for each in asked)
    if json:
        output.write_json(
            {
                "model": llm.model.name,
                "document": str(document),
                "characters": len(text),
                "tokens": len(session.tokens),
                "prefill_tokens_per_s": round(read.prefill_tokens_per_s, 2),
                "questions": asked,
                "first_over_last": round(first / last, 2) if last else None,
                "right": right,
                "session": NAME,
            }
        )
    else:
        output.write(_summary(asked, len(session.tokens), read.prefill_tokens_per_s, first, last))
    if not right:
        raise typer.Exit(1)


def write_reference() -> Path:
    """Write the language reference that every Python has as a text file into the cache, and return it."""
    from longspan import settings
    from longspan.errors import LongspanError

    target = settings.cache_folder() / "demo" / "python-language-reference.txt"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(reference(), encoding="utf-8")
    except OSError as error:
        raise LongspanError(
            f"can't write {target}: {error.strerror or error} (LONGSPAN_CACHE names a folder)"
        ) from error
    return target


def reference() -> str:
    """Return the text of the language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(f"{name}\n{text}" for name, text in sorted(topics.items()))


def _summary(asked: list[dict[str, Any]], tokens: int, speed: float, first: float, last: float) -> str:
    lines = [
        f"{tokens:,} tokens were read at {speed:,.0f} tokens/s.",
        f"First token of the first answer, reading included: {first:.1f} s.",
        f"First token of the last answer, nothing to read again: {last:.2f} s, "
        f"{first / max(last, 1e-9):,.0f} times sooner.",
    ]
    for number, each in enumerate(asked, 1):
        if not each["answer_has_it"]:
            lines.append(f"Answer {number} is wrong: it should contain {each['expected']!r}.")
        if not each["citation_has_it"]:
            lines.append(f"The passages of answer {number} do not contain {each['expected']!r}.")
    lines += [
        "",
        "Next:",
        f'  longspan ask "What is a generator?" --session {NAME}',
        f"  longspan chat --session {NAME}",
        '  longspan ask "YOUR QUESTION" --doc YOUR_FILE --session YOUR_NAME',
    ]
    return "\n".join(lines) + "\n"
