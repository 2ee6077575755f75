"""Weights in 4-bit codes: what lies on a grid is packed and loses nothing by it, what does not is left alone."""

import pytest
import torch

from longspan.hf import packed
from longspan.hf.packed import LOSSLESS, pack

pytestmark = pytest.mark.skipif(
    not packed.serves(torch.zeros(16, 32, dtype=torch.bfloat16)), reason="this PyTorch or CPU has no 4-bit product"
)


def grid(kind, rows, wide, seed=0):
    """Weights as a GGUF file of that kind holds them, float64."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, wide // 32, 32, generator=gen, dtype=torch.float64) * 0.1
    if kind == "q4_1":
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale, low = ((high - low) / 15).half().double(), low.half().double()
        return (low + ((x - low) / scale).round().clamp(0, 15) * scale).flatten(1)
    most = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    if kind == "q4_0":
        scale = (most / -8).half().double()
        return ((x / scale).round().clamp(-8, 7) * scale).flatten(1)
    scale = (most.abs() / 127).half().double()
    return ((x / scale).round() * scale).flatten(1)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind,bits", [("q4_1", 4), ("q4_0", 4), ("q8_0", 8)])
@pytest.mark.parametrize("shape", [(16, 32), (80, 96), (208, 2080), (1104, 576)])
def test_grids_are_found_and_kept(kind, bits, shape):
    weight = grid(kind, *shape)
    found = pack(weight.bfloat16())
    assert found is not None and found.bits == bits
    # The identity gives every weight back, rounded once by the product's type.
    for start in range(0, shape[1], 32):
        x = torch.eye(shape[1], dtype=torch.bfloat16)[start : start + 32]
        read = found(x).T
        torch.testing.assert_close(
            read.double(), weight[:, start : start + 32], atol=float(weight.abs().max()) * 2**-7, rtol=2**-6
        )
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = x.double() @ weight.T
    rounding = error(torch.nn.functional.linear(x, weight.bfloat16()), truth)
    assert error(found(x), truth) < 2 * rounding + 2**-9


def test_four_bits_are_fewer_bytes():
    weight = grid("q4_1", 576, 576).bfloat16()
    assert pack(weight).nbytes == weight.nbytes * 5 / 16  # 4 bits, and two half numbers for 32 of them
    assert pack(grid("q8_0", 576, 576).bfloat16()).nbytes == weight.nbytes * 5 / 8


@pytest.mark.parametrize("spread", ["even", "normal"])
def test_other_weights_are_packed_on_request_alone(spread):
    gen = torch.Generator().manual_seed(2)
    weight = torch.rand(64, 96, generator=gen) - 0.5 if spread == "even" else torch.randn(64, 96, generator=gen)
    assert pack(weight.bfloat16()) is None
    found = pack(weight.bfloat16(), lossy=True)
    assert found.bits == 8
    x = torch.randn(1, 96, generator=gen).bfloat16()
    lost = error(found(x), x.double() @ weight.double().T)
    assert LOSSLESS / 2 < lost < 4 * LOSSLESS


def test_one_row_off_the_grid_is_seen():
    weight = grid("q4_1", 256, 64)
    weight[200] = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert pack(weight.bfloat16()) is None


def test_groups_of_equal_weights_and_of_zeros():
    weight = grid("q4_1", 64, 64)
    weight[3, :32], weight[4] = 0.0, 0.25
    found = pack(weight.bfloat16())
    out = found(torch.ones(1, 64, dtype=torch.bfloat16))[0]
    assert found.bits == 4 and abs(float(out[4]) - 16) < 2**-4
    torch.testing.assert_close(out.double(), weight.sum(1), atol=0.05, rtol=2**-6)
    zeros = pack(torch.zeros(16, 32, dtype=torch.bfloat16))
    assert not zeros(torch.ones(1, 32, dtype=torch.bfloat16)).any()


def test_what_is_not_finite_is_not_packed():
    weight = grid("q4_1", 64, 64).bfloat16()
    for broken in ("nan", "inf"):
        weight[40, 0] = float(broken)
        assert pack(weight) is None and pack(weight, lossy=True) is None


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 32, dtype=torch.bfloat16),
        torch.zeros(16, 48, dtype=torch.bfloat16),
        torch.zeros(16, 32),
        torch.zeros(16, 32, dtype=torch.float16),
        torch.zeros(32, dtype=torch.bfloat16),
    ],
)
def test_shapes_and_types_that_the_kernel_does_not_take(weight):
    assert pack(weight) is None and pack(weight, lossy=True) is None
