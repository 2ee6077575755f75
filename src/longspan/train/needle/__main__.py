"""`python -m longspan.train.needle`: train the needle model, teach it where to search, measure it.

    train --recipe small --minutes 6 --out needle      a model from nothing; Ctrl-C stops, the same command goes on
    route --model needle/model --attention superlinear:window=63 --length 512 --minutes 3 --out needle/routed
    eval --model needle/model --adapter needle/routed --lengths 512,1K --attention dense superlinear:window=63

`route` is `longspan convert` on the model's own questions: it teaches a mechanism with the weights frozen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.errors import LongspanError, UsageError
from longspan.lengths import lengths_of
from longspan.train.needle.texts import installed

if TYPE_CHECKING:
    from longspan.hf.model import CausalModel


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    made = argparse.ArgumentParser("python -m longspan.train.needle", description=(__doc__ or "").splitlines()[0])
    commands = made.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="a model from nothing")
    train.add_argument("--recipe", default="small", help="small or needle; default: %(default)s")
    train.add_argument("--minutes", type=float, required=True, help="of training in all, earlier starts included")
    train.add_argument("--out", type=Path, required=True, help="a folder; a stopped run goes on from it")
    train.add_argument("--longest", default="64K", help="most tokens of a sequence; default: %(default)s")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--start", type=Path, metavar="FOLDER", help="the folder model of an earlier --out")
    train.add_argument("--begin", type=float, default=0.0, help="share of the phases that earlier runs have done")
    train.add_argument("--end", type=float, default=1.0, help="share that is done after this run")
    train.add_argument("--workers", type=int, default=0, help="processes that make batches ahead; default: %(default)s")
    route = commands.add_parser("route", help="teach it a mechanism")
    route.add_argument("--model", required=True)
    route.add_argument("--attention", default="superlinear", metavar="SPEC")
    route.add_argument("--length", default="8K", help="most tokens of a sequence; default: %(default)s")
    route.add_argument(
        "--density", type=float, default=0.1, help="facts, as a share of what fits; default: %(default)s"
    )
    route.add_argument("--rank", type=int, default=32)
    route.add_argument("--rate", type=float, default=3e-3)
    route.add_argument("--minutes", type=float, required=True)
    route.add_argument("--out", type=Path, required=True)
    route.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("eval", help="what it finds")
    measure.add_argument("--model", required=True)
    measure.add_argument("--adapter", help="routing queries that longspan convert taught it")
    measure.add_argument("--attention", nargs="+", default=["dense"], metavar="SPEC")
    measure.add_argument("--lengths", default="512", help="tokens of a text, such as 4K,64K,1M")
    measure.add_argument("--texts", type=int, default=4, help="of each length; default: %(default)s")
    measure.add_argument("--questions", type=int, default=8, help="about each text; default: %(default)s")
    measure.add_argument("--facts", type=int, default=16, help="most facts of a text; default: %(default)s")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--seconds", type=float, default=math.inf, help="after which no other text is begun")
    measure.add_argument("--json", action="store_true", help="lines with where and with what they were measured")
    measure.add_argument(
        "--out", type=Path, metavar="FILE", help="the same in a file, after every length and mechanism"
    )
    for each in (train, route, measure):
        each.add_argument("--device", default="auto")
    given = made.parse_args(arguments)
    try:
        return {"train": _train, "route": _route, "eval": _eval}[given.command](given)
    except LongspanError as error:
        print(f"longspan: {error}", file=sys.stderr)
        return 130 if type(error).__name__ == "Cancelled" else 2


def _train(given: argparse.Namespace) -> int:
    from longspan.hf.loading import pick_device
    from longspan.train import loop
    from longspan.train.curves import draw
    from longspan.train.needle.learn import Learn
    from longspan.train.needle.recipe import named, shorter

    recipe = shorter(named(given.recipe, given.seed, given.begin, given.end), lengths_of(given.longest)[0])
    task = Learn(recipe, installed(), pick_device(given.device), start=given.start, workers=given.workers)
    budget = loop.Budget(60 * given.minutes)
    _tell(f"{sum(p.numel() for p in task.parameters.values()):,} parameters")
    try:
        loop.train(task, given.out, budget, recipe.rates, tell=_tell)
    finally:
        task.batches.close()
        if (given.out / loop.LOG).is_file():
            task.save(given.out / "model", task.identity)
            try:
                draw(given.out / loop.LOG, given.out / "curves.png")
            except UsageError as error:  # what was trained is there, and a picture can be drawn later
                _tell(f"no curves: {error}")
    return 0


def _route(given: argparse.Namespace) -> int:
    from longspan.attention import parse
    from longspan.hf.loading import load
    from longspan.hf.model import CausalModel
    from longspan.train.convert import Options, convert
    from longspan.train.needle.learn import Questions
    from longspan.train.needle.tasks import Mix

    loaded = load(given.model, device=given.device)
    model = CausalModel(loaded.name, loaded.model, loaded.tokenizer, native=False)
    options = Options(rank=given.rank, length=lengths_of(given.length)[0], rate=given.rate, seed=given.seed, rows=96)
    source = Questions(installed(), Mix(asked=lengths_of(given.length)[0] // 16, density=given.density))
    convert(model, parse(given.attention), source, given.out, 60 * given.minutes, options, tell=_tell)
    return 0


def _eval(given: argparse.Namespace) -> int:
    from longspan.attention import parse
    from longspan.hf.adapter import write
    from longspan.hf.loading import load
    from longspan.train.needle.evaluate import evaluate

    until = time.monotonic() + given.seconds
    model = load(given.model, device=given.device, adapter=given.adapter)
    haystack = installed()
    about = _about(model, haystack)
    lines = []
    for some in evaluate(
        model, [parse(spec) for spec in given.attention], lengths_of(given.lengths), haystack, texts=given.texts,
        questions=given.questions, facts=given.facts, seed=given.seed, until=until, tell=_tell,
    ):  # fmt: skip
        lines += some
        about["lines"] = [dataclasses.asdict(line) for line in lines]
        if given.out is not None:
            write(given.out, (json.dumps(about) + "\n").encode())
    if given.json:
        print(json.dumps(about))
        return 0
    for line in lines:
        share = f"{100 * line.right / line.count:3.0f} % ({100 * line.low:.0f} to {100 * line.high:.0f})"
        print(f"{line.attention:40} {line.length:9,} {line.kind:7} {line.right:4} of {line.count:4}  {share}")
    return 0


def _about(model: CausalModel, haystack: bytes) -> dict[str, Any]:
    """Return where and with what something is measured."""
    import torch

    from longspan import __version__

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    return {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "longspan": __version__,
        "command": f"python -m longspan.train.needle {shlex.join(sys.argv[1:])}",
        "dtype": str(model.dtype).removeprefix("torch."), "text": len(haystack),
        "trained": getattr(model.model.config, "longspan_training", None), "lines": [],
    }  # fmt: skip


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
