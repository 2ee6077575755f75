"""Real prose to hide facts in, from what every Python installation holds: deterministic, and nothing is downloaded.

The language reference (`pydoc_data.topics`) comes first, then the docstrings of the standard library's modules, in the
order of their names. It does not know models' tokens: lengths in tokens are the business of the eval that cuts.
"""

from __future__ import annotations

import ast
import sysconfig
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def prose() -> str:
    """Return all of the prose, about a million characters."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.glob("*.py")):
        parts.extend(_docstrings(file))
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _docstrings(file: Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions that are long enough to be prose."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 400:
                found.append(text)
    return found
