"""Where and with what a figure was measured: it goes into every committed result."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longspan import __version__


def environment(device: torch.device, module: str, arguments: list[str]) -> dict[str, Any]:
    """Return device, versions and the command that measures it again."""
    return {
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "longspan": __version__,
        "command": f"python -m {module} {shlex.join(arguments)}",
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"
