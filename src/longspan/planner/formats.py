"""How many bytes a number takes: of weights, by the formats that checkpoints come in, and of keys and values.

Keys' and values' formats are `kv.formats`'; weights' are data here. It does not know what a format loses.
"""

from __future__ import annotations

from longspan.errors import UnknownNameError, UsageError
from longspan.planner.devices import Device
from longspan.planner.model import Model

WEIGHTS = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / 128**2,  # a float32 scale for every block of 128 x 128, as DeepSeek-V3 has it
    "int8": 1.0 + 2 / 128,
    "int4": 0.5 + 2.5 / 128,  # groups of 128 with a 16-bit scale and a 4-bit zero point, as GPTQ and AWQ have it
}
"""Bytes of one number of a matrix that tokens are multiplied with."""
_PLAIN = {"fp32": 4.0}
"""Bytes of the other numbers (embeddings, norms, biases), where they are not 2."""
PRODUCTS = {"fp32": "fp32", "fp8": "fp8"}
"""In which numbers products are computed; those of other formats in 16 bits."""


def weights(spec: str, device: Device) -> str:
    """Return a format of weights by name; `auto` is 16 bits, but float32 on a CPU (UnknownNameError lists them)."""
    if spec == "auto":
        return "bf16" if device.gpu or _multiplies_bf16() else "fp32"
    if spec not in WEIGHTS:
        raise UnknownNameError(f"unknown format of weights {spec!r}: use one of auto, {', '.join(WEIGHTS)}")
    return spec


def own_bytes(weights_format: str) -> float:
    """Return the bytes of a number as the model computes."""
    return _PLAIN.get(weights_format, 2.0)


def model_bytes(model: Model, weights_format: str) -> float:
    """Return the bytes of all weights."""
    return sum(parts(model, weights_format).values())


def parts(model: Model, weights_format: str) -> dict[str, float]:
    """Return the bytes of weights: of matrices, of experts, and of what stays as it is."""
    product, plain = WEIGHTS[weights_format], own_bytes(weights_format)
    rest = model.embedding + model.head + model.plain + sum(layer.plain for layer in model.layers)
    return {
        "layers": product * sum(layer.dense for layer in model.layers),
        "experts": product * sum(each.experts.count * each.experts.parameters for each in model.layers if each.experts),
        "embeddings and norms": plain * rest,
    }


def read_bytes(model: Model, weights_format: str, tokens: int) -> float:
    """Return the bytes of weights that are read to compute so many tokens together, the output layer's once."""
    product, plain = WEIGHTS[weights_format], own_bytes(weights_format)
    total = plain * ((model.head or model.vocabulary * model.hidden) + model.plain)
    for layer in model.layers:
        total += product * layer.dense + plain * layer.plain
        if layer.experts:
            total += product * layer.experts.touched(tokens) * layer.experts.parameters
    return total


def kv(spec: str, weights_format: str) -> str:
    """Return a format of keys and values, `auto` for the type that the model computes in.

    Raises:
        UnknownNameError: no such format or option.
        UsageError: it is wider than the model's own type.
    """
    own = "fp32" if weights_format == "fp32" else "fp16" if weights_format == "fp16" else "bf16"
    if spec in ("auto", own):
        return own
    from longspan.kv import formats

    made = formats.parse(spec)
    if made.bits > formats.named(own).bits:
        raise UsageError(f"KV format {spec!r} is wider than the model's own {own}: give a narrower one, or auto")
    return spec


def number_bytes(spec: str, dim: int) -> float:
    """Return the bytes of one number of keys and values in a format, its part of the scales included."""
    from longspan.kv import formats

    return formats.parse(spec).number_bytes(dim, dim)


def _multiplies_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively, without asking torch."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as told:  # noqa: PTH123 - a file of the kernel, not of a user
            flags = told.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
