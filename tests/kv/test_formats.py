"""Formats: error bounds, values that are hard to write down, what is refused, and room for more of them."""

import pytest
import torch
from plain_pages import nearest_e4m3

from longspan.errors import UnknownNameError, UsageError
from longspan.kv import formats
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool

CPU = torch.device("cpu")
FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pages(seed, count=6, dim=16, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-4, 3, count).view(1, -1, 1, 1)
    return (torch.randn(2, count, PAGE, dim, generator=gen) * spread).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fp8_comes_back_within_its_bound_and_no_better(dtype):
    x = pages(0, dtype=dtype)
    fp8 = formats.named("fp8")
    codes, scales = fp8.encode(x, "k")
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert scales.shape == (2, 6, 1, 1) and scales.dtype == torch.float32
    wanted = x.double()
    greatest = wanted.abs().amax((2, 3), keepdim=True)
    torch.testing.assert_close(scales.double(), greatest / 448, rtol=1e-6, atol=0)
    error = (fp8.decode(codes, scales, "k", 16, torch.float64) - wanted).abs()
    # Steps of 3 bits of mantissa are 1/8 of the power of two below: worst is the tie at 1 + 1/16, off by 1/16. Below
    # 2^-6 (scaled) steps are 2^-9.
    bound = torch.maximum(wanted.abs() / 17, greatest / 448 * 2.0**-10) * (1 + 1e-5)
    assert (error <= bound).all()
    normal = wanted.abs() > greatest / 448 * 2.0**-6
    assert (error > wanted.abs() / 18)[normal].any(), "the bound would be loose"
    # The largest number of a page is a code of its own.
    peak = wanted.abs() == greatest
    assert (error <= wanted.abs() * 2.0**-22)[peak].all(), "but for the scale's own rounding to float32"


def test_fp8_is_the_nearest_of_its_numbers():
    x = pages(1)
    fp8 = formats.named("fp8")
    codes, scales = fp8.encode(x, "v")
    back = fp8.decode(codes, scales, "v", 16, torch.float32)
    assert torch.equal(back, nearest_e4m3((x / scales).double()).float() * scales)


def test_fp8_of_hard_pages():
    fp8 = formats.named("fp8")
    x = torch.zeros(1, 4, PAGE, 2)
    x[0, 1, 3, 1], x[0, 1, 4, 0] = float("nan"), -2.0
    x[0, 2, 0, 0], x[0, 2, 1, 0], x[0, 2, 2, 1] = float("inf"), -float("inf"), 5.0
    x[0, 3, 7, 1] = 1e-44
    back = fp8.decode(*fp8.encode(x, "k"), "k", 2, torch.float32)
    assert torch.equal(back[0, 0], x[0, 0]), "zeros stay zeros"
    assert back[0, 1].isnan().sum() == 1 and back[0, 1, 3, 1].isnan() and back[0, 1, 4, 0] == -2.0
    assert back[0, 2, 0, 0] == 5.0 and back[0, 2, 1, 0] == -5.0 and back[0, 2, 2, 1] == 5.0
    assert back[0, 3].isfinite().all() and back[0, 3].abs().max() < 1e-40


def test_scales_belong_to_a_page_a_head_and_to_keys_or_values_apart():
    pool = PagePool(2, 4, 3, torch.float32, CPU, kv_format="fp8")
    kv = PagedKV(pool)
    k, v = torch.ones(1, 2, 2 * PAGE, 4), torch.ones(1, 2, 2 * PAGE, 3)
    k[:, 1] *= 1000
    k[:, :, PAGE:] *= 1e-6
    kv.append(k, 7 * v)
    kv.commit()
    torch.testing.assert_close(kv.keys(0, 2 * PAGE), k)
    torch.testing.assert_close(kv.values(0, 2 * PAGE), 7 * v)
    assert [kv.resolution(page) for page in (0, 1)] == ["fp8", "fp8"]


@pytest.mark.parametrize("name,dtype", FLOATS.items())
def test_a_float_type_holds_itself_exactly(name, dtype):
    made = formats.format_for(dtype)
    assert made.name == name and made is formats.format_of(None, dtype) is formats.format_of(name, dtype)
    x = pages(2, dtype=dtype)
    codes, scales = made.encode(x, "k")
    assert codes.dtype == dtype and torch.equal(made.decode(codes, scales, "k", 16, dtype), x)
    assert made.page_bytes("k", 2, 16) == x[:, :1].nbytes


def test_a_narrower_float_type_saturates():
    x = torch.full((1, 1, PAGE, 2), 1e9)
    x[0, 0, 0] = torch.tensor([-1e30, float("nan")])
    made = formats.format_of("fp16", torch.float32)
    back = made.decode(*made.encode(x, "k"), "k", 2, torch.float32)
    assert back[0, 0, 1, 0] == 65504 and back[0, 0, 0, 0] == -65504 and back[0, 0, 0, 1].isnan()


@pytest.mark.parametrize("dtype", FLOATS.values())
def test_an_unknown_format_is_told_those_that_can_be_given(dtype):
    with pytest.raises(UnknownNameError, match=r"'fp9': use one of auto, .*fp8") as caught:
        PagePool(1, 2, 2, dtype, CPU, kv_format="fp9")
    told = str(caught.value).partition("use one of ")[2].split(", ")
    for name in told:
        assert PagePool(1, 2, 2, dtype, CPU, kv_format=name).format.bits <= 8 * dtype.itemsize
    for name in set(formats.names()) - set(told):
        with pytest.raises(UsageError, match=f"use one of {', '.join(told)}"):
            PagePool(1, 2, 2, dtype, CPU, kv_format=name)


def test_a_page_is_demoted_to_a_known_format():
    kv = PagedKV(PagePool(1, 2, 2, torch.float32, CPU))
    with pytest.raises(UnknownNameError, match="'fp9'"):
        kv.demote([], "fp9")


@pytest.mark.parametrize(
    "name,dtype",
    [("fp32", torch.bfloat16), ("fp32", torch.float16), ("fp16", torch.bfloat16), ("bf16", torch.float16),
     ("fp64", torch.float32)],
)  # fmt: skip
def test_a_format_that_does_not_suit_the_type_is_refused(name, dtype):
    with pytest.raises(UsageError, match=f"'{name}' does not suit.*use .*fp8"):
        PagePool(1, 2, 2, dtype, CPU, kv_format=name)


def test_a_type_that_no_format_holds_is_refused():
    with pytest.raises(UsageError, match="float32, float16 or bfloat16"):
        PagePool(1, 2, 2, torch.int32, CPU)


class Int4(formats.Format):
    """Two numbers a byte; keys have a scale a channel, values one a token: what integer formats need of a pool."""

    name = "int4-test"
    code_dtype = torch.uint8
    scale_dtype = torch.float16
    bits = 4

    def code_dim(self, what, dim):
        return dim // 2

    def scale_shape(self, what, dim):
        return (1, dim) if what == "k" else (PAGE, 1)

    def encode(self, x, what):
        scales = (x.abs().amax(2 if what == "k" else 3, keepdim=True) / 7).half()
        codes = (torch.round(x / scales) + 8).to(torch.uint8)
        return codes[..., ::2] * 16 + codes[..., 1::2], scales

    def decode(self, codes, scales, what, dim, dtype):
        numbers = torch.stack([codes // 16, codes % 16], -1).flatten(-2).to(dtype) - 8
        return numbers * scales.to(dtype)


def test_another_format_needs_no_change_elsewhere(monkeypatch):
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    formats.register(Int4())
    with pytest.raises(UsageError, match="registered already"):
        formats.register(Int4())
    pool = PagePool(2, 6, 4, torch.float32, CPU, kv_format="int4-test")
    kv = PagedKV(pool)
    gen = torch.Generator().manual_seed(3)
    # Numbers that the format holds exactly: whole multiples of each channel's, or token's, scale.
    k = torch.randint(-7, 8, (1, 2, 150, 6), generator=gen) * torch.tensor([1.0, 2, 0.5, 4, 8, 0.25])
    k[:, :, [0, PAGE]] = 7 * torch.tensor([1.0, 2, 0.5, 4, 8, 0.25])
    v = torch.randint(-7, 8, (1, 2, 150, 4), generator=gen).float()
    v[..., 0] = 7
    v *= 2.0 ** torch.randint(-3, 4, (1, 2, 150, 1), generator=gen)
    for start in range(0, 150, 37):
        kv.append(k[:, :, start : start + 37], v[:, :, start : start + 37])
        kv.commit()
    assert [kv.resolution(page) for page in range(3)] == ["int4-test", "int4-test", "fp32"]
    assert torch.equal(kv.keys(10, 140), k[:, :, 10:140]) and torch.equal(kv.values(10, 140), v[:, :, 10:140])
    index = torch.tensor([[149, 3, 64], [70, 0, 131]])
    picked_k, picked_v = kv.gather(index.unsqueeze(0), rotated=False)
    for head in range(2):
        assert torch.equal(picked_k[0, head], k[0, head, index[head]])
        assert torch.equal(picked_v[0, head], v[0, head, index[head]])
    other = PagedKV(PagePool(2, 6, 4, torch.float32, CPU, kv_format="int4-test"))
    other.restore("", 150, kv.tensors(""))
    assert torch.equal(other.keys(0, 150), k) and torch.equal(other.values(0, 150), v)
