"""The command line: `longspan ask`, `chat`, `serve`, `demo`, `session`, `models`, `attention`, `plan`,
`decide`, `cost`, `eval`, `bench`, `convert`, `extend`, `version`.

Modules of this folder load nothing heavy when imported, so that help answers at once; commands load what they need
when they run. It does not know how anything is done: it reads arguments, calls the engine and shows what comes back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import longspan
from longspan import settings
from longspan.cli import ask, bench, chat, convert, cost, decide, demo, evals, output, plan, serve, sessions, show

__all__ = ["app", "main", "run"]


class _Commands(TyperGroup):
    """The commands; whatever goes wrong in one becomes a line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(output.failure(error)) from None


app = typer.Typer(
    cls=_Commands,
    help="Ask questions about documents of any length, with a model that runs here.",
    epilog='Example: longspan ask "When does the lease end?" --doc lease.pdf',
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take as long to load as all the rest
)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        output.write(f"longspan {longspan.__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        output.write(context.get_help().rstrip() + "\n")


ask.add_to(app)
chat.add_to(app)
serve.add_to(app)
demo.add_to(app)
sessions.add_to(app)
show.add_to(app)
evals.add_to(app)
bench.add_to(app)
convert.add_to(app)
plan.add_to(app)
decide.add_to(app)
cost.add_to(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1 (refused or failed), 2 (usage), 70 (a bug), 130 (Ctrl-C)."""
    output.prepare()
    settings.share_cores()
    try:
        code = app(list(arguments), prog_name="longspan", standalone_mode=False)
        output.write("")
    except (Exception, KeyboardInterrupt) as error:
        code = output.failure(error)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))
