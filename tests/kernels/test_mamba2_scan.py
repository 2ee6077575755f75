"""Every version of Mamba-2's scan against its recurrence, one token after another in float64."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.mamba2 import reference, scan

pytest.importorskip("triton")
from longspan.kernels.mamba2 import triton_scan
from longspan.kernels.mamba2.triton_scan import ScanTile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = [ScanTile(16, 16, 4, 1, segments) for segments in (1, 3)]
"""The interpreter's time goes by blocks: small ones have whole chunks, a rest and several segments at small sizes."""
SIZES = [
    # batch, tokens, heads, head dim, groups, state
    (1, 1, 1, 1, 1, 1),
    (2, 17, 2, 16, 1, 16),
    (1, 37, 2, 20, 2, 24),
    (1, 48, 3, 16, 3, 8),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter's bfloat16 dot is wrong
if CUDA:
    SMALL.append(None)
    SIZES += [(1, 4097, 64, 64, 8, 128), (2, 700, 24, 64, 1, 256), (1, 1000, 48, 64, 1, 128)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def inputs(batch, tokens, heads, dim, groups, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, kind)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = -torch.exp(normal(heads, kind=wide))
    given = {
        "D": normal(heads), "dt_bias": normal(heads), "state": normal(batch, heads, dim, size, kind=wide),
    }  # fmt: skip
    x, dt = normal(batch, tokens, heads, dim), normal(batch, tokens, heads)
    return (x, dt, a, normal(batch, tokens, groups, size), normal(batch, tokens, groups, size)), given


def loop(x, dt, a, b, c, D=None, dt_bias=None, state=None, dt_limit=(0.0, float("inf"))):
    """The recurrence, in float64."""
    x, dt, a, b, c = (z.double() for z in (x, dt, a, b, c))
    each = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(each, 2), c.repeat_interleave(each, 2)
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    dt = torch.log1p(torch.exp(dt)).clamp(*dt_limit)
    held = torch.zeros(*x.shape[:1], *x.shape[2:], b.shape[3], dtype=torch.float64, device=x.device)
    held = held if state is None else state.double().clone()
    y = torch.full_like(x, float("nan"))
    for t in range(x.shape[1]):
        held *= torch.exp(dt[:, t] * a)[..., None, None]
        held += dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None, :]
        y[:, t] = (held * c[:, t, :, None, :]).sum(-1)
        if D is not None:
            y[:, t] += D.double()[:, None] * x[:, t]
    return y, held


def close(found, wanted, tolerance):
    """By norm: outputs are sums of many products, some of which nearly cancel."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_every_version_equals_the_recurrence(size, dtype):
    given, rest = inputs(*size, dtype)
    wanted = loop(*given, **rest)
    for version in {reference.scan, scan} if CUDA else {scan}:  # on a CPU both are one
        y, state = version(*given, **rest)
        assert y.dtype == dtype and state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        close((y, state), wanted, TOLERANCE[dtype])
    if dtype != torch.float64:
        for tile in SMALL if CUDA or dtype == torch.float32 else SMALL[1:]:
            found = triton_scan.scan(*given, **rest, tile=tile)
            close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("version", [reference.scan, triton_scan.scan])
def test_what_is_not_given_and_limits(version):
    cut = {"chunk": 16} if version is reference.scan else {"tile": SMALL[1]}
    given, rest = inputs(1, 20, 2, 16, 1, 16, torch.float32)
    close(version(*given, **cut), loop(*given), 2e-6)
    limit = (0.5, 0.9)
    close(version(*given, **rest, dt_limit=limit, **cut), loop(*given, **rest, dt_limit=limit), 2e-6)


@pytest.mark.parametrize("version", [reference.scan, triton_scan.scan])
def test_any_pieces_equal_all_at_once(version):
    cut = {"chunk": 16} if version is reference.scan else {"tile": SMALL[1]}
    (x, dt, a, b, c), rest = inputs(2, 40, 2, 16, 2, 16, torch.float32)
    wanted = version(x, dt, a, b, c, **rest, **cut)
    before, held, found, start = rest["state"].clone(), rest.pop("state"), [], 0
    first = held
    for size in (1, 16, 0, 20, 3):
        here = slice(start, start + size)
        y, held = version(x[:, here], dt[:, here], a, b[:, here], c[:, here], state=held, **rest, **cut)
        found.append(y)
        start += size
    close((torch.cat(found, 1), held), (wanted[0].double(), wanted[1].double()), 1e-6)
    assert torch.equal(first, before), "the state that was given is the caller's"


def test_inputs_may_be_views_of_one_projection():
    generator = torch.Generator().manual_seed(5)
    heads, dim, groups, size = 2, 16, 2, 16
    sizes = [heads * dim, groups * size, groups * size, heads]
    wide = torch.randn(2, 20, 16 + sum(sizes), generator=generator).to(DEVICE, torch.float16)
    x, b, c, dt = wide[..., 16:].split(sizes, -1)
    x, b, c = x.unflatten(-1, (heads, dim)), b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size))
    a = -torch.rand(heads, generator=generator).to(DEVICE) - 0.1
    wanted = loop(x, dt, a, b, c)
    for engine in (False, True):
        close(triton_scan.scan(x, dt, a, b, c, tile=SMALL[1], engine=engine), wanted, 2e-3)


@pytest.mark.parametrize("version", [reference.scan, triton_scan.scan])
def test_time_steps_of_any_size(version):
    """Tiny steps are not lost, and huge ones forget all before them and nothing after."""
    cut = {"chunk": 16} if version is reference.scan else {"tile": SMALL[0]}
    (x, dt, a, b, c), rest = inputs(1, 32, 1, 16, 1, 16, torch.float32)
    dt = dt - 12.0
    dt[:, 7] = 500.0
    dt[:, 20] = 30.0
    wanted = loop(x, dt, a, b, c, state=rest["state"])
    found = version(x, dt, a, b, c, state=rest["state"], **cut)
    close(found, wanted, 2e-6)
    assert found[0][:, :7].abs().min() > 0


def test_the_future_is_not_read_beyond_the_chunk():
    given, rest = inputs(1, 40, 1, 16, 1, 16, torch.float32)
    spoilt = [z.clone() for z in given]
    for at in (0, 1, 3, 4):
        spoilt[at][:, 32:] = float("nan")
    for tile in SMALL[:2]:
        y, _ = triton_scan.scan(*given, **rest, tile=tile)
        again, state = triton_scan.scan(*spoilt, **rest, tile=tile)
        assert torch.equal(y[:, :32], again[:, :32]) and state.isnan().all()
    y, _ = reference.scan(*spoilt, **rest, chunk=16)
    assert y[:, :32].isfinite().all()
