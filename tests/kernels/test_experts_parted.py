"""The grouped product by warps with parts of their own: its parts as threads, and on a Hopper GPU as it is."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
import gluon_threads

from longspan.kernels.experts import gluon_kernels, reference
from longspan.kernels.tiles import hopper

CUDA = torch.cuda.is_available()


def inputs(columns, depth, gated, experts=3, device="cpu"):
    generator = torch.Generator().manual_seed(columns)
    expert = torch.tensor([0, 2, 2, 0], dtype=torch.int32)
    x = torch.randn(4 * 128, depth, generator=generator)
    x[3 * 128 :] = float("nan")  # a tile that is not used
    weight = torch.randn(experts, columns * (1 + gated), depth, generator=generator) / depth**0.5
    out = torch.full((len(x), columns), float("nan"))
    tensors = (x.half(), weight.half(), out.half(), expert, torch.tensor([3], dtype=torch.int32))
    return [one.to(device) for one in tensors]


def wanted(x, weight, expert, activation, gated):
    made = [x[i * 128 :][:128].float() @ weight[expert[i]].float().T for i in range(3)]
    made = torch.cat(made)
    return reference.activated(made, activation, gated) if activation else made


@pytest.mark.parametrize(
    "columns,depth,activation,gated",
    [(320, 192, "relu2", False), (384, 100, "", False), (200, 64, "silu", False), (160, 130, "silu", True)],
)
@pytest.mark.parametrize("stages,programs", [(4, 2), (2, 5)])
def test_parts_work_together(columns, depth, activation, gated, stages, programs, monkeypatch):
    x, weight, out, expert, tiles = inputs(columns, depth, gated)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **constants: gluon_threads.launch(gluon_kernels, kernel, *grid, *given, **constants)

    kernel = gluon_kernels.grouped_kernel
    monkeypatch.setattr(gluon_kernels, "grouped_kernel", Kernel())
    monkeypatch.setattr(gluon_kernels, "TensorDescriptor", gluon_threads.Descriptor)
    monkeypatch.setattr(gluon_kernels.gl, "NVMMASharedLayout", types.SimpleNamespace(get_default_for=lambda *_: None))
    gluon_kernels.launch(x, weight, out, expert, tiles, programs, activation=activation, gated=gated, stages=stages)
    torch.testing.assert_close(
        out[: 3 * 128].float(), wanted(x, weight, expert, activation, gated), atol=4e-3, rtol=4e-3
    )
    assert out[3 * 128 :].isnan().all(), "what is not used is not written"


@pytest.mark.skipif(not CUDA or not hopper(torch.device("cuda")), reason="needs a Hopper GPU")
@pytest.mark.parametrize("columns,depth,activation,gated", [(1856, 2688, "relu2", False), (768, 2048, "silu", True)])
def test_the_same_on_a_gpu(columns, depth, activation, gated):
    x, weight, out, expert, tiles = inputs(columns, depth, gated, device="cuda")
    gluon_kernels.launch(x, weight, out, expert, tiles, 4, activation=activation, gated=gated)
    torch.testing.assert_close(
        out[: 3 * 128].float(), wanted(x, weight, expert, activation, gated), atol=2e-2, rtol=4e-3
    )
    assert out[3 * 128 :].isnan().all()
