"""RULER on one model: dense by task and length, and every mechanism at a share of the keys, within a time limit.

    python -m benchmarks.ruler --out found --minutes 7 --workers 8 --device cuda
    python -m benchmarks.ruler --out found --result > benchmarks/results/ruler-h100.json

Several processes share one GPU (or `--gpus N`), since making questions and launching small kernels keep a core busy
each; each asks every N-th question and writes a journal of its own into `--scratch`. The first process puts them
together in one file, `ruler.jsonl` in `--out`, again and again: a run that is cut off leaves what it has, and the same
command goes on. Dense comes first, then one mechanism after the other in the order given, each with its share of the
time that is left; within a part questions take turns over tasks and lengths, so that a part that ends early is
balanced. A mechanism that fails is left out from there on, and its error is told at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longspan import settings

settings.share_cores()

import torch  # noqa: E402

from longspan.attention import parse  # noqa: E402
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
_MECHANISMS = (
    "quest sparq snapkv superlinear:sinks=4 expected kvzip h2o keydiff streaming retrieval:read=place rocketkv sparse "
    "retrieval tree"
)
"""Those that say most first, and last the one whose steps are many times as many small operations."""
_DENSE = 0.4
"""Share of the time at which dense ends at the latest."""
_FAIR = 1.5
"""Times an equal share of the time left that one mechanism may take."""
_BETWEEN = 10.0
"""Seconds between two looks at what the workers have done."""
_GRACE = 20.0
"""Seconds after the time limit in which workers may end what they have begun."""
_FILE = "ruler.jsonl"


@dataclass(frozen=True)
class Part:
    """Questions that take turns."""

    given: Given
    specs: list[str]
    budgets: list[str]


class Watched(Local):
    """An asker that remembers what went wrong in it, and asks one by one where memory does not hold several."""

    failure = ""

    def ask(self, example: Example, tick: Tick = lambda _, __: None) -> Reply:
        """See `Asker`."""
        try:
            return super().ask(example, tick)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise

    def ask_all(self, examples: Sequence[Example], tick: Tick = lambda _, __: None) -> list[Reply]:
        """See `Asker`."""
        try:
            return super().ask_all(examples, tick)
        except torch.OutOfMemoryError:
            say(f"{self.identity.attention}: no memory for {len(examples)} questions at once")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise
        torch.cuda.empty_cache()
        return [self.ask(example, tick) for example in examples]


def parts(options: argparse.Namespace) -> list[Part]:
    """Return what is to be asked, in this order."""
    dense = Given(RULER, named(RULER, options.tasks), lengths_of(options.lengths), options.questions, options.seed)
    asked = _MECHANISMS if options.mechanisms is None else options.mechanisms
    specs = list(choosing()) if asked == "all" else asked.split()
    less = replace(dense, lengths=lengths_of(options.share_lengths))
    # The first questions of a plan are those of a shorter one: nothing is asked twice, and workers keep their shares.
    rounds = [replace(less, questions=int(count)) for count in options.share_questions.split(",")]
    shares = options.shares.split(",")
    return [Part(dense, ["dense"], []), *(Part(given, [spec], shares) for given in rounds for spec in specs)]


def ends(began: float, seconds: float, left: int) -> float:
    """Return when a part ends at the latest, in seconds of `time.monotonic`.

    Args:
        began: when the run did.
        seconds: for all of it.
        left: parts of its round not begun before this one, itself among them; 0: this is dense, the first.
    """
    now = time.monotonic()
    if not left:
        return began + _DENSE * seconds
    return min(began + seconds, now + max(0.0, began + seconds - now) / left * _FAIR)


def work(options: argparse.Namespace) -> None:
    """Ask this process's share of the questions."""
    from longspan import LLM

    began = time.monotonic()
    mine, count = (int(number) for number in options.shard.split("/"))
    llm = LLM(options.model, "dense", options.device, dtype_of(options.dtype), say=say)
    about = environment(llm.model.device, "benchmarks.ruler", shlex.split(options.told))
    about |= {"model": Path(llm.model.name).name, "dtype": options.dtype, "eval": "ruler", "seed": options.seed}
    local = partial(Watched, together=options.together, stacked=int(options.stacked * 2**30) or None)

    def asker(mechanism: Any) -> LLM:
        return LLM(llm.model, mechanism, say=say)

    with in_folder(options.scratch, f"ruler-{mine}of{count}.jsonl") as journal:
        elsewhere = entries(options, leave_out=journal.file)
        every, failed = parts(options), set[str]()
        for number, part in enumerate(every):
            if not failed.isdisjoint(part.specs):
                continue
            engines = Engines(asker, ways(part.specs, part.budgets), leave_out=say, local=local)
            asked = plan(part.given, engines.at)[mine - 1 :: count]
            # The first round may take all of the time: the next one asks more of the same.
            left = sum(other.given == part.given for other in every[number:])
            until = ends(began, 60 * options.minutes, left if number else 0)
            while asked and not _asked(part.given, asked, journal, about, elsewhere, until):
                asked = [each for each in asked if not _failure(each)]
                failed.update(part.specs)


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


def entries(options: argparse.Namespace, leave_out: Path | None = None) -> list[Entry]:
    """Return the rows of the file and of the workers' journals."""
    files = [Path(options.out) / _FILE, *sorted(Path(options.scratch).glob("ruler-*.jsonl"))]
    return [entry for file in files if file != leave_out and file.exists() for entry in read(file)]


def merge(options: argparse.Namespace) -> list[Entry]:
    """Write all rows into the one file, and return them."""
    kept = list(rows.answered(entries(options)).values())
    file, lines, environment = Path(options.out) / _FILE, [], None
    for entry in kept:
        if entry.environment != environment:
            environment = entry.environment
            lines.append({"environment": environment})
        lines.append(entry.row)
    if lines:
        part = Path(options.scratch) / "merging"
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        shutil.copyfile(part, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return kept


def lead(options: argparse.Namespace, told: list[str]) -> None:
    """Start the workers, put together what they write until they end, and tell how far they are and what failed."""
    for folder in (options.out, options.scratch):
        Path(folder).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    load(options.model or settings.default_model(), device="cpu", say=say)  # converted once, before several would do it
    left = options.minutes - (time.monotonic() - began) / 60
    given = [sys.executable, "-m", "benchmarks.ruler", *told, "--told", shlex.join(told), "--minutes", str(left)]
    own = os.environ | {"OMP_NUM_THREADS": "1", "LONGSPAN_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    logs = [Path(options.scratch) / f"ruler-{i + 1}of{options.workers}.log" for i in range(options.workers)]
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
            _tell(merge(options), time.monotonic() - began, 60 * options.minutes)
            if time.monotonic() - began > 60 * options.minutes + _GRACE:
                break
    finally:
        for worker in workers:
            worker.terminate()
    for worker, log in zip(workers, logs, strict=True):
        lines = log.read_text(errors="replace").splitlines()
        for line in dict.fromkeys(line for line in lines if line.startswith(("FAILED", "left out"))):
            say(f"{log.name}: {line}")
        if worker.wait():
            say(f"{log.name} ended with {worker.returncode}: {lines[-1] if lines else 'no word'}")
    merge(options)


def _tell(found: list[Entry], seconds: float, limit: float) -> None:
    """Tell how many questions are answered, and the averages so far."""
    scores: dict[str, list[float]] = {}
    for row in map(rows.row_of, found):
        scores.setdefault(row.mechanism, []).append(row.score)
    means = [f"{name} {100 * sum(some) / len(some):.0f} % of {len(some)}" for name, some in scores.items()]
    say(f"{seconds:.0f} of {limit:.0f} s: {', '.join(means) or 'loading'}")


def result(options: argparse.Namespace) -> dict[str, Any]:
    """Return environment, table and rows of what was answered; with `--mechanisms`, of dense and these alone."""
    found = list(rows.answered(entries(options)).values())
    if options.mechanisms is not None:
        wanted = {spec for part in parts(options) for way in part.specs for spec in (way, parse(way).describe())}
        found = [entry for entry in found if entry.row["mechanism"] in wanted]
    # In the order of tables, whichever worker came first.
    order = list(RULER.tasks).index
    found.sort(key=lambda entry: (entry.row["length"], order(entry.row["task"]), entry.row["question"]))
    found.sort(key=lambda entry: entry.row["mechanism"] != "dense")
    made = tables.summary(found)
    kept = [{name: value for name, value in row.items() if name not in _LEFT_OUT} for row in made.pop("rows")]
    runs = made.pop("runs")
    commands = " ; ".join(dict.fromkeys(each["command"] for each in runs))
    return {**made, "run": f"{len(runs)} runs", "command": commands, "rows": kept}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    told = sys.argv[1:] if arguments is None else arguments
    options = _options(told)
    if options.result:
        print(json.dumps(result(options), ensure_ascii=False))
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
    made.add_argument("--out", required=True, metavar="FOLDER", help=f"for {_FILE}; a run that was stopped goes on")
    made.add_argument("--scratch", metavar="FOLDER", help="for the workers' own files; default: OUT.workers")
    made.add_argument("--model", metavar="NAME", help="as for longspan ask; default: LONGSPAN_MODEL, else smollm2")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--dtype", default="float32", help="default: %(default)s")
    made.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="time limit, loading included")
    made.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    made.add_argument("--gpus", type=int, default=1, metavar="N", help="that workers are spread over")
    made.add_argument("--together", type=int, metavar="N", help="answers written at once; default: 16 on a GPU, else 1")
    made.add_argument(
        "--stacked", type=float, default=0, metavar="GIB", help="of keys and values they may read together"
    )
    made.add_argument("--tasks", default="all", help="of RULER, commas between; default: %(default)s")
    made.add_argument("--lengths", default="1K,2K,4K,8K", help="dense; default: %(default)s")
    made.add_argument("--questions", type=int, default=10, help="of each task and length, dense; default: %(default)s")
    made.add_argument("--mechanisms", help=f"specifications, spaces between, or all; default: {_MECHANISMS}")
    made.add_argument("--shares", default="1/4", help="of the context's keys; default: %(default)s")
    made.add_argument("--share-lengths", default="4K,8K", help="for the mechanisms; default: %(default)s")
    made.add_argument(
        "--share-questions", default="5", metavar="N,M", help="for the mechanisms, by rounds; default: %(default)s"
    )
    made.add_argument("--seed", type=int, default=0, help="which questions")
    made.add_argument("--result", action="store_true", help="ask nothing: print what the folder holds as JSON")
    made.add_argument("--shard", help=argparse.SUPPRESS)
    made.add_argument("--told", default="", help=argparse.SUPPRESS)
    options = made.parse_args(told)
    options.scratch = options.scratch or f"{options.out.rstrip('/')}.workers"
    return options


if __name__ == "__main__":
    sys.exit(main())
