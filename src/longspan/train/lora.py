"""Low-rank changes of a model's linear layers (LoRA, arXiv 2106.09685), by peft while they are trained.

What comes out are plain pairs of matrices by the layers' names, as `hf.adapter` keeps them: loading needs no peft.
It does not know losses.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ModelError, UsageError

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "out_proj")


class Lora:
    """Matrices beside a model's linear layers, which are frozen."""

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        """Put them in: the model computes with them from here on, at first as before.

        Args:
            model: from transformers; all of its own parameters are frozen.
            rank: of each change.
            seed: draws one side; the other is zero.

        Raises:
            UsageError: peft is not installed.
            ModelError: the model has no layers of the usual names.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UsageError("changing the model's own layers needs peft: pip install 'longspan[train]'") from error
        names = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        targets = sorted(names & set(_TARGETS))
        if not targets:
            raise ModelError("this model has no linear layers of the usual names: train without --lora")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
        self._layers = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        found: dict[str, Tensor] = {}
        for name, module in self._layers.items():
            found |= {f"{name}.A": module.lora_A["default"].weight, f"{name}.B": module.lora_B["default"].weight}
        return found

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `(down, up)` by layer, as adapters keep them: the scale is in `up`."""
        return {
            name: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach() * m.scaling["default"])
            for name, m in self._layers.items()
        }
