"""Who is measured: our mechanism, PyTorch's dense attention, and the package `superlinear` of PyPI.

A side is prepared with inputs and gives back a call without arguments, which is what is timed. It says what it must
compute (`truth`) and how near to that it has to come. A side that can't run here says why, and the others go on.
It does not know how anything is timed or checked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from longspan.attention import Mechanism, attend, make
from longspan.attention.superlinear import Superlinear
from longspan.attention.superlinear_kernels import search_of
from longspan.bench.attention.inputs import Inputs
from longspan.bench.timing import Call
from longspan.kernels import superlinear
from longspan.kernels.held import PAGE, Held

OURS = "longspan"
PEERS = ("superlinear", "sdpa")

_OURS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}
"""Greatest error of a row's output, over the row's length: outputs and weights are rounded to the type."""
_KEY = 5e-2
"""The same where one key more or less is read: a key of 3000 random ones weighs about 0.02 of their mean's length."""


class Side(ABC):
    """One contender."""

    name: ClassVar[str]
    truth: Mechanism
    """What its outputs must be."""

    @property
    def dense(self) -> bool:
        """Whether its time grows with every key: it is the one to be faster than."""
        return self.truth.exact

    @abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the greatest error of a row's output over its length that is no mistake."""

    def graphs(self, device: torch.device) -> bool:
        """Return whether its decode step can be captured in a CUDA graph there."""
        return device.type == "cuda"

    def missing(self, what: str, inputs: Inputs) -> str | None:
        """Return why it can't be measured, with inputs such as these; None: it can."""
        return None

    @abstractmethod
    def decode(self, inputs: Inputs) -> Call:
        """Return a decode step, `[1, Hq, 1, D]`."""

    @abstractmethod
    def prefill(self, inputs: Inputs) -> Call:
        """Return the attention of a chunk of queries, `[1, Hq, T, D]`; differentiable where inputs are."""


class Ours(Side):
    """A mechanism of Longspan."""

    name = OURS

    def __init__(self, mechanism: Mechanism) -> None:
        """Measure this mechanism."""
        self.truth = mechanism

    def tolerance(self, dtype: torch.dtype) -> float:
        """See `Side`."""
        return _OURS[dtype]

    def graphs(self, device: torch.device) -> bool:
        """See `Side`."""
        return device.type == "cuda" and isinstance(self.truth, Superlinear) and self.truth.summary == "key"

    def decode(self, inputs: Inputs) -> Call:
        """See `Side`: on a GPU from pages behind a page table, with the context's length on the device."""
        mechanism, k, v = self.truth, inputs.k, inputs.v
        if not self.graphs(k.device) or not isinstance(mechanism, Superlinear) or k.shape[2] % PAGE:
            return self.prefill(inputs)
        pages = k.shape[2] // PAGE
        table = torch.arange(pages, device=k.device).unsqueeze(0)
        keys, values = (Held(x.view(x.shape[1], pages, PAGE, x.shape[3]), table) for x in (k, v))
        lengths = torch.tensor([k.shape[2]], device=k.device)
        search, scale, q = search_of(mechanism), 1.0 / math.sqrt(k.shape[3]), inputs.q[:, :, 0]
        return lambda: superlinear.decode(q, keys, values, lengths, search, scale=scale).unsqueeze(2)

    def prefill(self, inputs: Inputs) -> Call:
        """See `Side`."""
        return lambda: attend(inputs.q, inputs.k, inputs.v, self.truth)


class Sdpa(Side):
    """`scaled_dot_product_attention` as PyTorch chooses: on a CPU."""

    name = "sdpa"

    def __init__(self) -> None:
        """Measure it."""
        self.truth = make("dense")

    def tolerance(self, dtype: torch.dtype) -> float:
        """See `Side`; a merge of two parts rounds once more than one kernel does."""
        return 2 * _OURS[dtype]

    def decode(self, inputs: Inputs) -> Call:
        """See `Side`."""
        return lambda: functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=True)

    def prefill(self, inputs: Inputs) -> Call:
        """See `Side`."""
        q, k, v = inputs.q, inputs.k, inputs.v
        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        return lambda: functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


class Flash(Sdpa):
    """The same by FlashAttention alone, whose causal mask is aligned to the newest key."""

    name = "sdpa-flash"

    def decode(self, inputs: Inputs) -> Call:
        """See `Side`."""
        return _only(SDPBackend.FLASH_ATTENTION, super().decode(inputs))

    def prefill(self, inputs: Inputs) -> Call:
        """See `Side`."""
        return _only(SDPBackend.FLASH_ATTENTION, super().prefill(inputs))


class Cudnn(Sdpa):
    """The same by cuDNN alone.

    PyTorch gives cuDNN a causal mask that is aligned to the oldest key only. So a chunk attends to all keys before it
    without a mask and to itself with one, and the two are merged by their log-sum-exp; the merge takes about 0.5 ms for
    32K queries of 32 heads on an H200.
    """

    name = "sdpa-cudnn"

    def missing(self, what: str, inputs: Inputs) -> str | None:
        """See `Side`."""
        if what == "backward" and inputs.first:
            return "PyTorch gives cuDNN no causal mask for a chunk's gradients, only for a whole context's"
        return None

    def decode(self, inputs: Inputs) -> Call:
        """See `Side`."""
        return _only(SDPBackend.CUDNN_ATTENTION, super().decode(inputs))

    def prefill(self, inputs: Inputs) -> Call:
        """See `Side`."""
        first = inputs.first
        past, own = ([x[:, :, part] for x in (inputs.k, inputs.v)] for part in (slice(first), slice(first, None)))

        def call() -> Tensor:
            near, near_lse = _cudnn(inputs.q, *own, causal=True)
            if not first:
                return near
            far, far_lse = _cudnn(inputs.q, *past, causal=False)
            # In float32 at least: a chunk's first queries have few keys of their own, whose values are large.
            wide = torch.promote_types(near.dtype, torch.float32)
            own_share = torch.sigmoid(near_lse - far_lse).to(wide)
            return near.to(wide).mul_(own_share).addcmul_(far.to(wide), 1 - own_share).to(near.dtype)

        return call


class Published(Side):
    """The package `superlinear` 0.1.0 of PyPI (arXiv 2601.18401, its authors' own kernels): always `gate=routed`."""

    name = "superlinear"

    truth: Superlinear

    def __init__(self, ours: Mechanism) -> None:
        """Measure it with the options of our mechanism."""
        self.truth = replace(ours if isinstance(ours, Superlinear) else Superlinear(), gate="routed")

    def tolerance(self, dtype: torch.dtype) -> float:
        """See `Side`; it takes `n^span_power` in float32, so that a span may be a key longer than it should."""
        return _KEY

    def missing(self, what: str, inputs: Inputs) -> str | None:
        """See `Side`."""
        if inputs.q.device.type != "cuda":
            return "its kernels run on CUDA only"
        if self.truth.summary != "key" or self.truth.sinks or self.truth.spans not in (2, 3):
            return "it searches by keys, without sinks, for 2 or 3 spans"
        try:
            import superlinear  # noqa: F401
        except ImportError as error:
            return f"can't be imported ({error}): pip install --no-deps superlinear==0.1.0"
        return None

    def decode(self, inputs: Inputs) -> Call:
        """See `Side`."""
        from superlinear import decode_span_attention_staged_gqa

        q, k, v = inputs.q, inputs.k, inputs.v
        at = torch.tensor([inputs.first], device=q.device)
        return lambda: decode_span_attention_staged_gqa(
            q, q, k, v, at, topk=self.truth.spans, enable_gqa=True, **self._options()
        )

    def prefill(self, inputs: Inputs) -> Call:
        """See `Side`."""
        from superlinear import fused_prefill_with_swtriton_bucketed_gqa

        q, k, v = inputs.q, inputs.k, inputs.v
        at = torch.arange(inputs.first, k.shape[2], device=q.device)
        return lambda: fused_prefill_with_swtriton_bucketed_gqa(
            q, q, k, v, at, num_spans=self.truth.spans, **self._options()
        )

    def _options(self) -> dict[str, Any]:
        """Return our options in its words; it counts a window by its last anchor, and takes 1/power as an integer."""
        inverse = 1 / self.truth.power
        whole = inverse.is_integer() and 2 <= inverse <= 6
        return {
            "sw_index": self.truth.first_anchor - 1,
            "backward_factor": self.truth.backward,
            "forward_factor": self.truth.forward,
            "span_power": self.truth.span_power,
            "search_power": None if whole else self.truth.power,
            "inv_search_power_int": round(inverse) if whole else None,
        }


def of(mechanism: Mechanism, peers: tuple[str, ...], device: torch.device) -> list[Side]:
    """Return our side and its peers' (names of `PEERS`), in the order in which they take turns."""
    found: list[Side] = [Ours(mechanism)]
    for peer in peers:
        if peer == "superlinear":
            found.append(Published(mechanism))
        else:
            found += [Cudnn(), Flash()] if device.type == "cuda" else [Sdpa()]
    return found


def _only(backend: SDPBackend, call: Call) -> Call:
    def by_it() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return by_it


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp `[1, Hq, T, 1]` of cuDNN, which the public function does not give."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=causal, scale=1 / math.sqrt(q.shape[-1])
    )
    return out, lse.view(*q.shape[:3], 1)
