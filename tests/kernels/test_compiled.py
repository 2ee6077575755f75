"""Kernels compile for the chips that they are for, and keep within their shared memory: no such chip is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED = {86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory a program may take, by compute capability: Ada and small Ampere chips, Hopper."""


KERNELS = {
    "superlinear": {"parts_kernel", "share_kernel", "append_kernel", "search_kernel", "_span_attention_kernel"},
    "experts": {"_grouped_kernel", "_place_kernel", "_up_kernel", "_down_kernel", "_gemv_kernel"},
    "mamba": {"_steps_kernel", "_walk_kernel"},
}
"""What each script must compile, on every chip."""
ON_HOPPER = {
    "superlinear": {"span_attention_kernel", "_marked_tiles_kernel"},
    "experts": {"grouped_kernel"},
    "mamba": {"_causal_conv_kernel", "_gated_norm_kernel", "_rmsnorm_kernel", "_finish_kernel"},
}
"""And for Hopper alone."""


def compiled(script, *arguments):
    """Run a script of this folder without Triton's interpreter; return bytes of shared memory by kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(f"compile_{script}.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind,dim,capability", [("fp32", 128, 86), ("bf16", 128, 90)])
def test_kernels_fit(kind, dim, capability):
    for name, taken in compiled("kernels", kind, dim, capability).items():
        assert taken <= SHARED[capability], name


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("script", KERNELS)
def test_launches_fit(script, capability):
    found = compiled(script, capability)
    assert KERNELS[script] | (ON_HOPPER.get(script, set()) if capability == 90 else set()) <= set(found)
    for name, taken in found.items():
        assert taken <= SHARED[capability], name
