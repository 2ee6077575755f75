"""Which device a model would run on, found without importing torch, which takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path


def device() -> str:
    """Return `cpu (N cores)`, or the name of the first GPU as `cuda (NAME)` where torch was built for it."""
    if _torch_has_cuda() and (name := _first_gpu()):
        return f"cuda ({name})"
    return f"cpu ({os.cpu_count()} cores)"


def _torch_has_cuda() -> bool:
    """Read it from torch's version file: finding a package does not import it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


def _first_gpu() -> str | None:
    """Ask the driver, as torch does (CUDA driver API: cuInit, cuDeviceGet, cuDeviceGetName)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    first, name = ctypes.c_int(), ctypes.create_string_buffer(100)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(first), 0) or driver.cuDeviceGetName(name, 100, first):
        return None
    return name.value.decode(errors="replace")
