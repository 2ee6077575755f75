"""RULER on one model: dense by task and length, and every mechanism at a share of the keys, within a time limit.

    python -m benchmarks.ruler --out found --minutes 8 --workers 6 --device cuda
    python -m benchmarks.ruler --out found --result > benchmarks/results/ruler-h100.json

Several processes share one GPU (or `--gpus N`), since a small model leaves most of it idle; each asks every N-th
question and writes a journal of its own, as the shards of `longspan eval ruler` do. Dense comes first, then the
mechanisms, then those whose decode steps take many times as long; within each part questions take turns over tasks,
lengths and mechanisms, so that a run that ends early is balanced. The same command goes on where it was stopped. A
mechanism that fails is left out from there on, and its error is told at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan import settings

settings.share_cores()

from longspan.evals.arguments import dtype_of, guarded, say  # noqa: E402
from longspan.evals.asking import rows, tables  # noqa: E402
from longspan.evals.asking.asker import Reply, Tick  # noqa: E402
from longspan.evals.asking.engines import Engines, choosing, ways  # noqa: E402
from longspan.evals.asking.local import Local  # noqa: E402
from longspan.evals.asking.run import Asked, Given, plan, run  # noqa: E402
from longspan.evals.environment import environment  # noqa: E402
from longspan.evals.journal import Entry, Journal, in_folder, read  # noqa: E402
from longspan.evals.questions.example import Example  # noqa: E402
from longspan.evals.questions.making import named  # noqa: E402
from longspan.evals.ruler.tasks import RULER  # noqa: E402
from longspan.hf.loading import load  # noqa: E402
from longspan.lengths import lengths_of  # noqa: E402

_LEFT_OUT = ("answer", "wanted", "depths", "parameters")
"""Fields of rows that a committed result does without: they follow from the seed, or are long."""
_UNTIL = (0.3, 0.8, 1.0)
"""Shares of the time at which the parts end at the latest."""
_SLOW = "tree superlinear"
"""Mechanisms whose decode step is many times dense's today: hundreds of small operations a layer."""
_BETWEEN = 10.0
"""Seconds between two looks at what the workers have done."""


@dataclass(frozen=True)
class Part:
    """Questions that take turns."""

    given: Given
    specs: list[str]
    budgets: list[str]


class Watched(Local):
    """An asker that remembers what went wrong in it."""

    failure = ""

    def ask(self, example: Example, tick: Tick = lambda _, __: None) -> Reply:
        """See `Asker`."""
        try:
            return super().ask(example, tick)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise


def parts(options: argparse.Namespace) -> list[Part]:
    """Return what is to be asked."""
    dense = Given(RULER, named(RULER, options.tasks), lengths_of(options.lengths), options.questions, options.seed)
    less = replace(dense, lengths=lengths_of(options.share_lengths), questions=options.share_questions)
    every, shares = list(choosing()), options.shares.split(",")
    if options.mechanisms == "each":
        # Of a mechanism in several forms the first.
        specs = list({spec.partition(":")[0]: spec for spec in reversed(every)}.values())[::-1]
    else:
        specs = every if options.mechanisms == "all" else options.mechanisms.split()
    slow = [spec for spec in specs if spec.partition(":")[0] in options.slow.split()]
    quick = [spec for spec in specs if spec not in slow]
    return [Part(dense, ["dense"], []), Part(less, quick, shares), Part(less, slow, shares)]


def work(options: argparse.Namespace) -> None:
    """Ask this process's share of the questions."""
    from longspan import LLM

    began = time.monotonic()
    mine, count = (int(number) for number in options.shard.split("/"))
    llm = LLM(options.model, "dense", options.device, dtype_of(options.dtype), say=say)
    about = environment(llm.model.device, "benchmarks.ruler", shlex.split(options.told))
    about |= {"model": Path(llm.model.name).name, "dtype": options.dtype, "eval": "ruler", "seed": options.seed}

    def asker(mechanism: Any) -> LLM:
        return LLM(llm.model, mechanism, say=say)

    with in_folder(options.out, f"ruler-{mine}of{count}.jsonl") as journal:
        elsewhere = entries(Path(options.out), leave_out=journal.file)
        for part, share in zip(parts(options), _UNTIL, strict=True):
            until = began + 60 * options.minutes * share
            engines = Engines(asker, ways(part.specs, part.budgets), leave_out=say, local=Watched)
            asked = plan(part.given, engines.at)[mine - 1 :: count]
            while asked and not _asked(part.given, asked, journal, about, elsewhere, until):
                asked = [each for each in asked if not _failure(each)]


def _asked(
    given: Given, asked: list[Asked], journal: Journal, about: dict[str, Any], elsewhere: list[Entry], until: float
) -> bool:
    """Ask until all is done or the time is over; False: an asker failed."""
    try:
        if time.monotonic() < until:
            run(given, asked, journal, about, say, elsewhere=elsewhere, until=until)
    except Exception:
        failed = {each.key.attention: why for each in asked if (why := _failure(each))}
        if not failed:
            raise  # not an asker's fault
        for attention, why in failed.items():
            say(f"FAILED {attention}: {why}")
        return False
    return True


def _failure(asked: Asked) -> str:
    return asked.asker.failure if isinstance(asked.asker, Watched) else ""


def entries(folder: Path, leave_out: Path | None = None) -> list[Entry]:
    """Return the rows of a folder's journals."""
    return [entry for file in sorted(folder.glob("ruler*.jsonl")) if file != leave_out for entry in read(file)]


def lead(options: argparse.Namespace, told: list[str]) -> None:
    """Start the workers, tell how far they are until they end, and what failed."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    load(options.model or settings.default_model(), device="cpu", say=say)  # converted once, before several would do it
    left = options.minutes - (time.monotonic() - began) / 60
    given = [sys.executable, "-m", "benchmarks.ruler", *told, "--told", shlex.join(told), "--minutes", str(left)]
    own = os.environ | {"OMP_NUM_THREADS": "1", "LONGSPAN_THREADS": "1"}
    logs = [folder / f"ruler-{i + 1}of{options.workers}.log" for i in range(options.workers)]
    workers = []
    for i, log in enumerate(logs):
        with log.open("w") as stream:
            shard = ["--shard", f"{i + 1}/{options.workers}"]
            if options.gpus > 1:
                own["CUDA_VISIBLE_DEVICES"] = str(i % options.gpus)
            workers.append(subprocess.Popen([*given, *shard], stdout=stream, stderr=stream, env=own))
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(_BETWEEN)
            _tell(folder, time.monotonic() - began, 60 * options.minutes)
    finally:
        for worker in workers:
            worker.terminate()
    for worker, log in zip(workers, logs, strict=True):
        lines = log.read_text(errors="replace").splitlines()
        for line in dict.fromkeys(line for line in lines if line.startswith(("FAILED", "left out"))):
            say(f"{log.name}: {line}")
        if worker.wait():
            say(f"{log.name} ended with {worker.returncode}: {lines[-1] if lines else 'no word'}")


def _tell(folder: Path, seconds: float, limit: float) -> None:
    """Tell how many questions are answered, and the averages so far."""
    found = [rows.row_of(entry) for entry in rows.answered(entries(folder)).values()]
    dense = [row.score for row in found if row.mechanism == "dense"]
    others = [row.score for row in found if row.mechanism != "dense"]
    means = [
        f"{name} {100 * sum(scores) / len(scores):.0f} % of {len(scores)}"
        for name, scores in (("dense", dense), ("the others", others))
        if scores
    ]
    say(f"{seconds:.0f} of {limit:.0f} s: {', '.join(means) or 'loading'}")


def result(folder: Path) -> dict[str, Any]:
    """Return environment, table and rows of all journals in a folder."""
    made = tables.summary(list(rows.answered(entries(folder)).values()))
    kept = [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in made.pop("rows")]
    runs = made.pop("runs")
    commands = " ; ".join(dict.fromkeys(each["command"] for each in runs))
    return {**made, "run": f"{len(runs)} runs", "command": commands, "rows": kept}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    told = sys.argv[1:] if arguments is None else arguments
    options = _options(told)
    if options.result:
        print(json.dumps(result(Path(options.out)), ensure_ascii=False))
        return 0

    def ask() -> int:
        if options.shard:
            work(options)
        else:
            lead(options, told)
        return 0

    return guarded("ruler", ask)


def _options(told: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.ruler", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", required=True, metavar="FOLDER", help="for journals; a run that was stopped goes on")
    made.add_argument("--model", metavar="NAME", help="as for longspan ask; default: LONGSPAN_MODEL, else smollm2")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--dtype", default="float32", help="default: %(default)s")
    made.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="time limit, loading included")
    made.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    made.add_argument("--gpus", type=int, default=1, metavar="N", help="that workers are spread over")
    made.add_argument("--tasks", default="all", help="of RULER, commas between; default: %(default)s")
    made.add_argument("--lengths", default="1K,2K,4K,8K", help="dense; default: %(default)s")
    made.add_argument("--questions", type=int, default=5, help="of each task and length, dense; default: %(default)s")
    made.add_argument("--mechanisms", default="each", help="specifications, spaces between; all; or each in one form")
    made.add_argument("--slow", default=_SLOW, metavar="NAMES", help="asked last; default: %(default)s")
    made.add_argument("--shares", default="1/4", help="of the context's keys; default: %(default)s")
    made.add_argument("--share-lengths", default="4K,8K", help="for the mechanisms; default: %(default)s")
    made.add_argument("--share-questions", type=int, default=3, help="for the mechanisms; default: %(default)s")
    made.add_argument("--seed", type=int, default=0, help="which questions")
    made.add_argument("--result", action="store_true", help="ask nothing: print what the folder holds as JSON")
    made.add_argument("--shard", help=argparse.SUPPRESS)
    made.add_argument("--told", default="", help=argparse.SUPPRESS)
    return made.parse_args(told)


if __name__ == "__main__":
    sys.exit(main())
