"""How many bytes of pages moved between the device and what lies below it, and how reads of them went."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

_ONE = threading.Lock()  # the prefetching thread counts too


@dataclass
class Traffic:
    """Counts since the start."""

    host_down: int = 0
    """Bytes copied from the device to host memory."""
    host_up: int = 0
    """Bytes copied from host memory to the device."""
    disk_down: int = 0
    """Bytes written to files, from host memory or the device."""
    disk_up: int = 0
    """Bytes read from files."""
    hits: int = 0
    """Pages read that had been prefetched."""
    waits: int = 0
    """Pages read that were just being prefetched, and were waited for."""
    misses: int = 0
    """Pages read that nobody had prefetched."""

    def down(self, tier: str, nbytes: int) -> None:
        """Count bytes that went down to a tier, `host` or `disk`."""
        self._add(f"{tier}_down", nbytes)

    def up(self, tier: str, nbytes: int) -> None:
        """Count bytes that came up from a tier."""
        self._add(f"{tier}_up", nbytes)

    def read(self, hits: int, waits: int, misses: int) -> None:
        """Count pages that were read from below."""
        self._add("hits", hits)
        self._add("waits", waits)
        self._add("misses", misses)

    def since(self, before: Traffic) -> Traffic:
        """Return what was counted since a copy of these counts was made."""
        return Traffic(**{name: count - getattr(before, name) for name, count in asdict(self).items()})

    def _add(self, name: str, count: int) -> None:
        with _ONE:
            setattr(self, name, getattr(self, name) + count)
