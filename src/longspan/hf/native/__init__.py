"""Native forwards: a family's equations over the weights of its transformers modules, one file a family.

Why not the modules: at 64K tokens transformers runs the 30B hybrid at 2,669 tokens/s in prefill and 13.5 in decode (one
H200, bf16), since its expert loop asks the device for every expert, its scan is a chain of einsums, and one token is
some two thousand launches. Here a sublayer is a few kernels, many tokens need no answer from the device, and one token
can be captured as a graph.
"""

from __future__ import annotations

from typing import Any

from longspan.hf.native import decoder, nemotron_h
from longspan.hf.native.stack import Stack

_OWN = ("transformers.", "torch.nn.", "longspan.")
"""Where the classes of a model's modules come from if nobody changed them."""

__all__ = ["Stack", "native_of"]


def native_of(model: Any) -> Stack | None:
    """Return a model's native forward, or None where its equations are not known here, or its modules are not its own.

    What adapters and quantised weights put in their place would be left out.
    """
    if getattr(model.config, "quantization_config", None) is not None or not all(
        type(module).__module__.startswith(_OWN) for module in model.modules()
    ):
        return None
    if nemotron_h.fits(model):
        return nemotron_h.stack(model)
    return decoder.stack(model) if decoder.fits(model) else None
