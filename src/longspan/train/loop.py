"""The loop that every training here runs in: steps until the time is spent, curves, checkpoints, Ctrl-C.

A task has parameters, makes the loss of a step from the step's number alone (and so draws its data from it), and is
told what share of the time is done. The loop moves the parameters, writes a row to `log.jsonl`, and keeps one
checkpoint, `checkpoint.safetensors`: parameters, optimiser and counters, there as a whole or not at all. A run that was
stopped goes on as if it had not been: the same losses, step by step, where the time is counted in steps.
It does not know models or data.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.errors import Cancelled, SaveError, UsageError
from longspan.hf.adapter import write
from longspan.kv.undisturbed import Undisturbed
from longspan.train.optimiser import Optimiser, Rates

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

Tell = Callable[[str], None]


class Task(Protocol):
    """What is learnt."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """What moves, by name."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a checkpoint must have been made with to go on from it; JSON."""
        ...

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """Return the loss of a step, what else its row says, and how many tokens were read.

        Args:
            step: its number, from 0: all that is random follows from it.
            done: share of the time that is done.
        """
        ...


@dataclass(frozen=True)
class Budget:
    """How long a run takes: seconds, or steps (what is exact in tests)."""

    seconds: float | None = None
    steps: int | None = None
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        """Refuse a budget of nothing."""
        if (self.seconds is None) == (self.steps is None) or min(self.seconds or 1, self.steps or 1) <= 0:
            raise UsageError("training needs time, or a number of steps, above 0: give --hours")

    def done(self, seconds: float, steps: int) -> float:
        """Return the share that is done."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        assert self.steps is not None
        return steps / self.steps


@dataclass
class _Counted:
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def train(
    task: Task,
    folder: Path,
    budget: Budget,
    rates: Rates,
    *,
    muon: bool = True,
    tell: Tell = lambda _: None,
    stop_after: int | None = None,
) -> list[dict[str, Any]]:
    """Train until the budget is spent, from a checkpoint in the folder if there is one.

    Args:
        task: what is learnt; its parameters are moved in place.
        folder: holds checkpoint and log; made if need be.
        budget: all of the time, what earlier starts took included.
        rates: learning rates.
        muon: see `Optimiser`.
        tell: gets a line about every tenth of a minute's work.
        stop_after: stops (as Ctrl-C does) behind this many steps of this start.

    Returns:
        The rows of the log, those of earlier starts included.

    Raises:
        Cancelled: Ctrl-C; the checkpoint holds everything up to the last step.
        UsageError: the folder's checkpoint is of another training, or its loss is no number any more.
        SaveError: the folder can't be written.
    """
    optimiser = Optimiser(task.parameters.items(), rates, muon=muon)
    counted = _Counted()
    rows: list[dict[str, Any]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).is_file():
            counted, rows = _restored(folder, task, optimiser)
            tell(f"going on behind step {counted.step}, {counted.seconds:.0f} s")
        saved = told = time.monotonic()
        start = counted.step
        try:
            while (done := budget.done(counted.seconds, counted.step)) < 1:
                began = time.monotonic()
                with Undisturbed():  # Ctrl-C waits for the end of a step: half of one could not be gone on from
                    row = _step(task, optimiser, counted, done)
                counted.seconds += time.monotonic() - began
                row["seconds"] = round(counted.seconds, 3)
                rows.append(row)
                now = time.monotonic()
                if now - told > 6 or counted.step == start + 1:
                    told = now
                    tell(_line(row, counted, budget))
                if now - saved > budget.checkpoint_every:
                    _save(folder, task, optimiser, counted, rows)
                    saved = time.monotonic()
                if stop_after is not None and counted.step - start >= stop_after:
                    raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            _save(folder, task, optimiser, counted, rows)
            raise Cancelled(f"stopped behind step {counted.step}: the same command goes on from {folder}") from error
        _save(folder, task, optimiser, counted, rows)
    except OSError as error:
        raise SaveError(f"can't write to {folder}: {error.strerror or error}") from error
    return rows


def _step(task: Task, optimiser: Optimiser, counted: _Counted, done: float) -> dict[str, Any]:
    loss, more, tokens = task.loss(counted.step, done)
    loss.backward()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise UsageError(f"the loss of step {counted.step} is {value}: start again with a lower --rate")
    norm = optimiser.step(counted.step, done)
    counted.step += 1
    counted.tokens += tokens
    return {"step": counted.step, "loss": value, "norm": norm, "tokens": counted.tokens, **more}


def _line(row: Mapping[str, Any], counted: _Counted, budget: Budget) -> str:
    speed = counted.tokens / max(1e-9, counted.seconds)
    more = "".join(f", {name} {value:.3f}" for name, value in row.items() if name not in _PLAIN)
    share = budget.done(counted.seconds, counted.step)
    left = counted.seconds * (1 - share) / max(share, 1e-9)
    clock = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
    return f"step {row['step']}: loss {row['loss']:.4f}{more}; {speed:,.0f} tokens/s, {clock} left"


_PLAIN = ("step", "loss", "norm", "tokens", "seconds")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _save(folder: Path, task: Task, optimiser: Optimiser, counted: _Counted, rows: list[dict[str, Any]]) -> None:
    from safetensors.torch import save

    tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in task.parameters.items()}
    plain: list[Any] = []
    for i, state in enumerate(optimiser.state()):
        numbers = {}
        for key, entry in state["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{i}.{key}.{name}"] = value.detach().cpu().contiguous()
                else:
                    numbers[f"{key}.{name}"] = value
        plain.append({"groups": state["param_groups"], "numbers": numbers})
    about = {
        "identity": json.dumps(task.identity, sort_keys=True),
        "counted": json.dumps(vars(counted)),
        "optimiser": json.dumps(plain),
    }
    write(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())
    write(folder / CHECKPOINT, save(tensors, about))


def _restored(folder: Path, task: Task, optimiser: Optimiser) -> tuple[_Counted, list[dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / CHECKPOINT, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counted = _Counted(**json.loads(about["counted"]))
        plain = json.loads(about["optimiser"])
        rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the checkpoint in {folder} can't be read: remove it to start again") from error
    if about["identity"] != json.dumps(task.identity, sort_keys=True):
        raise UsageError(f"{folder} holds a training of another model or with other options: give another --out")
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    states: list[dict[str, Any]] = []
    for i, kept in enumerate(plain):
        entries: dict[int, dict[str, Any]] = {}
        for name, value in kept["numbers"].items():
            key, _, field = name.partition(".")
            entries.setdefault(int(key), {})[field] = value
        for name, tensor in tensors.items():
            if name.startswith(f"optimiser.{i}."):
                key, _, field = name.removeprefix(f"optimiser.{i}.").partition(".")
                entries.setdefault(int(key), {})[field] = tensor
        states.append({"state": entries, "param_groups": kept["groups"]})
    optimiser.load(states)
    return counted, rows[: counted.step]
