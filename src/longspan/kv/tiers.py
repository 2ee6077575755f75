"""What lies below the device, for all pools that share it: host memory up to a limit, then files up to a quota.

A specification is `host=8GiB,disk=50GiB:FOLDER`; either part may be left out. Without any, host memory has no limit and
there are no files. Files have no name: they are gone with the process, however it ends. They are allocated before they
are written to, so that a full disk is an error when a page asks for room, and never a fault when it is written.
It does not know which copies move from host memory to files: pools do (`pool.py`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from longspan.errors import PoolExhaustedError, UsageError
from longspan.kv.budget import Budget, size
from longspan.kv.prefetch import Prefetcher
from longspan.kv.traffic import Traffic
from longspan.lengths import bytes_of

HOST, DISK = "host", "disk"


@dataclass(frozen=True)
class TierLimits:
    """How much may lie where."""

    host: int | None = None
    """Bytes of host memory; None: no limit."""
    disk: int = 0
    """Bytes of files."""
    folder: Path | None = None
    """Where the files lie; None: there are none."""

    @classmethod
    def parse(cls, spec: str) -> TierLimits:
        """Return the limits of a specification such as `host=8GiB,disk=50GiB:/scratch`.

        Raises:
            UsageError: it is none, or the folder can't be written to.
        """
        host, disk, folder = None, 0, None
        rest = spec.strip()
        while rest:
            name, _, rest = rest.partition("=")
            if name == HOST and host is None:
                value, _, rest = rest.partition(",")
                host = bytes_of(value)
            elif name == DISK and folder is None:  # a folder's name may hold commas: it is the last
                value, _, path = rest.partition(":")
                if not path:
                    raise UsageError(f"--kv-tier disk={value} names no folder: write disk={value}:FOLDER")
                disk, folder, rest = bytes_of(value), Path(path).expanduser(), ""
            else:
                raise UsageError(f"--kv-tier {spec!r} is not understood: write host=8GiB,disk=50GiB:FOLDER")
        if host is None and folder is None:
            raise UsageError("--kv-tier names no tier: write host=8GiB,disk=50GiB:FOLDER")
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UsageError(f"--kv-tier can't write to {folder}: {error.strerror or error}") from error
        return cls(host, disk, folder)


class Tiers:
    """Bytes, files and traffic below the device."""

    def __init__(self, limits: TierLimits | None = None) -> None:
        """Start with nothing held; None: host memory without a limit, and no files."""
        self.limits = limits or TierLimits()
        self.budgets = {
            HOST: Budget(self.limits.host, "host tier"),
            DISK: Budget(self.limits.disk or None, "disk tier"),
        }
        """What the copies of each tier take."""
        self.traffic = Traffic()
        self.prefetcher = Prefetcher(self.traffic)

    def left(self, tier: str) -> int | None:
        """Return the bytes that a tier has left; None: no limit."""
        return 0 if tier == DISK and self.limits.folder is None else self.budgets[tier].left

    def used(self, tier: str) -> int:
        """Return the bytes that a tier's copies take."""
        return self.budgets[tier].used

    def require(self, nbytes: int) -> None:
        """Refuse what no tier has room for.

        Raises:
            PoolExhaustedError: so many bytes are more than all tiers have left.
        """
        left = [self.left(HOST), self.left(DISK)]
        known = [each for each in left if each is not None]
        if len(known) == len(left) and nbytes > sum(known):
            raise PoolExhaustedError(
                f"pages that move below the device need {size(nbytes)}, and the tiers there have {size(sum(known))} "
                "left: raise --kv-tier, or --kv-budget"
            )

    def storage(self, tier: str, device: torch.device) -> Callable[[int, Tensor | None], Tensor]:
        """Return what makes room for bytes, given how many and what it made before, whose contents are kept.

        Args:
            tier: `host` or `disk`.
            device: what the pages' own lies on; host memory is pinned for a GPU.
        """
        return _File(self.limits.folder) if tier == DISK and self.limits.folder else _Memory(device.type == "cuda")


class _Memory:
    """Host memory, pinned or not."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned

    def __call__(self, nbytes: int, before: Tensor | None) -> Tensor:
        with torch.inference_mode(False):
            made = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned and nbytes > 0)
        if before is not None:
            kept = min(nbytes, before.numel())
            made[:kept] = before[:kept]
        return made


class _File:
    """A file without a name, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None

    def __call__(self, nbytes: int, before: Tensor | None) -> Tensor:
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        try:
            if self._file is None:
                self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115
            handle = self._file.fileno()
            now = os.fstat(handle).st_size
            if nbytes > now:
                _allocate(handle, now, nbytes - now)
            else:
                os.ftruncate(handle, nbytes)
            mapped = mmap.mmap(handle, nbytes)
        except OSError as error:
            raise PoolExhaustedError(
                f"can't keep {size(nbytes)} of pages in {self.folder}: {error.strerror or error}; make room there, or "
                "give another folder with --kv-tier"
            ) from error
        # The map lives as long as the tensor that views it.
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _allocate(handle: int, start: int, count: int) -> None:
    """Make a file longer, with blocks of its own: a hole would be a fault where the disk is full when it is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, count)
        return
    zeros = bytes(1 << 20)
    while count:
        written = os.pwrite(handle, zeros[: min(count, len(zeros))], start)
        start, count = start + written, count - written
