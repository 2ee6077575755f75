"""Token ids in, text out, piece by piece, up to a stop string.

Two things make this more than `decode(token)`. A token may hold a part of a UTF-8 character, and its text may
depend on the tokens before it (a leading space that a decoder drops at the start), so pieces are differences
between decodings of a short window of tokens. And a stop string may lie across tokens, so text that could be
its beginning waits.

It doesn't know the tokenizer: it is told how to decode. It trusts that more tokens only add text, apart from
U+FFFD at the end. All byte-level BPE decoders keep to that, whatever the bytes. Two kinds don't quite:
SentencePiece's byte fallback turns a whole run of byte tokens into U+FFFD when the run proves malformed, and
"clean up" decoders take a space back. What was shown stays shown then, and nothing that follows is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longspan.errors import UsageError

_BAD = "\ufffd"  # the decoders' mark for bytes that are not, or not yet, a character
_CHARACTER = 4  # bytes of the longest UTF-8 character, and so the most tokens that one can lie across
_WINDOW = 16  # tokens decoded again at most, in ordinary text
_KEEP = 6  # tokens kept when the window moves: more than a character's, so that no unfinished one is cut


def normalise_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; one string alone is one stop.

    Raises:
        UsageError: not a string, list or tuple; or something in it that isn't a string, or is empty.
    """
    if not isinstance(stop, str | list | tuple):
        raise UsageError(f"stop is {stop!r}: give a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise UsageError(f"stop holds {one!r}: each stop must be a string of at least one character")
    return stops


class TextStream:
    """Text of an answer as its tokens come, ended just before the earliest stop string.

    The pieces that `push` and `finish` return, joined, are `decode(all tokens)` cut at the earliest
    occurrence of a stop string (of several that begin there, the longest is reported), however the text is
    split into tokens. Text waits only while it may be the beginning of a stop string or of an unfinished
    character. A stop that is found waits, too, while one that began before it, or a longer one that began
    with it, can be completed.

    Args:
        decode: token ids to text, for any run of tokens; bytes that aren't UTF-8 must come out as U+FFFD.
        stop: strings that end the text; one string alone is one stop.

    Raises:
        UsageError: a stop that isn't a string or is empty.

    Each token costs a decoding of some 16 tokens at most, so a whole answer costs time linear in its length.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: str | Sequence[str] = ()) -> None:
        self.stopped: str | None = None
        self._decode = decode
        self._stops = normalise_stops(stop)
        self._longest = max(map(len, self._stops), default=0)
        self._first = frozenset(one[0] for one in self._stops)
        self._window: list[int] = []  # the last tokens: some context, then what isn't settled
        self._settled = ""  # the head of decode(window) that has gone on to the search for stops
        self._waiting = 0  # tokens in a row after which the text ended in U+FFFD
        self._held = ""  # settled text that may be the beginning of a stop
        self._pieces: list[str] = []
        self._finished = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token: int) -> str:
        """Take one more token; return the text that is certain now and was not shown yet ("" at times).

        After a stop string was found (`stopped` tells which) tokens are ignored.
        """
        assert not self._finished, "push after finish"
        if self.stopped is not None:
            return ""
        self._window.append(token)
        full = self._decode(self._window)
        piece = self._show(self._settle(full), final=False)
        if len(self._window) >= _WINDOW:
            self._trim(full)
        return piece

    def finish(self) -> str:
        """Say that no token follows; return the text that was still held back, U+FFFD included."""
        if self._finished or self.stopped is not None:
            self._finished = True
            return ""
        self._finished = True
        full = self._decode(self._window) if self._window else ""
        return self._show(self._settle(full, final=True), final=True)

    def _settle(self, full: str, *, final: bool = False) -> str:
        """Return what `full`, the window's text, adds for certain to what is settled."""
        certain = full
        if not full.endswith(_BAD):
            self._waiting = 0
        elif not final:
            self._waiting += 1
            # For an unfinished character a byte-level decoder writes one U+FFFD, byte fallback one a byte: up
            # to three. After four such tokens the first is decided, and only the last mark may still change.
            run = len(full) - len(full.rstrip(_BAD))
            certain = full[: len(full) - (min(run, _CHARACTER - 1) if self._waiting < _CHARACTER else 1)]
        if self._settled.startswith(certain):
            return ""
        agreed = certain.startswith(self._settled)
        if not agreed and 0 < self._waiting < _CHARACTER and not final:
            return ""  # byte fallback spoils the whole run until the character is complete: wait for it
        pairs = zip(self._settled, certain, strict=False)
        same = next((at for at, (old, new) in enumerate(pairs) if old != new), len(self._settled))
        self._settled = certain
        return certain[same:]

    def _trim(self, full: str) -> None:
        """Shorten the window, where its tail alone decodes to the end of `full`, the whole window's text."""
        window = self._window
        agreed = full.startswith(self._settled)
        if not agreed and len(window) < 2 * _WINDOW:
            return  # a character is under way (see `_settle`), and the tail could not be compared
        unsettled = max(0, len(full) - len(self._settled))
        for start in range(len(window) - _KEEP, 0, -1):
            tail = self._decode(window[start:])
            context = tail[: max(0, len(tail) - unsettled)]
            # A cut inside a character shows up as U+FFFD where `full` has the character. A tail that lacks its
            # leading space is fine, as long as some text stands between it and what comes next.
            if context and full.endswith(tail):
                self._window, self._settled = window[start:], context
                return
        if not full.endswith(_BAD) and self._decode(window[:-1]) == full:
            window.pop()  # one more token without text after many: the context in front of them must stay
        elif len(window) >= 2 * _WINDOW:  # a decoder that drops much: the cost must stay linear all the same
            tail = self._decode(window[-_KEEP:])
            self._window, self._settled = window[-_KEEP:], tail[: max(0, len(tail) - unsettled)]

    def _show(self, new: str, *, final: bool) -> str:
        """Add settled text; return what of it and of the held text can be shown."""
        held = self._held + new
        end, self.stopped = self._search(held, final)
        self._held = "" if self.stopped is not None else held[end:]
        if end:
            self._pieces.append(held[:end])
        return held[:end]

    def _search(self, text: str, final: bool) -> tuple[int, str | None]:
        """Return how many characters of `text` can be shown, and the stop string that ends them (or None)."""
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        at, _, stop = min(found, default=(len(text), 0, None))
        if not final:
            for start in range(max(0, len(text) - self._longest + 1), min(at + 1, len(text))):
                if text[start] in self._first:
                    rest = text[start:]
                    if any(len(one) > len(rest) and one.startswith(rest) for one in self._stops):
                        return start, None
        return at, stop
