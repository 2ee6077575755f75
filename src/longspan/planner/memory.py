"""What a context takes: bytes of weights, keys and values, states and workspace, for one or several sequences.

Keys and values are the mechanism's own cost (`attention/*.cost`), summed over the layers that attend. It does not know
devices, but for what their libraries take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspan.planner import formats
from longspan.planner.model import Attention, Model

if TYPE_CHECKING:
    from longspan.attention import Cost, Mechanism

CHUNK, GPU_CHUNK = 512, 2048
"""Tokens that are read at once: the engine's own (`engine/contexts.py`), which can't be imported without torch."""
NATIVE, NATIVE_CHUNKS = ("nemotron_h", "llama", "qwen3", "qwen3_moe"), (32768, 16384, 8192, 4096, 2048)
"""Families that the engine runs by its own forward on a GPU (`hf/native`), and the tokens that it reads at once there,
the most that fit (`engine/memory_plan.py`)."""
SLACK = 0.03
"""Of a GPU's memory, what the engine leaves where it chooses those."""
RUNTIME, GPU_RUNTIME = 400_000_000, 600_000_000
"""Bytes that libraries take before any model is loaded: Python and torch; a CUDA context and cuBLAS."""
_CHECKPOINTS, _STATES = 0.25, 1 << 30
"""States are checkpointed so that they take at most this share of what pages take, and on a GPU at most so many bytes
(docs/architecture.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, on one device."""

    weights: float
    kv: float
    rotated: float
    """A second copy of the keys, rotated to their positions, for mechanisms that read the whole context."""
    state: float
    """Recurrent states: the latest and the committed one of every sequence, and checkpoints."""
    workspace: float
    """Activations of a chunk, and logits."""
    runtime: float
    """What libraries take: no part of `allocated`."""

    @property
    def allocated(self) -> float:
        """Bytes of tensors: what torch counts at the peak."""
        return self.weights + self.kv + self.rotated + self.state + self.workspace

    @property
    def total(self) -> float:
        """Bytes that a device must have."""
        return self.allocated + self.runtime

    def told(self) -> dict[str, int]:
        """Return whole bytes by name."""
        names = ("weights", "kv", "rotated", "state", "workspace", "runtime", "total")
        return {name: round(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Attended:
    """A mechanism's cost in all layers of one kind, at one context."""

    attention: Attention
    count: int
    cost: Cost
    token_bytes: float
    """Bytes of one token's keys and values in one layer."""
    prefill_share: float
    decode_share: float
    """FLOPs over those of the cost: other than 1 where keys and values are kept compressed."""


@functools.cache
def mechanism(spec: str) -> Mechanism:
    """Return a mechanism of a specification (errors: as `attention.parse`); loads torch."""
    from longspan.attention import parse

    return parse(spec)


def attended(model: Model, spec: str, kv_format: str, own: float, n: int) -> list[Attended]:
    """Return what a mechanism costs in each kind of attending layer.

    A layer with a window of its own attends to that alone, as `streaming` does without sinks.

    Args:
        model: whose layers.
        spec: of the mechanism.
        kv_format: of keys and values.
        own: bytes of a number as the model computes.
        n: tokens of context.
    """
    return [_attended(each, count, spec, kv_format, own, n) for each, count in model.alike]


@functools.lru_cache(maxsize=4096)
def _attended(each: Attention, count: int, spec: str, kv_format: str, own: float, n: int) -> Attended:
    from longspan.attention import Shape

    # The planner computes costs at thousands of lengths: equal ones once.
    chosen = mechanism(spec) if each.window is None else mechanism(f"streaming:window={each.window},sinks=0")
    prefill = decode = 1.0
    if each.latent:
        # In decode every head reads the latent numbers as keys and, without the rotated part, as values; in prefill
        # keys and values are made of them first.
        shape = Shape(each.query_heads, 1, each.latent, 0, formats.number_bytes(kv_format, each.latent), own)
        prefill, decode = (each.head_dim + each.value_dim) / each.latent, 2.0
    else:
        width = formats.number_bytes(kv_format, each.head_dim)
        shape = Shape(each.query_heads, each.kv_heads, each.head_dim, each.value_dim, width, own)
    return Attended(each, count, chosen.cost(n, shape), shape.token_bytes, prefill, decode)


def kv_bytes(layers: Iterable[Attended]) -> float:
    """Return the bytes of keys and values that are kept for one sequence."""
    return sum(each.count * each.cost.kept_bytes for each in layers if not each.attention.shared)


def rotated_bytes(layers: Iterable[Attended], n: int, own: float, native: bool, evicts: bool) -> float:
    """Return the bytes of the rotated keys that readers of the whole context keep: of pages in the model's own type."""
    if not native or evicts:
        return 0.0
    return sum(
        each.count * n * each.attention.kv_heads * each.attention.head_dim * own
        for each in layers
        if each.attention.rotary and each.attention.window is None and not each.attention.latent
        # What keeps less than every key and value does not read the whole context.
        if not each.attention.shared and each.cost.kept_bytes >= 0.999 * n * each.token_bytes
    )


def state_bytes(model: Model, own: float) -> float:
    """Return the bytes of all recurrent states of one sequence, once."""
    return sum(4.0 * each.state + own * each.convolution for each in model.recurrent)


def memory(
    model: Model,
    n: int,
    *,
    attention: str,
    weights: str,
    kv: str,
    concurrent: int = 1,
    chunk: int = GPU_CHUNK,
    gpu: bool = True,
    ranks: int = 1,
    split: bool = False,
) -> Memory:
    """Return what a model takes at a context.

    Args:
        model: which one.
        n: tokens of each context.
        attention: specification of the mechanism.
        weights: format of weights.
        kv: format of keys and values.
        concurrent: contexts that are held at once.
        chunk: tokens that are read at once.
        gpu: whether the libraries are a GPU's.
        ranks: devices that share each context's tokens.
        split: whether they share the weights too, instead of holding all of them each.
    """
    own = formats.own_bytes(weights)
    layers = attended(model, attention, kv, own, n)
    kept = kv_bytes(layers)
    state = state_bytes(model, own)
    evicts = mechanism(attention).evicts
    native = kv == formats.kv("auto", weights)
    held = formats.model_bytes(model, weights)
    tokens = min(chunk, -(-n // ranks))
    most = max(_STATES, 2 * state) if gpu else math.inf
    return Memory(
        weights=held / ranks if split else held,
        kv=concurrent * kept / ranks,
        rotated=concurrent * rotated_bytes(layers, n, own, native, evicts) / ranks,
        state=concurrent * (2 * state + min(_CHECKPOINTS * kept / ranks, state * n / max(1024, chunk), most)),
        workspace=tokens * own * (4 * model.hidden + _inner(model)) + concurrent * model.vocabulary * 4.0,
        runtime=GPU_RUNTIME if gpu else RUNTIME,
    )


def _inner(model: Model) -> float:
    """Return the numbers of a token that the widest layer makes: what goes into and comes out of its matrices."""
    return max(
        (layer.dense + (layer.experts.top * layer.experts.parameters if layer.experts else 0)) / model.hidden
        for layer in model.layers
    )
