"""Does dense attention score alike on our RULER questions and on those of an independent generator?

    python -m benchmarks.ruler_agreement --out found/agreement.jsonl --minutes 3 --device cuda
    python -m benchmarks.ruler_agreement --out found/agreement.jsonl --ours found/ruler.jsonl --result \\
        > benchmarks/results/agreement-h100.json

The first asks what `ruler_independent.py` makes, and appends to a journal: the same command goes on. The second holds
the scores against the dense ones of `python -m benchmarks.ruler` at the same lengths: task by task, and all together,
with the difference's 95 % interval (normal, from the variance of the questions within each task).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from longspan import settings

settings.share_cores()

from benchmarks import ruler_independent as independent  # noqa: E402
from longspan.evals.arguments import dtype_of, guarded, say  # noqa: E402
from longspan.evals.asking import rows  # noqa: E402
from longspan.evals.asking.local import Local  # noqa: E402
from longspan.evals.environment import environment  # noqa: E402
from longspan.evals.journal import Journal, merged, read  # noqa: E402
from longspan.evals.questions.example import Example, Template  # noqa: E402
from longspan.lengths import lengths_of  # noqa: E402

_Z = 1.96


def example(made: independent.Question, number: int, template: Template, tokens: int) -> Example:
    """Return an independent question as an asker takes it."""
    return Example(
        task=made.task,
        index=number,
        context=made.context,
        head="",
        question=made.asked,
        asked=made.asked,
        answer_prefix=made.prefix,
        outputs=made.answers,
        scoring="any" if made.any_counts else "all",
        max_tokens=made.max_tokens,
        tokens=tokens,
        depths=(),
        template=template,
    )


def ask(options: argparse.Namespace) -> None:
    """Ask what the journal does not hold yet."""
    from longspan import LLM

    until = time.monotonic() + 60 * options.minutes
    llm = LLM(options.model, "dense", options.device, dtype_of(options.dtype), say=say)
    asker = Local(llm, stacked=int(options.stacked * 2**30) or None)
    template = asker.template

    def count(made: independent.Question) -> int:
        closing = made.asked + template.between + made.prefix
        return sum(len(asker.tokens(part)) for part in (template.before, made.context, closing))

    about = environment(llm.model.device, "benchmarks.ruler_agreement", shlex.split(options.told))
    about |= {"model": Path(llm.model.name).name, "dtype": options.dtype, "seed": options.seed}
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    with Journal(Path(options.out)) as journal:
        done = {(entry.row["task"], entry.row["length"], entry.row["question"]) for entry in journal.entries}
        journal.begin(about)
        for number in range(options.questions):
            for length in lengths_of(options.lengths):
                left = [task for task in independent.TASKS if (task, length, number) not in done]
                if not left or time.monotonic() >= until:
                    continue
                made = []
                for task in left:
                    rng = random.Random(f"independent-{task}-{length}-{options.seed}-{number}")
                    maker = independent.Maker(count, lambda text: len(asker.tokens(text)), rng)
                    made.append(maker.made(task, length))
                sizes = [count(each) + each.max_tokens for each in made]
                told = [example(each, number, template, size) for each, size in zip(made, sizes, strict=True)]
                replies = asker.ask_all(told) if asker.together > 1 else [asker.ask(each) for each in told]
                for each, size, reply in zip(made, sizes, replies, strict=True):
                    journal.append(
                        {
                            "task": each.task, "length": length, "question": number, "tokens": size,
                            "score": each.score(reply.text), "answer": reply.text.strip(), "wanted": each.answers,
                        }
                    )  # fmt: skip
                say(f"question {number + 1} at {length} tokens: {_percent([e.row['score'] for e in journal.entries])}")


def result(theirs: Path, ours: Path) -> dict[str, Any]:
    """Return both sides' scores in percent, their differences, and in how many standard errors they lie apart."""
    found = merged(read(theirs))
    lengths = sorted({row["length"] for row in found["rows"]})
    dense = [rows.row_of(entry) for entry in read(ours)]
    sides = {
        "independent": [(row["task"], row["length"], row["score"]) for row in found["rows"]],
        "ours": [(row.task, row.length, row.score) for row in dense if row.mechanism == "dense"],
    }
    table = []
    for length in lengths:
        lines = []
        for task in independent.TASKS:
            scores = [[s for t, n, s in side if (t, n) == (task, length)] for side in sides.values()]
            if all(len(each) > 1 for each in scores):
                lines.append(_line(task, length, *scores))
        if lines:
            average = {side: round(statistics.mean(line[side] for line in lines), 1) for side in sides}
            error = math.sqrt(sum(line["error"] ** 2 for line in lines)) / len(lines)
            table += [*lines, _told("average", length, average, error, min(line["questions"] for line in lines))]
    rows_kept = [{k: v for k, v in row.items() if k not in ("answer", "wanted")} for row in found.pop("rows")]
    found.pop("runs")
    return {**found, "table": table, "rows": rows_kept}


def _line(task: str, length: int, theirs: list[float], ours: list[float]) -> dict[str, Any]:
    means = {"independent": round(100 * statistics.mean(theirs), 1), "ours": round(100 * statistics.mean(ours), 1)}
    spread = [_variance(each) / len(each) for each in (theirs, ours)]
    return _told(task, length, means, 100 * math.sqrt(sum(spread)), min(len(theirs), len(ours)))


def _variance(scores: list[float]) -> float:
    """Return the variance of a question's score; where all are alike, as if one more had been the other way."""
    found = statistics.variance(scores)
    return found or len(scores) / (len(scores) + 1) ** 2


def _told(task: str, length: int, means: dict[str, float], error: float, count: int) -> dict[str, Any]:
    apart = means["independent"] - means["ours"]
    return {
        "task": task, "length": length, "questions": count, **means, "difference": round(apart, 1),
        "error": round(error, 2), "agrees": abs(apart) <= _Z * error,
    }  # fmt: skip


def _percent(scores: list[float]) -> str:
    return f"{100 * statistics.mean(scores):.0f} % of {len(scores)}"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    told = sys.argv[1:] if arguments is None else arguments
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.ruler_agreement", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--out", required=True, metavar="FILE", help="the journal; a run that was stopped goes on")
    made.add_argument("--ours", metavar="FILE", help="for --result: what benchmarks.ruler wrote")
    made.add_argument("--result", action="store_true", help="ask nothing: print both sides' scores as JSON")
    made.add_argument("--model", metavar="NAME", help="as for longspan ask; default: LONGSPAN_MODEL, else smollm2")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--dtype", default="float32", help="default: %(default)s")
    made.add_argument("--lengths", default="2K,4K", help="default: %(default)s")
    made.add_argument("--questions", type=int, default=10, help="of each task and length; default: %(default)s")
    made.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="time limit")
    made.add_argument("--stacked", type=float, default=0, metavar="GIB", help="of keys and values answered at once")
    made.add_argument("--seed", type=int, default=0, help="which questions")
    options = made.parse_args(told)
    options.told = shlex.join(told)
    if options.result:
        if options.ours is None:
            made.error("--result needs --ours FILE, what benchmarks.ruler wrote")
        print(json.dumps(result(Path(options.out), Path(options.ours))))
        return 0
    return guarded("ruler_agreement", lambda: ask(options) or 0)


if __name__ == "__main__":
    sys.exit(main())
