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


@pytest.mark.parametrize("kind,dim,capability", [("fp32", 128, 86), ("bf16", 128, 90)])
def test_kernels_fit(kind, dim, capability):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), kind, str(dim), str(capability)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, taken in json.loads(done.stdout).items():
        assert taken <= SHARED[capability], name


@pytest.mark.parametrize("capability", [86, 90])
def test_superlinears_kernels_fit(capability):
    script = Path(__file__).with_name("compile_superlinear.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = {"parts_kernel", "search_kernel", "_span_attention_kernel"}
    if capability == 90:
        wanted |= {"span_attention_kernel", "_marked_tiles_kernel"}
    assert wanted <= set(found)
    for name, taken in found.items():
        assert taken <= SHARED[capability], name


@pytest.mark.parametrize("capability", [86, 90])
def test_experts_kernels_fit(capability):
    script = Path(__file__).with_name("compile_experts.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"_grouped_kernel", "_place_kernel", "_up_kernel", "_down_kernel", "_gemv_kernel"} <= set(found)
    for name, taken in found.items():
        assert taken <= SHARED[capability], name
