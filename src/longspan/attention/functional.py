"""The functional face of every mechanism, for tests and for people with a model of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longspan.attention.base import Hints, Mechanism
from longspan.attention.registry import make
from longspan.errors import UsageError
from longspan.kv.base import TensorKV


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: str | Mechanism = "superlinear",
    *,
    scale: float | None = None,
    routing_query: Tensor | None = None,
    chosen_pages: Sequence[int] = (),
    layer: int | None = None,
    gates: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attend causally from the last T positions of a context, by any registered mechanism.

    Args:
        q: queries `[B, Hq, T, D]` of the positions `N - T .. N - 1`.
        k: keys `[B, Hkv, N, D]`; Hq is a multiple of Hkv. Positions, if any, are in q and k already.
        v: values `[B, Hkv, N, Dv]`.
        mechanism: a name of the registry, or a mechanism.
        scale: what scores are multiplied by; None: `1/sqrt(D)`.
        routing_query: `[B, Hq, T, D]`, what superlinear searches with; None: q itself.
        chosen_pages: pages of 64 tokens that retrieval, or a mechanism with `who=model`, reads beside sinks and window,
            the best first.
        layer: which layer of a model this is, from 0, for mechanisms that leave the first layers dense; None: one
            beyond those.
        gates: `[Hq]`, how much of each head's output is memory, before the sigmoid (infini); None: its `beta`.
        **options: the mechanism's dataclass fields.

    Returns:
        `[B, Hq, T, Dv]` in q's type, on q's device.

    Raises:
        UsageError: shapes, types or devices that don't fit, or an unknown mechanism or option.
    """
    _check(q, k, v, routing_query)
    if gates is not None and (gates.shape != q.shape[1:2] or gates.device != q.device):
        raise UsageError(
            f"gates must be [{q.shape[1]}], one for each query head, on {q.device}: not {tuple(gates.shape)} on "
            f"{gates.device}"
        )
    if isinstance(mechanism, Mechanism):
        if options:
            raise UsageError("options belong to a mechanism's name; this mechanism is made already")
        chosen = mechanism
    else:
        chosen = make(mechanism, **options)
    if q.shape[2] == 0:
        return q.new_empty(*q.shape[:3], v.shape[-1])
    hints = Hints(
        routing_query=routing_query,
        chosen_pages=tuple(int(page) for page in chosen_pages),
        layer=sys.maxsize if layer is None else layer,
        gates=gates,
    )
    return chosen.attend(q, TensorKV(k, v), scale=scale, hints=hints)


def _check(q: Tensor, k: Tensor, v: Tensor, routing_query: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise UsageError(f"{name} must have 4 axes [B, heads, tokens, head size], not {tensor.dim()}")
        if not tensor.is_floating_point():
            raise UsageError(f"{name} must hold floating-point numbers, not {tensor.dtype}")
        if tensor.device != q.device:
            raise UsageError(f"{name} lies on {tensor.device}, q on {q.device}: move them to one device")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise UsageError(
            f"batch, KV heads or tokens differ: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise UsageError(f"head sizes differ: q has {q.shape[-1]}, k {k.shape[-1]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise UsageError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if q.shape[2] > k.shape[2]:
        raise UsageError(
            f"{q.shape[2]} queries but only {k.shape[2]} keys: queries are the last positions of the context"
        )
    if routing_query is not None and routing_query.shape != q.shape:
        raise UsageError(f"routing_query must have q's shape {tuple(q.shape)}, not {tuple(routing_query.shape)}")
