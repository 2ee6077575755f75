"""Whether a model computes the right thing, before anything of it is timed.

In 16 bits no two right forwards agree: each rounds in every layer, and where a router is near a tie one takes another
expert; after 52 layers of random weights transformers' own logits are a quarter of their size away from float32. So:

1. Layer by layer: each gets what transformers' modules in float32 gave the layer before, and its output is compared
   with that module's own; ours may be no further from it than the module in the number type is, with some room. The
   median over tokens counts, which a few other experts do not move, and how many tokens are far off.
2. Decode, layer by layer: one token after a context that was read, by the kernels of a step and by those of a chunk.
3. Logits of the whole: ours are no further from float32 than transformers' own are, with some room; the median again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention import Mechanism, make
from longspan.engine.kv_context import KVContext
from longspan.engine.readers import Attending
from longspan.engine.stepper import Stepper
from longspan.errors import LongspanError
from longspan.hf.model import CausalModel
from longspan.hf.native.blocks import Run
from longspan.hf.plain import Seen, exact_logits, plain_layer, plain_logits

TOKENS, KEPT = 2048, 64
_ROOM = 1.3
"""How much further from float32 than transformers is still right: distances of two roundings vary so much."""
_FAR, _FEW = 0.1, 0.02
"""A distance that other experts make and rounding does not, and the share of tokens that may differ so by chance."""
_LEAST = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-9}
"""Distance that a few roundings explain, whoever makes them."""


class WrongLogitsError(LongspanError):
    """Ours are wrong: nothing is timed."""


@dataclass(frozen=True)
class Checked:
    """Distances: root of summed squares, over that of the truth."""

    tokens: int
    layer: float
    """The greatest of any layer's output from float32, given the same input; and of transformers' own."""
    layer_transformers: float
    logits: float
    """The median of the last tokens' logits from float32; and of transformers' own."""
    logits_transformers: float
    decode: dict[str, float]
    """By mechanism: the greatest of a layer's output in a decode step from the same token read as a chunk."""


def check(model: CausalModel, mechanisms: list[Mechanism], seed: int = 0, tokens: int = TOKENS) -> Checked:
    """Compare a model with transformers.

    Args:
        model: whose weights transformers' modules hold too.
        mechanisms: whose decode steps are compared with their own prefill.
        seed: which tokens.
        tokens: how many of them.

    Raises:
        WrongLogitsError: ours are further off than rounding explains.
    """
    text, least = random_tokens(model, tokens, seed), _LEAST[model.dtype]
    kept = min(KEPT, tokens // 2)
    truth, seen = exact_logits(model, text, kept)
    layer = layer_transformers = 0.0
    for number, each in enumerate(seen):
        theirs, ours = (
            _rows(out, each.after) for out in (plain_layer(model, number, each), _layer(model, number, each))
        )
        a, b = float(ours.median()), float(theirs.median())
        layer, layer_transformers = max(layer, a), max(layer_transformers, b)
        far, far_theirs = (int((rows > _FAR).sum()) for rows in (ours, theirs))
        if not (a <= max(least, _ROOM * b) and far <= _ROOM * far_theirs + _FEW * tokens + 2):
            raise WrongLogitsError(
                f"layer {number} of {model.name} is {a:.2g} away from float32, transformers' own {b:.2g}; "
                f"{far} and {far_theirs} of {tokens} tokens are more than {_FAR} away"
            )
    del seen
    b, a = (float(_rows(out, truth).median()) for out in (plain_logits(model, text, kept), _logits(model, text, kept)))
    if not a <= max(least, _ROOM * b):
        raise WrongLogitsError(f"logits of {model.name} are {a:.2g} away from float32, transformers' own {b:.2g}")
    decode = {each.describe(): _decode(model, each, text) for each in mechanisms}
    for name, apart in decode.items():
        if not apart <= 4 * least:
            raise WrongLogitsError(f"{name}: a layer's decode step is {apart:.2g} away from the same token in a chunk")
    return Checked(tokens, layer, layer_transformers, a, b, decode)


def random_tokens(model: CausalModel, count: int, seed: int) -> list[int]:
    """Return tokens of a model's vocabulary."""
    source = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, model.config.vocab_size, (count,), generator=source).tolist()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return the distance of a from b, over the size of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of each row of a from that of b, over its size."""
    found: Tensor = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)
    return found


@torch.inference_mode()
def _layer(model: CausalModel, number: int, seen: Seen) -> Tensor:
    """Return what our sublayers of a layer make of what it got, beside the residual stream."""
    stack = model.native
    assert stack is not None
    each = len(stack.sublayers) // len(model.model.base_model.layers)
    context = KVContext(model, make("dense"))
    run = Run(Attending(context.layers, context.mechanism, context.hints, model.trained), {})
    h, mixed = seen.before.to(model.dtype), None
    for norm, mixer in stack.sublayers[number * each : (number + 1) * each]:
        x, h = norm(h) if mixed is None else norm(mixed, h)
        mixed = mixer.read(x, run)
    assert mixed is not None
    # What was added, in float32: the stream itself is so much larger that its rounding would hide everything.
    return mixed.float() + h.float() - seen.before


def _logits(model: CausalModel, tokens: list[int], kept: int) -> Tensor:
    context = KVContext(model, make("dense"))
    reader = Attending(context.layers, context.mechanism, context.hints, model.trained)
    out = model.forward(tokens, reader, logits=kept, state={})
    assert out is not None
    return out


@torch.inference_mode()
def _decode(model: CausalModel, mechanism: Mechanism, tokens: list[int]) -> float:
    """Return the greatest distance of a layer's decode step from the same token read as a chunk."""
    stack = model.native
    context = KVContext(model, mechanism)
    if stack is None or not Stepper.serves(model, context.layers, mechanism):
        return 0.0
    context.extend(tokens[:-1])
    other, state = context.fork(), context.recurrence.state()
    run = Run(Attending(other.layers, mechanism, other.hints, model.trained), state)
    stepper = Stepper(model, context.layers, mechanism)
    stepper.begin(tokens[-1], 1, state)
    h, mixed, worst = stack.embedding[torch.tensor(tokens[-1:], device=model.device)], None, 0.0
    for norm, mixer in stack.sublayers:
        x, h = norm(h) if mixed is None else norm(mixed, h)
        mixed = mixer.step(x, stepper)
        worst = max(worst, distance(mixer.read(x, run), mixed))
    return worst
