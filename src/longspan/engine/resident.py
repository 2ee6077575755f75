"""One session in memory: where it lies, and what it takes there. It does not know quotas: `residents.py` does."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from longspan.attention import Mechanism
from longspan.engine.contexts import Context
from longspan.engine.making import context_mechanism
from longspan.sessions.session import Session


@dataclass
class Moves:
    """How often sessions moved, and how often one could not be saved and stayed."""

    to_host: int = 0
    to_disk: int = 0
    from_host: int = 0
    from_disk: int = 0
    stayed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass
class Resident:
    """One session, and where its memory is."""

    session: Session | None = None
    host: dict[str, Tensor] | None = None
    """What `Context.tensors` returned, in host memory; None: it is on the device, or there is none."""
    mechanism: Mechanism | None = None
    """By what its context attends, and the tokens that this has read, while they are in host memory."""
    tokens: tuple[int, ...] = ()
    pins: int = 0
    moving: bool = False
    used: float = 0.0
    """When it was last let go of."""
    turn: int = 0
    """Greater than that of every session that was used before."""
    changed: bool = False
    """Whether it may be another than the one that was last saved."""
    pages: Counter[str] = field(default_factory=Counter)
    """How many pages lie in host memory, by format."""

    @property
    def on_device(self) -> bool:
        """Whether it remembers something on the device."""
        return self.session is not None and self.session.memory is not None

    @property
    def host_bytes(self) -> int:
        """Bytes that it takes in host memory."""
        return 0 if self.host is None else sum(tensor.nbytes for tensor in self.host.values())

    def to_host(self, memory: Context) -> None:
        """Copy what it remembers to host memory."""
        self.host = {part: tensor.to("cpu", copy=True) for part, tensor in memory.tensors().items()}
        self.mechanism, self.tokens = context_mechanism(memory), tuple(memory.tokens)
        self.pages = sum((kv.census() for kv in memory._layers()), Counter[str]())

    def off_host(self) -> None:
        """Forget what lies in host memory."""
        self.host, self.tokens, self.pages = None, (), Counter()


def fits(memory: Context, most: int) -> bool:
    """Whether a context takes at most so many bytes; what is still in a file is not read for that: it does not."""
    if any(plane.coming is not None for kv in memory._layers() for plane in kv.pool.planes):
        return False
    return 0 < sum(sizes(memory).values()) <= most


def sizes(memory: Context | None) -> dict[int, int]:
    """Return the bytes of each thing that a context refers to and may share with a fork."""
    if memory is None:
        return {}
    return {id(kv.pool): kv.pool.nbytes for kv in memory._layers()} | memory.beside()
