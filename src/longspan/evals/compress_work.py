"""Who measures in a comparison of ways to compress: this process, copies of it side by side, or a peer's.

    python -m longspan.evals.compress_work MODEL DEVICE DTYPE [ADAPTER]

A small model leaves most of a GPU, or of many cores, idle: one process is busy with launching. A copy loads the model,
is told once what is asked of every way (`begin`), and then measures a way at a ratio a line. Ratios of one way come one
after the other, so that its documents are read once. It does not know journals, nor which ways there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from longspan.errors import LongspanError
from longspan.evals.arguments import dtype_of, guarded
from longspan.evals.compress import Case, Outcome, Question, Theirs
from longspan.evals.compress_ours import Ours, Readings, Way, within
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.peers.process import Peer, Program


class Measurer(Protocol):
    """Measures ways, ours or a peer's."""

    @property
    def ended(self) -> bool:
        """Whether it measures nothing more."""

    def measure(self, way: str, ratio: float) -> tuple[str, list[Outcome]]:
        """Return a way in words, and what came of each case (UsageError: it can't keep so little, or it failed)."""
        ...


class Presses:
    """A peer's process."""

    def __init__(
        self, peer: Peer, model: CausalModel, cases: Sequence[Case], continuations: Sequence[Sequence[int]]
    ) -> None:
        """Take what is asked of every way; `model` turns tokens into text."""
        self.peer, self.model, self.cases, self.continuations = peer, model, cases, continuations

    @property
    def ended(self) -> bool:
        """See `Measurer`."""
        return self.peer.ended

    def measure(self, way: str, ratio: float) -> tuple[str, list[Outcome]]:
        """See `Measurer`."""
        outcomes = Theirs(self.peer, self.model, way, ratio).run(self.cases, self.continuations)
        return f"{way} compression_ratio={1 - 1 / ratio:g}", outcomes


class Here:
    """This process."""

    ended = False

    def __init__(
        self, model: CausalModel, length: int, cases: Sequence[Case], continuations: Sequence[Sequence[int]]
    ) -> None:
        """Take what is asked of every way; `length`: tokens of the contexts."""
        self.model, self.length, self.cases, self.continuations = model, length, cases, continuations
        self.readings = Readings(model)
        self._latest: tuple[Way, list[Outcome]] | None = None

    def measure(self, way: str, ratio: float) -> tuple[str, list[Outcome]]:
        """See `Measurer`."""
        made = within(self.model, way, ratio, self.length)
        if self._latest is None or self._latest[0] != made:  # a format alone is the same at every ratio
            self._latest = made, Ours(self.model, made, self.readings).run(self.cases, self.continuations)
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()  # other processes share the device
        return made.describe(), self._latest[1]


class Copy:
    """A process of its own with the same model."""

    def __init__(self, model: str, device: str, dtype: str, adapter: str | None = None) -> None:
        """Start it, and wait for nothing; arguments as on the command line above."""
        command = [sys.executable, "-m", __name__, model, device, dtype, *([adapter] if adapter else [])]
        self.program = Program("a copy of longspan", command, {"OMP_NUM_THREADS": "1", "LONGSPAN_THREADS": "1"})

    def begin(self, length: int, cases: Sequence[Case], continuations: Sequence[Sequence[int]]) -> None:
        """Tell what is asked of every way; arguments as for `Here` (UsageError: it does not start)."""
        told = {"length": length, "cases": [asdict(case) for case in cases], "continuations": continuations}
        self.program.ask(told)

    def measure(self, way: str, ratio: float) -> tuple[str, list[Outcome]]:
        """See `Measurer`."""
        found = self.program.ask({"way": way, "ratio": ratio})
        outcomes = [Outcome(**{**each, "likeliest": tuple(each["likeliest"])}) for each in found["outcomes"]]
        return found["options"], outcomes

    @property
    def ended(self) -> bool:
        """Whether it ended, and measures nothing more."""
        return self.program.ended

    def __enter__(self) -> Copy:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.program.close()


def main() -> int:
    """Load the model, say so, and answer until standard input ends."""
    name, device, dtype, *adapter = sys.argv[1:]
    model = load(name, device=device, dtype=dtype_of(dtype), adapter=adapter[0] if adapter else None)
    _say({"model": model.fingerprint})
    here: Here | None = None
    for line in sys.stdin:
        told = json.loads(line)
        if "cases" in told:
            here = Here(model, told["length"], [_case(each) for each in told["cases"]], told["continuations"])
            _say({})
            continue
        assert here is not None, "what is asked comes first"
        try:
            options, outcomes = here.measure(told["way"], told["ratio"])
            _say({"options": options, "outcomes": [asdict(each) for each in outcomes]})
        except LongspanError as error:
            _say({"error": str(error)})
        except Exception as error:  # one way that fails ends no others
            _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    return 0


def _case(told: dict[str, Any]) -> Case:
    asked = told["question"]
    question = None if asked is None else Question(**{**asked, "outputs": tuple(asked["outputs"])})
    return Case(told["tokens"], question, tuple(told["follows"]))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded("compress_work", main))
