"""Integer formats: every bound that is claimed, for numbers that are hard to write down, and bytes to the last one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import UnknownNameError, UsageError
from longspan.kv import formats, hadamard
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool

CPU = torch.device("cpu")
NAMES = ("int8", "int4", "int3", "int2")
UNLIKE = [
    "int4:by=token,rotate=false",
    "int2:keys=3,rotate=false",
    "int4:keys=8,rotate=false",
    "int8:keys=2,rotate=false",
]
PLAIN = [f"{name}:rotate=false,group={group}" for name in NAMES for group in (16, 32, 64)]
LARGEST = torch.finfo(torch.bfloat16).max


def grouped(x, by_channel, size):
    """The groups of a page `[Hkv, n, PAGE, D]`, one by one, as lists of places."""
    heads, count, tokens, dim = x.shape
    for head in range(heads):
        for page in range(count):
            if by_channel:
                for first in range(0, tokens, size):
                    for channel in range(dim):
                        yield [(head, page, token, channel) for token in range(first, first + size)]
            else:
                for token in range(tokens):
                    for first in range(0, dim, size):
                        yield [(head, page, token, channel) for channel in range(first, min(first + size, dim))]


def through(made, x, what, dtype=torch.float32):
    codes, scales = made.encode(x, what)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.bfloat16
    assert codes.shape == (*x.shape[:3], made.code_dim(what, x.shape[3]))
    assert scales.shape == (*x.shape[:2], *made.scale_shape(what, x.shape[3]))
    back = made.decode(codes, scales, what, x.shape[3], dtype)
    assert back.shape == x.shape and back.dtype == dtype
    return back


def check_bound(made, x, what):
    """Half a step in every group, whose step is at most a hair larger than what its span needs."""
    back = through(made, x, what, torch.float64)
    levels = 2 ** (made.keys or made.bits if what == "k" else made.bits) - 1
    for group in grouped(x, what == "k" and made.by == "channel", made.group):
        place = tuple(torch.tensor(axis) for axis in zip(*group, strict=True))
        numbers, found = x[place].double(), back[place]
        low, high = float(numbers.min()), float(numbers.max())
        # The centre is a bfloat16 (8 bits, or the smallest subnormal), and so is the step, rounded up.
        off = max(abs(low / 2 + high / 2) * 2.0**-8, 2.0**-133)
        step = 2 * (high / 2 - low / 2 + off) / levels * (1 + 2.0**-7) + 2.0**-133
        error = float((found - numbers).abs().max())
        assert error <= step / 2 * (1 + 1e-5) + 2.0**-22 * max(abs(low), abs(high)), (group[0], low, high)
        assert len(set(found.tolist())) <= levels + 1


@settings(max_examples=120, deadline=None)
@given(
    spec=st.sampled_from([*PLAIN, *UNLIKE]),
    what=st.sampled_from("kv"),
    dim=st.sampled_from([1, 3, 8, 33]),
    kind=st.sampled_from(["spread", "offset", "constant", "outlier", "tiny", "huge", "denormal", "two", "zero"]),
    seed=st.integers(0, 10**6),
)
def test_every_number_comes_back_within_half_a_step_of_its_group(spec, what, dim, kind, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, PAGE, dim, generator=gen)
    if kind == "offset":
        x += 100 * torch.randn(1, 2, 1, dim, generator=gen)
    elif kind == "constant":
        x = torch.randn(1, 2, 1, 1, generator=gen).expand(1, 2, PAGE, dim).clone()
    elif kind == "outlier":
        x[0, 1, seed % PAGE, seed % dim] = 1e30 * (-1) ** seed
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "huge":
        x = x.clamp(-3, 3) * 1e38
    elif kind == "denormal":
        x *= 1e-41
    elif kind == "two":
        x = torch.where(x > 0, 5.0, -3.0)
    elif kind == "zero":
        x = torch.zeros_like(x)
    check_bound(formats.parse(spec), x, what)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_held(name, dtype):
    x = torch.randn(2, 1, PAGE, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = formats.parse(f"{name}:rotate=false")
    for what in "kv":
        check_bound(made, x, what)
        assert torch.equal(through(made, x, what, dtype), through(made, x, what, torch.float64).to(dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", "kv")
def test_constants_zeros_and_numbers_on_the_levels_come_back_exactly(name, what):
    made = formats.parse(f"{name}:rotate=false")
    levels = 2**made.bits - 1
    for constant in (0.0, 1.0, -2.5, 2.0**-126, 1.5 * 2.0**120):
        x = torch.full((1, 1, PAGE, 32), constant)
        assert torch.equal(through(made, x, what), x)
    # Levels from -L to L by twos, all of them in every group.
    gen = torch.Generator().manual_seed(1)
    x = 2.0 * torch.randint(0, levels + 1, (1, 1, PAGE, 64), generator=gen) - levels
    if what == "k":
        x[:, :, ::32], x[:, :, 1::32] = -levels, levels
    else:
        x[..., ::32], x[..., 1::32] = -levels, levels
    if levels < 256:  # a step of 2 and a centre of 0
        assert torch.equal(through(made, x, what), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rotate", ["false", "true"])
def test_nan_and_infinity_stay_where_they_are(name, rotate):
    made = formats.parse(f"{name}:rotate={rotate}")
    x = torch.randn(2, 3, PAGE, 64, generator=torch.Generator().manual_seed(2))
    spoiled = x.clone()
    spoiled[0, 1, 40, 5] = float("nan")
    spoiled[1, 2, 3, 7], spoiled[1, 2, 3, 8] = float("inf"), -float("inf")
    for what in "kv":
        clean, back = through(made, x, what), through(made, spoiled, what)
        lost = back.isnan()
        expected = torch.zeros_like(lost)
        if what == "v":
            expected[0, 1, 40, :32] = True
        elif rotate == "false":
            expected[0, 1, 32:, 5] = True  # its channel, over the tokens of its group
        else:
            expected[0, 1, 32:] = True  # its key is mixed with NaN as a whole
        assert torch.equal(lost, expected)
        same = torch.ones(2, 3, dtype=torch.bool)
        same[0, 1] = same[1, 2] = False
        assert torch.equal(back[same], clean[same]), "other pages do not change"
        greatest = x[1, 2].abs().max()
        if rotate == "false" or what == "v":
            assert torch.equal(back[0, 1][~lost[0, 1]], clean[0, 1][~lost[0, 1]]), "nor other groups"
            step = 2 * greatest / (2**made.bits - 1) * (1 + 2.0**-6)
            assert abs(back[1, 2, 3, 7] - greatest) <= step and abs(back[1, 2, 3, 8] + greatest) <= step
        assert back[1, 2].isfinite().all()


@pytest.mark.parametrize("dim,block", [(64, 64), (80, 16), (96, 32), (7, 1), (128, 128)])
def test_the_rotation_is_orthonormal_and_its_own_inverse(dim, block):
    assert hadamard.mixed(dim) == block
    matrix = hadamard.matrix(block, torch.float64, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(block, dtype=torch.float64), atol=1e-14, rtol=0)
    assert torch.equal(matrix, matrix.T)
    x = torch.randn(3, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    turned = hadamard.rotate(x)
    torch.testing.assert_close(hadamard.rotate(turned), x, atol=1e-14, rtol=0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-13, rtol=0)
    assert (block == 1) == torch.equal(turned, x)
    # By the definition: the sign of entry (i, j) is the parity of the bits that i and j share.
    plain = torch.zeros_like(x)
    for j in range(dim):
        for i in range(j // block * block, j // block * block + block):
            sign = (-1) ** bin((i % block) & (j % block)).count("1")
            plain[..., j] += sign * x[..., i] / math.sqrt(block)
    torch.testing.assert_close(turned, plain, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rotated_keys_come_back_within_the_steps_of_the_rotated_ones(name):
    made, plain = formats.parse(name), formats.parse(f"{name}:rotate=false")
    assert made.rotate
    x = torch.randn(1, 2, PAGE, 64, generator=torch.Generator().manual_seed(4))
    x[..., 3] += 50  # an outlier channel
    wanted = hadamard.rotate(through(plain, hadamard.rotate(x), "k"))
    torch.testing.assert_close(through(made, x, "k"), wanted, atol=1e-4, rtol=0)
    assert torch.equal(through(made, x, "v"), through(plain, x, "v")), "values are not rotated"
    huge = torch.full((1, 1, PAGE, 64), LARGEST)
    assert through(made, huge, "k").isfinite().all()


def test_what_is_written_again_does_not_drift():
    made = formats.parse("int4:rotate=false")
    x = torch.randn(1, 4, PAGE, 64, generator=torch.Generator().manual_seed(5))
    for what in "kv":
        once = through(made, x, what)
        again = once
        for _ in range(10):
            again = through(made, again, what)
        torch.testing.assert_close(again, once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ["fp16", "fp8", *NAMES, *PLAIN, *UNLIKE, "int4:group=64"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (7, 3), (80, 33)])
def test_bytes_are_those_of_the_tensors(spec, dims):
    made = formats.parse(spec)
    pool = PagePool(3, *dims, torch.float32, CPU, kv_format=spec)
    plane = pool.plane(made.name)
    plane.reserve(5)
    stored = sum(tensor.nbytes for tensor in plane.tensors.values())
    assert stored == 5 * plane.page_bytes == 5 * pool.page_bytes(made.name)
    assert plane.page_bytes == sum(made.page_bytes(what, 3, dim) for what, dim in zip("kv", dims, strict=True))
    assert made.number_bytes(*dims) == pytest.approx(plane.page_bytes / (3 * PAGE * sum(dims)))
    gen = torch.Generator().manual_seed(6)
    for what, dim in zip("kv", dims, strict=True):
        codes, scales = made.encode(torch.randn(3, 2, PAGE, dim, generator=gen), what)
        assert codes.nbytes + scales.nbytes == 2 * made.page_bytes(what, 3, dim)


def test_bits_of_a_number_with_its_part_of_steps_and_centres():
    wanted = {"int8": 9.0, "int4": 5.0, "int3": 4.0, "int2": 3.0, "int4:group=64": 4.5, "int2:keys=3": 3.5}
    assert {spec: 8 * formats.parse(spec).number_bytes(64, 64) for spec in wanted} == wanted


def test_single_tokens_are_read_as_whole_pages_are():
    for spec in (*(f"{name}:" for name in NAMES), "int2:keys=3,"):
        pool = PagePool(2, 8, 40, torch.float32, CPU, kv_format=f"{spec}residual=0,sinks=0")
        kv = PagedKV(pool)
        gen = torch.Generator().manual_seed(7)
        kv.append(torch.randn(1, 2, 5 * PAGE, 8, generator=gen), torch.randn(1, 2, 5 * PAGE, 40, generator=gen))
        kv.commit()
        k, v = kv.keys(0, 5 * PAGE), kv.values(0, 5 * PAGE)
        index = torch.randint(0, 5 * PAGE, (1, 2, 90), generator=gen)
        picked_k, picked_v = kv.gather(index, rotated=False)
        for head in range(2):
            torch.testing.assert_close(picked_k[0, head], k[0, head, index[0, head]], atol=1e-6, rtol=1e-6)
            assert torch.equal(picked_v[0, head], v[0, head, index[0, head]])


def test_specifications_say_what_they_make():
    made = formats.parse(" int4:group=64, rotate=false ,sinks=0")
    assert (made.group, made.rotate, made.sinks, made.residual) == (64, False, 0, 128)
    assert formats.parse(made.describe()) == made and made.describe() == "int4:sinks=0,group=64,rotate=false"
    assert made.coding == formats.parse("int4:group=64,rotate=false,residual=7").coding
    assert (
        made.coding == "int4:group=64,rotate=false,keys=0,by=channel"
        and formats.parse(made.coding).coding == made.coding
    )
    assert formats.parse("int4") is formats.named("int4") and formats.named("int4").describe() == "int4"
    assert formats.format_of("int4:rotate=FALSE", torch.bfloat16).rotate is False


@pytest.mark.parametrize(
    "spec,told",
    [
        ("int5", "unknown KV format 'int5': use one of auto, fp32, .*int2"),
        ("int4:by=page", "by=page of KV format 'int4' is unknown: use one of channel, token"),
        ("int4:keys=5", "keys=5 of KV format 'int4' is unknown: use one of 2, 3, 4, 8"),
        (
            "int4:grup=3",
            r"KV format 'int4' has no option 'grup'; its options: by, group, keys, residual, rotate, sinks",
        ),
        ("int4:group=33", "group=33 of KV format 'int4' is unknown: use one of 16, 32, 64"),
        ("int4:group", "written name=value"),
        ("int4:group=32,group=64", "given twice"),
        ("int4:rotate=1", "must be bool"),
        ("fp8:group=32", "KV format 'fp8' has no option 'group'; its options: residual, sinks"),
        ("int8:residual=-1", "residual=-1 of KV format 'int8' must be 0 or more"),
        ("int8:sinks=99999999999999", "give at most"),
        ("fp32:residual=64", "how the model computes"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_a_line(spec, told):
    with pytest.raises(UsageError, match=told) as caught:
        PagePool(1, 2, 2, torch.float32, CPU, kv_format=spec)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UnknownNameError) == ("unknown KV" in told or "has no option" in told)
