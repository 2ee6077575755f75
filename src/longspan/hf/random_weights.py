"""Models of exactly a configuration's shape with random weights, made on the device: to measure speed and memory.

Weights are drawn so that activations keep their size through any number of layers: an input projection keeps a token's
variance, what is added to the residual stream is divided by the root of the number of sublayers, time steps and decays
of recurrent layers are those that Mamba-2 begins with (arXiv 2405.21060). What such a model says means nothing.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import ModelError
from longspan.hf import attention
from longspan.hf.configuration import configuration
from longspan.hf.loading import pick_device, pick_dtype
from longspan.hf.model import CausalModel

_OUT = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
"""Endings of the names of weights whose product joins the residual stream."""


def random_model(
    name: str, *, device: str = "auto", dtype: torch.dtype | None = None, seed: int = 0, native: bool | None = None
) -> CausalModel:
    """Make a model without a tokenizer.

    Args:
        name: whose configuration it has (`hf.configuration`).
        device: `auto`, `cpu` or `cuda`.
        dtype: None: chosen for the device.
        seed: the same seed on the same kind of device gives the same weights.
        native: as in `CausalModel`.

    Raises:
        UnknownNameError: no such configuration.
        ModelError: transformers or Longspan can't run it, or the device has no memory for it.
        UsageError: no such device.
    """
    on = pick_device(device)
    dtype = dtype or pick_dtype(on)
    found = configuration(name)
    attention.register()
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(found.fields)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"can't make a model of the shape of {name}: {told}") from error
    try:
        model.to_empty(device=on)
    except torch.OutOfMemoryError:
        needed = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
        raise ModelError(
            f"the weights of {name} take {needed:.1f} GiB, more than {on} has left: give a smaller model, or --dtype"
        ) from None
    fill(model, seed)
    return CausalModel(f"{name} (random weights)", model.eval(), None, native=native)


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Give every parameter and buffer of a model numbers, by its name and the seed."""
    config = model.config.get_text_config()
    model.tie_weights()
    sublayers = sum(1 for name, _ in model.named_modules() if name.endswith(("mixer", "self_attn", "mlp")))
    for name, parameter in model.named_parameters():
        source = torch.Generator(parameter.device).manual_seed(_seed(seed, name))
        _fill(parameter, name, source, max(1, sublayers))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05, generator=torch.Generator(buffer.device).manual_seed(_seed(seed, name)))
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            # Its buffers are computed, not stored.
            owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], type(module)(config=config).to(model.device))


def _fill(parameter: Tensor, name: str, source: torch.Generator, sublayers: int) -> None:
    if name.endswith("A_log"):
        parameter.uniform_(0, math.log(16), generator=source)
    elif name.endswith("dt_bias"):
        steps = parameter.float().uniform_(math.log(1e-3), math.log(1e-1), generator=source).exp()
        parameter.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps back
    elif name.endswith("conv1d.bias") or name.endswith(".bias"):
        parameter.normal_(0, 0.1, generator=source)
    elif parameter.dim() == 1:
        parameter.normal_(1, 0.1, generator=source)
    elif "embed" in name:
        parameter.normal_(0, 1, generator=source)
    else:
        fan_in = math.prod(parameter.shape[1:]) if "conv1d" in name else parameter.shape[-1]
        small = sublayers**-0.5 if name.endswith(_OUT) else 1.0
        parameter.normal_(0, small * fan_in**-0.5, generator=source)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")
