"""`longspan eval passkey`, `needle`, `ruler`, `mrcr`, `nolima`, `rot`, `perplexity`: evals of generated questions.

Each takes the options of `eval_options.Shared` and, where it has any, its own. It loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import eval_run
from longspan.cli.eval_options import Shared
from longspan.cli.progress import Progress

if TYPE_CHECKING:
    from longspan.evals.questions.example import Eval
    from longspan.evals.questions.sources import Sources


def passkey(*, given: Shared) -> None:
    """Ask for one number in a text that says nothing: the easiest question of all (arXiv 2305.16300)."""
    eval_run.run(_evaluation("passkey"), given)


def needle(
    *,
    given: Shared,
    kinds: Annotated[
        str,
        typer.Option("--kinds", metavar="NAMES", help="Of single, multikey, paraphrase and twofact; commas between."),
    ] = "single",
    depths: Annotated[int, typer.Option("--depths", metavar="N", help="Depths, from the beginning to the end.")] = 11,
) -> None:
    """Ask for a fact in real prose, by depth and by length: the grid that shows where a model forgets (Kamradt 2023).

    A task is a kind of fact at a depth, such as single_050; every cell asks the same questions.
    """
    from longspan.evals.grid import grid

    names = [name for part in kinds.split(",") if (name := part.strip())]
    eval_run.run(grid(list(dict.fromkeys(names)), depths), given)


def ruler(
    *,
    given: Shared,
    qa: Annotated[
        list[str] | None,
        typer.Option(
            "--qa",
            metavar="FILE",
            help="Questions for qa_1 (JSON in the form of SQuAD) or qa_2 (HotpotQA). Default: Longspan's own.",
        ),
    ] = None,
) -> None:
    """Ask RULER's 13 tasks: needles, variable tracking, word counts, questions among documents (arXiv 2404.06654).

    Contexts are read before their question is known. Scores have 95 % intervals.
    """

    def sources(progress: Progress) -> Sources:
        from longspan.evals.questions import passages
        from longspan.evals.questions.sources import Sources

        found = dict(passages.read(Path(name)) for name in qa or [])
        single, hops = passages.shipped()
        essay = eval_run.essay(given, progress)
        return Sources(essay, found.get("qa_1", single), found.get("qa_2", hops))

    eval_run.run(_evaluation("ruler"), given, sources)


def mrcr(*, given: Shared) -> None:
    """Ask for one of several answers to the same ask in a conversation, word for word (arXiv 2409.12640, OpenAI MRCR).

    Tasks: mrcr_2, mrcr_4, mrcr_8, by how often the same was asked.
    """
    eval_run.run(_evaluation("mrcr"), given)


def nolima(*, given: Shared) -> None:
    """Ask for a person by association: no content word of the question stands in the needle (arXiv 2502.05167).

    Tasks: literal (the needle's own words, for comparison), onehop, twohop.
    """
    eval_run.run(_evaluation("nolima"), given)


def rot(*, given: Shared) -> None:
    """Ask the same questions as the context around their answers grows (Chroma 2025, Context Rot).

    Tasks: coherent_0, coherent_1, coherent_4, shuffled_0, shuffled_1, shuffled_4: prose in its own order or with its
    sentences shuffled, and how many distractors stand in it.
    """
    eval_run.run(_evaluation("rot"), given)


def perplexity(*, given: Shared) -> None:
    """Measure how likely the same words are after more and more of the text before them (arXiv 2108.12409).

    What is shown is the perplexity after a context of each length: less is better.
    """
    eval_run.run(_evaluation("perplexity"), given)


def _evaluation(name: str) -> Eval:
    from longspan.evals.questions.registry import evaluation

    return evaluation(name)


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "passkey": (passkey, "longspan eval passkey --lengths 4K,16K,64K --attention retrieval --out found"),
    "needle": (needle, "longspan eval needle --lengths 2K,4K,8K --questions 3 --out found"),
    "ruler": (ruler, "longspan eval ruler --lengths 4K,8K --tasks vt,cwe --questions 10 --attention quest --out found"),
    "mrcr": (mrcr, "longspan eval mrcr --lengths 4K,8K --tasks mrcr_2 --out found"),
    "nolima": (nolima, "longspan eval nolima --lengths 1K,4K --question both --out found"),
    "rot": (rot, 'longspan eval rot --lengths 1K,2K,4K --mechanisms "dense streaming" --budgets 1/4 --out found'),
    "perplexity": (perplexity, "longspan eval perplexity --lengths 512,2K,8K --kv int4 --out found"),
}
"""Each command with an example of its use."""
