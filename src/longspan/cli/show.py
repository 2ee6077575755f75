"""What is there: models, attention mechanisms, versions. Each as a table or, with --json, as JSON.

It reads registries and folders; it never loads a model.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import typer

import longspan
from longspan.cli import options, output


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: longspan models --json")(models)
    app.command(epilog="Example: longspan attention --json")(attention)
    app.command(epilog="Example: longspan version --json")(version)


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
