"""Longspan: a long attention span for language models.

    from longspan import LLM
    llm = LLM("smollm2")
    session = llm.session("report")
    llm.read(session, ["report.pdf"])
    print(llm.ask("Who signed it?", session).text)

The public names are those of `__all__`; everything else may change without notice. They load on first use, so that
importing the package, and with it the command line, stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.attention import Mechanism, attend, mechanisms
    from longspan.engine.llm import LLM
    from longspan.engine.sampler import SamplingParams
    from longspan.errors import LongspanError
    from longspan.planner.plan import plan
    from longspan.sessions.session import Session

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "LongspanError",
    "Mechanism",
    "SamplingParams",
    "Session",
    "__version__",
    "attend",
    "mechanisms",
    "plan",
]

_HOMES = {
    "LLM": "longspan.engine.llm",
    "LongspanError": "longspan.errors",
    "Mechanism": "longspan.attention",
    "SamplingParams": "longspan.engine.sampler",
    "Session": "longspan.sessions.session",
    "attend": "longspan.attention",
    "mechanisms": "longspan.attention",
    "plan": "longspan.planner.plan",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
