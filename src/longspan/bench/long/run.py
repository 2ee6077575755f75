"""Measures a whole model at growing contexts, one row for each way of attending and context.

The way that is named first comes first, at all contexts. Logits are checked before (`checks`). Every row goes into a
journal as it comes, so that a run that was stopped goes on where it was. Floors: prefill by the FLOPs of the weights
that a token multiplies and of attention, decode by the bytes of weights, states, keys and values that a step reads.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longspan.attention import Mechanism
from longspan.bench import timing
from longspan.bench.long import checks, measure, peers
from longspan.bench.timing import Peaks
from longspan.engine import memory_plan
from longspan.engine.kv_context import KVContext
from longspan.engine.stepper import AHEAD
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.journal import Entry, Journal
from longspan.hf.model import CausalModel
from longspan.hf.native.blocks import Experts
from longspan.kv.base import PAGE

ANSWER = measure.STEPS * (measure.BATCHES + 1)
"""Tokens that are decoded after each context."""
_FEWEST = 256
"""Tokens whose logits are compared at least."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    contexts: tuple[int, ...]
    mechanisms: tuple[Mechanism, ...]
    peers: tuple[str, ...]
    whole: int
    """Tokens up to which a context is read whole."""
    seed: int
    profile: bool
    of: dict[str, Any]
    """What rows must have in common to stand in one result."""

    def __post_init__(self) -> None:
        """Refuse what can't be measured (UsageError)."""
        for peer in self.peers:
            if peer not in peers.PEERS:
                raise UsageError(f"unknown peer {peer!r}: use {', '.join(peers.PEERS)}")
        if not self.mechanisms and not self.peers:
            raise UsageError("no attention is named: give --attention superlinear,dense")
        for mechanism in self.mechanisms:
            if mechanism.evicts or mechanism.wanted_pages:
                raise UsageError(
                    f"{mechanism.name} keeps no whole context here: give dense, superlinear, quest or tree"
                )

    @property
    def sides(self) -> list[str]:
        """What is measured at each context, as rows name it."""
        return [*(mechanism.describe() for mechanism in self.mechanisms), *self.peers]


def run(
    model: CausalModel,
    asked: Asked,
    journal: Journal,
    late: Callable[[], bool],
    say: Callable[[str], None],
    busy: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Measure what the journal does not hold yet; return what was left out because time was up.

    Args:
        model: with a native forward.
        asked: what.
        journal: begun; every row goes into it as it comes.
        late: whether no further row may be begun.
        say: told every figure.
        busy: told what is being done.

    Raises:
        WrongLogitsError: the model's logits are wrong.
    """
    done = {(entry.row["attention"], entry.row["context"]) for entry in entries_of(asked, journal)}
    checked: checks.Checked | None = None
    peaks: Peaks | None = None
    left: list[str] = []
    for side, context in itertools.product(asked.sides, asked.contexts):
        if (side, context) in done:
            continue
        if late():
            left.append(f"{side} at {context:,}")
            continue
        if checked is None:
            busy(f"logits of {checks.TOKENS:,} tokens beside transformers'")
            checked = _checked(model, asked)
            say(f"logits: {asdict(checked)}")
            busy("what the device can do")
            peaks = timing.peaks(model.device, model.dtype)
        assert peaks is not None
        gc.collect()
        measure.clear(model.device)
        busy(f"{side} at {context:,}")
        row: dict[str, Any] = {"attention": side, "context": context}
        mechanism = next((each for each in asked.mechanisms if each.describe() == side), None)
        try:
            row |= peers.row(model, side, context, asked.seed) if mechanism is None else _row(
                model, mechanism, context, asked, peaks, say
            )  # fmt: skip
        except (PoolExhaustedError, torch.OutOfMemoryError) as error:
            row["left_out"] = str(error).splitlines()[0]
        row |= {"checked": asdict(checked), "peaks": asdict(peaks)}
        say(line(row))
        journal.append({**_short(row), "of": asked.of})
    return left


def _checked(model: CausalModel, asked: Asked) -> checks.Checked:
    """Compare logits (WrongLogitsError), of fewer tokens where transformers has no memory for so many."""
    tokens = min(checks.TOKENS, *asked.contexts)
    while True:
        try:
            return checks.check(model, list(asked.mechanisms), asked.seed, tokens)
        except torch.OutOfMemoryError:
            if tokens <= _FEWEST:
                raise
        tokens //= 2  # what the failure held is free by now
        gc.collect()
        measure.clear(model.device)


def entries_of(asked: Asked, journal: Journal) -> list[Entry]:
    """Return what of a journal answers what is asked."""
    return [
        entry
        for entry in journal.entries
        if entry.row.get("of") == asked.of
        and entry.row["context"] in asked.contexts
        and entry.row["attention"] in asked.sides
    ]


def line(row: dict[str, Any]) -> str:
    """Return a row's figures in one line."""
    head = f"{row['attention']} at {row['context']:,}: "
    if "left_out" in row:
        return f"{head}left out: {row['left_out']}"
    decode = row["decode_tokens_per_s"][0]
    told = f"{head}prefill {row['prefill_tokens_per_s']:,.0f} tokens/s, first token after {row['first_token_s']:.2f} s"
    peak = "" if row["memory"] is None else f", peak {row['memory']['peak'] / 2**30:.1f} GiB"
    return f"{told}, decode {decode:,.1f} tokens/s{peak}"


def _row(
    model: CausalModel, mechanism: Mechanism, length: int, asked: Asked, peaks: Peaks, say: Callable[[str], None]
) -> dict[str, Any]:
    context = KVContext(model, mechanism)
    profiled = asked.profile and model.device.type == "cuda"
    # Nothing may have to grow while something is timed, or beside a context that fills the device.
    planned = context.reserve(length + ANSWER + AHEAD * PAGE + (memory_plan.CHUNKS[0] if profiled else 0))
    if length <= asked.whole:
        read = measure.read_whole(context, length, asked.seed)
    else:
        read = measure.read_parts(context, length, _ends(length, context.chunk), asked.seed, say)
    rate = measure.decode(context)
    found = measure.memory(context)
    flops, nbytes = _floors(model, mechanism, length)
    row: dict[str, Any] = {
        "prefill_tokens_per_s": length / read.seconds,
        "first_token_s": read.seconds,
        "read": "whole" if read.whole else "integral of chunks over filled pages",
        "chunk": read.chunk,
        "fewest": read.fewest,
        "chunks": read.chunks,
        "decode_tokens_per_s": rate,
        "graph": context.runs and model.device.type == "cuda",
        "memory": found,
        "planned": None if planned is None else planned.as_dict(),
        "prefill_floor_share": flops / peaks.matmul_flops / read.seconds,
        "decode_floor_share": nbytes / peaks.copy_bytes_per_s * rate[0],
    }
    if (reads := context.reads_by(length)) != mechanism:
        row["prefill"] = reads.describe()
    if profiled:
        row["top_kernels"] = measure.top_kernels(context, read.chunk)
    context.free()
    return row


def _ends(length: int, chunk: int) -> list[int]:
    """Return the lengths at which chunks of a long context are timed: a tenth, then every fifth of it."""
    shares = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    ends = {max(chunk, round(share * length / chunk) * chunk) for share in shares} | {length}
    return sorted(end for end in ends if end > chunk and end <= length)


def _floors(model: CausalModel, mechanism: Mechanism, length: int) -> tuple[float, float]:
    """Return the FLOPs of reading a context, and the bytes of a decode step after it."""
    stack = model.native
    assert stack is not None
    body = sum(parameter.numel() for parameter in model.model.parameters()) - stack.embedding.numel()
    if stack.head.data_ptr() != stack.embedding.data_ptr():
        body -= stack.head.numel()
    for _, block in stack.sublayers:
        if isinstance(block, Experts):
            each = (block.up.numel() + block.down.numel()) // block.up.shape[0]
            body -= each * (block.up.shape[0] - block.routing.top)
    cost = mechanism.cost(length, model.dimensions.shape(model.dtype.itemsize))
    states = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in model.state_spec.values())
    flops = 2.0 * body * length + model.dimensions.layers * cost.prefill_flops
    read = (body + stack.head.numel()) * model.dtype.itemsize + 2.0 * states
    return flops, read + model.dimensions.layers * cost.decode_bytes


def _short(value: Any) -> Any:
    """Return a JSON value with five digits of every fraction: more than any clock gives."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
