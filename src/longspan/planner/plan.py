"""Will it fit, and how fast: one model, one context, one device or several, one mechanism.

    from longspan import plan
    found = plan("llama-3.1-8b", "128K", gpu="h100")
    found.fits, found.memory.total, found.decode_tokens_per_s

Where it does not fit, `advice` says what to change. It does not know what a mechanism loses beyond what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longspan.errors import UsageError
from longspan.lengths import context_of, short
from longspan.planner import advice, formats, parallel, reading, times
from longspan.planner.devices import NETWORK, Device, device
from longspan.planner.measured import Range, plus, summary
from longspan.planner.memory import CHUNK, GPU_CHUNK, NATIVE, NATIVE_CHUNKS, SLACK, Memory, mechanism, memory
from longspan.planner.model import Model
from longspan.planner.parallel import Placement, Ranks, Sent
from longspan.planner.times import Work

_OWN = ("fp32", "bf16", "fp16")
"""Formats of weights in which a model is run as it is."""


@dataclass(frozen=True)
class Asked:
    """What is planned: names looked up, defaults filled in."""

    model: Model
    context: int
    attention: str
    weights: str
    kv: str
    device: Device
    ranks: Ranks
    placement: Placement | None
    """None: one GPU."""
    concurrent: int
    given_chunk: int | None
    """Tokens that are read at once; None: the engine's choice."""
    rotated: bool = True
    """Whether a rotated copy of the keys is kept; a KV budget leaves it out."""
    above: float | None = None
    """Bytes of keys and values that the device holds, the others being in host memory; None: all."""

    @property
    def work(self) -> Work:
        """The same as one device would have to compute it."""
        return Work(
            self.model,
            self.context,
            self.attention,
            self.weights,
            self.kv,
            self.concurrent,
            self.device,
            self.chunk,
        )

    @property
    def chunk(self) -> int:
        """Tokens that are read at once: as the engine has it, the most that fit where it plans its memory before."""
        if self.given_chunk is not None:
            return self.given_chunk
        if not self._planned:
            return GPU_CHUNK if self.device.gpu else CHUNK
        room = (1 - SLACK) * self.device.memory
        fitting = (chunk for chunk in NATIVE_CHUNKS if self._memory(chunk).total <= room)
        return next(fitting, NATIVE_CHUNKS[-1])

    @property
    def _planned(self) -> bool:
        """Whether the engine runs the model by its own forward and sets memory aside (`KVContext.reserve`)."""
        return (
            self.device.gpu
            and self.placement is None
            and self.model.kind in NATIVE
            and self.weights in _OWN
            and self.kv == formats.kv("auto", self.weights)
            and self.rotated
            and self.above is None
            and not mechanism(self.attention).evicts
            and mechanism(self.attention).dropped(self.context) == (0, 0)
        )

    def memory(self) -> Memory:
        """Return the bytes on one device."""
        return self._memory(self.chunk)

    def _memory(self, chunk: int) -> Memory:
        held = memory(
            self.model,
            self.context,
            attention=self.attention,
            weights=self.weights,
            kv=self.kv,
            concurrent=self.concurrent,
            chunk=chunk,
            gpu=self.device.gpu,
            ranks=self.ranks.count,
            split=self.ranks.split,
        )
        return replace(
            held,
            rotated=held.rotated if self.rotated else 0.0,
            kv=held.kv if self.above is None else min(held.kv, self.above),
        )


@dataclass(frozen=True)
class Plan:
    """What one model takes for one context."""

    asked: Asked
    memory: Memory
    """Of one device."""
    prefill: Range
    """Seconds of reading one context."""
    step: Range
    """Seconds of a decode step."""
    sent: Sent | None
    """What is computed and sent over several devices."""
    notes: tuple[str, ...]
    advice: tuple[advice.Change, ...] = field(default=(), compare=False)
    """What to change where it does not fit, in order of harm; the last one makes it fit."""

    @property
    def fits(self) -> bool:
        """Whether it fits, all that makes it fast included."""
        return self.memory.total <= self.asked.device.memory

    @property
    def spare(self) -> float:
        """Bytes left on a device; less than 0: that lack."""
        return self.asked.device.memory - self.memory.total

    @property
    def first_token(self) -> Range:
        """Seconds until the first token of an answer, the context read anew."""
        return plus(self.prefill, self.step)

    @property
    def decode_tokens_per_s(self) -> tuple[float, float]:
        """Tokens a second of each sequence, at least and at most."""
        return 1 / self.step.high, 1 / self.step.low

    @property
    def prefill_tokens_per_s(self) -> tuple[float, float]:
        """Tokens a second of prefill, at least and at most."""
        return self.asked.context / self.prefill.high, self.asked.context / self.prefill.low

    @property
    def by(self) -> list[str]:
        """What the times rest on."""
        return summary(self.first_token.by)

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        asked = self.asked
        return {
            "model": asked.model.name,
            "parameters": asked.model.parameters,
            "active_parameters": asked.model.active,
            "layers": asked.model.describe(),
            "context": asked.context,
            "attention": asked.attention,
            "weights": asked.weights,
            "kv": asked.kv,
            "concurrent": asked.concurrent,
            "device": asked.device.name,
            "gpus": asked.ranks.gpus,
            "nodes": asked.ranks.nodes,
            "placement": None if asked.placement is None else asked.placement.name,
            "memory": self.memory.told(),
            "kv_bytes_per_token": _token_bytes(asked),
            "device_memory": asked.device.memory,
            "fits": self.fits,
            "spare": round(self.spare),
            "prefill_seconds": _ends(self.prefill),
            "prefill_tokens_per_s": [_digits(each) for each in self.prefill_tokens_per_s],
            "first_token_seconds": _ends(self.first_token),
            "decode_tokens_per_s": [_digits(each) for each in self.decode_tokens_per_s],
            "by": self.by,
            **({"parallel": _sent(self.sent)} if self.sent else {}),
            "notes": list(self.notes),
            "advice": [each.told() for each in self.advice],
        }


def plan(
    model: str | Mapping[str, Any],
    context: int | str,
    *,
    attention: str = "dense",
    weights: str = "auto",
    kv: str = "auto",
    gpu: str = "auto",
    gpus: int = 1,
    nodes: int = 1,
    placement: str = "auto",
    concurrent: int = 1,
    chunk: int | None = None,
    network: float = NETWORK,
    anchor: int | None = None,
    split_weights: bool = False,
) -> Plan:
    """Plan a model's context on a device: bytes, whether they fit, seconds, and what to change.

    Args:
        model: a short name, a hub name, a folder with config.json, or the fields of a config.json.
        context: tokens, or as `context_of` reads them: `1.5M`, `128K`, `128Ki`.
        attention: specification of a mechanism.
        weights: `auto`, `fp32`, `bf16`, `fp16`, `fp8`, `int8` or `int4`.
        kv: `auto` or a format of keys and values (`kv/formats.py`).
        gpu: a device of the data file, `cpu`, or `auto` for what is here.
        gpus: of one node.
        nodes: of so many GPUs each.
        placement: how a context lies on several GPUs: `auto`, `ring`, `context_parallel`, `star` or `sharded`.
        concurrent: contexts that are held, and answered, at once.
        chunk: tokens that are read at once; None: the engine's choice.
        network: bytes a second that a GPU sends to another node.
        anchor: tokens of star's anchor; None: a rank's own block.
        split_weights: whether GPUs share the weights instead of holding all of them each.

    Raises:
        UsageError: an option out of range, or unknown; the message lists what is known.
        ModelError: a configuration that can't be read, or lacks a field.
    """
    found = planned(
        asked(
            model,
            context,
            attention=attention,
            weights=weights,
            kv=kv,
            gpu=gpu,
            ranks=ranks(gpus, nodes, network, anchor, split_weights),
            placement=placement,
            concurrent=concurrent,
            chunk=chunk,
        )
    )
    return found if found.fits else replace(found, advice=tuple(advice.changes(found.asked)))


def asked(
    model: str | Mapping[str, Any],
    context: int | str,
    *,
    attention: str,
    weights: str,
    kv: str,
    gpu: str,
    ranks: Ranks,
    placement: str,
    concurrent: int,
    chunk: int | None,
) -> Asked:
    """Return what is asked for, checked; arguments and errors as for `plan`."""
    of = reading.model(model) if isinstance(model, str) else reading.read("the model", model)
    tokens = context if isinstance(context, int) else context_of(context)
    for name, value in (("context", tokens), ("concurrent", concurrent), ("chunk", 1 if chunk is None else chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value} must be a whole number of at least 1")
    on = device(gpu)
    if ranks.count > 1 and not on.gpu:
        raise UsageError("several devices are planned for GPUs alone: give --gpu, such as h100")
    spec = mechanism(attention).describe()
    placed = None if placement == "auto" and ranks.count == 1 else parallel.placement(placement, spec)
    if placed is not None and ranks.count == 1:
        raise UsageError(f"placement {placed.name!r} lies over several GPUs: give their number, or leave it out")
    numbers = formats.weights(weights, on)
    return Asked(
        model=of,
        context=tokens,
        attention=spec,
        weights=numbers,
        kv=formats.kv(kv, numbers),
        device=on,
        ranks=ranks,
        placement=placed,
        concurrent=concurrent,
        given_chunk=chunk,
    )


def planned(given: Asked) -> Plan:
    """Return the plan of what is asked for, without advice."""
    if given.placement is None:
        prefill, step, sent = times.prefill(given.work), times.decode(given.work), None
    else:
        prefill = parallel.prefill(given.work, given.ranks, given.placement)
        step = parallel.decode(given.work, given.ranks, given.placement)
        sent = parallel.sent(given.placement, given.work, given.ranks)
    return Plan(given, given.memory(), prefill, step, sent, tuple(_notes(given)))


def ranks(gpus: int, nodes: int, network: float, anchor: int | None = None, split: bool = False) -> Ranks:
    """Return GPUs that share a context (UsageError: a number out of range)."""
    for name, value in (("gpus", gpus), ("nodes", nodes), ("anchor", 1 if anchor is None else anchor)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 40:
            raise UsageError(f"{name}={value} must be a whole number of at least 1")
    if not (network > 0 and math.isfinite(network)):
        raise UsageError(f"network={network} must be bytes a second, more than 0")
    return Ranks(gpus, nodes, network, anchor, split)


def _notes(given: Asked) -> list[str]:
    """Return what whoever reads a plan should know."""
    notes = list(given.model.notes)
    chosen, trained = mechanism(given.attention), given.model.trained
    if trained is not None and given.context > trained and not chosen.beyond_window:
        notes.append(
            f"{given.model.name} was trained for {short(trained)} tokens, and {chosen.name} reads "
            f"{short(given.context)} at their own positions: expect nonsense beyond"
        )
    if chosen.needs_training:
        notes.append(f"{chosen.name} needs a model that was trained with it")
    if given.model.attending and given.model.attending[0].latent:
        notes.append("keys and values are counted compressed (MLA); transformers' own cache holds them expanded")
    if any(each.window is not None for each in given.model.attending):
        notes.append(
            "layers with a window of their own are counted as if they kept no more; Longspan keeps all their keys"
        )
    if given.ranks.split:
        notes.append("weights are counted as split over the GPUs, which Longspan does for experts alone")
    return notes


def _token_bytes(given: Asked) -> float:
    """Return the bytes that one more token of context adds, where all keys and values are kept."""
    number = formats.number_bytes(given.kv, max((each.head_dim for each in given.model.attending), default=64))
    return round(number * given.model.token_numbers(), 3)


def _ends(given: Range) -> list[float]:
    return [_digits(given.low), _digits(given.high)]


def _digits(value: float) -> float:
    """Return a number to four digits: no estimate here knows more."""
    return float(f"{value:.4g}")


def _sent(sent: Sent) -> dict[str, Any]:
    return {
        "rank_tokens": sent.rank_tokens,
        "compute_steps": sent.steps,
        "passes": sent.passes,
        "bytes_sent": round(sent.bytes),
        "bytes_sent_to_other_nodes": round(sent.across),
        "sent_beside_compute": sent.beside,
        "decode_bytes_sent": round(sent.decode_bytes),
    }
