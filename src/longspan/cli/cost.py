"""`longspan cost`: a long context every time, a cached session, retrieval or both: money, seconds, break-evens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import output, plan
from longspan.cli.options import AsJson
from longspan.errors import UsageError

if TYPE_CHECKING:
    from longspan.planner.cost import Job, Line, Payer

EXAMPLE = "longspan cost --tokens 1M --queries 10 --price-in 2 --price-out 8"

Price = Annotated[float | None, typer.Option("--price-in", metavar="USD", help="A million tokens that are read.")]


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=f"Example: {EXAMPLE}")(cost)


def cost(
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="Of the text: 1M, 128K, 128Ki.")] = "1M",
    queries: Annotated[int, typer.Option("--queries", metavar="N", help="Questions about it.")] = 10,
    prices_of: Annotated[
        str, typer.Option("--prices-of", metavar="MODEL", help="A hosted model of the price file.")
    ] = "gpt-4.1",
    price_in: Price = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", metavar="USD", help="A million tokens that come back.")
    ] = None,
    price_cached: Annotated[
        float | None, typer.Option("--price-cached", metavar="USD", help="A million tokens that a cache holds.")
    ] = None,
    prices: Annotated[
        str | None, typer.Option("--prices", metavar="FILE.json", help="Your own prices, above those that come along.")
    ] = None,
    gpu_hour: Annotated[
        float | None, typer.Option("--gpu-hour", metavar="USD", help="Your own GPU instead: dollars an hour.")
    ] = None,
    model: plan.Model = "llama-3.1-8b",
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="Your own GPU, as for longspan plan.")] = "h100",
    gpus: plan.Gpus = 1,
    attention: plan.Attention = "dense",
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="N", help="Tokens of a corpus, asked day by day.")
    ] = None,
    per_day: Annotated[int, typer.Option("--per-day", metavar="N", help="Questions a day to the corpus.")] = 100,
    chunk: Annotated[int, typer.Option("--chunk", metavar="N", help="Tokens of what retrieval finds.")] = 512,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Chunks that retrieval gives.")] = 5,
    wide: Annotated[int, typer.Option("--wide", metavar="N", help="Times more that the hybrid gives.")] = 8,
    answer: Annotated[int, typer.Option("--answer", metavar="N", help="Tokens of an answer.")] = 500,
    picture: Annotated[
        str | None, typer.Option("--out", metavar="FILE.png", help="Draw money against questions.")
    ] = None,
    html: plan.Html = None,
    json: AsJson = False,
) -> None:
    """Say what questions to a long text cost, four ways: whole every time, cached, by retrieval, and both.

    Prices of hosted models come from a dated file, and nothing is fetched. With --gpu-hour your own GPU is paid for the
    seconds that a plan says, at its slower end.
    """
    from longspan.lengths import context_of
    from longspan.planner.cost import Job, break_evens, lines

    job = Job(context_of(tokens), queries, chunk, top_k, wide, answer=answer)
    if corpus is not None:
        if per_day < 1:
            raise UsageError(f"--per-day {per_day} asks nothing: give at least 1")
        job = replace(job, tokens=context_of(corpus), queries=per_day)
    listed = Path(prices) if prices is not None else None
    hosted = (price_in, price_out, price_cached)
    payer = _payer(prices_of, hosted, listed, gpu_hour, model=model, gpu=gpu, gpus=gpus, attention=attention)
    found, told = lines(job, payer, daily=corpus is not None), break_evens(job, payer)
    notes = _notes(job, payer)
    if gpu_hour is not None:
        told += _rented(job, _payer(prices_of, hosted, listed, None), payer)
    title = (
        f"{job.tokens:,} tokens, {output.counted(job.queries, 'question')}{' a day' if corpus else ''}: {payer.name}"
    )
    if picture is not None:
        from longspan.cli.cost_pictures import write

        write(job, payer, Path(picture))
        output.say(f"picture: {picture}")
    if html is not None:
        from longspan.cli.cost_pictures import page

        output.save(Path(html), page(title, job, payer, table(found, daily=corpus is not None), told, notes))
        output.say(f"page: {html}")
    if json:
        output.write_json(_json(job, payer, found, told, notes, daily=corpus is not None))
        return
    output.write(f"{title}\n\n")
    titles, rows = table(found, daily=corpus is not None)
    shown = output.table(titles[0], *(f">{name}" for name in titles[1:]))
    for row in rows:
        shown.add_row(*row)
    output.write_rich(shown)
    output.write("\n" + "".join(f"{line[0].upper()}{line[1:]}.\n" for line in told))
    output.write("".join(f"note: {note}\n" for note in notes))


def _payer(
    prices_of: str,
    given: tuple[float | None, float | None, float | None],
    listed: Path | None,
    gpu_hour: float | None,
    **own: Any,
) -> Payer:
    from longspan.planner import prices
    from longspan.planner.cost import Hosted, Own

    known = prices.price_list(listed)
    if gpu_hour is not None:
        if not 0 <= gpu_hour <= prices.DEAREST:
            raise UsageError(f"--gpu-hour {gpu_hour} is no price: give dollars an hour")
        return Own(own["model"], own["gpu"], gpu_hour, own["attention"], own["gpus"])
    return Hosted(prices.own(known.model(prices_of), *given), known.embedding)


def table(found: list[Line], *, daily: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return what every way takes as a table: titles and lines."""
    from longspan.planner.words import money, seconds

    rows = [
        [
            line.way,
            f"{line.read:,}",
            money(line.once.dollars),
            money(line.each.dollars),
            money(line.total.dollars),
            seconds(line.each.seconds),
            seconds(line.total.seconds),
        ]
        for line in found
    ]
    every = "a day" if daily else "all"
    return ["way", "tokens read", "once", "a question", every, "time a question", f"time of {every}"], rows


def _notes(job: Job, payer: Payer) -> list[str]:
    from longspan.planner.cost import WAYS, Hosted, Own
    from longspan.planner.words import size

    if isinstance(payer, Own):
        rest = f"--gpu {payer.gpu} --gpus {payer.gpus} --attention {payer.attention}"
        lacking = {way: payer.lacking(job, way) for way in WAYS}
        return [
            f"{way} does not fit: {size(lack)} lack on each GPU; for what to change see: longspan plan --model "
            f"{payer.model} --context {job.read(way)} {rest}"
            for way, lack in lacking.items()
            if lack
        ] + ["times are the slower ends of plans; a cached session is read back from disk at 2 GB/s"]
    assert isinstance(payer, Hosted), "one of both is paid"
    window = payer.prices.context
    notes = [
        f"times assume {payer.prefill:,.0f} tokens/s read and {payer.decode:,.0f} written: prices do not say",
        "caches of hosted models forget within minutes or hours: then a question counts as the first",
    ]
    if window is not None and job.tokens > window:
        notes.insert(0, f"{payer.prices.name} takes {window:,} tokens at most: whole and cached need several requests")
    if payer.prices.source:
        notes.append(f"prices: {payer.prices.source}, {payer.prices.date}")
    return notes


def _rented(job: Job, hosted: Payer, own: Payer) -> list[str]:
    from longspan.planner.cost import Own, rented

    assert isinstance(own, Own)
    if own.lacking(job, "cached"):
        return []
    count = rented(job, hosted, own)
    if count is None:
        return [f"rented day and night, {own.name} can't answer as many as would make it cheaper than {hosted.name}"]
    return [f"rented day and night, {own.name} costs less than {hosted.name} from {count:,} cached questions a day on"]


def _json(
    job: Job, payer: Payer, found: list[Line], told: list[str], notes: list[str], *, daily: bool
) -> dict[str, Any]:
    import dataclasses

    return {
        **dataclasses.asdict(job),
        "daily": daily,
        "paid": payer.name,
        "ways": [line.told() for line in found],
        "break_evens": told,
        "notes": notes,
    }
