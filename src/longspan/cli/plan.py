"""`longspan plan`: whether a context fits, how fast it is, and what to change; `--max-context`: how long it may be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import output
from longspan.cli.options import AsJson
from longspan.cli.plan_words import heading, limits_table, rows, speeds, verdict

if TYPE_CHECKING:
    from longspan.planner.limits import Longest
    from longspan.planner.plan import Plan

EXAMPLE = "longspan plan --model llama-3.1-8b --context 128K --gpu h100"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A short name such as llama-3.1-8b, a hub name owner/model, or a folder with config.json.",
    ),
]
Context = Annotated[
    str, typer.Option("--context", metavar="N", help="Tokens: 1.5M, 128K (128,000) or 128Ki (131,072).")
]
Attention = Annotated[str, typer.Option("--attention", "-a", metavar="SPEC", help="See: longspan attention.")]
Weights = Annotated[str, typer.Option("--weights", metavar="TYPE", help="auto, fp32, bf16, fp16, fp8, int8 or int4.")]
KV = Annotated[str, typer.Option("--kv", metavar="SPEC", help="Keys and values: auto, fp8, int8, int4, int2.")]
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu", metavar="NAME", help="auto, cpu, h100, h200, b200, a100, l40s, rtx4090 or rtx5090; auto: what is here."
    ),
]
Gpus = Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs of one node that share the context.")]
Nodes = Annotated[int, typer.Option("--nodes", metavar="M", help="Nodes of so many GPUs each.")]
Network = Annotated[
    str, typer.Option("--network", metavar="BYTES", help="Bytes a second from a GPU to another node, such as 50GB.")
]
Placement = Annotated[
    str,
    typer.Option("--placement", metavar="NAME", help="auto, ring, context_parallel, star or sharded."),
]
Html = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and pictures as well.")
]


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=f"Example: {EXAMPLE}")(plan)


def plan(
    model: Model = "smollm2",
    context: Context = "128K",
    attention: Attention = "dense",
    weights: Weights = "auto",
    kv: KV = "auto",
    gpu: Gpu = "auto",
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    network: Network = "50GB",
    placement: Placement = "auto",
    anchor: Annotated[
        str | None, typer.Option("--anchor", metavar="N", help="Tokens of star's anchor. Default: a GPU's own block.")
    ] = None,
    split_weights: Annotated[
        bool, typer.Option("--split-weights", help="GPUs share the weights instead of holding all of them each.")
    ] = False,
    concurrent: Annotated[
        int, typer.Option("--concurrent", metavar="S", help="Contexts that are held and answered at once.")
    ] = 1,
    chunk: Annotated[
        str | None, typer.Option("--chunk", metavar="N", help="Tokens read at once. Default: the engine's choice.")
    ] = None,
    max_context: Annotated[
        bool, typer.Option("--max-context", help="The longest context that fits, by mechanism and KV format.")
    ] = False,
    picture: Annotated[
        str | None, typer.Option("--out", metavar="FILE.png", help="Draw memory against context.")
    ] = None,
    html: Html = None,
    json: AsJson = False,
) -> None:
    """Say what a context takes before anything runs: bytes, seconds, and what to change where it does not fit.

    Times are ranges: a roofline of the device, corrected by committed measurements, which are named.
    """
    from longspan.lengths import bytes_of, context_of
    from longspan.planner.plan import plan as planned

    found = planned(
        model,
        context,
        attention=attention,
        weights=weights,
        kv=kv,
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        network=float(bytes_of(network)),
        placement=placement,
        anchor=None if anchor is None else context_of(anchor),
        split_weights=split_weights,
        concurrent=concurrent,
        chunk=None if chunk is None else context_of(chunk),
    )
    limits = _limits(found) if max_context or html else None
    if picture is not None:
        from longspan.cli.plan_pictures import write

        write(found, Path(picture))
        output.say(f"picture: {picture}")
    if html is not None and limits is not None:
        from longspan.cli.plan_page import page

        output.save(Path(html), page(found, limits))
        output.say(f"page: {html}")
    if json:
        told = found.told()
        output.write_json({**told, "max_context": [each.told() for each in limits]} if limits else told)
    elif max_context and limits is not None:
        _show_limits(found, limits)
    else:
        _show(found)


def _limits(found: Plan) -> list[Longest]:
    from longspan.planner.limits import longest

    return longest(found.asked)


def _show(found: Plan) -> None:
    output.write("".join(f"{line}\n" for line in heading(found)) + "\n")
    table = output.table("on each GPU" if found.asked.ranks.count > 1 else "memory", ">bytes", ">of device", "")
    for name, count, about, share in rows(found):
        table.add_row(name, count, f"{100 * share:.1f} %", about)
    output.write_rich(table)
    output.write(f"\n{verdict(found)}\n\n")
    for name, told in speeds(found):
        output.write(f"{name}: {told}\n")
    for line in found.by:
        output.write(f"    by {line}\n")
    for note in found.notes:
        output.write(f"note: {note}\n")
    if found.fits:
        return
    from longspan.planner.words import size

    output.write("\nWhat to change, in order of harm; changes add up:\n\n")
    table = output.table("change", "option", ">bytes then", "", "harm")
    for each in found.advice:
        table.add_row(each.what, each.option, size(each.total), "fits" if each.fits else "", each.harm)
    output.write_rich(table)


def _show_limits(found: Plan, limits: list[Longest]) -> None:
    asked = found.asked
    first, _ = heading(found)
    output.write(f"{first}\nThe longest context on {asked.device.title}, weights {asked.weights}, ")
    output.write(f"{output.counted(asked.concurrent, 'context')} at once, no rotated keys (--kv-budget):\n\n")
    titles, lines = limits_table(limits)
    table = output.table(*titles[:2], *(f">{title}" for title in titles[2:]))
    for line in lines:
        table.add_row(*line)
    output.write_rich(table)
    for note in asked.model.notes:
        output.write(f"note: {note}\n")
    if asked.model.trained is not None:
        output.write(f"\nIt was trained for {asked.model.trained:,} tokens.\n")
