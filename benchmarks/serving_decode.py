"""How many tokens a second 1, 4 and 16 answers get that are written at once, and what a long ingest costs them.

    python -m benchmarks.serving_decode --json > benchmarks/results/serving-decode-cpu.json

Everything goes through the scheduler, as a server's requests do: sampling, text and events among it. Tokens are counted
from when all answers of a group have begun until the first has ended, so that as many as the row says are written all
the time. Before anything is timed, answers in a group are compared with the same ones alone. The tiny model has random
weights: its steps are calls rather than arithmetic, which is what batching has to save on a CPU. It knows no HTTP.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan import settings

settings.share_cores()  # before torch is imported

import torch  # noqa: E402

from longspan import LLM, SamplingParams  # noqa: E402
from longspan.engine.serving import Delta, Done, Limits, Progress, Request, Scheduler  # noqa: E402
from longspan.evals.arguments import guarded, say  # noqa: E402
from longspan.evals.environment import environment  # noqa: E402
from longspan.hf.loading import load  # noqa: E402

_TINY = "tiny"
_PROMPT, _TURNS = 64, 3


def tiny(folder: Path) -> LLM:
    """Return an engine around the tests' tiny llama, with a longer window."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_llama import save_model

    return LLM(
        load(str(save_model(folder, max_position_embeddings=1 << 15)), device="cpu", dtype=torch.float32), "dense"
    )


def requests(llm: LLM, count: int, most: int, seed: int) -> list[Request]:
    """Return requests of random prompts with greedy answers of `most` tokens."""
    draw = torch.Generator().manual_seed(seed)
    params = SamplingParams(max_tokens=most)
    size = llm.model.config.vocab_size
    return [
        Request(tokens=torch.randint(size, (_PROMPT,), generator=draw).tolist(), params=params) for _ in range(count)
    ]


class _Reader(threading.Thread):
    """Reads one request's events as they come."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        super().__init__()
        self.handle, self.times, self.tokens = scheduler.submit(request), [], []
        self.start()

    def run(self) -> None:
        for event in self.handle:
            if isinstance(event, Delta) and event.tokens:
                self.times.append(time.perf_counter())
                self.tokens += event.tokens

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Return the seconds between tokens within a stretch of time."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if a >= since and b <= until]


def together(scheduler: Scheduler, asked: Sequence[Request]) -> tuple[float, list[_Reader]]:
    """Return the tokens a second of answers that are written at once."""
    readers = [_Reader(scheduler, request) for request in asked]
    for reader in readers:
        reader.join()
    start, stop = max(reader.times[0] for reader in readers), min(reader.times[-1] for reader in readers)
    written = sum(sum(start < at <= stop for at in reader.times) for reader in readers)
    return written / (stop - start), readers


def check(llm: LLM, scheduler: Scheduler) -> None:
    """See that answers in a group are those of one after another (AssertionError: they are not)."""
    asked = requests(llm, 4, 32, seed=99)
    alone = [together(scheduler, [request])[1][0].tokens for request in asked]
    beside = [reader.tokens for reader in together(scheduler, asked)[1]]
    assert alone == beside, "answers in a group are others than alone: nothing is measured"


def ingest(llm: LLM, scheduler: Scheduler, chats: int, tokens: int, most: int) -> dict[str, Any]:
    """Measure the seconds between tokens of chats alone, and while a text of so many tokens is read."""
    text = " ".join(f"Line {i} of the ledger names pier {i * 7 % 91}." for i in range(tokens))
    split = llm.model.tokens(text[: 8 * tokens])[:tokens]
    asked = requests(llm, chats, most, seed=7)
    idle = [gap for reader in together(scheduler, asked)[1] for gap in reader.gaps()]
    readers = [_Reader(scheduler, request) for request in asked]
    while not all(reader.times for reader in readers):
        time.sleep(0.001)
    started, ended = time.perf_counter(), 0.0
    for event in scheduler.submit(Request(tokens=split, params=SamplingParams(max_tokens=1))):
        if isinstance(event, Progress | Done):
            ended = time.perf_counter()
    for reader in readers:
        reader.join()
    until = min(ended, *(reader.times[-1] for reader in readers))
    busy = [gap for reader in readers for gap in reader.gaps(started, until)]
    p95 = [1000 * statistics.quantiles(gaps, n=20)[-1] for gaps in (idle, busy)]
    return {
        "chats": chats,
        "ingest_tokens": len(split),
        "idle_p95_ms": round(p95[0], 2),
        "ingest_p95_ms": round(p95[1], 2),
        "ratio": round(p95[1] / p95[0], 2),
        "ingest_tokens_per_s": round(len(split) / (ended - started)),
    }


def _main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser("python -m benchmarks.serving_decode", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", default=_TINY, help="what the command line calls a model; tiny: random weights")
    made.add_argument("--attention", default="dense", help="e.g. quest:budget=1024")
    made.add_argument("--at-once", default="1,4,16", help="answers written at once, by commas")
    made.add_argument("--tokens", type=int, default=256, help="of an answer")
    made.add_argument("--ingest", type=int, default=8000, help="tokens that are read beside chats; 0: none")
    made.add_argument("--json", action="store_true")
    given = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        llm = tiny(Path(folder)) if given.model == _TINY else LLM(given.model, given.attention)
        llm.heads_or_none = lambda: None  # type: ignore[method-assign]
        vars(llm.model)["end_tokens"] = frozenset()  # no answer ends before the others
        scheduler = Scheduler(llm, limits=Limits(cached=0))
        scheduler.start()
        check(llm, scheduler)
        found: dict[int, list[float]] = {int(count): [] for count in given.at_once.split(",")}
        for turn in range(_TURNS):
            for count, rates in found.items():
                rates.append(together(scheduler, requests(llm, count, given.tokens, seed=turn))[0])
            say(f"turn {turn + 1} of {_TURNS}: " + ", ".join(f"{n}: {rates[-1]:.0f}/s" for n, rates in found.items()))
        rows = [{"at_once": n, "tokens_per_s": round(statistics.median(rates))} for n, rates in found.items()]
        for row in rows:
            row["times_one"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 2)  # type: ignore[assignment]
        beside = ingest(llm, scheduler, 4, given.ingest, 4 * given.tokens) if given.ingest else None
        scheduler.close(save=False)
        command = f"python -m benchmarks.serving_decode {' '.join(arguments)}".strip()
        about = environment(llm.model.device, "", []) | {"command": command}
    about |= {"model": given.model, "attention": given.attention, "dtype": str(llm.model.dtype).removeprefix("torch.")}
    if given.json:
        print(json.dumps({**about, "rows": rows, "ingest": beside}))
        return 0
    for row in (*rows, beside or {}):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("serving_decode", lambda: _main(sys.argv[1:])))
