"""A model's config.json by name, without loading a model: short name, folder, or hub name.

The short names' configurations are a data file, `configurations.json`: what the models' own config.json say of their
shape, with the number of parameters that their cards give. It knows no transformers and no torch, and not what the
fields mean (the planner does).
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ModelError, UnknownNameError
from longspan.hf.catalogue import CATALOGUE

_FILE = Path(__file__).with_name("configurations.json")
_ALIASES = {"smollm2": "smollm2-135m"}
"""Models that `LLM` loads by another short name."""


@dataclass(frozen=True)
class Configuration:
    """What a config.json says."""

    name: str
    """As people call the model."""
    fields: dict[str, Any]


@functools.cache
def short() -> dict[str, dict[str, Any]]:
    """Return the entries of the data file by short name."""
    entries: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return entries


def configuration(name: str) -> Configuration:
    """Return the configuration of a model.

    Args:
        name: a short name, in any case; a folder with config.json, or that file; a hub name `owner/model`, whose
            config.json is fetched unless it lies in the hub's cache.

    Raises:
        UnknownNameError: nothing of that name; the message lists the short names.
        ModelError: it can't be fetched, or is no configuration.
    """
    key = _ALIASES.get(name.lower(), name.lower())
    if key in short():
        return _entry(key)
    for each, entry in short().items():
        if entry["hub"].lower() == key:
            return _entry(each)
    path = Path(name).expanduser()
    if name and path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(f"the folder {name} has no config.json: name the folder of a model")
    if path.is_file() and path.suffix.lower() == ".json":
        return Configuration(path.resolve().parent.name if path.name == "config.json" else path.stem, _read(path))
    if path.is_file() or name.lower().endswith(".gguf"):
        raise ModelError(f"{name} has no config.json: name a folder that has one, a hub name or a short name")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return Configuration(name, _read(_fetched(name)))
    names = ", ".join([*CATALOGUE, *short()])
    raise UnknownNameError(
        f"unknown model {name!r}: give a folder with config.json, a hub name owner/model or one of {names}"
    )


def _entry(key: str) -> Configuration:
    entry = short()[key]
    return Configuration(entry["title"], dict(entry["config"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is no configuration: it holds no object")
    return fields


def _fetched(name: str) -> Path:
    """Return a hub model's config.json, from the cache where it is there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it would tell of each retry
    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "config.json"))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is no hub name: write owner/model") from error
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"can't fetch the config.json of {name}: {reason[0] if reason else type(error).__name__} "
            "(or name a folder that holds it)"
        ) from error
    finally:
        logger.setLevel(before)
