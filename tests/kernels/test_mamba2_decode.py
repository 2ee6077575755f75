"""Mamba-2's decode step, its gated norm, and both with the convolution: every version against the equations."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.causal_conv import reference as convolution
from longspan.kernels.mamba2 import gated_rmsnorm, mixer_step, reference, step

pytest.importorskip("triton")
from longspan.kernels.mamba2 import triton_decode, triton_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIZES = [
    # batch, heads, head dim, groups, state, taps, norm's groups
    (1, 1, 1, 1, 1, 2, 1),
    (2, 4, 20, 2, 24, 4, 2),
    (1, 3, 16, 1, 16, 4, 1),
    (1, 2, 33, 2, 8, 1, 2),
]
if CUDA:
    SIZES += [(3, 64, 64, 8, 128, 4, 8), (1, 24, 64, 1, 256, 4, 1)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def normals(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, kind)

    return normal


def layer(batch, heads, dim, groups, size, taps, norm_groups, dtype):
    """Return what a layer's step takes, in order and by name."""
    normal, inner, shared = normals(dtype), heads * dim, groups * size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mixed = inner + 2 * shared
    given = {
        "projected": normal(batch, inner + mixed + heads),
        "conv_weight": normal(mixed, taps), "conv_bias": normal(mixed),
        "conv_state": normal(batch, mixed, taps - 1), "A": -torch.exp(normal(heads, kind=wide)),
        "state": normal(batch, heads, dim, size, kind=wide), "norm_weight": 1 + normal(inner) / 4,
    }  # fmt: skip
    rest = {"D": normal(heads), "dt_bias": normal(heads), "groups": groups, "norm_groups": norm_groups, "eps": 1e-5}
    return given, rest


def equation(projected, conv_weight, conv_bias, conv_state, A, state, norm_weight, *, groups, norm_groups, eps,
             D=None, dt_bias=None, dt_limit=(0.0, float("inf"))):  # fmt: skip
    """A layer's step in float64; returns the output and both new states."""
    batch, heads, dim, size = state.shape
    inner, shared = heads * dim, groups * size
    gate, mixed, dt = projected.double().split([inner, inner + 2 * shared, heads], -1)
    seen = torch.cat([conv_state.double(), mixed.unsqueeze(-1)], -1)
    mixed = (seen * conv_weight.double()).sum(-1) + (0 if conv_bias is None else conv_bias.double())
    mixed = mixed / (1 + torch.exp(-mixed))
    x, b, c = mixed.split([inner, shared, shared], -1)
    x = x.view(batch, heads, dim)
    b, c = (z.view(batch, groups, 1, size).expand(-1, -1, heads // groups, -1).flatten(1, 2) for z in (b, c))
    dt = torch.log1p(torch.exp(dt + (0 if dt_bias is None else dt_bias.double()))).clamp(*dt_limit)
    held = state.double() * torch.exp(dt * A.double())[..., None, None]
    held = held + dt[..., None, None] * x[..., None] * b[..., None, :]
    y = (held * c[..., None, :]).sum(-1) + (0 if D is None else D.double()[:, None] * x)
    gated = y.flatten(1) * gate / (1 + torch.exp(-gate))
    if norm_weight is not None:
        parts = gated.view(batch, norm_groups, -1)
        gated = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).view(batch, inner) * norm_weight.double()
    return gated, seen[..., 1:], held


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_layers_step_equals_the_equations(size, dtype):
    given, rest = layer(*size, dtype)
    wanted = equation(**given, **rest)
    versions = [reference.mixer_step, mixer_step] + [triton_decode.mixer_step] * (dtype != torch.float64)
    for version in versions:
        held = {name: tensor.clone() for name, tensor in given.items()}
        out = version(**held, **rest)
        assert out.dtype == dtype
        close((out, held["conv_state"], held["state"]), wanted, TOLERANCE[dtype])
        for name in given.keys() - {"conv_state", "state"}:
            assert torch.equal(held[name], given[name])


@pytest.mark.parametrize("version", [reference.mixer_step, triton_decode.mixer_step])
def test_what_is_not_given_and_limits(version):
    given, rest = layer(*SIZES[1], torch.float32)
    given |= {"conv_bias": None, "norm_weight": None}
    rest |= {"D": None, "dt_bias": None, "dt_limit": (0.5, 0.9)}
    wanted = equation(**given, **rest)
    close((version(**given, **rest), given["conv_state"], given["state"]), wanted, 2e-6)


@pytest.mark.parametrize("version", [step, triton_decode.step])
def test_steps_equal_the_scan(version):
    normal = normals(torch.float32, 3)
    x, dt, b, c = normal(2, 5, 2, 20), normal(2, 5, 2), normal(2, 5, 2, 24), normal(2, 5, 2, 24)
    a, rest = -torch.exp(normal(2)), {"D": normal(2), "dt_bias": normal(2)}
    state = normal(2, 2, 20, 24)
    y, last = reference.scan(x.double(), dt, a, b, c, state=state, **rest)
    for t in range(5):
        found = version(x[:, t], dt[:, t], a, b[:, t], c[:, t], state=state, **rest)
        close([found], [y[:, t]], 2e-6)
    close([state], [last], 2e-6)


@pytest.mark.parametrize("version", [reference.mixer_step, triton_decode.mixer_step])
def test_decode_equals_prefill(version):
    """A layer token by token is the layer all at once."""
    given, rest = layer(*SIZES[2], torch.float32)
    heads, dim, groups, size = 3, 16, 1, 16
    projected = normals(torch.float32, 7)(1, 5, given["projected"].shape[1])
    inner, shared = heads * dim, groups * size
    gate, mixed, dt = projected.split([inner, inner + 2 * shared, heads], -1)
    mixed, _ = convolution.causal_conv(mixed, given["conv_weight"], given["conv_bias"], given["conv_state"])
    x, b, c = mixed.split([inner, shared, shared], -1)
    y, state = reference.scan(
        x.unflatten(-1, (heads, dim)), dt, given["A"], b.unflatten(-1, (groups, size)),
        c.unflatten(-1, (groups, size)), D=rest["D"], dt_bias=rest["dt_bias"], state=given["state"],
    )  # fmt: skip
    wanted = reference.gated_rmsnorm(y.flatten(2), gate, given["norm_weight"], 1, 1e-5)
    for t in range(5):
        out = version(**{**given, "projected": projected[:, t]}, **rest)
        close([out], [wanted[:, t].double()], 3e-6)
    close([given["state"]], [state.double()], 3e-6)


@pytest.mark.parametrize("shape,groups", [((1, 1), 1), ((3, 40), 2), ((2, 5, 33), 1), ((2, 4096), 8), ((1, 5000), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_gated_norm_equals_the_equation(shape, groups, dtype):
    normal = normals(dtype, 4)
    y, wide, weight = normal(*shape), normal(*shape[:-1], shape[-1] + 16), 1 + normal(shape[-1]) / 4
    gate = wide[..., 8:-8]
    gated = y.double() * gate.double() / (1 + torch.exp(-gate.double()))
    parts = gated.unflatten(-1, (groups, -1))
    wanted = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight.double()
    versions = [reference.gated_rmsnorm, gated_rmsnorm] + [triton_norm.gated_rmsnorm] * (dtype != torch.float64)
    for version in versions:
        close([version(y, gate, weight, groups, 1e-5)], [wanted], TOLERANCE[dtype])
        close([version(y, gate, None, groups, 1e-5)], [gated], TOLERANCE[dtype])
