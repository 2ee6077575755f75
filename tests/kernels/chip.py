"""A chip that is not here: Triton is told that it is, and every launch to compile only, as it would be launched."""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def pretend(capability):
    """Return what later launches of this process fill: bytes of shared memory that a program takes, by kernel."""
    taken, launch = {}, JITFunction.run

    class Chip:
        """What Triton asks of a driver before it launches anything."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

        def map_python_to_cpp_type(self, kind):
            return kind

    def compile_only(self, *arguments, grid, warmup=False, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        taken[self.fn.__name__] = max(taken.get(self.fn.__name__, 0), kernel.metadata.shared)
        return kernel

    driver.set_active(Chip())
    JITFunction.run = compile_only
    return taken


def zeros(*shape, dtype=torch.bfloat16):
    """Return a tensor that a launch can be described by; nothing reads it."""
    return torch.zeros(*shape, dtype=dtype)
