"""Every version of the causal convolution against a loop over tokens and taps."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.causal_conv import causal_conv, causal_conv_step, reference

pytest.importorskip("triton")
from longspan.kernels.causal_conv import triton_kernels
from longspan.kernels.causal_conv.triton_kernels import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = Tile(4, 16, 2, 4)
SIZES = [
    # batch, tokens, channels, taps
    (1, 1, 1, 4),
    (2, 2, 5, 4),
    (1, 3, 20, 4),
    (2, 17, 18, 4),
    (1, 8, 16, 2),
    (1, 11, 20, 1),
    (2, 9, 17, 6),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def inputs(batch, tokens, channels, taps, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    x, state = normal(batch, tokens, channels), normal(batch, channels, taps - 1)
    return x, normal(channels, taps), normal(channels), state


def loop(x, weight, bias, state, silu):
    """In float64, one token and tap after another."""
    x, weight, taps = x.double(), weight.double(), weight.shape[1]
    seen = torch.cat([state.double().mT, x], 1)  # [B, W - 1 + T, C]
    y = torch.full_like(x, float("nan"))
    for t in range(x.shape[1]):
        y[:, t] = 0.0 if bias is None else bias.double()
        for w in range(taps):
            y[:, t] += weight[:, w] * seen[:, t + w]
    return (y / (1 + torch.exp(-y)) if silu else y), seen[:, x.shape[1] :].mT


@pytest.mark.parametrize("dtype,sizes", [(torch.float32, SIZES), *((kind, SIZES[2:4]) for kind in TOLERANCE)], ids=str)
def test_every_version_equals_a_loop(dtype, sizes):
    for size in sizes:
        compare(size, dtype)


def compare(size, dtype):
    x, weight, bias, state = inputs(*size, dtype)
    versions = [reference.causal_conv, causal_conv]
    if dtype != torch.float64:
        versions += [triton_kernels.causal_conv, lambda *given, **rest: triton_kernels.causal_conv(
            *given, **rest, tile=SMALL)]  # fmt: skip
    for silu, some_bias, some_state in [(True, bias, state), (False, None, None)]:
        wanted = loop(x, weight, some_bias, torch.zeros_like(state) if some_state is None else state, silu)
        for version in versions:
            found = version(x, weight, some_bias, some_state, activation="silu" if silu else None)
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_token_by_token_equals_all_at_once(size):
    x, weight, bias, state = inputs(*size, torch.float32)
    wanted, newest = loop(x, weight, bias, state, True)
    for version in (reference.causal_conv_step, causal_conv_step, triton_kernels.causal_conv_step):
        held = state.clone()
        for t in range(x.shape[1]):
            y = version(x[:, t], weight, bias, held, activation="silu")
            torch.testing.assert_close(y.double(), wanted[:, t], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(held.double(), newest, atol=0, rtol=0)


@pytest.mark.parametrize("version", [reference.causal_conv, triton_kernels.causal_conv])
def test_any_pieces_equal_all_at_once(version):
    x, weight, bias, state = inputs(2, 23, 20, 4, torch.float32)
    wanted, newest = version(x, weight, bias, state)
    held, found, start = state, [], 0
    for size in (1, 2, 0, 9, 3, 8):
        y, held = version(x[:, start : start + size], weight, bias, held)
        found.append(y)
        start += size
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(held, newest)


def test_inputs_may_be_views_and_the_future_is_not_read():
    wide, weight, bias, state = inputs(2, 23, 50, 4, torch.float32)
    x = wide[..., 7:40]
    given = (weight[7:40], bias[7:40], state.mT.contiguous().mT[:, 7:40])
    for version in (reference.causal_conv, triton_kernels.causal_conv):
        whole = version(x, *given)
        torch.testing.assert_close(whole[0].double(), loop(x, *given, True)[0], atol=2e-6, rtol=2e-6)
        spoilt = wide.clone()
        spoilt[:, 12:] = float("nan")
        spoilt[..., :7] = float("nan")
        y, _ = version(spoilt[..., 7:40], *given)
        assert torch.equal(y[:, :12], whole[0][:, :12]) and y[:, 12:].isnan().all()
