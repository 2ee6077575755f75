"""What the environment may set: every variable that Longspan reads, typed and documented, and nothing else.

| variable | meaning | default |
|---|---|---|
| `LONGSPAN_CACHE` | folder for models and calibrations | `$XDG_CACHE_HOME/longspan`, else the platform's cache folder |
| `LONGSPAN_SESSIONS` | folder for saved sessions | `$XDG_DATA_HOME/longspan/sessions`, else the platform's |
| `LONGSPAN_SESSIONS_QUOTA` | bytes, such as `50GiB`, that saved sessions may take on disk | no limit |
| `LONGSPAN_MODEL` | model used where none is named | `smollm2` |
| `LONGSPAN_THREADS` | CPU threads for torch: one fewer where other work keeps a core busy | torch's own choice |
| `GOMP_SPINCOUNT` | how long an idle thread of torch's OpenMP spins before it sleeps; set unless you set it | `10000` |
| `LONGSPAN_API_KEY` | key of an endpoint that an eval asks; another variable with `--api-key-env` | unset |
| `WORLD_SIZE`, `RANK` | how many processes share contexts, and which of them this is; torchrun sets them | `1`, `0` |
| `LONGSPAN_DEBUG` | `1`: the command line shows a traceback where it would say `internal error` | unset |
"""

from __future__ import annotations

import os
from pathlib import Path

from longspan.errors import UsageError

DEFAULT_MODEL = "smollm2"
_MOST_THREADS = 1024


def cache_folder() -> Path:
    """Return the folder for what can be fetched or computed again."""
    return _folder("LONGSPAN_CACHE", "XDG_CACHE_HOME", "cache")


def sessions_folder() -> Path:
    """Return the folder for saved sessions: these are kept until the user removes them."""
    named = os.environ.get("LONGSPAN_SESSIONS")
    return Path(named).expanduser() if named else _folder(None, "XDG_DATA_HOME", "data") / "sessions"


def sessions_quota() -> int | None:
    """Return the bytes that saved sessions may take on disk, or None for no limit (UsageError: it is no size)."""
    from longspan.lengths import bytes_of

    text = os.environ.get("LONGSPAN_SESSIONS_QUOTA")
    return bytes_of(text) if text else None


def history_file() -> Path:
    """Return the file that holds the questions typed into `longspan chat`."""
    return _folder(None, "XDG_STATE_HOME", "state") / "chat_history"


def default_model() -> str:
    """Return the model used where none is named."""
    return os.environ.get("LONGSPAN_MODEL") or DEFAULT_MODEL


def threads() -> int | None:
    """Return the number of CPU threads that was asked for, or None for torch's own choice."""
    text = os.environ.get("LONGSPAN_THREADS")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_THREADS:
        raise UsageError(f"LONGSPAN_THREADS must be a whole number from 1 to {_MOST_THREADS}, not {text!r}")
    return int(text)


def api_key(variable: str | None = None) -> str:
    """Return the key of an endpoint: that of `LONGSPAN_API_KEY`, or of a variable that the user names.

    Raises:
        UsageError: the variable that was named is not set.
    """
    found = os.environ.get(variable or "LONGSPAN_API_KEY", "").strip()
    if variable and not found:
        raise UsageError(f"--api-key-env names {variable}, which is not set: set it to the key")
    return found


def ranks() -> int:
    """Return how many processes torchrun started that share their contexts; 1 without it."""
    return _whole("WORLD_SIZE", 1)


def rank() -> int:
    """Return which of them this is: rank 0 reads input and answers."""
    return _whole("RANK", 0)


def share_cores() -> None:
    """Let torch's idle threads give their core back soon. To be called before torch is first imported.

    By default they spin for long: beside any other process that keeps a core busy, products of a decode step then take
    35 times as long, and with this setting 4 times, at the same speed on an idle machine (docs/experiments.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _folder(own: str | None, xdg: str, kind: str) -> Path:
    """Return the folder of one kind: our own variable, then XDG's on every platform, then the platform's habit."""
    if own and (named := os.environ.get(own)):
        return Path(named).expanduser()
    if base := os.environ.get(xdg):
        return Path(base).expanduser() / "longspan"
    import platformdirs

    return Path(getattr(platformdirs, f"user_{kind}_dir")("longspan", appauthor=False))


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
