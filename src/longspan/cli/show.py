"""What is there: saved sessions, models, attention mechanisms, versions. Each as a table or, with --json, as JSON.

It reads registries and folders; it never loads a model.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import longspan
from longspan.cli import options, output
from longspan.errors import UsageError

if TYPE_CHECKING:
    from longspan.sessions.store import SessionInfo

Name = Annotated[str, typer.Argument(metavar="NAME", help="The session's name.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    sessions = typer.Typer(
        no_args_is_help=False,
        invoke_without_command=True,
        callback=_session,
        help="List, show or remove saved sessions.",
        epilog="Example: longspan session ls",
        rich_markup_mode=None,
    )
    sessions.command("ls", epilog="Example: longspan session ls --json")(session_ls)
    sessions.command("show", epilog="Example: longspan session show contract")(session_show)
    sessions.command("rm", epilog="Example: longspan session rm contract --yes")(session_rm)
    app.add_typer(sessions, name="session")
    app.command(epilog="Example: longspan models --json")(models)
    app.command(epilog="Example: longspan attention --json")(attention)
    app.command(epilog="Example: longspan version --json")(version)


def _session(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        output.write(context.get_help().rstrip() + "\n")


def session_ls(json: options.AsJson = False) -> None:
    """List the saved sessions."""
    from longspan.sessions.store import SessionStore

    store = SessionStore()
    infos = store.infos()
    if json:
        output.write_json([_session_json(info) for info in infos])
    elif not infos:
        output.write(
            f"No session is saved in {store.root}. Make one: longspan ask QUESTION --doc PATH --session NAME\n"
        )
    else:
        table = output.table("name", "documents", "tokens read", ">size", "saved")
        for info in infos:
            about = _session_json(info)
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
    """Show one session: documents, tokens read, attention."""
    from longspan.sessions.store import SessionStore

    store = SessionStore()
    about = _session_json(store.show(name))
    if json:
        output.write_json(about)
        return
    output.write(f"{name}, {output.size(about['bytes'])} in {store.root / name}\n")
    output.write(f"saved {_when(about['saved'])}, made {_when(about['created'])}\n")
    kept = "".join(f", {key} {about[key]}" for key in ("prefill", "kv") if about[key] is not None)
    output.write(f"attention {about['attention']}{kept}, numbers {about['dtype']}, model {about['model']}\n")
    read = "all" if about["complete"] else f"{about['tokens_read']:,}"
    output.write(
        f"{read} of {about['tokens']:,} tokens read, {output.counted(about['turns'], 'question')} remembered\n"
    )
    table = output.table("document", ">tokens")
    for document in about["documents"]:
        table.add_row(document["name"], f"{document['tokens']:,}")
    output.write_rich("", table)


def session_rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: options.AsJson = False,
) -> None:
    """Remove a saved session for good, damaged or not."""
    from longspan.sessions.store import SessionStore

    store = SessionStore()
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


def models(json: options.AsJson = False) -> None:
    """List the models, and what lies in the cache."""
    from longspan import settings
    from longspan.hf.catalogue import CATALOGUE

    cache = settings.cache_folder()
    listed: list[dict[str, Any]] = [
        {
            "name": model.name,
            "title": model.title,
            "bytes": model.megabytes * 1_000_000,
            "licence": model.licence,
            "cached": model.cached,
            "default": model.name == settings.default_model(),
        }
        for model in CATALOGUE.values()
    ]
    converted: list[dict[str, Any]] = [
        {"path": str(path), "bytes": _bytes_of(path)} for path in _inside(cache / "converted", "*/config.json")
    ]
    calibrations: list[dict[str, Any]] = [
        {"path": str(path), "model": _model_of(path), "bytes": _bytes_of(path)}
        for path in _inside(cache / "heads", "*.json")
    ]
    if json:
        output.write_json({"models": listed, "cache": str(cache), "converted": converted, "calibrations": calibrations})
        return
    table = output.table("name", "model", ">size", "licence", "fetched")
    for each in listed:
        name = f"{each['name']} (default)" if each["default"] else str(each["name"])
        fetched = "yes" if each["cached"] else "on first use"
        table.add_row(name, str(each["title"]), output.size(each["bytes"]), str(each["licence"]), fetched)
    output.write_rich(table)
    output.write("\nAlso: a hub name owner/model, a folder with config.json, or a GGUF file.\n")
    output.write(f"\nIn the cache, {cache}:\n")
    for each in [*converted, *calibrations]:
        what = f"retrieval heads of {each['model']}" if "model" in each else "converted model"
        output.write(f"  {what}, {output.size(each['bytes'])}: {Path(each['path']).relative_to(cache)}\n")
    if not converted and not calibrations:
        output.write("  nothing converted or calibrated yet\n")


def attention(json: options.AsJson = False) -> None:
    """List the ways to attend and their options."""
    from longspan.attention import mechanisms

    listed: list[dict[str, Any]] = [
        {
            "name": name,
            "about": cls.about,
            "exact": cls.exact,
            "bounded_memory": cls.bounded_memory,
            "needs_training": cls.needs_training,
            "decode_order": cls.decode_order,
            "options": cls.options(),
            "source": cls.source,
        }
        for name, cls in mechanisms().items()
    ]
    if json:
        output.write_json(listed)
        return
    table = output.table("name", "exact", "bounded memory", "needs training", "decode work", "paper")
    for each in listed:
        marks = ["yes" if each[key] else "no" for key in ("exact", "bounded_memory", "needs_training")]
        table.add_row(each["name"], *marks, each["decode_order"], each["source"])
    output.write_rich(table)
    output.write("\n")
    for each in listed:
        told = ",".join(f"{option}={default}" for option, default in each["options"].items())
        output.write(f"{each['name']}: {each['about']}\n    {told or 'no options'}\n")
    output.write("\nUse: --attention NAME or --attention NAME:option=value,option=value\n")


def version(json: options.AsJson = False) -> None:
    """Show the versions of longspan and what it runs on."""
    from longspan.planner.detected import device

    about = {
        "longspan": longspan.__version__,
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "transformers": _installed("transformers"),
        "device": device(),
    }
    if json:
        output.write_json(about)
    else:
        output.write("".join(f"{name} {told}\n" for name, told in about.items()))


def _session_json(info: SessionInfo) -> dict[str, Any]:
    """Return what is known of a session; one that is damaged has its `problem`."""
    state: Any = info.state
    documents = [{"name": d["name"], "tokens": d["last"] - d["first"]} for d in state.get("documents", [])]
    memory = state.get("memory") or {}
    tokens = max((d["last"] for d in state.get("documents", [])), default=0)
    read = max(0, memory.get("length", 0) - state.get("head", 0))
    return {
        "name": info.name,
        "created": info.created.isoformat() if info.created else None,
        "saved": info.saved.isoformat() if info.saved else None,
        "bytes": info.bytes,
        "documents": documents,
        "tokens": tokens,
        "tokens_read": read,
        "complete": read >= tokens,
        "turns": len(state.get("turns", [])),
        "attention": info.identity.get("attention"),
        "prefill": info.identity.get("prefill"),
        "kv": info.identity.get("kv"),
        "dtype": info.identity.get("dtype"),
        "model": info.identity.get("model"),
        "problem": info.problem,
    }


def _when(iso: str) -> str:
    from datetime import datetime

    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M}"


def _inside(folder: Path, pattern: str) -> list[Path]:
    """Return what the cache holds: for a pattern `*/file`, the folders that have that file."""
    return sorted(path.parent if "/" in pattern else path for path in folder.glob(pattern))


def _bytes_of(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


def _model_of(calibration: Path) -> str:
    """Return the name of the model that was calibrated, as far as the file tells it."""
    import json

    try:
        return str(json.loads(calibration.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return "an unnamed model"


def _installed(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
