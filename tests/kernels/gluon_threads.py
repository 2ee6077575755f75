"""Run a Gluon kernel whose warps have parts of their own on a CPU: every part is a thread, in PyTorch.

Gluon has no interpreter. What is kept of the hardware is what such a kernel can get wrong beside its arithmetic:
copies arrive late and out of order, products read shared memory until they are waited for, stores read it until then
too, and barriers have phases. A part that waits for what never comes ends with an error. Layouts are left out.
"""

from __future__ import annotations

import random
import threading
import time
import types

import torch

PATIENCE = 20.0
"""Seconds after which a wait is held to be for ever."""
_here = threading.local()


class Block(torch.Tensor):
    """A tensor in registers; `split` takes its last axis of two apart."""

    def split(self):
        return self[..., 0], self[..., 1]


class Descriptor:
    """A tensor that the copy engine knows: blocks beyond its edge are 0, or not written."""

    def __init__(self, base, shape, strides, block_shape, layout):
        assert list(base.shape) == list(shape) and list(base.stride()) == list(strides)
        self.base, self.block_shape, self.layout, self.dtype = base, block_shape, layout, base.dtype

    def _edges(self, at):
        return tuple(
            slice(int(a), min(int(a) + size, end))
            for a, size, end in zip(at, self.block_shape, self.base.shape, strict=True)
        )

    def read(self, at):
        found, block = self.base[self._edges(at)], torch.zeros(self.block_shape, dtype=self.dtype)
        block[tuple(slice(0, size) for size in found.shape)] = found
        return block

    def write(self, at, block):
        assert list(block.shape) == list(self.block_shape)
        where = self.base[self._edges(at)]
        where.copy_(block[tuple(slice(0, size) for size in where.shape)])


class Shared:
    """Shared memory; what was never written is not a number."""

    def __init__(self, data):
        self.data, self.shape = data, list(data.shape)

    def index(self, i):
        return Shared(self.data[int(i)])

    def slice(self, start, length, dim):
        return Shared(self.data.narrow(dim, int(start), int(length)))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def store(self, block):
        self.data.copy_(block)


class Barrier:
    """A phase is over when all have arrived and all bytes that are expected have."""

    def __init__(self):
        self.changed, self.phase = threading.Condition(), 0

    def init(self, count):
        self.count = self.missing = count
        self.bytes = 0

    def arrive(self, count=1, size=0):
        with self.changed:
            self.missing -= count
            self.bytes += size
            self._end()

    def landed(self, size):
        with self.changed:
            self.bytes -= size
            self._end()

    def _end(self):
        assert self.missing >= 0, "more arrivals than a phase has"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE), "waits for ever"


class Barriers:
    """An array of them."""

    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.all[int(i)]


class Pointer:
    """A pointer into a tensor."""

    def __init__(self, base, at=0):
        self.base, self.at = base, at

    def __add__(self, offset):
        return Pointer(self.base, self.at + int(offset))


def _bring(rows, at, barrier, place):
    def land():
        time.sleep(random.random() * 2e-3)
        block = rows.read(at)
        assert list(block.shape) == place.shape
        place.data.copy_(block)
        barrier.landed(block.numel() * block.element_size())

    threading.Thread(target=land, daemon=True).start()


def _write(rows, at, place):
    _here.stores.append(lambda: rows.write(at, place.data))


def _stored(pending):
    while len(_here.stores) > pending:
        _here.stores.pop(0)()


def _multiply(a, b, out, is_async=False):
    _here.products.append(lambda: out.add_((a.data.double() @ b.data.double()).to(out.dtype)))
    return out


def _multiplied(pending, deps):
    while len(_here.products) > pending:
        _here.products.pop(0)()
    return deps[0]


def _language(program, programs):
    def specialise(parts, warps, registers):
        failures = []

        def run(part, arguments):
            _here.stores, _here.products = [], []
            try:
                part(*arguments)
                assert not _here.stores and not _here.products, "a part ends before what it began"
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def shared(kind, shape, layout):
        return Barriers(shape[0]) if kind is int else Shared(torch.full(shape, float("nan"), dtype=kind))

    return types.SimpleNamespace(
        constexpr=int, int64=int, float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16,
        program_id=lambda axis: program, num_programs=lambda axis: programs, static_range=range,
        cdiv=lambda a, b: -(-a // b), load=lambda p: int(p.base.flatten()[p.at]), where=torch.where, exp=torch.exp,
        zeros=lambda shape, kind, layout: torch.zeros(shape, dtype=kind).as_subclass(Block),
        allocate_shared_memory=shared, warp_specialize=specialise,
        NVMMADistributedLayout=lambda **_: None,
    )  # fmt: skip


def launch(module, kernel, programs, *arguments, **constants):
    """Run a module's kernel, one program after the other; tensors become pointers."""
    given = [Pointer(one) if isinstance(one, torch.Tensor) else one for one in arguments]
    constants.pop("num_warps", None)
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None, init=lambda b, count: b.init(count), wait=lambda b, parity: b.wait(parity),
        expect=lambda b, size: b.arrive(size=size), arrive=lambda b, count: b.arrive(count),
    )  # fmt: skip
    for program in range(programs):
        names = dict(vars(module))
        names |= {"gl": _language(program, programs), "mbarrier": mbarrier, "fence_async_shared": lambda: None}
        names |= {"tma": types.SimpleNamespace(store_wait=_stored), "_bring_rows": _bring, "_write_rows": _write}
        names |= {"warpgroup_mma": _multiply, "warpgroup_mma_wait": _multiplied}
        for name, value in vars(module).items():
            if isinstance(getattr(value, "fn", None), types.FunctionType):
                names[name] = plain(value, names)
        plain(kernel, names)(*given, **constants)


def plain(jitted, names):
    """Return the Python function that is compiled, where its globals are `names`."""
    return types.FunctionType(jitted.fn.__code__, names, jitted.fn.__name__, jitted.fn.__defaults__)
