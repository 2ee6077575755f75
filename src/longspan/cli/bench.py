"""`longspan bench`: what a device does with attention, and with a whole model."""

from __future__ import annotations

import typer

from longspan.cli import bench_attention, bench_model, output


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    benches = typer.Typer(
        no_args_is_help=False,
        invoke_without_command=True,
        callback=_bench,
        help="Measure speed beside others' in the same run, outputs compared first.",
        epilog=f"Example: {bench_attention.EXAMPLE}",
        rich_markup_mode=None,
    )
    benches.command("attention", epilog=f"Example: {bench_attention.EXAMPLE}")(bench_attention.attention)
    benches.command("model", epilog=f"Example: {bench_model.EXAMPLE}")(bench_model.model)
    app.add_typer(benches, name="bench")


def _bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        output.write(context.get_help().rstrip() + "\n")
