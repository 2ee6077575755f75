"""`longspan session`: what is saved, and what can be done to it. Each with --json.

Only `save` loads a model; the others read folders.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options, output, work
from longspan.errors import UsageError
from longspan.lengths import seconds_of

if TYPE_CHECKING:
    from longspan.sessions.store import SessionInfo, SessionStore

Name = Annotated[str, typer.Argument(metavar="NAME", help="The session's name.")]
TTL = Annotated[
    str | None,
    typer.Option(
        "--ttl",
        metavar="TIME",
        help="Do not promise to keep it: it may be removed so long after its last use (90s, 12h, 7d), or earlier where "
        "a quota is short.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    sessions = typer.Typer(
        no_args_is_help=False,
        invoke_without_command=True,
        callback=_session,
        help="List, save, check, fork, carry and remove sessions: documents that were read once.",
        epilog="Example: longspan session ls",
        rich_markup_mode=None,
    )
    for command, about, example in (
        (session_ls, "ls", "ls --json"),
        (session_show, "show", "show contract"),
        (session_save, "save", "save contract --doc contract.pdf"),
        (session_restore, "restore", "restore contract --commit 3"),
        (session_fork, "fork", "fork contract draft"),
        (session_rm, "rm", "rm contract --yes"),
        (session_export, "export", "export contract contract.longspan"),
        (session_import, "import", "import contract.longspan --name copy"),
        (session_verify, "verify", "verify contract"),
        (session_gc, "gc", "gc --quota 50GiB"),
    ):
        sessions.command(about, epilog=f"Example: longspan session {example}")(command)
    app.add_typer(sessions, name="session")


def _session(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        output.write(context.get_help().rstrip() + "\n")


def session_ls(json: options.AsJson = False) -> None:
    """List the saved sessions."""
    store = _store()
    infos = store.infos()
    if json:
        output.write_json([_as_json(info) for info in infos])
    elif not infos:
        output.write(
            f"No session is saved in {store.root}. Make one: longspan ask QUESTION --doc PATH --session NAME\n"
        )
    else:
        table = output.table("name", "documents", "tokens read", ">size", "saved")
        for info in infos:
            about = _as_json(info)
            if info.problem:
                table.add_row(info.name, "damaged", "", output.size(info.bytes), "")
                continue
            names = [document["name"] for document in about["documents"]]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            read = f"{about['tokens_read']:,}" + ("" if about["complete"] else f" of {about['tokens']:,}")
            table.add_row(info.name, shown, read, output.size(info.bytes), _when(about["saved"]))
        output.write_rich(table)
        for info in infos:
            if info.problem:
                output.say(f"longspan: {output.one_line(info.problem)}")


def session_show(name: Name, json: options.AsJson = False) -> None:
    """Show one session: documents, tokens read, attention, commits that can be gone back to."""
    store = _store()
    about = _as_json(store.show(name))
    commits = [{"commit": number, "saved": saved.isoformat()} for number, saved in store.commits(name)]
    if json:
        output.write_json(about | {"commits": commits})
        return
    output.write(f"{name}, {output.size(about['bytes'])} in {store.root / name}\n")
    output.write(f"saved {_when(about['saved'])}, made {_when(about['created'])}, {_promise(about)}\n")
    kept = "".join(f", {key} {about[key]}" for key in ("prefill", "kv") if about[key] is not None)
    output.write(f"attention {about['attention']}{kept}, numbers {about['dtype']}, model {about['model']}\n")
    read = "all" if about["complete"] else f"{about['tokens_read']:,}"
    output.write(
        f"{read} of {about['tokens']:,} tokens read, {output.counted(about['turns'], 'question')} remembered, "
        f"{output.counted(len(commits), 'commit')}\n"
    )
    if about["hits"]:
        output.write(
            f"{output.counted(about['hits'], 'request')} that began alike found {about['hit_tokens']:,} tokens here\n"
        )
    table = output.table("document", ">tokens")
    for document in about["documents"]:
        table.add_row(document["name"], f"{document['tokens']:,}")
    output.write_rich("", table)


def session_save(
    name: Name,
    doc: options.Documents = None,
    model: options.Model = None,
    attention: options.Attention = None,
    prefill: options.Prefill = None,
    kv: options.KVFormat = "auto",
    kv_budget: options.KVBudget = None,
    device: options.Device = "auto",
    ttl: TTL = None,
    json: options.AsJson = False,
) -> None:
    """Read documents into a session, so that any question about them starts at once; or change how long it is kept.

    Without --doc nothing is read, and the session is kept from now on, or with --ttl no longer than that.
    """
    from longspan.cli.progress import Progress

    seconds = None if ttl is None else seconds_of(ttl)
    if not doc:
        store = _store()
        store.keep(name, seconds is None, seconds)
        read_tokens = 0
    else:
        work.check_session(name, True, needs_documents=True)
        with Progress() as progress:
            reading = work.read_files(doc, progress)
            llm = work.load(model, attention, device, progress, prefill=prefill, kv=kv, kv_budget=kv_budget)
            opened = llm.session(name)
            changed = work.add(llm, opened, reading.documents, progress)
            read_tokens = work.prefill(llm, opened, progress, changed=changed).read_tokens
            store = llm.store
            if seconds is not None:
                store.keep(name, False, seconds)
    about = _as_json(store.show(name))
    if json:
        output.write_json(about | {"read_tokens": read_tokens})
    else:
        output.write(
            f"saved {name}: {about['tokens_read']:,} tokens, {output.size(about['bytes'])}, {_promise(about)}\n"
        )


def session_restore(
    name: Name,
    commit: Annotated[
        int | None,
        typer.Option(
            "--commit", metavar="N", help="Its number (see: longspan session show). Default: the last whole one."
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Go back to an earlier commit of a session, such as the last one before damage; what came after is forgotten."""
    store = _store()
    number = store.restore(name, commit)
    if json:
        output.write_json(_as_json(store.show(name)) | {"commit": number})
    else:
        output.write(f"{name} is as it was at commit {number}\n")


def session_fork(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The fork's name.")],
    ttl: TTL = None,
    json: options.AsJson = False,
) -> None:
    """Save a session under a second name without copying it; either can be read on, or removed first."""
    store, seconds = _store(), None if ttl is None else seconds_of(ttl)
    store.fork(name, new, kept=seconds is None, ttl=seconds)
    if json:
        output.write_json(_as_json(store.show(new)))
    else:
        output.write(f"{new} goes on from {name}\n")


def session_rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: options.AsJson = False,
) -> None:
    """Remove a saved session for good, damaged or not; forks of it stay whole."""
    store = _store()
    if not store.exists(name):
        store.show(name)  # raises, listing those that are
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"removing {name!r} is for good: confirm with --yes")
        if not typer.confirm(f"Remove the session {name} for good?", err=True):
            output.say("longspan: nothing was removed")
            raise typer.Exit(1)
    store.remove(name)
    if json:
        output.write_json({"removed": name})
    else:
        output.write(f"removed {name}\n")


def session_export(
    name: Name,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A new file, or a folder to put NAME.longspan into.")],
    json: options.AsJson = False,
) -> None:
    """Write a session into one file, to carry it to another machine with the same model."""
    from longspan.sessions import archive

    made = archive.export(_store(), name, Path(path).expanduser())
    if json:
        output.write_json({"exported": name, "path": str(made), "bytes": made.stat().st_size})
    else:
        output.write(f"exported {name} to {made}, {output.size(made.stat().st_size)}\n")


def session_import(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file that `longspan session export` wrote.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Under this name instead of its own.")
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Add a session from a file, after every row of it was checked."""
    from longspan.sessions import archive

    store = _store()
    added = archive.import_(store, Path(path).expanduser(), name)
    if json:
        output.write_json(_as_json(store.show(added)))
    else:
        output.write(f"imported {added}\n")


def session_verify(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A session, or a file that was exported. Default: all.")
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Read every byte of saved sessions and name the file and the place of any that is not as it was written."""
    from longspan.sessions import upkeep

    exported = Path(name).expanduser() if name is not None else None
    if exported is not None and (exported.suffix or exported.parent != Path()) and exported.is_file():
        problems = upkeep.verify_file(exported)
    else:
        problems = upkeep.verify(_store(), name)
    damaged = [problem for problem in problems if not problem.harmless]
    if json:
        output.write_json({"whole": not damaged, "problems": [dataclasses.asdict(problem) for problem in problems]})
    else:
        for problem in problems:
            output.write(f"{'left over' if problem.harmless else 'damaged'}: {problem.line()}\n")
        if not damaged:
            output.write("everything is as it was written\n")
    if damaged:
        raise typer.Exit(1)


def session_gc(
    quota: Annotated[
        str | None,
        typer.Option(
            "--quota",
            metavar="BYTES",
            help="Remove sessions that nobody promised to keep, the longest unused first, until all take so much, such "
            "as 50GiB. Default: LONGSPAN_SESSIONS_QUOTA.",
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Remove what interrupted saves left and sessions whose time is over; nothing that is kept is touched."""
    from longspan.lengths import bytes_of
    from longspan.sessions import upkeep

    done = upkeep.collect(_store(), None if quota is None else bytes_of(quota))
    if json:
        output.write_json(done.as_json())
        return
    for file in done.files:
        output.write(f"removed {file}\n")
    for session in done.sessions:
        output.write(f"removed the session {session}\n")
    for session in done.compacted:
        output.write(f"written anew: {session}\n")
    output.write(f"{output.size(done.freed)} freed\n")


def _store() -> SessionStore:
    from longspan.sessions.store import SessionStore

    return SessionStore()


def _promise(about: dict[str, Any]) -> str:
    if about["kept"]:
        return "kept until it is removed"
    ttl = about["ttl"]
    return "removed when room is short" if ttl is None else f"removed {ttl / 3600:,.1f} hours after its last use"


def _as_json(info: SessionInfo) -> dict[str, Any]:
    """Return what is known of a session; one that is damaged has its `problem`."""
    state: Any = info.state
    documents = [{"name": d["name"], "tokens": d["last"] - d["first"]} for d in state.get("documents", [])]
    memory = state.get("memory") or {}
    tokens = max((d["last"] for d in state.get("documents", [])), default=0)
    read = max(0, memory.get("length", 0) - state.get("head", 0))
    turns = state.get("turns", 0)
    return {
        "name": info.name,
        "created": info.created.isoformat() if info.created else None,
        "saved": info.saved.isoformat() if info.saved else None,
        "used": info.used.isoformat() if info.used else None,
        "bytes": info.bytes,
        "documents": documents,
        "tokens": tokens,
        "tokens_read": read,
        "complete": read >= tokens,
        "turns": len(turns) if isinstance(turns, list) else turns,
        "attention": info.identity.get("attention"),
        "prefill": info.identity.get("prefill"),
        "kv": info.identity.get("kv"),
        "dtype": info.identity.get("dtype"),
        "model": info.identity.get("model"),
        "kept": info.kept,
        "ttl": info.ttl,
        "hits": info.hits,
        "hit_tokens": info.hit_tokens,
        "problem": info.problem,
    }


def _when(iso: str) -> str:
    from datetime import datetime

    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M}"
