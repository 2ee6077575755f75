"""Real text to hide facts in: what is installed beside this package. The list is here, the text is not.

First Python's own reference, then documentation and sources of the libraries of `packages.txt`, in the order of that
list and of their files' names. It does not know facts or questions.
"""

from __future__ import annotations

import importlib.metadata
from importlib import resources
from pathlib import Path

_ENDS = (".py", ".md", ".rst", ".txt", ".pyi")


def installed(most: int = 32 << 20) -> bytes:
    """Return up to `most` bytes of text.

    Args:
        most: enough for a few passes of a long training.
    """
    from pydoc_data.topics import topics

    found = bytearray("\n\n".join(topics[name] for name in sorted(topics)).encode())
    for name in resources.files("longspan.train.needle").joinpath("packages.txt").read_text(encoding="utf-8").split():
        for file in _files(name):
            if len(found) >= most:
                return bytes(found[:most])
            found += b"\n\n" + file.read_bytes()
    return bytes(found)


def _files(name: str) -> list[Path]:
    """Return a distribution's texts; none where it is not installed."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [path for file in sorted(files) if file.suffix in _ENDS and (path := Path(str(file.locate()))).is_file()]
