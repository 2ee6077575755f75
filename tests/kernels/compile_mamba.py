"""Compile a Mamba-2 layer's kernels for a chip that is not here, as their launches would; prints shared memory by kernel.

Triton is told that the chip is there, and every launch to compile only. Run by `test_compiled.py` in its own process.
"""

import json
import sys

import torch
from compile_superlinear import HOPPER, taken, zeros  # noqa: F401
