"""Batches of the needle model's sequences, made ahead by other processes while a GPU is busy.

What a batch holds follows from the run's seed and its step's number, whoever makes it. It does not know models.
"""

from __future__ import annotations

import signal
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from longspan.train.needle import tasks
from longspan.train.needle.recipe import Phase
from longspan.train.needle.tasks import Mix, Sequence_

NOTHING, TEXT, ANSWER = 0, 1, 2
"""What a token counts as, when it is predicted."""
_MOST = 512
"""Sequences of a step."""


@dataclass(frozen=True)
class Made:
    """A batch."""

    ids: Tensor
    """int64 `[B, T]`."""
    marks: Tensor
    """uint8 `[B, T]`: what each token counts as."""
    rows: Tensor
    """int64 `[B, R]`: positions that predict a token of an answer, ascending; fewer than R are told again."""


class Batches:
    """All batches of a run, by their steps' numbers."""

    def __init__(self, haystack: bytes, seed: int, tokens: int, *, workers: int = 0) -> None:
        """Take what sequences are made from.

        Args:
            haystack: real text.
            seed: of the run.
            tokens: of a step; a sequence longer than that is a step alone.
            workers: processes that make batches ahead; 0: they are made when they are asked for.
        """
        self.haystack, self.seed, self.tokens = haystack, seed, tokens
        self._ahead: deque[tuple[int, Phase, Future[_Arrays]]] = deque()
        self._pool = None
        if workers:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (haystack,))
            self._depth = 3 * workers

    def get(self, step: int, phase: Phase) -> Made:
        """Return a step's batch; the steps behind it are expected to be of its phase."""
        if self._pool is None:
            return _made(_arrays(self.haystack, self.seed, step, phase, self.tokens))
        if not self._ahead or self._ahead[0][:2] != (step, phase):
            while self._ahead:
                self._ahead.pop()[2].cancel()
        first = self._ahead[-1][0] + 1 if self._ahead else step
        for number in range(first, step + self._depth):
            future = self._pool.submit(_in_worker, self.seed, number, phase, self.tokens)
            self._ahead.append((number, phase, future))
        return _made(self._ahead.popleft()[2].result())

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_Arrays = tuple[np.ndarray, ...]


def batched(made: list[Sequence_], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and marks `[B, length]`; what is missing at the ends counts nothing."""
    ids = np.full((len(made), length), tasks.END, dtype=np.uint16)
    marks = np.zeros((len(made), length), dtype=np.uint8)
    for row, sequence in enumerate(made):
        count = min(length, len(sequence.tokens))
        ids[row, :count] = sequence.tokens[:count]
        marks[row, 1:count] = TEXT
        for asked in sequence.asked:
            marks[row, asked.start : asked.start + len(asked.answer)] = ANSWER
    return ids, marks


def answering(marks: np.ndarray, count: int) -> np.ndarray:
    """Return `count` positions of each sequence that predict a token of an answer, spread evenly."""
    rows = np.empty((len(marks), count), dtype=np.int64)
    for row, each in enumerate(marks):
        found = np.flatnonzero(each == ANSWER) - 1
        if not len(found):
            found = np.array([len(each) - 1])
        rows[row] = found[np.linspace(0, len(found) - 1, count).astype(np.int64)]
    return rows


def _arrays(haystack: bytes, seed: int, step: int, phase: Phase, tokens: int) -> _Arrays:
    count = max(1, min(_MOST, tokens // phase.length))
    mix = Mix(asked=phase.asked, density=phase.density)
    seeds = (seed << 32) % tasks.HELD_OUT + step * 4096
    ids, marks = batched([tasks.make(seeds + i, phase.length, haystack, mix) for i in range(count)], phase.length)
    return ids, marks, answering(marks, phase.rows)


def _made(arrays: _Arrays) -> Made:
    ids, marks, rows = map(torch.from_numpy, arrays)
    return Made(ids.long(), marks, rows)


_in_here: dict[str, bytes] = {}
"""A worker's haystack: sent once, not with every batch."""


def _begin(haystack: bytes) -> None:
    """Begin in a worker; Ctrl-C is for the process that trains, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _in_here["haystack"] = haystack


def _in_worker(seed: int, step: int, phase: Phase, tokens: int) -> _Arrays:
    return _arrays(_in_here["haystack"], seed, step, phase, tokens)
