"""Independent pieces of work side by side on a CPU's cores, each on one thread.

PyTorch splits every operation over all threads and waits for each to end. For products of some hundred microseconds
waiting costs half of what the second core gives: whole pieces, a row of attention say, share nothing and wait once.
PyTorch lets other threads have the interpreter while it computes, so that Python's own serve. It does not know what a
piece is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import torch


def side_by_side(work: Callable[..., None], *pieces: Iterable[object]) -> None:
    """Call `work` for each piece (as `map` does, with an item of each), on as many threads as PyTorch may use.

    Gradients are not recorded. The first error that `work` raises is raised here, once no piece is being worked on.
    """
    threads = torch.get_num_threads()
    # One iterator for all: who is done takes the next piece. A list's `next` is one step of the interpreter.
    waiting = iter(list(zip(*pieces, strict=True)))
    if threads == 1:
        _take(work, waiting)
        return
    running = [_pool(threads).submit(torch.inference_mode()(_take), work, waiting) for _ in range(threads)]
    wait(running)
    for each in running:
        each.result()


def _take(work: Callable[..., None], waiting: Iterator[tuple[object, ...]]) -> None:
    for piece in waiting:
        work(*piece)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads within which PyTorch uses one thread each."""
    pool, together = ThreadPoolExecutor(threads, "longspan-pieces"), Barrier(threads)
    wait([pool.submit(_alone, together) for _ in range(threads)])
    # Setting it for one thread also sets what threads that come later begin with.
    torch.set_num_threads(threads)
    return pool


def _alone(together: Barrier) -> None:
    torch.get_num_threads()  # a thread takes the common setting on first use: what is set before that is lost
    torch.set_num_threads(1)
    together.wait()  # so that no thread takes the place of another, which would not be started
