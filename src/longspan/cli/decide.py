"""`longspan decide`: which attention for a model, a context and hardware; why, what comes next, what would flip it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import output, plan
from longspan.cli.options import AsJson
from longspan.errors import UsageError

if TYPE_CHECKING:
    from longspan.planner.decide import Decision, Question

EXAMPLE = "longspan decide --model llama-3.1-8b --context 600K --gpu h100"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=f"Example: {EXAMPLE}")(decide)


def decide(
    model: plan.Model = "llama-3.1-8b",
    context: plan.Context = "128K",
    gpu: plan.Gpu = "auto",
    gpus: plan.Gpus = 1,
    nodes: plan.Nodes = 1,
    network: plan.Network = "50GB",
    weights: plan.Weights = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="Nothing may be approximated.")] = False,
    quality: Annotated[
        float | None,
        typer.Option("--quality", metavar="X", help="Least share right in committed evals, such as 0.9."),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="S", help="Most seconds until the first token.")] = 60.0,
    speed: Annotated[float, typer.Option("--speed", metavar="X", help="Least tokens a second of an answer.")] = 0.0,
    tree: Annotated[bool, typer.Option("--tree", help="The whole tree: one GPU, --gpus (8), --nodes (4).")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="The tree as a Mermaid flowchart.")] = False,
    html: plan.Html = None,
    json: AsJson = False,
) -> None:
    """Choose an attention and a placement: computed from costs, the device and committed evals.

    What is exact comes first, as long as it fits and the first token does not take too long; of approximations those
    that found most, and of equals the fastest at worst.
    """
    from longspan.lengths import bytes_of
    from longspan.planner.decide import decide as decided
    from longspan.planner.decide import question

    if html is not None and (tree or mermaid):
        raise UsageError("--html writes the tree as well: leave out --tree and --mermaid")
    if tree and mermaid:
        raise UsageError("--tree and --mermaid are two ways to print one tree: give one of them")
    given = question(
        model, context, gpu=gpu, gpus=gpus, nodes=nodes, network=float(bytes_of(network)), weights=weights,
        exact=exact, quality=quality, wait=wait, speed=speed,
    )  # fmt: skip
    if tree or mermaid:
        _tree(given, mermaid=mermaid, json=json)
        return
    from longspan.planner.flips import flips

    found = decided(given)
    if html is not None:
        from longspan.cli.decide_page import page
        from longspan.planner.tree import tree as whole

        output.save(Path(html), page(found, flips(found), whole(given, hardware(given))))
        output.say(f"page: {html}")
    if json:
        output.write_json({**found.told(), "flips": [each.told() for each in flips(found)]})
        return
    _show(found)


def hardware(given: Question) -> list[tuple[int, int]]:
    """Return the branches of a tree: one GPU, several, and several nodes of these."""
    if not given.asked.device.gpu:
        return [(1, 1)]
    gpus = given.asked.ranks.gpus if given.asked.ranks.gpus > 1 else 8
    nodes = given.asked.ranks.nodes if given.asked.ranks.nodes > 1 else 4
    return [(1, 1), (gpus, 1), (gpus, nodes)]


def _tree(given: Question, *, mermaid: bool, json: bool) -> None:
    from longspan.planner import tree

    made = tree.tree(given, hardware(given))
    if json:
        output.write_json(made.told())
    else:
        output.write(tree.mermaid(made) if mermaid else tree.text(made))


def _show(found: Decision) -> None:
    from longspan.lengths import short
    from longspan.planner.flips import flips

    asked = found.question.asked
    where = asked.device.title if asked.ranks.count == 1 else f"{asked.ranks.count} x {asked.device.title}"
    output.write(f"{asked.model.name}, {short(asked.context)} tokens, {where}")
    output.write(", nothing approximated\n\n" if found.question.exact else "\n\n")
    if found.choice is None:
        output.write("Nothing fits.\n")
    else:
        output.write(f"{found.choice.name}\n    {found.choice.why()}\n")
        for limit in found.relaxed:
            output.write(f"    though nothing meets every limit: {limit}\n")
        for note in found.choice.plan.notes:
            output.write(f"    note: {note}\n")
    if found.runner_up is not None:
        output.write(f"\nNext: {found.runner_up.name}\n    {found.runner_up.why()}\n")
    if found.out:
        output.write("\nOut:\n")
        for each in found.out:
            reasons = [*each.against, *each.limits]
            output.write(f"    {each.name}: {'; '.join(reasons) or 'not as good, or slower'}\n")
    if changes := flips(found):
        output.write("\nWhat would flip it:\n")
        for change in changes:
            output.write(f"    {change.when}: {change.choice}\n")
