"""What the user sees: answers, passages and tables on standard output; everything else on standard error.

It does not know models or sessions. Rich is loaded only where a bar or a table is shown.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.errors import Cancelled, LongspanError, SaveError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from longspan.engine.generation import Citation, Stats

_BUG, _STOPPED, _BROKEN_PIPE = 70, 130, 141
_EXCERPT = 280
"""Characters of a passage that are shown."""


def prepare() -> None:
    """Make the standard streams able to carry any text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """Write to standard output at once.

    Raises:
        BrokenPipeError: whoever read it has gone.
        LongspanError: it can't be written (a full disk, say).
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        raise
    except OSError as error:
        _abandon_stdout()
        raise LongspanError(f"can't write the output: {error.strerror or error}") from error


def write_json(value: Any) -> None:
    """Write one JSON value, in UTF-8 whatever the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    write(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def save(file: Path, text: str) -> None:
    """Write a file that was asked for (SaveError: it can't be written)."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"can't write {file}: {error.strerror or error}") from error


def write_rich(*what: RenderableType) -> None:
    """Write tables and styled text: in colour on a terminal, plain elsewhere."""
    from rich.console import Console

    # Beyond a terminal no width is given: rich would cut at 80.
    console = Console(
        file=sys.stdout, highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160
    )
    with console.capture() as captured:
        for each in what:
            console.print(each)
    write("\n".join(line.rstrip() for line in captured.get().split("\n")))


def table(*titles: str) -> Table:
    """Return an empty table; a title that begins with > stands over numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in titles:
        made.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
    return made


def say(line: str, *, dim: bool = False) -> None:
    """Write a line to standard error; a terminal that went away is nothing to fail for."""
    if dim and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        line = f"\x1b[2m{line}\x1b[0m"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def failure(error: BaseException) -> int:
    """Tell an error in one line on standard error and return the exit code it stands for."""
    if os.environ.get("LONGSPAN_DEBUG") == "1":
        import traceback

        with suppress(OSError):
            traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        _abandon_stdout()
        return _BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        say("longspan: stopped")
        return _STOPPED
    if isinstance(error, LongspanError):
        say(f"longspan: {one_line(error)}")
        return _STOPPED if isinstance(error, Cancelled) else 2 if isinstance(error, UsageError) else 1
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        say("longspan: there is no folder for temporary files that can be written to: set TMPDIR to one")
        return 1
    if _of_memory(error):
        say("longspan: there is not enough memory: give less to read, a shorter length, or a smaller model")
        return 1
    if type(error).__name__ == "Abort":  # typer's, at a question that was answered by Ctrl-C or Ctrl-D
        say("longspan: stopped")
        return _STOPPED
    if (format_message := getattr(error, "format_message", None)) is not None:  # typer's usage errors
        path = getattr(getattr(error, "ctx", None), "command_path", "longspan")
        say(f"longspan: {one_line(format_message()).rstrip('.')} (see: {path} --help)")
        return int(getattr(error, "exit_code", 2))
    say(f"longspan: internal error: {type(error).__name__}: {one_line(error)} (LONGSPAN_DEBUG=1 shows where)")
    return _BUG


def _of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's, a GPU's (torch names its error so), or torch's on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def one_line(what: object) -> str:
    """Return a message as one line."""
    return " ".join(str(what).split())


def readable(text: str) -> str:
    """Return what was typed as valid Unicode: bytes that are no UTF-8 would stop a tokenizer."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def counted(count: int, thing: str) -> str:
    """Return a number and what is counted, in the plural unless it is one."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def passages(citations: Sequence[Citation], about: str, most: int | None = None) -> str:
    """Return the passages that an answer rests on, shortened around the words that they share with `about`."""
    if not citations:
        return ""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = ["", "Passages it rests on:"]
    for number, each in enumerate(citations[:most], 1):
        if each.source == "attention":
            how = f"read for the answer with {each.mass:.0%} of the attention"
        else:
            how = f"score {each.score:.2f}, by {each.chosen_by.replace('+', ' and ')}"
        lines.append(f"{number:>3}. {each.doc}, characters {each.start:,} to {each.end:,} ({how})")
        text = excerpt(each.text, about, _EXCERPT)
        lines.extend(textwrap.wrap(text, width, initial_indent=" " * 5, subsequent_indent=" " * 5))
    if most is not None and len(citations) > most:
        lines.append(f"     and {len(citations) - most} more")
    return "\n".join(lines) + "\n"


def excerpt(text: str, about: str, width: int) -> str:
    """Return at most about `width` characters of a text, on one line, where most words of `about` stand."""
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    wanted = {word.lower() for word in re.findall(r"\w{4,}", about)}
    places = [(m.start(), m.group().lower()) for m in re.finditer(r"\w{4,}", flat)]
    places = [(at, word) for at, word in places if word in wanted]
    best, start = 0, 0
    for first, _ in places:
        inside = [(at, word) for at, word in places if first <= at < first + width * 3 // 4]
        if (found := len({word for _, word in inside})) > best:
            best, start = found, (first + inside[-1][0] - width) // 2  # in the middle
    start = max(0, min(start, len(flat) - width))
    if start:
        start = flat.find(" ", start) + 1 or start
    cut = flat[start : start + width]
    if start + width < len(flat):
        cut = cut.rsplit(" ", 1)[0] + " …"
    return ("… " if start else "") + cut


def stats_line(stats: Stats, cached: int, prefill_speed: float, attention: str, model: str) -> str:
    """Return tokens and speeds in one line."""
    told = [f"{stats.prompt_tokens:,} tokens ({cached:,} cached)", f"prefill {prefill_speed:,.0f} tokens/s"]
    if stats.decode_tokens_per_s:
        told.append(f"decode {stats.decode_tokens_per_s:,.1f} tokens/s")
    told.append(f"first token after {stats.first_token_seconds:.1f} s")
    return ", ".join([*told, attention, model])


def _abandon_stdout() -> None:
    """Point standard output at nothing, so that Python does not fail once more when it leaves."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
