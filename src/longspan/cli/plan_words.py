"""A plan in words: what a terminal, a page and a picture say alike. It does not know how any of them looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan.cli import output

if TYPE_CHECKING:
    from longspan.planner.limits import Longest
    from longspan.planner.plan import Plan


def heading(found: Plan) -> list[str]:
    """Return the model, and how it is to run, in two lines."""
    from longspan.lengths import short

    asked = found.asked
    where = asked.device.title
    if asked.placement is not None:
        nodes = f"{asked.ranks.nodes} x " if asked.ranks.nodes > 1 else ""
        where = f"{nodes}{asked.ranks.gpus} x {where}, {asked.placement.name}"
    at_once = "" if asked.concurrent == 1 else f", {asked.concurrent} at once"
    return [
        f"{asked.model.name}, {_billions(asked.model.parameters)} parameters"
        + ("" if asked.model.parameters < 1.2 * asked.model.active else f", {_billions(asked.model.active)} active")
        + f", {asked.model.describe()}",
        f"{short(asked.context)} tokens{at_once} by {asked.attention}; weights {asked.weights}, KV {asked.kv}; {where}",
    ]


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def rows(found: Plan) -> list[tuple[str, str, str, float]]:
    """Return what memory is for: name, bytes in words, what it is, and its share of the device."""
    from longspan.planner.words import size

    held, room = found.memory, found.asked.device.memory
    names = (
        ("weights", held.weights, ""),
        ("keys and values", held.kv, _of_tokens(found)),
        ("rotated keys", held.rotated, "a copy; none under --kv-budget"),
        ("recurrent state", held.state, "with checkpoints"),
        ("workspace", held.workspace, f"chunks of {found.asked.chunk:,} tokens"),
        ("libraries", held.runtime, ""),
    )
    return [(name, size(count), about, count / room) for name, count, about in names if count]


def _of_tokens(found: Plan) -> str:
    """Return what a token adds, and how many such devices the keys and values alone would fill."""
    from longspan.planner.words import size

    told = f"{size(found.told()['kv_bytes_per_token'])} a token where all are kept"
    filled = found.memory.kv / found.asked.device.nominal
    return told if filled <= 1 else f"{told}; {filled:.1f} x {size(found.asked.device.nominal)}"


def verdict(found: Plan) -> str:
    """Return whether it fits, in a line."""
    from longspan.planner.words import size

    each = "" if found.asked.ranks.count == 1 else " on each GPU"
    told = f"{size(found.memory.total)} of {size(found.asked.device.memory)}{each}"
    return (
        f"fits: {told}, {size(found.spare)} to spare"
        if found.fits
        else f"does not fit: {told}, {size(-found.spare)} lack"
    )


def speeds(found: Plan) -> list[tuple[str, str]]:
    """Return times and speeds by name."""
    from longspan.planner import words

    lines = [
        ("prefill", f"{words.time(found.prefill)} ({words.speed(*found.prefill_tokens_per_s)})"),
        ("first token after", words.time(found.first_token)),
        ("decode", words.speed(*found.decode_tokens_per_s) + (" each" if found.asked.concurrent > 1 else "")),
    ]
    if (sent := found.sent) is not None:
        how = "beside compute" if sent.beside else "between steps"
        lines.append(
            (
                "each GPU",
                f"{sent.rank_tokens:,} tokens, {output.counted(sent.steps, 'compute step')}, "
                f"{sent.passes} pass{'' if sent.passes == 1 else 'es'}, {words.size(sent.bytes)} sent {how}; "
                f"{words.size(sent.decode_bytes)} a decoded token",
            )
        )
    return lines


def limits_table(limits: list[Longest]) -> tuple[list[str], list[list[str]]]:
    """Return the longest contexts as a table: titles and lines."""
    kinds = list(limits[0].tokens)
    lines = [
        [each.attention, "yes" if each.exact else "", *(_tokens(each.tokens[kind]) for kind in kinds)]
        for each in limits
    ]
    return ["attention", "exact", *(f"KV {kind}" for kind in kinds)], lines


def _tokens(count: int | None) -> str:
    if count is None:
        return "no limit"
    if count < 1000:
        return f"{count}"
    for unit, each in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= each:
            return f"{count / each:.3g}{unit}"
    raise AssertionError(count)
