"""PyTorch's own context parallelism, to be measured beside ours (torch.distributed.tensor.experimental, 2.9 to 2.13).

It replaces `scaled_dot_product_attention` while it is active. What it needs: equal shards in its own zigzag order, so
lengths that are multiples of twice the ranks; as many keys as queries; CUDA tensors. Its buffers are given whole to
every rank and cut there; here shards are made by the caller, and a buffer of a few numbers stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.distributed.group import Group
from longspan.errors import UsageError

ROTATIONS = ("allgather", "alltoall")
"""How keys and values come: all at once, which is its default, or in passes."""


def refuses(group: Group, length: int) -> str | None:
    """Return why it can't serve a context over these ranks, None where it can."""
    if group.device.type != "cuda":
        return "its kernels run on CUDA only"
    if group.size < 2:
        return "it needs two ranks at least"
    if length % (2 * group.size):
        return f"it takes multiples of {2 * group.size} tokens"
    return None


@contextmanager
def active(group: Group, rotation: str) -> Iterator[None]:
    """Make it active for all ranks of the process; cuDNN's kernel computes.

    Raises:
        UsageError: no such rotation.
    """
    if rotation not in ROTATIONS:
        raise UsageError(f"unknown rotation {rotation!r}: use {' or '.join(ROTATIONS)}")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (group.size,))
    set_rotate_method(rotation)
    stand_in = torch.zeros(2 * group.size, device=group.device)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), context_parallel(mesh, buffers=[stand_in], buffer_seq_dims=[0]):
        yield


def attend(q: Tensor, k: Tensor, v: Tensor, *, expanded: bool) -> Tensor:
    """Attend while it is active: this rank's shards in zigzag order; `expanded`: keys are repeated for query heads."""
    if expanded:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with torch.no_grad():
        # By its full name: that is what is replaced.
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
