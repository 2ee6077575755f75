"""What pages should hold, as plain lists of rows: the model that pools and page tables are tested against.

Nothing here knows slots, references or budgets. Quantisation to fp8 is done again from its definition: e4m3 by
looking for the nearest of its 127 magnitudes. That of integers is the formats' own (test_integers.py tests it).
"""

import torch

from longspan.kv import formats
from longspan.kv.base import PAGE

HEADS, DIM, VALUE_DIM, BLOCK = 2, 4, 3, 16
SUMMARIES = ("lowest", "mean_value", "highest_rotated")
BITS = {"fp32": 32, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2, "summary": 0}

MAGNITUDES = torch.tensor(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1],
    dtype=torch.float64,
)
"""The magnitudes of e4m3 in order of their codes: 3 bits of mantissa, exponents -6 to 8, the last pattern is NaN."""


def rows_of(first, count, dim, seed):
    """Rows `[2, n, dim]` in float32 that differ for every token, head and channel; scales differ from page to page."""
    at = torch.arange(first, first + count, dtype=torch.float64).view(1, -1, 1)
    head, channel = torch.arange(HEADS).view(-1, 1, 1), torch.arange(dim)
    return (torch.sin(at * 1.7 + head * 10 + channel * 3.1 + seed) * (1 + at % 97)).float()


def nearest_e4m3(x):
    """The e4m3 number nearest to x (float64, at most 448), ties to the even code."""
    above = torch.searchsorted(MAGNITUDES, x.abs().contiguous()).clamp(1, len(MAGNITUDES) - 1)
    low, high = MAGNITUDES[above - 1], MAGNITUDES[above]
    up = x.abs() - low
    down = high - x.abs()
    take_high = (up > down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_high, high, low) * x.sign()


def written_as(spec, page, what):
    """A page `[2, PAGE, dim]` of keys or values as it comes back from a format."""
    name, _, _ = spec.partition(":")
    if name == "fp32":
        return page
    if name.startswith("int"):
        made = formats.parse(spec)
        return made.decode(*made.encode(page.unsqueeze(1), what), what, page.shape[2], page.dtype)[:, 0]
    if name == "fp16":
        return page.half().float()
    assert name == "fp8"
    scale = (page.abs().amax((1, 2), keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    return nearest_e4m3((page / scale).double()).float() * scale


class PlainContext:
    """One context: the rows that can be read, exact rows kept aside, and summaries as they were when blocks filled."""

    def __init__(self, full_format, rotary):
        self.full_format, self.rotary = full_format, rotary
        self.policy = formats.parse(full_format)
        self.written = self.fresh = 0  # pages before them were looked at, at a commit and between commits
        self.k, self.v = torch.zeros(HEADS, 0, DIM), torch.zeros(HEADS, 0, VALUE_DIM)
        self.held = []  # how each page is held: a format, or "summary"
        self.host = {}  # page: what it was held as, and its (k, v) then
        self.blocks = {what: [] for what in SUMMARIES}
        self.committed = 0

    @property
    def length(self):
        return self.k.shape[1]

    def copy(self):
        other = PlainContext(self.full_format, self.rotary)
        other.__dict__.update(self.__dict__)
        other.held, other.host = list(self.held), dict(self.host)
        other.blocks = {what: list(rows) for what, rows in self.blocks.items()}
        return other

    def page(self, page):
        return self.k[:, page * PAGE : (page + 1) * PAGE], self.v[:, page * PAGE : (page + 1) * PAGE]

    def put(self, page, k, v):
        self.k, self.v = self.k.clone(), self.v.clone()
        self.k[:, page * PAGE : page * PAGE + k.shape[1]] = k
        self.v[:, page * PAGE : page * PAGE + v.shape[1]] = v

    def can_append(self):
        half = self.length // PAGE
        return self.length % PAGE == 0 or self.held[half] != "summary" or half in self.host

    def append(self, k, v):
        before, after = self.length, self.length + k.shape[1]
        page, offset = divmod(before, PAGE)
        if not k.shape[1]:
            return
        if offset:
            self._reopen(page, offset)
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.held += ["fp32"] * (-(-after // PAGE) - len(self.held))
        for block in range(before // BLOCK, after // BLOCK):
            rows = slice(block * BLOCK, (block + 1) * BLOCK)
            rotated = self.rotary(self.k[:, rows], torch.arange(rows.start, rows.stop))
            self.blocks["lowest"].append(self.k[:, rows].min(1).values)
            self.blocks["mean_value"].append(self.v[:, rows].sum(1) / BLOCK)
            self.blocks["highest_rotated"].append(rotated.max(1).values)

    def due(self, first):
        """Pages from `first` on that are old enough to be written in the format, and one after the last to look at."""
        if self.full_format == "fp32":
            return [], first
        stop = max(0, (self.length - self.policy.residual) // PAGE)
        first = max(first, -(-self.policy.sinks // PAGE))
        return [page for page in range(first, stop) if self.held[page] == "fp32"], max(first, stop)

    def due_now(self):
        """Those of them that an append writes down: what is new since the commit."""
        return self.due(max(self.fresh, -(-self.committed // PAGE)))

    def _reopen(self, page, offset):
        if self.held[page] != "fp32":
            if page in self.host:
                _, (k, v) = self.host.pop(page)
                self.put(page, k[:, :offset], v[:, :offset])
            self.held[page] = "fp32"

    def rewrite(self, page, name):
        parts = self.host[page][1] if page in self.host else self.page(page)
        spec = self.full_format if name == self.policy.name else name
        self.put(page, *(written_as(spec, part, what) for part, what in zip(parts, "kv", strict=True)))
        self.held[page] = name

    def truncate(self, length):
        keep = -(-length // PAGE)
        self.k, self.v, self.held = self.k[:, :length], self.v[:, :length], self.held[:keep]
        self.host = {page: kept for page, kept in self.host.items() if page < keep}
        self.written, self.fresh = min(self.written, length // PAGE), min(self.fresh, length // PAGE)
        self.blocks = {what: rows[: length // BLOCK] for what, rows in self.blocks.items()}

    def drop(self, pages):
        for page in pages:
            self.held[page] = "summary"
            self.host.pop(page, None)

    def demote(self, pages, to, keep_exact):
        for page in pages:
            if BITS[self.held[page]] <= BITS[to]:
                continue
            if keep_exact and page not in self.host:
                self.host[page] = self.held[page], tuple(part.clone() for part in self.page(page))
            if to == "summary":
                self.held[page] = to
            else:
                self.rewrite(page, to)
            if not keep_exact:
                self.host.pop(page, None)

    def promote(self, pages, to=None):
        for page in pages:
            name, parts = self.host[page] if to else self.host.pop(page)
            filled = min(PAGE, self.length - page * PAGE)
            spec = self.full_format if to == self.policy.name else to
            parts = [
                part if to is None else written_as(spec, part, what) for part, what in zip(parts, "kv", strict=True)
            ]
            self.put(page, *(part[:, :filled] for part in parts))
            self.held[page] = to or name
