"""One token of each sequence through the layers of a plain decoder on a CPU, without transformers' modules in between.

A decode step of a small model is hundreds of operations of a few microseconds each; modules, hooks, casts and separate
projections cost as much as the arithmetic. Here a layer is two norms, four products and the reader:

    x = h / rms(h) * w;   q, k, v = W_qkv x + b;   h += W_o attend(q, k, v)
    x = h / rms(h) * w;   gate, up = W_gu x;       h += W_down (act(gate) * up)

(LLaMA, arXiv 2302.13971, section 2.2; Qwen2's biases and Qwen3's norms of each head's query and key are optional.)
The residual stream h stays in float32; products are in the model's type. Query, key and value weights are one matrix,
as are gate and up; on grids of 4 or 8 bits they are packed (`packed.py`).

Which models these equations hold for is not known from their names: modules must have these weights and no others, and
the result must be the modules' own on a few tokens (`OneToken.of`). All others run by their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longspan.hf import packed
from longspan.hf.attention import Enough, Reader
from longspan.hf.one_token import OneTokenLinear, multiply
from longspan.kernels.partial_attention.reference import partial_attention

Product = Callable[[Tensor], Tensor]
"""`[B, in]` to `[B, out]`, in the model's type."""

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FEW = 32
"""Tokens up to which modules take as long as the arithmetic, in a small model."""
_TRIED = (3, 17)
"""Tokens on which a model's own modules are asked for the same result."""


@dataclass(frozen=True)
class _Norm:
    """`x / rms(x) * weight` over the last axis."""

    weight: Tensor
    """float32."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise float32 `[B, n]`."""
        if x.shape[0] > 1:
            return (x * self.weight).mul_((x.square().mean(-1, keepdim=True) + self.eps).rsqrt_())
        flat = x[0]
        # A number, not a tensor: two operations that take it are cheaper than five on tensors.
        scale = (float(torch.dot(flat, flat)) / x.shape[1] + self.eps) ** -0.5
        return (x * self.weight).mul_(scale)

    def heads(self, x: Tensor) -> Tensor:
        """Normalise each of `[B, H, 1, D]` in any type."""
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt_() * self.weight).to(x.dtype)


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, as they are used."""

    before: _Norm
    qkv: Product
    q_norm: _Norm | None
    k_norm: _Norm | None
    scale: float
    out: Product
    after: _Norm
    gate_up: Product
    act: Callable[[Tensor], Tensor]
    down: Product


class OneToken:
    """A model's layers and head for one token at a time."""

    def __init__(self, model: Any, heads: int, kv_heads: int, head_dim: int, weights: str) -> None:
        """Take the weights of a model whose modules `fits` has seen; `weights` as in `loading.load`."""
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._dtype: torch.dtype = model.dtype
        base = model.base_model
        self._embedding: Tensor = base.embed_tokens.weight
        self._layers = [_layer(each, weights) for each in base.layers]
        self._norm = _norm(base.norm)
        self._head = _product([model.lm_head], weights)

    @classmethod
    def of(cls, model: Any, heads: int, kv_heads: int, head_dim: int, weights: str = "auto") -> OneToken | None:
        """Return a model's decoder, or None where its modules are not these or compute something else.

        Args:
            model: from transformers, loaded with Longspan's attention.
            heads: query heads.
            kv_heads: KV heads.
            head_dim: size of a head.
            weights: as in `loading.load`.
        """
        if not fits(model):
            return None
        made = cls(model, heads, kv_heads, head_dim, weights)
        # Weights that were packed with loss are compared as they were.
        exact = made if weights != "int8" else cls(model, heads, kv_heads, head_dim, "own")
        return made if exact._agrees(model) else None

    def __call__(self, token: int, reader: Reader, *, logits: bool) -> Tensor | None:
        """Run one token through the layers.

        Args:
            token: its id.
            reader: gets each layer's unrotated query, key and value.
            logits: whether they are wanted.

        Returns:
            float32 `[1, V]`, or None where they are not wanted or the reader had enough.
        """
        return self._run(self._embedding[token : token + 1], reader, logits=logits)

    def together(self, tokens: Sequence[int], reader: Reader) -> Tensor:
        """Run one token of each of B sequences through the layers; products read the weights once for all.

        Args:
            tokens: their ids.
            reader: gets each layer's unrotated queries `[B, Hq, 1, D]`, keys and values `[B, Hkv, 1, D]`.

        Returns:
            float32 logits `[B, V]`.
        """
        out = self._run(self._embedding[torch.tensor(tokens)], reader, logits=True)
        assert out is not None, "who reads for several sequences reads to the end"
        return out

    def few(self, tokens: Sequence[int], reader: Reader, *, logits: int) -> Tensor | None:
        """Run a few tokens of one sequence through the layers: where modules would take as long as the arithmetic.

        Arguments and results are those of `CausalModel.forward`.
        """
        out = self._run(self._embedding[torch.tensor(tokens)], _Row(reader), logits=bool(logits))
        return None if out is None else out[-logits:]

    def _run(self, embedded: Tensor, reader: Reader, *, logits: bool) -> Tensor | None:
        h, batch = embedded.to(torch.float32, copy=True), embedded.shape[0]
        split = [self._heads, self._kv_heads, self._kv_heads]
        try:
            for number, layer in enumerate(self._layers):
                qkv = layer.qkv(layer.before(h).to(self._dtype))
                q, k, v = qkv.view(batch, -1, 1, self._head_dim).split_with_sizes(split, 1)
                if layer.q_norm is not None and layer.k_norm is not None:
                    q, k = layer.q_norm.heads(q), layer.k_norm.heads(k)
                read = reader.attend(number, q, k, v, layer.scale)
                h += layer.out(read.reshape(batch, -1))
                gate, up = layer.gate_up(layer.after(h).to(self._dtype)).chunk(2, 1)
                h += layer.down(layer.act(gate).mul_(up))
        except Enough:
            return None
        return self._head(self._norm(h).to(self._dtype)).float() if logits else None

    @torch.inference_mode()
    def _agrees(self, model: Any) -> bool:
        """Return whether the model's own modules give the same logits, each token seeing those before it."""
        ours, theirs = _Earlier(), _Earlier()
        for token in _TRIED:
            found = self(token, ours, logits=True)
            ids = torch.tensor([[token]])
            given = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False, "longspan": theirs}
            wanted = model(**given).logits[0, -1:].float()
            assert found is not None, "no reader had enough"
            if not float((found - wanted).abs().max()) <= tolerance(self._dtype) * float(wanted.abs().max()):
                return False
        return True


def tolerance(dtype: torch.dtype) -> float:
    """Return by what share of the largest logit two right results may differ: in 16 bits every layer rounds."""
    return max(2e-3, 8 * torch.finfo(dtype).eps)


def fits(model: Any) -> bool:
    """Return whether a model has the modules of the equations above and no others that would take part."""
    base = model.base_model
    layers = getattr(base, "layers", None)
    known = {"embed_tokens", "layers", "norm", "rotary_emb"}
    if layers is None or not _children(base) <= known or _children(model) != {model.base_model_prefix, "lm_head"}:
        return False
    # Some variants scale queries and keys by way of their rotation, which is not made here.
    unscaled = getattr(getattr(base, "rotary_emb", None), "attention_scaling", 1.0) == 1.0
    return unscaled and model.device.type == "cpu" and all(_fits(layer) for layer in layers)


def _fits(layer: Any) -> bool:
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attention = _children(layer.self_attn)
    if attention not in (_ATTENTION, _ATTENTION | _HEAD_NORMS):
        return False
    owners = ((layer.self_attn, _ATTENTION), (layer.mlp, _MLP - {"act_fn"}))
    linear = [getattr(owner, name) for owner, names in owners for name in names]
    return all(type(each) in (nn.Linear, OneTokenLinear) for each in linear)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layer(layer: Any, weights: str) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return _Layer(
        before=_norm(layer.input_layernorm),
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj], weights),
        q_norm=None if norms[0] is None else _norm(norms[0]),
        k_norm=None if norms[1] is None else _norm(norms[1]),
        scale=float(getattr(attention, "scaling", attention.head_dim**-0.5)),
        out=_product([attention.o_proj], weights),
        after=_norm(layer.post_attention_layernorm),
        gate_up=_product([mlp.gate_proj, mlp.up_proj], weights),
        act=_act(mlp.act_fn),
        down=_product([mlp.down_proj], weights),
    )


def _act(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a module's function; a module's call costs more than the function does for one token."""
    x = torch.linspace(-4, 4, 9)
    return silu if torch.equal(module(x), silu(x)) else module


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight.detach().float(), float(getattr(module, "variance_epsilon", 1e-6)))


@torch.inference_mode(mode=False)  # the modules' weights may be trained on
@torch.no_grad()
def _product(linears: Sequence[nn.Linear], weights: str) -> Product:
    """Return the product with the rows of several linear layers, one below the other."""
    parts: list[Tensor] = [each.weight.detach() for each in linears]
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    bias = None
    if any(each.bias is not None for each in linears):
        # Some of them may have none.
        biases: list[Tensor] = [
            rows.new_zeros(each.out_features) if each.bias is None else each.bias for each in linears
        ]
        bias = torch.cat(biases)
    small = None if weights == "own" else packed.pack(rows, lossy=weights == "int8")
    if small is not None:
        return small if bias is None else lambda x: small(x) + bias
    start = 0
    for each in linears:
        # The modules, which multiply many tokens, read the same memory from now on.
        each.weight.data = rows[start : start + each.out_features]
        start += each.out_features
    return lambda x: multiply(rows, x, bias)


@dataclass(frozen=True)
class _Row:
    """A reader of rows that are tokens of one sequence."""

    reader: Reader

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 2) for x in (q, k, v))  # [T, H, 1, D] to [1, H, T, D]
        return self.reader.attend(layer, q, k, v, scale).transpose(0, 2)


class _Earlier:
    """A reader that attends to the tokens so far, without positions."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        return partial_attention(q, k, v, scale=scale)[0].to(q.dtype)
