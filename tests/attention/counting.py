"""A layer of any length that needs no memory for it, and counts every key and summary that a mechanism touches."""

import math
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.kv.base import PAGE, LayerKV

_VIEWS = {"view", "expand", "unsqueeze", "flatten", "__getitem__", "transpose", "mT", "movedim", "detach", "to"}
_ROWS = {"gather", "index_select"}


class Counted(torch.Tensor):
    """Counts the numbers that are used: views are free, picking rows counts those, all else counts every one."""

    @staticmethod
    def wrap(tensor, count):
        counted = tensor.as_subclass(Counted)
        counted.count = count
        return counted

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, Counted)]
        count = given[0].count
        if not isinstance(out, torch.Tensor):
            assert not (isinstance(out, tuple) and any(isinstance(part, torch.Tensor) for part in out)), name
            return out
        indexed = name == "__getitem__" and any(isinstance(i, torch.Tensor) for i in _tuple(args[1]))
        if name in _ROWS or indexed:
            count(out.numel())
            return out.as_subclass(torch.Tensor)
        if name in _VIEWS or out.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr():
            return Counted.wrap(out, count)
        for tensor in given:
            tensor.count(tensor.numel())
        return out.as_subclass(torch.Tensor)


def _tuple(index):
    return index if isinstance(index, tuple) else (index,)


class CountingKV(LayerKV):
    """n tokens of one KV head; a key depends on its index alone. `touched` counts keys and summaries by kind.

    Queries must be float64, so that the plain reference attends, which multiplies by every key that it reads once.
    """

    rotary = None

    def __init__(self, n, dim=8):
        self.n, self.dim, self.touched = n, dim, {}
        self._summaries = {}

    def _counter(self, kind):
        def count(numbers):
            self.touched[kind] = self.touched.get(kind, 0) + numbers // self.dim

        return count

    def _made(self, index, salt):
        """Rows that look random, `[..., D]`."""
        phase = index.double().unsqueeze(-1) * 0.6180339887 * (torch.arange(self.dim) + 1 + salt) * math.pi
        return torch.sin(phase % (2 * math.pi)).float()

    @property
    def length(self):
        return self.n

    def _range(self, start, stop, kind):
        # Memory for one row; a mechanism that reads all of it is found by the count.
        rows = self._made(torch.tensor([start]), 0 if kind == "keys" else 50).expand(1, 1, stop - start, self.dim)
        return Counted.wrap(rows, self._counter(kind))

    def keys(self, start, stop):
        return self._range(start, stop, "keys")

    def values(self, start, stop):
        return self._range(start, stop, "values")

    def gather_keys(self, index):
        self._counter("keys")(index.numel() * self.dim)
        return self._made(index, 0)[None, None]

    def gather_values(self, index):
        self._counter("values")(index.numel() * self.dim)
        return self._made(index, 50)[None, None]

    def gather(self, index, *, rotated):
        self._counter("keys")(index.numel() * self.dim)
        self._counter("values")(index.numel() * self.dim)
        return self._made(index, 0), self._made(index, 50)

    def summary(self, what, block=PAGE):
        if (what, block) not in self._summaries:
            salt = {"mean_key": 3, "mean_value": 4, "lowest": 5, "highest": 6}[what] * 10 + block % 7
            made = self._made(torch.arange(self.n // block), salt)[None, None]
            self._summaries[what, block] = made
        return Counted.wrap(self._summaries[what, block], self._counter(what))


def slope(lengths, counts):
    """The exponent of growth: the least-squares slope of log count over log length."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (lengths, counts))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


class Operators(TorchDispatchMode):
    """Counts the numbers that PyTorch's operators read and write, whoever calls them.

    Views are free; what picks rows of a tensor reads those alone.
    """

    PICKS: ClassVar[set[str]] = {"aten::index", "aten::index_select", "aten::embedding", "aten::gather"}

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = out if func._schema.name in self.PICKS else (args, kwargs)
            self.numbers += sum(x.numel() for x in tree_leaves((read, out)) if isinstance(x, torch.Tensor))
        return out
