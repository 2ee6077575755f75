"""`longspan serve`: the model for other programs, by OpenAI's API, and sessions, over HTTP."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import options, output, work
from longspan.cli.progress import Progress
from longspan.errors import UsageError

if TYPE_CHECKING:
    from longspan.engine.llm import LLM
    from longspan.engine.serving import Limits
    from longspan.server.serving import ServerOptions

_EXTRA = "longspan serve needs more packages: pip install 'longspan[server]'"
_KEY_LENGTH = 8
_OWNER = re.compile(r"[A-Za-z0-9_-]{1,40}")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: longspan serve --model smollm2 --attention retrieval --port 8000, and then: "
        "curl http://127.0.0.1:8000/v1/models"
    )(serve)


def serve(
    model: options.Model = None,
    attention: options.Attention = None,
    prefill: options.Prefill = None,
    kv: options.KVFormat = "auto",
    kv_budget: options.KVBudget = None,
    kv_tier: options.KVTier = None,
    weights: options.Weights = "auto",
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    gpus: options.Gpus = None,
    parallel: options.Parallel = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", metavar="N", help="0: any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="API keys, one a line (KEY, or NAME KEY: keys of one name share sessions); a request must bring one.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without a key: everybody there may read all."),
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Under which the model is listed. Default: its own.")
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", metavar="FOLDER", help="From which sessions may read documents by path."),
    ] = None,
    max_queue: Annotated[int, typer.Option(metavar="N", help="Requests that wait; more are told to come later.")] = 256,
    max_running: Annotated[int, typer.Option(metavar="N", help="Answers that are written at once.")] = 32,
    token_ms: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Milliseconds from one token of an answer to the next, on average: where more answers at once take "
            "longer, those that come wait for others to end. Default: up to --max-running are written.",
        ),
    ] = None,
    max_request_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of documents and prompt of one request, such as 200K.")
    ] = None,
    max_answer_tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens of one answer.")] = None,
    max_body: Annotated[str, typer.Option(metavar="BYTES", help="Of a request.")] = "16MiB",
    max_upload: Annotated[str, typer.Option(metavar="BYTES", help="Of uploaded documents.")] = "256MiB",
    max_sessions: Annotated[int, typer.Option(metavar="N", help="Saved sessions of each key.")] = 10_000,
    session_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Of the device for sessions in memory, such as 8GiB; others wait on disk."),
    ] = None,
    session_host: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Of host memory for sessions that leave the device, before they go to disk."
        ),
    ] = None,
    session_ttl: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Without use after which a session leaves memory (90s, 12h); it stays saved."
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="In which answers may finish when the server is stopped.")
    ] = 30.0,
    log: Annotated[bool, typer.Option("--log/--no-log", help="A line on standard error for every request.")] = False,
) -> None:
    """Serve the model to other programs: OpenAI's API, sessions of documents, metrics, and a page for people.

    Ctrl-C (or SIGTERM) stops it: answers under way may finish, and sessions are saved.
    """
    work.spread(gpus)
    if work.follows():
        work.follow(model, attention, device, prefill=prefill, weights=weights, adapter=adapter, parallel=parallel)
        return
    keys, owners = keys_of(api_key_file)
    try:
        from longspan.server import listening
    except ModuleNotFoundError as error:
        raise UsageError(f"{_EXTRA} ({error.name} is missing)") from error
    if not keys and not insecure and not listening.is_loopback(host):
        raise UsageError(
            f"without a key only this machine may ask, and --host {host} lets others in: give --api-key-file FILE, "
            "or --insecure to let everybody in"
        )
    if documents is not None and not documents.is_dir():
        raise UsageError(f"--documents {documents} is no folder: make it, or name another")
    limits = _limits(
        max_queue, max_running, token_ms, max_request_tokens, max_answer_tokens, session_memory, session_host,
        session_ttl,
    )  # fmt: skip
    settings = _options(name, keys, owners, host, insecure, documents, max_body, max_upload, max_sessions)
    socket = listening.bound(host, port)  # before minutes are spent on loading
    _log(log)
    with Progress() as progress:
        llm = work.load(
            model, attention, device, progress, prefill=prefill, kv=kv, kv_budget=kv_budget, kv_tier=kv_tier,
            weights=weights, parallel=parallel, adapter=adapter,
        )  # fmt: skip
        # Looking for them takes as long as reading some documents: not while others wait for their answers.
        llm.heads_or_none()
    from longspan.engine.serving import Scheduler
    from longspan.server.app import create_app

    url = listening.url_of(socket)
    app = create_app(Scheduler(llm, limits=limits), settings, grace=grace)
    try:
        listening.listen(app, socket, grace=grace, ready=lambda: _greet(url, llm, settings, insecure))
    finally:
        llm.close()
    output.say("longspan: stopped; sessions are saved")


def keys_of(file: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of a file, and the names before them (UsageError: it can't be read, or a key is no secret)."""
    if file is None:
        return (), ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        readable_by_all = bool(file.stat().st_mode & 0o004)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} can't be read ({error}): give a text file, one key a line") from error
    told = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not told:
        raise UsageError(f"--api-key-file {file} holds no key: write one a line")
    for number, parts in enumerate(told, 1):
        key = parts[-1]
        if len(key) < _KEY_LENGTH or not key.isascii() or len(parts) > 2:
            raise UsageError(
                f"key {number} of {file} is no key: use at least {_KEY_LENGTH} ASCII characters without blanks, such "
                "as `openssl rand -hex 24` prints"
            )
        if len(parts) == 2 and not _OWNER.fullmatch(parts[0]):
            raise UsageError(
                f"the name of key {number} of {file} is {parts[0]!r}: use up to 40 letters, digits, - and _"
            )
    if readable_by_all:
        output.say(f"longspan: {file} can be read by every user of this machine: chmod 600 {file}")
    return tuple(parts[-1] for parts in told), tuple(parts[0] if len(parts) == 2 else "" for parts in told)


def _limits(
    queue: int,
    running: int,
    token_ms: float | None,
    request_tokens: str | None,
    answer_tokens: str | None,
    session_memory: str | None,
    session_host: str | None,
    session_ttl: str | None,
) -> Limits:
    from longspan.engine.serving import Limits
    from longspan.lengths import bytes_of, seconds_of, tokens_of

    for option, value in (("--max-queue", queue), ("--max-running", running)):
        if value < 1:
            raise UsageError(f"{option} is {value}: it must be at least 1")
    if token_ms is not None and not 0 < token_ms < float("inf"):
        raise UsageError(f"--token-ms is {token_ms}: it must be above 0")
    return Limits(
        queue=queue,
        sequences=running,
        token_seconds=None if token_ms is None else token_ms / 1000,
        request_tokens=None if request_tokens is None else tokens_of(request_tokens),
        answer_tokens=None if answer_tokens is None else tokens_of(answer_tokens),
        session_bytes=None if session_memory is None else bytes_of(session_memory),
        session_host_bytes=0 if session_host is None else bytes_of(session_host),
        session_seconds=None if session_ttl is None else seconds_of(session_ttl),
    )


def _options(
    name: str | None,
    keys: tuple[str, ...],
    owners: tuple[str, ...],
    host: str,
    insecure: bool,
    documents: Path | None,
    body: str,
    upload: str,
    sessions: int,
) -> ServerOptions:
    from longspan.lengths import bytes_of
    from longspan.server.serving import ServerOptions

    # Without a key a page that resolves its own name to this machine could ask; it can't change the Host header.
    local = ("127.0.0.1", "localhost", "[::1]", host) if not (keys or insecure) else ()
    return ServerOptions(
        name=name or "",
        keys=keys,
        owners=owners,
        hosts=local,
        documents=documents,
        body_bytes=bytes_of(body),
        upload_bytes=bytes_of(upload),
        sessions=sessions,
    )


def _log(requests: bool) -> None:
    """Have warnings told on standard error, and requests where that was asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for about, level in (
        ("longspan.server", logging.INFO if requests else logging.WARNING),
        ("uvicorn", logging.ERROR),
    ):
        logger = logging.getLogger(about)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _greet(url: str, llm: LLM, settings: ServerOptions, insecure: bool) -> None:
    """Tell where the server is and how to ask it."""
    served = settings.name or (Path(llm.model.name).name if Path(llm.model.name).is_absolute() else llm.model.name)
    attention = "dense, retrieval beyond the window" if llm.attention is None else llm.attention.describe()
    key = " -H 'Authorization: Bearer KEY'" if settings.keys else ""
    lines = [
        ("address", f"{url}/v1   (page: {url}/, API: {url}/docs)"),
        ("model", f"{served}, {attention}, on {llm.model.device.type}"),
        ("keys", output.counted(len(settings.keys), "key") if settings.keys else "none needed"),
        ("sessions", str(llm.store.root)),
    ]
    body = f'{{"model": "{served}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    ask = f"curl {url}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for title, text in lines:
            table.add_row(title, text)
        console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        console.print(Panel(table, title="Longspan serves", title_align="left", border_style="green", expand=False))
        console.print(f"Ask it:\n{ask}\n\nCtrl-C stops it and saves.", soft_wrap=True)
    else:
        for title, text in lines:
            output.say(f"longspan: {title}: {text}")
    if insecure and not settings.keys:
        output.say(
            "longspan: WARNING: no key is needed: whoever reaches this address reads and deletes every session "
            "(--api-key-file FILE asks for one)"
        )
