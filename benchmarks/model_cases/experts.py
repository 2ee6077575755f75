"""Experts, their routing, and products with few rows, as `benchmarks.model_kernels` times them.

Nemotron-3-Nano-30B-A3B's: 128 experts of 1856, 6 a token, one shared of 3712. Every token chooses at random. Rows named
`torch` are PyTorch's own products on the same inputs; rows of PyTorch know no tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.model_cases.frame import Case, Options, normal, rounds
from longspan.kernels.experts import Routing, experts, mixture, reference, triton_decode, triton_kernels, triton_prefill
from longspan.kernels.experts.triton_kernels import Layout
from longspan.kernels.gemv import reference as gemv_reference
from longspan.kernels.gemv import triton_kernels as gemv_kernels

HIDDEN, INNER, SHARED, EXPERTS = 2688, 1856, 3712, 128
ROUTING = Routing(6, scale=2.5)
WEIGHTS = {"mamba in": (10304, HIDDEN), "mamba out": (HIDDEN, 4096), "qkv": (4608, HIDDEN), "gate": (EXPERTS, HIDDEN)}
WEIGHTS |= {"head": (131072, HIDDEN)}
"""Outputs and inputs of the products that are not experts'."""


def cases(what: str, options: Options) -> Iterator[Case]:
    """Make the cases of one name."""
    yield from MAKERS[what](options)


def _logits(tokens: int) -> Tensor:
    return normal(tokens, EXPERTS, dtype=torch.float32)


def _route(options: Options) -> Iterator[Case]:
    bias = normal(EXPERTS, dtype=torch.float32, scale=0.05)
    for tokens in (options.tokens, *options.batches):
        logits = _logits(tokens)
        pairs = tokens * ROUTING.top

        def routed(logits: Tensor = logits, **_: int) -> Sequence[Tensor]:
            return triton_kernels.route(logits, bias, ROUTING)

        moved = logits.numel() * 4 + pairs * 8
        wanted = [x.float() for x in reference.route(logits, bias, ROUTING)]
        yield Case(f"route {tokens}", [routed], routed, lambda wanted=wanted: wanted, moved, graph=True)  # type: ignore[misc]
        ids = triton_kernels.route(logits, bias, ROUTING)[0]

        numbers = 1 + torch.arange(tokens, dtype=torch.float32, device="cuda").unsqueeze(1)

        def sorted_(ids: Tensor = ids, numbers: Tensor = numbers, pad: int = 128) -> Sequence[Tensor]:
            layout = Layout.of(ids, EXPERTS, pad)
            place = layout.place.long()
            return layout.expert[place // pad], triton_kernels.spread(numbers, layout)[place].squeeze(-1)

        def layout(ids: Tensor = ids, pad: int = 128) -> Layout:
            return Layout.of(ids, EXPERTS, pad)

        token = numbers.expand(-1, ROUTING.top)
        yield Case(
            f"route sort {tokens}", [layout], sorted_, lambda ids=ids, token=token: (ids, token),  # type: ignore[misc]
            pairs * 12, tolerance=0.0, graph=True,
        )  # fmt: skip


def _experts(options: Options) -> Iterator[Case]:
    kind = options.dtype
    up = normal(EXPERTS, INNER, HIDDEN, dtype=kind, scale=HIDDEN**-0.5)
    down = normal(EXPERTS, HIDDEN, INNER, dtype=kind, scale=INNER**-0.5)
    shared = [
        (normal(SHARED, HIDDEN, dtype=kind, scale=HIDDEN**-0.5), normal(HIDDEN, SHARED, dtype=kind, scale=SHARED**-0.5))
        for _ in range(4)
    ]
    yield from _prefill(options, up, down, shared[0])
    yield from _steps(options, up, down, shared)


def _prefill(options: Options, up: Tensor, down: Tensor, shared: tuple[Tensor, Tensor]) -> Iterator[Case]:
    tokens, kind, size = options.tokens, options.dtype, up.element_size()
    x, residual = normal(tokens, HIDDEN, dtype=kind), normal(tokens, HIDDEN, dtype=kind)
    ids, weights = triton_kernels.route(_logits(tokens), None, ROUTING)
    pairs = ids.numel()
    some = torch.randint(0, tokens, (64,), device="cuda")
    hidden = normal(tokens * ROUTING.top, INNER, dtype=kind).abs()
    usual = triton_prefill.cuts_for(kind, pairs / EXPERTS, False, True)

    @cache
    def layout(pad: int) -> Layout:
        return Layout.of(ids, EXPERTS, pad)

    @cache
    def rows(pad: int) -> Tensor:
        return triton_kernels.spread(x, layout(pad))

    @cache
    def hidden_rows(pad: int) -> Tensor:
        """What every pair's experts made of it, where the layout has it."""
        made = torch.zeros(layout(pad).capacity, INNER, dtype=kind, device="cuda")
        made[layout(pad).place.flatten().long()] = hidden
        return made

    def cut(which: int, tile: dict[str, int]) -> triton_prefill.Cut:
        known = {name: getattr(usual[which], name) for name in usual[which].__dataclass_fields__}
        return triton_prefill.Cut(**(known | tile))

    def first(**tile: int) -> Tensor:
        one = cut(0, tile)
        return triton_prefill.product(
            rows(one.rows), up, layout(one.rows), one, activation="relu2", engine=_engine(one)
        )

    def second(**tile: int) -> Tensor:
        one = cut(1, tile)
        return triton_prefill.product(hidden_rows(one.rows), down, layout(one.rows), one, engine=_engine(one))

    def chosen(made: Tensor, pad: int) -> Sequence[Tensor]:
        return (made[layout(pad).place[some].long()],)

    def first_wanted() -> Sequence[Tensor]:
        every = torch.stack([torch.stack([up[i].float() @ x[t].float() for i in ids[t]]) for t in some])
        return (every.relu().square(),)

    def second_wanted() -> Sequence[Tensor]:
        by_token = hidden.view(tokens, ROUTING.top, INNER)
        return (torch.stack([torch.stack([down[i].float() @ by_token[t, j].float() for j, i in enumerate(ids[t])])
                             for t in some]),)  # fmt: skip

    flops, matrix = 2.0 * pairs * INNER * HIDDEN, EXPERTS * INNER * HIDDEN
    moved = (matrix + pairs * (INNER + HIDDEN)) * size
    yield Case(
        f"experts up {tokens}", [first], lambda **tile: chosen(first(**tile), cut(0, tile).rows), first_wanted, moved,
        flops,
    )  # fmt: skip
    yield Case(
        f"experts down {tokens}", [second], lambda **tile: chosen(second(**tile), cut(1, tile).rows), second_wanted,
        moved, flops,
    )  # fmt: skip
    yield from _torch(x, hidden, up, down, ids, moved, flops)
    pad = usual[0].rows
    yield Case(
        f"experts spread {tokens}", [lambda **_: triton_kernels.spread(x, layout(pad))],
        lambda **_: chosen(triton_kernels.spread(x, layout(pad)), pad),
        lambda: (x[some].float().unsqueeze(1).expand(-1, ROUTING.top, -1),), (tokens + pairs) * HIDDEN * size,
    )  # fmt: skip

    def summed(**_: int) -> Tensor:
        return triton_kernels.gathered(rows(pad), layout(pad), weights, residual, torch.empty_like(x))

    yield Case(
        f"experts sum {tokens}", [summed], lambda **_: (summed()[some],),
        lambda: (x[some].float() * weights[some].sum(1, keepdim=True) + residual[some].float(),),
        (2 * tokens + pairs) * HIDDEN * size,
    )  # fmt: skip

    def dense(**_: int) -> Tensor:
        return triton_prefill.dense(x, *shared, "relu2", residual)

    def dense_wanted() -> Sequence[Tensor]:
        made = reference.activated(x[some].float() @ shared[0].float().T, "relu2", False) @ shared[1].float().T
        return (made + residual[some].float(),)

    yield Case(
        f"experts shared {tokens}", [dense], lambda **_: (dense()[some],), dense_wanted,
        (3 * tokens * HIDDEN + 2 * SHARED * HIDDEN) * size, 4.0 * tokens * SHARED * HIDDEN,
    )  # fmt: skip

    def whole(**_: int) -> Tensor:
        return experts(x, up, down, ids, weights, shared=shared, residual=residual)

    def whole_wanted() -> Sequence[Tensor]:
        given = (x[some].float(), up, down, ids[some], weights[some])
        return (reference.experts(*given, shared=shared, residual=residual[some]),)

    yield Case(
        f"experts whole {tokens}", [whole], lambda **_: (whole()[some],), whole_wanted,
        (3 * tokens * HIDDEN + 2 * matrix + 2 * SHARED * HIDDEN) * size, 2 * flops + 4.0 * tokens * SHARED * HIDDEN,
    )  # fmt: skip


def _engine(cut: triton_prefill.Cut) -> bool | None:
    return False if cut.rows <= 16 else None


def _torch(
    x: Tensor, hidden: Tensor, up: Tensor, down: Tensor, ids: Tensor, moved: float, flops: float
) -> Iterator[Case]:
    """PyTorch's grouped product of rows that lie sorted already, without the activation."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten().long(), minlength=EXPERTS).cumsum(0).int()
    some = torch.randint(0, order.numel(), (64,), device="cuda")
    expert = ids.flatten()[order[some]].long()
    for name, of, weight in (("up", x[order // ROUTING.top], up), ("down", hidden[order], down)):

        def call(of: Tensor = of, weight: Tensor = weight, **_: int) -> Tensor:
            return torch._grouped_mm(of, weight.transpose(-2, -1), offs=ends)

        def wanted(of: Tensor = of, weight: Tensor = weight) -> Sequence[Tensor]:
            return (torch.stack([weight[i].float() @ of[r].float() for i, r in zip(expert, some, strict=True)]),)

        yield Case(
            f"experts torch {name} {x.shape[0]}",
            [call],
            lambda call=call, **_: (call()[some],),
            wanted,
            moved,
            flops,  # type: ignore[misc]
        )


def _steps(options: Options, up: Tensor, down: Tensor, shared: list[tuple[Tensor, Tensor]]) -> Iterator[Case]:
    kind, size = options.dtype, up.element_size()
    bias = normal(EXPERTS, dtype=torch.float32, scale=0.05)
    for tokens in options.batches:
        sets = [
            (normal(tokens, HIDDEN, dtype=kind), _logits(tokens), one, normal(tokens, HIDDEN, dtype=kind))
            for one in shared * 4
        ]  # fmt: skip
        used = sum(len(reference.route(logits, bias, ROUTING)[0].unique()) for _, logits, *_ in sets) / len(sets)
        moved = 2 * (used * INNER + SHARED) * HIDDEN * size
        flops = 4.0 * tokens * (ROUTING.top * INNER + SHARED) * HIDDEN

        def step(x: Tensor, logits: Tensor, shared: tuple[Tensor, Tensor], residual: Tensor, **tile: int) -> Tensor:
            more = {"routing": ROUTING, "shared": shared, "residual": residual}
            if tile:
                cut = triton_decode.Cut(**tile)
                return triton_decode.mixture(x, logits, bias, up, down, cut=cut, **more)
            return mixture(x, logits, bias, up, down, **more)

        def wanted(given: tuple[Any, ...] = sets[0]) -> Sequence[Tensor]:
            x, logits, shared, residual = given
            route = reference.route(logits, bias, ROUTING)
            return (reference.experts(x.float(), up, down, *route, shared=shared, residual=residual),)

        yield Case(
            f"experts step {tokens}", [_with(step, given) for given in sets],
            lambda given=sets[0], **tile: (step(*given, **tile),), wanted, moved, flops, graph=True,  # type: ignore[misc]
        )  # fmt: skip


def _gemv(options: Options) -> Iterator[Case]:
    for (name, (outs, depth)), count in ((w, n) for w in WEIGHTS.items() for n in options.batches if n <= 8):
        moved = outs * depth * torch.finfo(options.dtype).bits // 8
        weights = [normal(outs, depth, dtype=options.dtype, scale=depth**-0.5) for _ in range(rounds(moved))]
        x, residual = normal(count, depth, dtype=options.dtype), normal(count, outs, dtype=options.dtype)

        def ours(weight: Tensor, x: Tensor = x, residual: Tensor = residual, **tile: int) -> Tensor:
            cut = gemv_kernels.Cut(**tile) if tile else None
            return gemv_kernels.gemv(x, weight, residual=residual, cut=cut)

        def theirs(weight: Tensor, x: Tensor = x, residual: Tensor = residual, **_: int) -> Tensor:
            return torch.addmm(residual, x, weight.T)

        def wanted(x: Tensor = x, weight: Tensor = weights[0], residual: Tensor = residual) -> Sequence[Tensor]:
            return (gemv_reference.gemv(x.float(), weight, residual=residual),)

        for side, call in (("", ours), ("torch ", theirs)):
            yield Case(
                f"gemv {side}{name} {count}x{outs}x{depth}", [_with(call, (weight,)) for weight in weights],
                lambda call=call, weight=weights[0], **tile: (call(weight, **tile),), wanted, moved,  # type: ignore[misc]
                2.0 * count * outs * depth, graph=True,
            )  # fmt: skip


def _with(call: Callable[..., Tensor], given: tuple[Any, ...]) -> Callable[..., Tensor]:
    return lambda **tile: call(*given, **tile)


MAKERS: dict[str, Callable[[Options], Iterator[Case]]] = {"route": _route, "experts": _experts, "gemv": _gemv}
