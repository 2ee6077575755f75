"""Prefill and decode of a whole model, beside plain transformers in the same run.

    python -m longspan.bench.model --lengths 1K,4K,8K --json

The same weights, the same tokens, the same type. Each mechanism that is exact must give transformers' logits before it
is timed. Times are medians; runs of the two sides alternate, so that a busy machine slows both. It measures no quality.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from longspan.attention import Mechanism, parse
from longspan.engine.contexts import CHUNK, GPU_CHUNK, Context
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.errors import UsageError
from longspan.evals.arguments import DTYPES, guarded, parser, say, specs_of
from longspan.evals.environment import environment
from longspan.evals.haystack import prose
from longspan.hf.loading import plain_transformers
from longspan.hf.model import CausalModel
from longspan.lengths import lengths_of

_DECODED = 24


def _ours(llm: LLM, mechanism: Mechanism, tokens: list[int]) -> tuple[float, float | None, Tensor | None]:
    """Return seconds of prefill, seconds a decoded token, and the last position's logits."""
    context: Context = llm.new_context(mechanism)
    started = time.perf_counter()
    if isinstance(context, IndexContext):
        context.extend(tokens)
        return time.perf_counter() - started, None, None
    assert isinstance(context, KVContext)
    context.extend(tokens[:-1])
    logits = context.step(tokens[-1:])
    prefill = time.perf_counter() - started
    steps = []
    token = int(logits.argmax())
    for _ in range(_DECODED):
        started = time.perf_counter()
        token = int(context.step([token]).argmax())
        steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps), logits


@torch.inference_mode()
def _theirs(model: Any, tokens: list[int]) -> tuple[float, float, Tensor]:
    """The same with transformers alone: its own attention (sdpa) and cache, prefilled in the same chunks."""
    device = model.device
    ids = torch.tensor([tokens], device=device)
    started = time.perf_counter()
    cache = None
    chunk = GPU_CHUNK if device.type == "cuda" else CHUNK
    for start in range(0, len(tokens), chunk):
        out = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    logits = out.logits[0, -1].float()
    token = int(logits.argmax())  # waits for the device
    prefill = time.perf_counter() - started
    steps = []
    for _ in range(_DECODED):
        started = time.perf_counter()
        out = model(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = int(out.logits[0, -1].argmax())
        steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps), logits


def _tolerance(dtype: torch.dtype) -> float:
    """Return by what share of the largest logit two right results may differ.

    In 16 bits both round in every layer: SmolLM2's logits after 256 and 1024 tokens differ by 1.6 to 3.1 times the
    type's last bit, in float32 by 2e-6.
    """
    return max(2e-3, 6 * torch.finfo(dtype).eps)


def measure(llm: LLM, plain: Any, specs: list[str], length: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row a mechanism at one length: tokens/s of both sides and their ratios."""
    model: CausalModel = llm.model
    tokens = model.tokens(prose()[: length * 8])[:length]
    rows = []
    for spec in specs:
        mechanism = parse(spec)
        mine, others = [], []
        for _ in range(repeats):
            mine.append(_ours(llm, mechanism, tokens))
            others.append(_theirs(plain, tokens))
        if mechanism.exact:
            difference = float((mine[0][2] - others[0][2]).abs().max())  # type: ignore[operator]
            if not difference < _tolerance(model.dtype) * float(others[0][2].abs().max()):
                raise AssertionError(f"{spec} differs from transformers by {difference}: a wrong result is not timed")
        prefill = [length / seconds for seconds, _, _ in mine]
        their_prefill = [length / seconds for seconds, _, _ in others]
        row: dict[str, Any] = {
            "mechanism": spec,
            "length": length,
            "prefill_tokens_per_s": round(statistics.median(prefill), 1),
            "transformers_prefill_tokens_per_s": round(statistics.median(their_prefill), 1),
            "prefill_ratio": round(statistics.median(a / b for a, b in zip(prefill, their_prefill, strict=True)), 2),
        }
        decode = [1 / step for _, step, _ in mine if step]
        if decode:
            theirs = [1 / step for _, step, _ in others]
            row |= {
                "decode_tokens_per_s": round(statistics.median(decode), 1),
                "transformers_decode_tokens_per_s": round(statistics.median(theirs), 1),
                "decode_ratio": round(statistics.median(a / b for a, b in zip(decode, theirs, strict=True)), 2),
            }
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; prints a table, or with --json one JSON object."""
    return guarded("bench", lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    made = parser(
        "longspan.bench.model",
        (__doc__ or "").splitlines()[0],
        mechanisms="dense streaming superlinear retrieval",
        lengths="1K,4K,8000",
    )
    made.add_argument("--dtype", choices=DTYPES, help="default: what the device is best at")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="of which medians; default: %(default)s")
    given = made.parse_args(arguments)
    specs, lengths = specs_of(given.mechanisms), lengths_of(given.lengths)
    if given.repeats < 1:
        raise UsageError(f"--repeats {given.repeats} measures nothing: give at least 1")
    llm = LLM(given.model, device=given.device, dtype=DTYPES.get(given.dtype))
    plain = plain_transformers(llm.model)
    rows = []
    for length in lengths:
        rows += measure(llm, plain, specs, length, given.repeats)
        say(f"{length} done")
    if given.json:
        about = environment(llm.model.device, "longspan.bench.model", arguments)
        about |= {"model": llm.model.name, "dtype": str(llm.model.dtype).removeprefix("torch.")}
        print(json.dumps({**about, "rows": rows}))
        return 0
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
