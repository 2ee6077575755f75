"""A causal language model from transformers, as the rest of Longspan sees it.

It runs tokens through the layers with a reader in each layer's attention, and knows tokenizer, chat template, window
and how positions are encoded. It does not keep anything between calls, recurrent layers' states included: contexts do.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longspan.attention.base import Shape
from longspan.errors import ModelError, UsageError
from longspan.hf import hybrid, trained, windows
from longspan.hf.adapter import Adapter
from longspan.hf.attention import Enough, Reader
from longspan.hf.decoder import FEW, OneToken
from longspan.hf.tokenizer import chat_of, hash_of
from longspan.kv.rotary import Rotary

if TYPE_CHECKING:
    from longspan.distributed.group import Group
    from longspan.hf.native import Stack
    from longspan.hf.native.handing import Split


@dataclass(frozen=True)
class Dimensions:
    """The sizes that pages and readers need."""

    layers: int
    """Layers that attend; a hybrid model's other layers have no keys and values."""
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    """Positions that the model was trained on."""

    def shape(self, kv_bytes: float, own_bytes: float | None = None) -> Shape:
        """Return one layer's shape for cost models; arguments as there."""
        return Shape(self.query_heads, self.kv_heads, self.head_dim, self.head_dim, kv_bytes, own_bytes)


class CausalModel:
    """A model, its tokenizer, and what Longspan must know about both."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        weights: str = "auto",
        *,
        native: bool | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Take a transformers model that was loaded with Longspan's attention, its tokenizer, and `load`'s `weights`.

        Args:
            name: what it is called.
            model: from transformers.
            tokenizer: its own; None: for whoever gives and takes token ids alone.
            weights: see `loading.load`.
            native: whether it runs by our own forward where there is one (`hf.native`); None: on a GPU.
            adapter: what was trained beside the weights; those are merged already (`loading.load`).

        Raises:
            ModelError: attention or recurrent layers of a kind that Longspan does not serve yet.
        """
        self.name, self.model, self.tokenizer, self._weights = name, model, tokenizer, weights
        self.config = model.config.get_text_config()
        found = hybrid.layers(name, self.config)
        self.dimensions = _dimensions(name, self.config, len(found.ordinals))
        self.windows = windows.windows(name, self.config, self.dimensions.layers)
        """How many of the newest keys each layer that attends sees; None: all."""
        self.rotaries = self._find_rotaries()
        """How each layer that attends encodes positions; None: it does not."""
        self.rotary = self.rotaries[self.windows.index(None)]
        """How layers that see everything do."""
        wanted = self.device.type == "cuda" if native is None else native
        self.native: Stack | None = _native_of(model) if wanted else None
        """Its own forward, without transformers' modules; None: theirs."""
        self._hybrid: hybrid.Hybrid | None = None
        if found.recurrent:
            self._hybrid = hybrid.Hybrid(name, model, self.config, found)
            self._hybrid.check(lambda t, reader, state: self.forward(t, reader, state=state), self.config.vocab_size)
        sizes = self.dimensions
        self.trained = trained.read(name, model.config, sizes.layers, sizes.query_heads)
        self.adapter = adapter
        if adapter is not None:
            self.trained = self.trained.adapted(adapter, name, sizes.layers, sizes.query_heads, sizes.head_dim)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        found: torch.device = self.model.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        found: torch.dtype = self.model.dtype
        return found

    def share_experts(self, group: Group) -> None:
        """Keep, of every mixture of experts, this rank's alone; all ranks must call it, once.

        Raises:
            UsageError: the model runs by transformers' modules here, or has no experts, or too few.
        """
        if self.native is None:
            raise UsageError(f"{self.name} keeps its experts together here (docs/distributed.md): leave out experts")
        from longspan.hf.native.sharing import share

        # Of all weights: whatever rank opens a session knows its model.
        _ = self.fingerprint
        self.native = share(self.native, self.model.parameters(), group)

    @property
    def state_spec(self) -> hybrid.Spec:
        """Shape and type of each tensor of the recurrent layers' state; empty where all layers attend."""
        return {} if self._hybrid is None else self._hybrid.spec

    def states_before(self, layer: int) -> hybrid.Spec:
        """As `state_spec`, of the recurrent layers before one that attends (counted among those) alone."""
        return {} if self._hybrid is None else self._hybrid.before(layer)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int],
        reader: Reader,
        *,
        logits: int = 0,
        state: dict[str, Tensor] | None = None,
        split: Split | None = None,
    ) -> Tensor | None:
        """Run new tokens through the layers.

        Args:
            tokens: T token ids.
            reader: gets the unrotated queries, keys and values of each layer that attends.
            logits: of how many last positions logits are wanted; all of a long text would not fit in memory.
            state: a hybrid model's recurrent state before these tokens (empty: before the first), replaced by that
                after them where the call returns; tensors are not written to. Of a call that the reader ended, only
                layers before that have a new one. A model whose layers all attend needs none.
            split: of which tokens these are this rank's part. Layers that keep a state, whose states before and after
                are those of all parts, and experts that lie on several ranks, must know (a native model). None: all
                tokens are here.

        Returns:
            float32 logits `[logits, V]`, or None where none are wanted or the reader had enough.
        """
        if self.native is not None:
            from longspan.hf.native.blocks import Run

            run = Run(reader, {} if state is None else state, split=split)
            out = self.native.read(torch.tensor(tokens, device=self.device), run, logits=logits)
            if state is not None:
                state.update(run.after)
            return out
        assert split is None or self._hybrid is None, "states are handed along by native layers"
        if len(tokens) == 1 and self._one_token is not None:
            return self._one_token(tokens[0], reader, logits=bool(logits))
        # Weights that were packed with loss are for answers: what documents are read with does not hang on chunks.
        if len(tokens) <= FEW and self._weights != "int8" and self._one_token is not None:
            return self._one_token.few(tokens, reader, logits=logits)
        given = self._inputs(tokens, reader)
        if self._hybrid is not None:
            assert state is not None, "a hybrid model reads on from a state"
            cache = self._hybrid.cache(state)
            given |= {"past_key_values": cache, "use_cache": True, "longspan": self._hybrid.counting(reader)}
        out = None
        try:
            if logits:
                out = self.model(**given, logits_to_keep=logits).logits[0, -logits:].float()
            else:
                self.model.base_model(**given)
        except Enough:
            pass  # before any logits
        if self._hybrid is not None and state is not None:
            state.update(self._hybrid.states(cache))
        return out

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], reader: Reader, states: Sequence[dict[str, Tensor]] = ()) -> Tensor:
        """Run one token of each of B sequences through the layers, as one batch.

        Args:
            tokens: their ids.
            reader: gets the unrotated queries `[B, Hq, 1, D]`, keys and values `[B, Hkv, 1, D]` of each layer that
                attends; it must not have enough before the last one.
            states: a hybrid model's recurrent state of each sequence, replaced by that after its token where the call
                returns; tensors are not written to. A model whose layers all attend needs none.

        Returns:
            float32 logits `[B, V]`.
        """
        if self.native is not None:
            from longspan.hf.native.together import Together

            together = Together(self.native, reader, states)
            logits = self.native.step(torch.tensor(tokens, device=self.device), together)
            together.leave(states)
            return logits
        if self._one_token is not None:
            return self._one_token.together(tokens, reader)
        given = self._inputs(tokens, reader)
        for name in ("input_ids", "position_ids"):
            given[name] = given[name].T  # every sequence is a row of the batch
        if self._hybrid is not None:
            cache = self._hybrid.cache(hybrid.joined(states))
            given |= {"past_key_values": cache, "use_cache": True, "longspan": self._hybrid.counting(reader)}
        out: Tensor = self.model(**given).logits[:, -1].float()
        if self._hybrid is not None:
            hybrid.part(self._hybrid.states(cache), states)
        return out

    @torch.inference_mode()
    def states(self, tokens: Sequence[int], reader: Reader, layer: int) -> Tensor:
        """Return the residual stream behind a layer, float32 `[T, hidden]`; layers above it are not run.

        Args:
            tokens: T token ids.
            reader: see `forward`.
            layer: how many layers run.

        Raises:
            ModelError: a hybrid model, or one whose layers are not where they usually are.
        """
        layers = getattr(self.model.base_model, "layers", None)
        if layers is None or self._hybrid is not None or not 1 <= layer < len(layers):
            raise ModelError(f"{self.name} has no {layer} plain layers whose states could be taken")
        found: list[Tensor] = []

        def take(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append((given[0] if given else named["hidden_states"])[0].float())
            raise Enough

        hook = layers[layer].register_forward_pre_hook(take, with_kwargs=True)
        try:
            self.model.base_model(**self._inputs(tokens, reader))
        except Enough:
            pass
        finally:
            hook.remove()
        return found[0]

    def _inputs(self, tokens: Sequence[int], reader: Reader) -> dict[str, Any]:
        """Return what a forward call is given."""
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)
        # Position 0 everywhere: nothing is rotated (see hf/attention.py).
        return {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False, "longspan": reader}

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens added at its ends."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and, for each, its first character and the one after its last.

        Raises:
            ModelError: the tokenizer can't tell offsets (a slow tokenizer).
        """
        if not self.tokenizer.is_fast:
            raise ModelError(f"{self.name} has a slow tokenizer, which can't tell where a token stands in the text")
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), [(int(a), int(b)) for a, b in out["offset_mapping"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str
        if self._backend is not None:  # what transformers' own `decode` calls, at a third of its time
            text = self._backend.decode(list(tokens), skip_special_tokens=True)
        else:
            text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer beneath transformers' face, where that adds nothing to it; None: it may."""
        base = getattr(importlib.import_module("transformers"), "PreTrainedTokenizerFast", None)
        own = base is not None and type(self.tokenizer)._decode is base._decode
        return getattr(self.tokenizer, "backend_tokenizer", None) if own else None

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        found: set[int] = set()
        for owner in (self.model.generation_config, self.config, self.tokenizer):
            ends = getattr(owner, "eos_token_id", None)
            found.update([ends] if isinstance(ends, int) else ends or [])
        return frozenset(found)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return a conversation as text in the model's own chat template, ready for its answer; see `chat_of`."""
        return chat_of(self.tokenizer, messages, tools)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights, whatever the model's path: 32 hexadecimal digits.

        Weights are sampled (4096 numbers of each tensor), enough to tell checkpoints apart at a fraction of the time.
        """
        keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rope_parameters")
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps({key: getattr(self.config, key, None) for key in keys}, sort_keys=True).encode())
        digest.update(repr(self.dimensions).encode())
        if self.state_spec:
            # A recurrent layer's groups, say, show in no weight's shape. Types depend on the device and are left out.
            digest.update(repr({name: shape for name, (shape, _) in self.state_spec.items()}).encode())
        if self.trained.attention is not None:
            gates = None if self.trained.gates is None else self.trained.gates.tolist()
            digest.update(json.dumps([self.trained.attention, gates]).encode())
        for routing in self.trained.routing or ():
            for tensor in (routing.down, routing.up):
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // 4096)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            # bfloat16, so that a model has one fingerprint on every device.
            digest.update(flat[::step].to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """A hash of the tokenizer's vocabulary and rules: 32 hexadecimal digits."""
        return hash_of(self.tokenizer)

    @cached_property
    def _one_token(self) -> OneToken | None:
        """One token through the layers of a plain decoder, faster; None: by the modules. Made on first use."""
        sizes = self.dimensions
        if self._hybrid is not None or self.device.type != "cpu":
            return None
        return OneToken.of(self.model, sizes.query_heads, sizes.kv_heads, sizes.head_dim, self._weights)

    def _find_rotaries(self) -> tuple[Rotary | None, ...]:
        """Return how each layer rotates, checked against the model's own code; None where it encodes no positions."""
        base = self.model.base_model
        module = getattr(base, "rotary_emb", None) or getattr(base, "pos_emb", None)  # the latter in lfm2_moe
        if module is None:
            return (None,) * self.dimensions.layers
        given = getattr(self.config, "rope_parameters", None) or {}
        by_kind = windows.rotaries(module, self.dimensions.window) if any(self.windows) else {}
        if not by_kind and getattr(module, "inv_freq", None) is None:
            raise ModelError(f"{self.name} rotates each kind of layer in its own way, which is not supported yet")
        for each in (given[kind] for kind in by_kind) if by_kind else (given,):
            if (kind := each.get("rope_type", "default")) in ("dynamic", "longrope"):
                raise ModelError(
                    f"{self.name} uses {kind} RoPE, whose angles change with the length: not supported yet"
                )
        if not by_kind:
            rotary = Rotary(module.inv_freq, self.dimensions.window)
            self._check_rotary(module, rotary)
            return (rotary,) * self.dimensions.layers
        for kind, rotary in by_kind.items():
            self._check_rotary(module, rotary, layer_type=kind)
        return tuple(by_kind[windows.kind_of(window)] for window in self.windows)

    def _check_rotary(self, module: Any, rotary: Rotary, **named: str) -> None:
        """Refuse a model whose own rotation differs from ours (other pairing, other scaling)."""
        apply = getattr(importlib.import_module(type(self.model).__module__), "apply_rotary_pos_emb", None)
        if apply is None:
            raise ModelError(f"{self.name} applies positions in a way that Longspan does not know")
        x = torch.randn(1, 1, 8, self.dimensions.head_dim, generator=torch.Generator().manual_seed(0))
        at = torch.tensor([[0, 1, 2, 3, 17, 100, 500, 1000]])
        first = x.to(self.device)
        cos, sin = module(first, position_ids=at.to(self.device), **named)
        zero_cos, zero_sin = module(first, position_ids=torch.zeros_like(at).to(self.device), **named)
        theirs = apply(first, first, cos, sin)[0].cpu()
        ours = rotary(apply(first, first, zero_cos, zero_sin)[0].cpu(), at[0])
        if not torch.allclose(ours, theirs, atol=2e-3):
            raise ModelError(f"{self.name} rotates queries and keys in a way that Longspan does not know")


def _native_of(model: Any) -> Stack | None:
    from longspan.hf.native import native_of

    return native_of(model)


def _dimensions(name: str, config: Any, layers: int) -> Dimensions:
    """Read the sizes from a configuration; refuse what no reader here serves."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ModelError(f"{name} has no attention heads: there is nothing that Longspan could read otherwise")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    window = getattr(config, "max_position_embeddings", None) or 2048
    return Dimensions(layers, heads, kv_heads, head_dim, window)
