"""How much memory a context will take on a GPU, before any of it is read: weights, keys and values, states, workspace.

Weights, keys, values and states are counted; the workspace is what one chunk's tensors take at most while they run
through the widest sublayer, from the shapes of a native forward's blocks. `chunk_for` gives the largest chunk that
fits, `check` refuses with what would fit. It does not know time or money: the planner does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from longspan.attention import Mechanism
from longspan.errors import PoolExhaustedError
from longspan.hf.model import CausalModel
from longspan.hf.native.blocks import Attention, Experts, Mamba, Mlp
from longspan.kv.base import PAGE

CHUNKS = (32768, 16384, 8192, 4096, 2048)
"""Tokens that may run through a native forward together on a GPU, the fastest first."""
STATES = 1 << 30
"""Bytes that checkpoints of recurrent states may take on a GPU, where memory is planned."""
_SLACK = 0.03
"""Of a device's memory, left for what the driver, libraries and fragments take."""
_STATE_CHUNK = 128
"""Tokens between two states that a scan keeps while it runs, at least."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by kind."""

    weights: int
    kv: int
    state: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.kv + self.state + self.workspace

    def as_dict(self) -> dict[str, int]:
        """Return the bytes by kind, for reports."""
        return {**asdict(self), "total": self.total}


def plan(model: CausalModel, mechanism: Mechanism, tokens: int, chunk: int) -> MemoryPlan:
    """Return what a context of `tokens` takes, read in chunks.

    Args:
        model: with a native forward.
        mechanism: by which it is read and answers.
        tokens: of the context, its answers included.
        chunk: tokens that are read together.
    """
    sizes, size = model.dimensions, model.dtype.itemsize
    pages = -(-tokens // PAGE)
    row = sizes.layers * sizes.kv_heads * sizes.head_dim * size
    kv = pages * PAGE * row * 2 + pages * 8 * sizes.layers
    if model.rotary is not None:
        kv += pages * PAGE * row  # keys once more, rotated
    state = sum(shape.numel() * dtype.itemsize for shape, dtype in _state(model))
    every = max(1, tokens // chunk)
    kept = min(every * state, max(STATES, 2 * state)) + 2 * state if state else 0
    return MemoryPlan(_weights(model), kv, kept, _workspace(model, mechanism, min(chunk, tokens)))


def available(model: CausalModel, held: int) -> int:
    """Return the bytes that a GPU has for a model and one context: what is free, and what the two hold already.

    Args:
        model: it is on the GPU.
        held: bytes that the context holds.
    """
    device = model.device
    free, whole = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + spare - _SLACK * whole) + _weights(model) + held


def chunk_for(model: CausalModel, mechanism: Mechanism, tokens: int, bytes_: int) -> int:
    """Return the largest chunk with which a context of `tokens` fits into `bytes_` (else the smallest there is)."""
    fitting = (chunk for chunk in CHUNKS if plan(model, mechanism, tokens, chunk).total <= bytes_)
    return next(fitting, CHUNKS[-1])


def check(model: CausalModel, mechanism: Mechanism, tokens: int, bytes_: int) -> MemoryPlan:
    """Return the plan of a context that fits.

    Raises:
        PoolExhaustedError: it does not; the message says what fits.
    """
    found = plan(model, mechanism, tokens, chunk_for(model, mechanism, tokens, bytes_))
    if found.total <= bytes_:
        return found
    least, most = 0, tokens // PAGE
    while least < most:  # pages that fit
        middle = (least + most + 1) // 2
        fits = plan(model, mechanism, middle * PAGE, CHUNKS[-1]).total <= bytes_
        least, most = (middle, most) if fits else (least, middle - 1)
    told = (
        f"{tokens:,} tokens of {model.name} take {_gib(found.total)} of the {_gib(bytes_)} that the device has for it"
    )
    parts = ", ".join(f"{name} {_gib(value)}" for name, value in asdict(found).items())
    fitting = f"{least * PAGE:,} tokens fit" if least else "not even one page fits"
    raise PoolExhaustedError(f"{told} ({parts}): {fitting}")


def _weights(model: CausalModel) -> int:
    return sum(parameter.nbytes for parameter in model.model.parameters())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _state(model: CausalModel) -> list[tuple[torch.Size, torch.dtype]]:
    return [(torch.Size(shape), dtype) for shape, dtype in model.state_spec.values()]


def _workspace(model: CausalModel, mechanism: Mechanism, chunk: int) -> int:
    """Return the bytes of a chunk's tensors while the widest sublayer runs."""
    stack = model.native
    assert stack is not None, "only a native forward is planned"
    size, hidden = model.dtype.itemsize, stack.embedding.shape[1]
    widest = 0
    for _, block in stack.sublayers:
        if isinstance(block, Attention):
            rows = (block.heads + 2 * block.kv_heads) * block.head_dim * size
            read = block.heads * block.head_dim
            spans = int(getattr(mechanism, "spans", 0))
            # Outputs of spans; their ends, scores and order; what is near; the merged output.
            own = 2 * rows + read * size * (spans + 3) + block.heads * spans * 40
        elif isinstance(block, Mamba):
            wide = block.in_proj.shape[0] + 2 * block.channels + 3 * block.inner
            own = wide * size + 2 * block.heads * block.head_dim * block.state * 4 // _STATE_CHUNK
        elif isinstance(block, Experts):
            own = block.routing.top * (block.up.shape[1] + hidden) * size + block.router.shape[0] * 12
            own += 0 if block.shared is None else block.shared[0].shape[0] * 2 * size
        else:
            assert isinstance(block, Mlp)
            own = block.up.shape[0] * 2 * size
        widest = max(widest, own)
    return chunk * (widest + 5 * hidden * size) + 2 * stack.head.shape[0] * 4
