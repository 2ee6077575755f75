"""The ranks that share one context: what they say to each other, the bytes it takes, and what happens when one dies.

A `Group` is a rank's own view of all of them: NCCL between GPUs, gloo between CPUs. Every operation must be called by
all ranks of the group in one order. Bytes are counted as this rank sends them: by an operation's ring algorithm, which
is what NCCL and gloo use for large messages. A rank that stops, or does not answer within the timeout, makes the
operations of all others fail with a `ParallelError`; such a group is of no more use. A group of one rank sends nothing
and needs no processes, so that callers need no second path.

It does not know attention, models, or what the tensors mean. Merging partial outputs is the one exception: it is a
collective of its own (Tree Attention, arXiv 2408.04093, which takes three reductions where one message serves here).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.distributed.merge import merge_packed, merged
from longspan.distributed.placements import GATHERED
from longspan.errors import ParallelError, UsageError

TIMEOUT = 300.0
"""Seconds that a rank may take to answer."""
_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Pending:
    """What is being sent and received while the caller computes; `wait` before the tensors are read or written."""

    group: Group
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Wait: on a CPU until it is done, on a GPU make what is launched from now on wait for it."""
        with self.group.told("sending round the ring"):
            for work in self.works:
                work.wait()
        self.works = []


class Group:
    """One rank's view of the ranks that share a context.

    Attributes:
        rank: this one, from 0.
        size: how many there are.
        device: where its tensors lie.
        sent: bytes that this rank has sent, by operation.
        timeout: seconds that a rank may take to answer.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        assert (process_group is None) == (size == 1), "several ranks have a process group, one has none"
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.sent: Counter[str] = Counter()
        self._processes = process_group

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Group:
        """Return a group of one rank."""
        return cls(0, 1, torch.device(device))

    @classmethod
    def start(
        cls,
        device: str | None = None,
        *,
        timeout: float = TIMEOUT,
        address: str = "env://",
        rank: int = -1,
        size: int = -1,
    ) -> Group:
        """Join the ranks that torchrun has started, or those that meet at an address.

        Args:
            device: `cuda`, `cpu`, or None: GPUs where there are any. Rank r of a host takes its GPU number r.
            timeout: seconds that a rank may take to answer.
            address: where ranks meet; the default is what torchrun has set.
            rank: which one this is, where torchrun has not said.
            size: how many there are, likewise.

        Raises:
            UsageError: ranks were not started together, or a host has fewer GPUs than ranks.
            ParallelError: the others did not come in time.
        """
        if address == "env://" and not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UsageError(
                "several ranks are started together: put `torchrun --nproc-per-node 2 -m` before the module"
            )
        on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
        local = dist.get_node_local_rank(0) if on_gpu else 0
        if on_gpu and local >= torch.cuda.device_count():
            raise UsageError(
                f"rank {local} of this host has no GPU of its own: start {torch.cuda.device_count()} a host"
            )
        place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        options = None
        if on_gpu:
            torch.cuda.set_device(place)
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = True  # what is sent beside compute must not queue behind it
            options._timeout = datetime.timedelta(seconds=timeout)  # another than the group's own is warned of
        with _told("meeting the other ranks", timeout):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=address,
                timeout=datetime.timedelta(seconds=timeout),
                rank=rank,
                world_size=size,
                pg_options=options,
                device_id=place if on_gpu else None,
            )
        if dist.get_world_size() == 1:
            return cls(0, 1, place, timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), place, dist.group.WORLD, timeout)

    def subgroup(self, ranks: Sequence[int]) -> Group | None:
        """Return the group of some of these ranks, None on the others; all of them must call it, in one order."""
        if self._processes is None:
            return self if 0 in ranks else None
        members = [dist.get_global_rank(self._processes, rank) for rank in ranks]
        with self.told("making a smaller group"):
            made = dist.new_group(members, timeout=datetime.timedelta(seconds=self.timeout))
        if self.rank not in ranks:
            return None
        alone = len(members) == 1
        return Group(list(ranks).index(self.rank), len(members), self.device, None if alone else made, self.timeout)

    def close(self) -> None:
        """Leave: the last thing that a rank does with a group. That of all ranks takes every smaller one along."""
        if dist.is_initialized() and self._processes is not None:
            whole = self._processes is dist.group.WORLD
            dist.destroy_process_group(None if whole else self._processes)
        # Threads of a group that something still refers to as the program ends would end it with an abort.
        self._processes = None

    def told(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which what fails between ranks is told in one line (ParallelError)."""
        return _told(what, self.timeout, f"rank {self.rank} of {self.size}: ")

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Pending:
        """Begin to send tensors to the next rank of the ring and to receive the previous one's.

        Args:
            outgoing: contiguous tensors; a tensor without elements is not sent.
            incoming: what is received is written here: shapes and types as the previous rank sends them.
        """
        return self._send(outgoing, (self.rank + 1) % self.size, incoming, (self.rank - 1) % self.size, "ring")

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, `[P, ...]`; all have one shape."""
        if self._processes is None:
            return x.unsqueeze(0)
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        with self.told("gathering"):
            _GATHER(out.view(-1), x.view(-1), group=self._processes)
        self.sent["gather"] += (self.size - 1) * _bytes(x)
        return out

    def reduce(self, x: Tensor, operation: str = "sum") -> Tensor:
        """Replace x by the `sum`, `max` or `min` over all ranks, in place, and return it."""
        if self._processes is not None:
            with self.told("reducing"):
                dist.all_reduce(x, _OPERATIONS[operation], group=self._processes)
            self.sent["reduce"] += 2 * (self.size - 1) * _bytes(x) // self.size
        return x

    def broadcast(self, x: Tensor, source: int = 0, timeout: float | None = None) -> Tensor:
        """Replace x by the source rank's, in place, and return it.

        Args:
            x: contiguous, of one shape and type on all ranks.
            source: whose is taken.
            timeout: seconds that it may take (gloo); None: as long as everything else.
        """
        if self._processes is not None:
            options = dist.BroadcastOptions()
            options.rootRank = source
            if timeout is not None:
                options.timeout = datetime.timedelta(seconds=timeout)
            with self.told("broadcasting"):
                self._processes.broadcast([x], options).wait()
            self.sent["broadcast"] += _bytes(x) if self.rank == source else 0
        return x

    def deal(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Send piece r to rank r, and return what every rank sent here: all have the shape of this rank's own piece."""
        own = pieces[self.rank]
        out = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        asked = []
        for rank in others:
            peer = dist.get_global_rank(self._processes, rank) if self._processes is not None else 0
            if pieces[rank].numel():
                asked.append(dist.P2POp(dist.isend, pieces[rank], peer, self._processes))
            if own.numel():
                asked.append(dist.P2POp(dist.irecv, out[rank], peer, self._processes))
        self.sent["deal"] += sum(_bytes(pieces[rank]) for rank in others)
        with self.told("exchanging"):
            for work in dist.batch_isend_irecv(asked) if asked else []:
                work.wait()
        return out

    def send(self, x: Tensor, target: int) -> None:
        """Send a contiguous tensor to a rank that calls `receive` for it."""
        if x.numel():
            self._send([x], target, [], target, "send", receive=False)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Write what a rank sends into x, which has its shape and type and no gaps, and return it."""
        if x.numel():
            self._send([], source, [x], source, "send", send=False)
        return x

    def host(self) -> Group:
        """Return the same ranks for tensors in host memory; all of them must call it, in one order."""
        if self.device.type == "cpu" or self._processes is None:
            return self
        members = [dist.get_global_rank(self._processes, rank) for rank in range(self.size)]
        with self.told("making a group for the host"):
            made = dist.new_group(members, timeout=datetime.timedelta(seconds=self.timeout), backend="gloo")
        return Group(self.rank, self.size, torch.device("cpu"), made, self.timeout)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self._processes is not None:
            self.reduce(torch.zeros(1, device=self.device))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge every rank's partial output into the softmax over the keys of all, to the same bits on every rank.

        Few bytes are gathered in one message, which a CUDA graph can hold; many go through a tree: rank and partner
        exchange what they have merged, log2(P) times.

        Args:
            out: `[..., Dv]`, over this rank's keys alone; any float type.
            lse: `[...]`, natural logarithm, float32 or float64; -inf: it has none.

        Returns:
            `(out, lse)` in the type of `lse`.
        """
        packed = torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1)
        if self._processes is None:
            return packed[..., :-1], lse
        if (self.size * _bytes(packed)) <= GATHERED:
            return merge_packed(self.gather(packed))
        packed = self._merge_tree(packed)
        return packed[..., :-1], packed[..., -1]

    def _merge_tree(self, own: Tensor) -> Tensor:
        """Merge `[..., Dv + 1]` by recursive doubling; ranks beyond a power of two join a partner first."""
        whole = 1 << (self.size.bit_length() - 1)
        beyond = self.size - whole
        other = torch.empty_like(own)
        if self.rank >= whole:
            self._send([own], self.rank - whole, [other], self.rank - whole, "merge", receive=False)
        elif self.rank < beyond:
            self._send([own], self.rank + whole, [other], self.rank + whole, "merge", send=False)
            own = _merge_packed(own, other)
        step = 1
        while step < whole and self.rank < whole:
            self._send([own], self.rank ^ step, [other], self.rank ^ step, "merge")
            own = _merge_packed(own, other)
            step *= 2
        if self.rank >= whole:
            own = torch.empty_like(own)
            self._send([other], self.rank - whole, [own], self.rank - whole, "merge", send=False)
        elif self.rank < beyond:
            self._send([own], self.rank + whole, [other], self.rank + whole, "merge", receive=False)
        return own

    def _send(
        self,
        outgoing: Sequence[Tensor],
        target: int,
        incoming: Sequence[Tensor],
        source: int,
        operation: str,
        *,
        send: bool = True,
        receive: bool = True,
    ) -> Pending:
        """Begin to send and receive; what belongs to no ring is waited for."""
        if self._processes is None:
            for x, y in zip(outgoing, incoming, strict=True):
                y.copy_(x)
            return Pending(self)
        to, of = (dist.get_global_rank(self._processes, rank) for rank in (target, source))
        asked = []
        if send:
            asked += [dist.P2POp(dist.isend, x, to, self._processes) for x in outgoing if x.numel()]
            self.sent[operation] += sum(_bytes(x) for x in outgoing)
        if receive:
            asked += [dist.P2POp(dist.irecv, x, of, self._processes) for x in incoming if x.numel()]
        with self.told("sending"):
            pending = Pending(self, dist.batch_isend_irecv(asked) if asked else [])
        if operation != "ring":
            pending.wait()
        return pending


def _merge_packed(a: Tensor, b: Tensor) -> Tensor:
    out, lse = merged(a[..., :-1], a[..., -1], b[..., :-1], b[..., -1])
    return torch.cat([out, lse.unsqueeze(-1)], -1)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextlib.contextmanager
def _told(what: str, timeout: float, who: str = "") -> Iterator[None]:
    """Turn what a backend raises, which is a RuntimeError of no particular kind, into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ParallelError(
            f"{who}{what} failed, since a rank stopped or did not answer in {timeout:g} s: "
            f"start all ranks again ({first})"
        ) from error
