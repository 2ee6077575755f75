"""Training steps at long contexts: tokens a second and peak memory, under mechanisms and densely (SDPA), one JSON line.

A step is what `longspan convert --lora` does: forward and backward of one text through low-rank changes of a model of
random weights, the loss of every token, layers computed again in the backward pass. Each length first sees that losses
of the mechanism are finite and that gradients reach every change. Peak memory is the device's, None on a CPU.
It does not know whether anything is learnt.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from longspan.attention import Mechanism, parse
from longspan.evals.environment import environment
from longspan.hf.model import CausalModel
from longspan.hf.training import states, token_losses
from longspan.lengths import lengths_of
from longspan.train.lora import Lora
from longspan.train.readers import Learning


def measure(
    model: CausalModel, mechanisms: Sequence[Mechanism], lengths: Sequence[int], steps: int
) -> list[dict[str, Any]]:
    """Return a row for each length and mechanism.

    Args:
        model: its layers get low-rank changes.
        mechanisms: by which it attends while it learns.
        lengths: tokens of a text.
        steps: measured, after one that is not.
    """
    lora = Lora(model.model, 16, 0)
    rows = []
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        for mechanism in mechanisms:
            row = {"attention": mechanism.describe(), "tokens": length, **_timed(model, mechanism, ids, lora, steps)}
            print(json.dumps(row), file=sys.stderr, flush=True)  # a run that is stopped has told what it measured
            rows.append(row)
    return rows


def _timed(model: CausalModel, mechanism: Mechanism, ids: torch.Tensor, lora: Lora, steps: int) -> dict[str, Any]:
    cuda, ids = model.device.type == "cuda", ids.to(model.device)
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(steps + 1):
            began = time.perf_counter()
            found = states(model, ids, Learning(mechanism, model.rotary), again=True)
            loss = token_losses(model.model, found, ids).mean()
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            assert bool(torch.isfinite(loss)), "a loss that is no number is no measurement"
            for name, parameter in lora.parameters.items():
                assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
                parameter.grad = None
    except torch.OutOfMemoryError:
        return {"tokens_per_s": None, "peak_bytes": None, "told": "out of memory"}
    middle = sorted(seconds[1:])[steps // 2]
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"tokens_per_s": round(ids.shape[1] / middle, 1), "seconds": round(middle, 4), "peak_bytes": peak}


def main(arguments: Sequence[str]) -> int:
    """Run `python -m longspan.bench.train [MODEL [LENGTHS [SPEC ...]]]`."""
    from longspan.hf.random_weights import random_model

    name, lengths, *specs = [*arguments, *("smollm2-135m", "32K,64K")[len(arguments) :]]
    model = random_model(name, native=False)
    # Kernels compute gradients within the trained length.
    if model.rotary is not None:
        model.rotary.trained_length = None
    chosen = [parse(spec) for spec in specs or ("dense", "superlinear:window=2024,spans=3")]
    rows = measure(model, chosen, lengths_of(lengths), 3)
    about = environment(model.device, "", []) | {"command": f"python -m longspan.bench.train {' '.join(arguments)}"}
    print(json.dumps({**about, "model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
