"""A few ranks that are started once and asked many times: gloo between processes of this machine.

The processes are forked from a server that has imported torch once, so that four ranks start in the time of one. What
they run is a function of a test module: it gets the group of the ranks that were asked, and returns what it found.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds after which a rank that has not answered counts as hanging."""


class Ranks:
    """Processes 0 .. size-1, and groups of the first 1, 2, ... of them."""

    def __init__(self, folder: Path, size: int, timeout: float = 30.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "longspan.engine.llm", "transformers.models.llama.modeling_llama", "tiny_llama"]
        )
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, f"file://{folder / 'meet'}", rank, size, timeout))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, size: int) -> list[Any]:
        """Return what `function(group, *args)` returns on each of the first `size` ranks, in order."""
        for pipe in self.pipes[:size]:
            pipe.send((function, args, size))
        answers = self.answers(range(size))
        wrong = [told for told, is_error in answers if is_error]
        assert not wrong, "\n".join(map(str, wrong))
        return [value for value, _ in answers]

    def answers(self, ranks: Sequence[int]) -> list[tuple[Any, bool]]:
        """Return what each rank answers, and whether it is an error; a rank that hangs ends all of them."""
        found = []
        for rank in ranks:
            if not self.pipes[rank].poll(PATIENCE):
                self.close()
                raise AssertionError(f"rank {rank} hangs: it has not answered for {PATIENCE} s")
            found.append(self.pipes[rank].recv())
        return found

    def close(self) -> None:
        """End all ranks."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, address: str, rank: int, size: int, timeout: float) -> None:
    import torch

    from longspan.distributed.group import Group

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    everyone = Group.start("cpu", timeout=timeout, address=address, rank=rank, size=size)
    groups = {count: everyone.subgroup(range(count)) for count in range(1, size + 1)}
    while True:
        try:
            function, args, count = pipe.recv()
        except (EOFError, OSError):
            break
        groups[count].sent.clear()
        try:
            pipe.send((function(groups[count], *args), False))
        except BaseException:
            pipe.send((traceback.format_exc(), True))
    os._exit(0)  # peers may be gone: nothing is left to be said to them
