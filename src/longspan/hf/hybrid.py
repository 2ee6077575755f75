"""Models that mix attention with recurrent layers: which layer is which, and states handed in and out by name.

transformers keeps what layers remember in a cache. Ours lives for one forward call: a recurrent layer finds the state
that was handed in, an attention layer finds nothing (the reader keeps its keys), and the new states are read out of it.
A state is a set of tensors: `L.recurrent.I` (float32, whatever the model computes in) and `L.conv.I` (the newest inputs
of a convolution, in the model's own type) of layer L; most layers have one of each, I = 0.
It does not know how long a state is kept, or for which tokens: contexts do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ModelError
from longspan.hf import windows
from longspan.hf.attention import Reader

SERVED = ("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_next")
"""Families whose layers were seen to continue from a state as if they had read everything at once (tests/hf)."""

_ATTENDS = {"full_attention", "hybrid"}
_RECURS = {"linear_attention", "conv", "hybrid"}
_NEITHER = {"moe", "mlp"}
_TOKENS, _PIECES = 7, (4, 1, 2)
_APART = 0.03
"""Relative distance of two states that counts as another state: in a tiny model's first layer, rounding to bfloat16
makes at most 0.002, and forgetting what came before (jamba's does) 0.06."""

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a state."""


@dataclass(frozen=True)
class Layers:
    """Which layers attend, and whether others keep a state."""

    ordinals: dict[int, int]
    """For each layer that attends, which of them it is: readers and mechanisms count those alone."""
    recurrent: bool


def layers(name: str, config: Any) -> Layers:
    """Return what the layers of a configuration are (ModelError: a mixture that is not served)."""
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if not kinds or getattr(config, "model_type", None) in windows.SERVED:
        kinds = ["full_attention"] * config.num_hidden_layers
    found = set(kinds)
    ordinals = {layer: i for i, layer in enumerate(at for at, kind in enumerate(kinds) if kind in _ATTENDS)}
    recurrent = bool(found & _RECURS)
    if found != {"full_attention"}:
        if not recurrent or found - _ATTENDS - _RECURS - _NEITHER:
            raise ModelError(f"{name} mixes layers of the kinds {', '.join(sorted(found))}: not supported yet")
        if config.model_type not in SERVED:
            raise ModelError(
                f"{name} mixes attention with recurrent layers: of such models {', '.join(SERVED)} are supported, "
                f"not {config.model_type}"
            )
        if not ordinals:
            raise ModelError(f"{name} has recurrent layers alone: its memory is of one size whatever the attention")
    return Layers(ordinals, recurrent)


class Hybrid:
    """What a forward call of one model needs beside its tokens: a cache that begins with the states handed in."""

    def __init__(self, name: str, model: Any, config: Any, found: Layers) -> None:
        """Take a model whose layers were found to be a mixture.

        Raises:
            ModelError: its time steps are limited.
        """
        from transformers.cache_utils import DynamicCache

        self.name, self.found = name, found
        self.spec: Spec = {}
        """What a state holds, once `check` has seen one."""
        free_time_steps(name, model, config)
        made = DynamicCache(config=config).layers
        # An entry's class and options: working them out again at every token would take as long as a small model does.
        self._entries = [(type(entry), _options(entry)) for entry in made]

    def cache(self, state: Mapping[str, Tensor]) -> Any:
        """Return a cache whose recurrent layers begin with copies of these states (none: at their first token)."""
        from transformers.cache_utils import Cache

        made = Cache(layers=[entry(**options) for entry, options in self._entries])
        for name, tensor in state.items():
            layer, kind, which = name.split(".")
            entry = made.layers[int(layer)]
            if kind == "conv":
                entry.update_conv_state(tensor, int(which), conv_kernel_size=tensor.shape[-1])
            else:
                entry.update_recurrent_state(tensor, int(which))
        return made

    @staticmethod
    def states(cache: Any) -> dict[str, Tensor]:
        """Return the states that a forward call left in its cache; layers that it did not reach have none."""
        out = {}
        for layer, entry in enumerate(cache.layers):
            for which, present in getattr(entry, "has_previous_state", {}).items():
                kept = {"conv": entry.conv_states[which], "recurrent": entry.recurrent_states[which]}
                out.update({f"{layer}.{k}.{which}": t for k, t in kept.items() if present and t is not None})
        return out

    def before(self, attending: int) -> Spec:
        """Return what a state holds of the layers before one that attends."""
        stop = next(layer for layer, ordinal in self.found.ordinals.items() if ordinal == attending)
        return {name: kept for name, kept in self.spec.items() if int(name.split(".")[0]) < stop}

    def counting(self, reader: Reader) -> Reader:
        """Return a reader that calls another one with layers counted among those that attend."""
        return _Counting(reader, self.found.ordinals)

    def check(self, forward: Callable[[Sequence[int], Reader, dict[str, Tensor]], object], vocabulary: int) -> None:
        """See that the model continues from its states and hands every attention layer to the reader.

        Args:
            forward: runs tokens through the model with a reader, from a state that it replaces by the new one.
            vocabulary: number of token ids.

        Raises:
            ModelError: it does not, in this version of transformers.
        """
        tokens = [1 + i * (vocabulary - 2) // _TOKENS for i in range(_TOKENS)]
        at_once: dict[str, Tensor] = {}
        in_pieces: dict[str, Tensor] = {}
        reader = _Own()
        forward(tokens, reader, at_once)
        start = 0
        for size in _PIECES:
            forward(tokens[start : start + size], reader, in_pieces)
            start += size
        layers = list(dict.fromkeys(name.split(".")[0] for name in at_once))
        # The first layer that can tell: deeper ones round, and choose experts, otherwise. What a convolution keeps is
        # its newest inputs whatever it did with older ones, so that the layer behind it must tell.
        first = layers[0] if f"{layers[0]}.recurrent.0" in at_once else layers[1 % len(layers)]
        told = [name for name in at_once if name.startswith(f"{first}.")]
        apart = max(_distance(in_pieces[name].float(), at_once[name].float()) for name in told)
        if reader.seen != list(range(len(self.found.ordinals))) * (1 + len(_PIECES)) or not apart <= _APART:
            import transformers

            raise ModelError(
                f"{self.name} does not continue from the state of its recurrent layers in transformers "
                f"{transformers.__version__}: use another version of it, or another model"
            )
        self.spec = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in at_once.items()}


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the states of B sequences as one, a row for each; all have read something."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def part(together: Mapping[str, Tensor], states: Sequence[dict[str, Tensor]]) -> None:
    """Replace each sequence's state by a copy of its row."""
    for row, state in enumerate(states):
        state.update({name: tensor[row : row + 1].clone() for name, tensor in together.items()})


def free_time_steps(name: str, model: Any, config: Any) -> None:
    """Let Mamba-2 layers take time steps of any size in prefill too, as their checkpoints were trained.

    Where a checkpoint names no limit, transformers (5.17 to 5.23) still keeps the steps of nemotron_h above 0.001 in
    prefill, and in no other call: a head that had learned to ignore a token then forgets a little at each one, and
    reading token by token gives other states than reading at once (huggingface/transformers pull request 48989).

    Raises:
        ModelError: the checkpoint names a limit, which transformers would leave out in decode.
    """
    low, high = getattr(config, "time_step_limit", None) or (0.0, float("inf"))
    if low > 0 or high < float("inf"):
        raise ModelError(f"{name} limits its time steps to {low} .. {high}, which decode leaves out: not supported yet")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _options(entry: Any) -> dict[str, int]:
    count = getattr(entry, "number_of_states", None)
    return {} if count is None else {"number_of_states": count}


class _Counting:
    """A reader that counts layers among those that attend, and hands on."""

    def __init__(self, reader: Reader, ordinals: Mapping[int, int]) -> None:
        self.reader, self.ordinals = reader, ordinals

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self.reader.attend(self.ordinals[layer], q, k, v, scale)


class _Own:
    """A reader in which every token attends to itself alone: what it returns does not depend on the chunks."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.seen.append(layer)
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)
