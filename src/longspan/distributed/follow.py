"""What rank 0 does next, told to the other ranks.

One rank decides (it reads input and answers), the others do the same work on their own parts. Before each piece of work
rank 0 tells its name and a few numbers and words as JSON, which can hold nothing that runs; tensors travel beside it by
the group's own operations. A note that fits the first message is one broadcast. It does not know what the work is.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from longspan.distributed.group import Group

_FIRST = 2048
"""Bytes of the first message; a decode step's note is some 80."""
_LENGTH = 8
_PATIENCE = 7 * 24 * 3600.0
"""Seconds for which followers wait for work: a server may have nothing to do for days."""


class Word:
    """The way from rank 0 to the others."""

    def __init__(self, group: Group) -> None:
        """Take the ranks, for tensors in host memory."""
        self.group = group

    def tell(self, work: str, **details: Any) -> None:
        """Tell the others what comes next (rank 0); details are numbers, words, lists and None."""
        assert self.group.rank == 0, "rank 0 decides"
        note = json.dumps([work, details], separators=(",", ":")).encode()
        head = torch.zeros(_FIRST, dtype=torch.uint8)
        head[:_LENGTH] = torch.tensor([len(note)], dtype=torch.int64).view(torch.uint8)
        begin = note[: _FIRST - _LENGTH]
        head[_LENGTH : _LENGTH + len(begin)] = torch.frombuffer(bytearray(begin), dtype=torch.uint8)
        self.group.broadcast(head, timeout=_PATIENCE)
        if len(note) > len(begin):
            self.group.broadcast(torch.frombuffer(bytearray(note[len(begin) :]), dtype=torch.uint8))

    def hear(self) -> tuple[str, dict[str, Any]]:
        """Wait for what comes next (all other ranks)."""
        assert self.group.rank != 0, "rank 0 decides"
        head = self.group.broadcast(torch.empty(_FIRST, dtype=torch.uint8), timeout=_PATIENCE)
        length = int(head[:_LENGTH].view(torch.int64))
        note = bytes(head[_LENGTH : _LENGTH + min(length, _FIRST - _LENGTH)].tolist())
        if length > len(note):
            note += bytes(self.group.broadcast(torch.empty(length - len(note), dtype=torch.uint8)).tolist())
        work, details = json.loads(note)
        return str(work), dict(details)
