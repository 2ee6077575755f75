"""One answer while it is being written, and what can be said of it afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longspan.engine.sampler import Sampler, SamplingParams
from longspan.engine.stops import TextStream
from longspan.hf.model import CausalModel


@dataclass(frozen=True)
class Citation:
    """A passage that an answer rests on: `text` is exactly `[start:end]` of the document's extracted text."""

    doc: str
    start: int
    end: int
    text: str
    score: float
    """Share of the retrieval heads' attention (and of the lexical vote) on the page chosen, 0 to 1; `mass` where
    attention names it."""
    chosen_by: str
    """`heads`, `lexical` or `heads+lexical`: who chose it for the question; `attention`: the answer was read there."""
    mass: float | None = None
    """Share of the retrieval heads' attention that fell on it while the answer was written, 0 to 1 (`sources.py`);
    None: not known."""
    source: str = "retrieval"
    """What names it: `attention` (the answer was read there), `retrieval` (it was chosen for the question, by the
    retrieval heads), `words` (chosen by its words alone)."""


@dataclass
class Stats:
    """Tokens and seconds of one answer."""

    prompt_tokens: int = 0
    """Tokens of context and question together."""
    cached_tokens: int = 0
    """Those of them that were not computed again."""
    read_tokens: int = 0
    """Tokens run through the model before the answer's first token."""
    read_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From the question to the first token of the answer, reading included."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Reading speed."""
        return self.read_tokens / self.read_seconds if self.read_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Writing speed, the first token left out: it comes with the reading."""
        later = self.decoded_tokens - 1
        return later / self.decode_seconds if later > 0 and self.decode_seconds else 0.0


@dataclass
class Answer:
    """An answer and what it rests on."""

    text: str
    citations: list[Citation]
    stats: Stats
    finish_reason: str
    """`stop`: the model ended it, or a stop string did; `length`: max_tokens or a full window; `cancelled`."""
    attention: str
    model: str
    pages: list[int] = field(default_factory=list)
    """Pages of the context that were chosen, best first."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: how pages were chosen, what was left out."""
    read_again: list[str] = field(default_factory=list)
    """The sentences or passages that retrieval read again, best first."""
    quote: str = ""
    """What was added to `text` because the model's own words were not in what it read again or, where it read nothing
    again, in the passages cited; empty: nothing was."""
    unsourced: str = ""
    """Why attention names no sentence that the answer was read from; empty: it does, the first of `citations`."""
    stopped_by: str = ""
    """What `finish_reason` does not tell apart: `end` (the model ended it), `string` (a stop string), `length`,
    `cancelled`."""

    @property
    def own_words(self) -> str:
        """The answer without the quotation."""
        return self.text.removesuffix(self.quote) if self.quote else self.text


class Generation(Iterator[str]):
    """Pieces of an answer as they come. After the last one, `answer` holds the whole.

    Closing it early, or an exception, takes everything back that was read for this answer alone.
    """

    def __init__(self, answer: Answer, pieces: Iterator[str]) -> None:
        """Take the answer that `pieces` fills while it is being iterated."""
        self.answer = answer
        self._pieces = pieces

    def __next__(self) -> str:
        """Return the next piece of text."""
        return next(self._pieces)

    def close(self) -> None:
        """Stop here."""
        closing = getattr(self._pieces, "close", None)
        if closing is not None:
            closing()

    def finish(self) -> Answer:
        """Write the rest and return the whole answer."""
        for _ in self:
            pass
        return self.answer


def decode(
    model: CausalModel,
    first: Tensor,
    step: Callable[[list[int]], Tensor],
    params: SamplingParams,
    answer: Answer,
    started: float,
    room: int,
) -> Iterator[str]:
    """Sample tokens until the answer ends, and yield its text.

    Args:
        model: for decoding text and the tokens that end an answer.
        first: logits `[V]` after the prompt.
        step: reads a token and returns the next logits.
        params: how to sample.
        answer: filled as the answer grows.
        started: `time.perf_counter()` when the question came.
        room: positions left in the model's window.
    """
    sampler = Sampler(params, first.device)
    stream = TextStream(model.decode, params.stop)
    stats, logits = answer.stats, first
    limit = min(params.max_tokens, room)
    history: list[int] = []
    answer.finish_reason = answer.stopped_by = "length"
    since = time.perf_counter()
    try:
        while len(history) < limit:
            token = sampler(logits, _history(history, params, first))
            if not history:
                stats.first_token_seconds = time.perf_counter() - started
                since = time.perf_counter()
            if token in model.end_tokens:
                answer.finish_reason, answer.stopped_by = "stop", "end"
                break
            history.append(token)
            stats.decoded_tokens, stats.decode_seconds = len(history), time.perf_counter() - since
            piece = stream.push(token)
            if piece:
                answer.text += piece
                yield piece
            if stream.stopped is not None:
                break
            if len(history) < limit:
                logits = step([token])
    except BaseException:
        answer.finish_reason = answer.stopped_by = "cancelled"
        raise
    rest = stream.finish()
    if stream.stopped is not None:  # also one that waited for a longer one, whatever came then
        answer.finish_reason, answer.stopped_by = "stop", "string"
    if rest:
        answer.text += rest
        yield rest
    if len(history) == room < params.max_tokens and answer.finish_reason == "length":
        answer.notes.append("the answer was cut: the model's window is full")


def _history(tokens: list[int], params: SamplingParams, like: Tensor) -> Tensor | None:
    """Return the tokens so far where a penalty needs them."""
    if not params.looks_back or not tokens:
        return None
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)
