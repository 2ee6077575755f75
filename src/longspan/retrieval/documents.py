"""Files, folders and standard input become plain text that a model can read.

Text of any kind (notes, Markdown, source code, CSV, JSON, logs) stays as it is; PDF, HTML, DOCX, PPTX, XLSX
and EPUB become Markdown through markitdown. A file's first bytes say what it is, then its suffix.

What this does not know: letters in pictures (scanned pages need OCR first; a PDF scanned in part gives its
rest in silence), page numbers, layout, a DOCX's page headers, what a link leads to (nothing is fetched), the
inside of archives. A file is held in memory whole; nothing guards against archives built to unpack without
end. Where text does not tell its encoding, a legacy alphabet can be taken for its sister (`õ` for `ő`).
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import stat
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from longspan.errors import DocumentError, UsageError

_LEFT_OUT = {"__pycache__", "node_modules"}  # beside all that starts with a dot, `.git` too
_ZIP_PARTS = {"word/": "docx", "ppt/": "pptx", "xl/": "xlsx", "META-INF/container.xml": "epub"}
_UNREAD = {
    b"\xd0\xcf\x11\xe0": "is an old Office file, or locked with a password: save it unlocked as .docx or PDF",
    b"{\\rtf": "is Rich Text Format, which is not read: save it as .docx or PDF",
    b"\x89PNG\r\n": "is a picture: run OCR on it first, and give the text",
    b"\xff\xd8\xff": "is a photograph: run OCR on it first, and give the text",
}
_HTML_START = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html[\s>])", re.I | re.S)
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # the colours in logs
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]+")  # those that are not white space
_UNMAPPED_GLYPH = re.compile(r"\(cid:\d+\)")  # pdfminer writes it where a font does not tell the letter
_CONVERTING = threading.Lock()  # warnings are silenced process-wide: two threads would undo each other's


@dataclass(frozen=True)
class Document:
    """A document: its name as the user gave it, or below the folder they gave; its text, newlines as `\\n`."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file or folder inside a given folder that was not read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """What was read, in the order given (a folder's files sorted), and what was passed over."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


class _RefusedError(DocumentError):
    """Why something can't be read, without its name."""


def read_documents(
    paths: Sequence[str | os.PathLike[str]],
    *,
    stdin: BinaryIO | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reading:
    """Read every path: a file, a folder (with all below it), or `-` for standard input.

    `progress` is called with a document's name before it is read. In folders, names that start with a dot,
    `__pycache__` and `node_modules` are left out; links are followed, each folder once. A file reached twice
    is read once.

    Raises:
        DocumentError: a path given by name is missing, empty, binary, damaged, without text, of a kind that is
            not read, or may not be read; or a folder held nothing that could be read. Such a file inside a
            folder is named in `skipped` instead.
        UsageError: `paths` is one string and not a list of them.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise UsageError("paths must be a list: write [path] for a single one")
    reader = _Reader(stdin, progress or (lambda name: None))
    for path in paths:
        given = os.fsdecode(path)
        try:
            reader.read(given)
        except _RefusedError as error:
            raise DocumentError(" ".join(f"{_shown(given) or repr(given)}: {error}".splitlines())) from error
    return Reading(tuple(reader.documents.values()), tuple(reader.skipped.values()))


def text_of(data: bytes, name: str) -> str:
    """Return the text of a document that is in memory (DocumentError: see `read_documents`).

    Args:
        data: of the file.
        name: for messages, and for what its suffix says.
    """
    try:
        return _text_of(data, Path(name).suffix.lower())
    except _RefusedError as error:
        raise DocumentError(f"{_shown(name)} {error}") from error


class _Reader:
    """Reads path after path; knows a file it has met by the file itself, not by its name."""

    def __init__(self, stdin: BinaryIO | None, progress: Callable[[str], None]) -> None:
        self.stdin = stdin
        self.progress = progress
        self.documents: dict[tuple[int, int] | str, Document] = {}
        self.skipped: dict[str, Skipped] = {}

    def read(self, given: str) -> None:
        path = Path(given)
        if given == "-":
            self._standard_input()
        elif not given:  # Path would take it for the current folder
            raise _RefusedError("the path is empty: give a file or a folder")
        elif stat.S_ISDIR((status := _status(path)).st_mode):
            self._folder(path)
        elif stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode):  # a pipe: the shell's <(command)
            self._file(path, given, status)
        else:
            raise _RefusedError("is a device or a socket: give a file or a folder")

    def _standard_input(self) -> None:
        if (stream := self.stdin or getattr(sys.stdin, "buffer", None)) is None:
            raise _RefusedError("there is no standard input: give a file")
        if "-" not in self.documents:
            self.progress("<stdin>")
            if not (data := stream.read()).strip():
                raise _RefusedError("standard input is empty: pipe a text into it")
            self.documents["-"] = Document("<stdin>", _text_of(data, ""))

    def _file(self, path: Path, name: str, status: os.stat_result) -> None:
        identity = (status.st_dev, status.st_ino)
        if identity not in self.documents:
            self.progress(_shown(name))
            with _refusing(path):
                data = path.read_bytes()
            self.documents[identity] = Document(_shown(name), _text_of(data, path.suffix.lower()))

    def _folder(self, top: Path) -> None:
        refused: list[Skipped] = []
        found = False
        walked: set[tuple[int, int]] = set()  # links may lead round in circles
        pending = [top]
        while pending:
            path = pending.pop()
            try:
                status = _status(path)
                if stat.S_ISREG(status.st_mode):
                    self._file(path, str(path), status)
                    found = True
                elif not stat.S_ISDIR(status.st_mode):  # reading a pipe that nobody fills would never end
                    raise _RefusedError("is a pipe, a device or a socket: give it by name if it is meant")
                elif (identity := (status.st_dev, status.st_ino)) not in walked:
                    walked.add(identity)
                    with _refusing(path):
                        inside = sorted(path.iterdir(), key=lambda child: child.name, reverse=True)
                    pending += [p for p in inside if not p.name.startswith(".") and p.name not in _LEFT_OUT]
            except _RefusedError as error:
                refused.append(Skipped(_shown(str(path)), str(error)))
        if not found:
            told = "; ".join(f"{each.name} {each.reason}" for each in refused[:3])
            more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
            empty = "it holds no files (hidden ones are left out)"
            raise _RefusedError(f"nothing in this folder could be read: {told or empty}{more}")
        self.skipped.update((each.name, each) for each in refused)


def _shown(name: str) -> str:
    """Return the name as valid Unicode: bytes of it that are not UTF-8 could be neither printed nor saved."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def _status(path: Path) -> os.stat_result:
    with _refusing(path):
        return path.stat()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into `_RefusedError` with the fix."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"can't be read ({getattr(error, 'strerror', '')}): check the path and the disk, then try again"
        if isinstance(error, PermissionError):
            reason = "may not be read by this user: change its permissions (chmod +r), or ask its owner"
        elif isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            reason = "there is no such file or folder: check the path"
            if path.is_symlink():
                reason = "is a link to something that is gone: remove it, or point it at a file"
        raise _RefusedError(reason) from error


def _text_of(data: bytes, suffix: str) -> str:
    """Return the text in a document's bytes; raise `_RefusedError` if there is none."""
    kind = _kind(data, suffix) if data else "text"
    if kind == "text":
        text = _decoded(data)
        # A template or a program that begins like HTML is source code, and stays so.
        if suffix in {".html", ".htm", ".xhtml"} or (suffix in {"", ".txt"} and _HTML_START.match(text)):
            kind, data = "html", text.encode()
    if kind != "text":
        text = _converted(data, kind)
    if _UNMAPPED_GLYPH.sub("", text).strip():
        return text
    if kind in {"text", "html"}:
        raise _RefusedError("is empty: leave it out, or check that it was saved")
    raise _RefusedError("has no text (a scan, pictures of text, or blank pages): run OCR on it first")


def _kind(data: bytes, suffix: str) -> str:
    # Junk may precede a PDF's mark; far from the start the mark counts only if the name agrees.
    start = data[:64].lstrip(codecs.BOM_UTF8 + b" \t\r\n\0")
    if start.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in data[:1024]):
        return "pdf"
    if data.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except Exception as error:  # BadZipFile, but ValueError, NotImplementedError and others too
            raise _RefusedError("can't be unpacked: it is damaged or cut short; get it again") from error
        for part, kind in _ZIP_PARTS.items():
            if any(name.startswith(part) for name in names):
                return kind
        raise _RefusedError("is an archive or OpenDocument: unpack it, or save it as .docx or PDF")
    for mark, reason in _UNREAD.items():
        if data.startswith(mark):
            raise _RefusedError(reason)
    if suffix == ".pdf" or suffix[1:] in _ZIP_PARTS.values():
        raise _RefusedError(f"is named {suffix} but holds something else: get it again, or rename it")
    return "text"


def _converted(data: bytes, kind: str) -> str:
    # One converter is called, not markitdown's dispatch: that would read a damaged document as if it were text.
    with _CONVERTING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import markitdown.converters
        from markitdown import MissingDependencyException, StreamInfo

        for name in ("pdfminer", "pdfplumber", "markitdown", "openpyxl"):  # what matters is raised
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        converter = getattr(markitdown.converters, f"{kind.capitalize()}Converter")()
        about = StreamInfo(extension=f".{kind}", charset="utf-8")
        # Markdown's backslashes before _ and * are noise to a model, and part words for lexical search.
        plain = {"escape_underscores": False, "escape_asterisks": False, "escape_misc": False}
        try:
            text: str = converter.convert(io.BytesIO(data), about, **plain).markdown
        except MissingDependencyException as error:
            raise _RefusedError(f"needs more: pip install 'markitdown[{kind}]', or save it as PDF") from error
        except Exception as error:  # a damaged file leads these parsers to raise anything
            if "Password" in type(error).__name__:
                raise _RefusedError("is locked with a password: save it unlocked") from error
            what = " ".join(f"{type(error).__name__} {error}".split())[:100]
            raise _RefusedError(f"can't be parsed as {kind.upper()} ({what}): get it again") from error
    text = _CONTROLS.sub("", text).encode("utf-8", "replace").decode()
    if kind == "pdf":  # justified lines come with two spaces for one
        text = re.sub(r"(?<=\S) {2,}(?=\S)", " ", text)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip("\n")


def _decoded(data: bytes) -> str:
    """Return the first plausible reading of the bytes, newlines as `\\n`, stray control characters dropped."""
    for reading in _readings(data):
        text = _TERMINAL_CODES.sub("", reading)
        clean = _CONTROLS.sub("", text)
        if len(text) - len(clean) <= max(1, len(text) // 200):  # more than a slip: not text
            return clean.replace("\r\n", "\n").replace("\r", "\n")
    raise _RefusedError("is binary, not text: give text, Markdown, HTML, PDF, DOCX, PPTX, XLSX or EPUB")


def _readings(data: bytes) -> Iterator[str]:
    """Yield what the bytes may say, the most trustworthy reading first."""
    codec = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first begins with UTF-16's mark
        codec = "utf-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        codec = "utf-16"
    try:
        yield data.decode(codec)
    except UnicodeDecodeError:
        # A long log with a few spoilt bytes is still UTF-8: text in other encodings hardly ever looks so.
        text = data.decode("utf-8", "replace")
        if len(text) - len(text.encode("ascii", "ignore")) > 10 * text.count("\ufffd"):
            yield text
    from charset_normalizer import from_bytes

    # Latin letters and spaces have zero bytes in UTF-16; without that test a short word passes for Chinese.
    wide = [f"utf_{bits}{order}" for bits in (16, 32) for order in ("", "_le", "_be")]
    excluded = ["utf_7", *([] if b"\0" in data else wide)]
    matches = from_bytes(data, cp_exclusion=excluded)
    if (best := matches.best()) is not None:
        # Western text fits sister alphabets nearly as well; it is by far the commonest, so ties are its own.
        western = (m for m in matches if "cp1252" in m.could_be_from_charset and m.chaos <= best.chaos + 0.06)
        yield data.decode(next(western, best).encoding, "replace")
