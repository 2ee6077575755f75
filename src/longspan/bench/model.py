"""Prefill and decode of a whole model, beside plain transformers, and llama.cpp where asked, in the same run.

    longspan bench model --lengths 1K,4K,8K --json
    longspan bench model --mechanisms "dense quest:budget=1024" --prefill xattention --lengths 8000 \\
        --peer-python peer/bin/python --peer-model SmolLM2-135M-Instruct.Q4_1.gguf

The same weights, the same tokens, for transformers the same number type. Each mechanism that is exact must give
transformers' logits before it is timed, and llama.cpp must continue the text with the same first token. Times are
medians; runs of all sides alternate, so that a busy machine slows each. It measures no quality.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.attention import Mechanism, make, parse
from longspan.engine.contexts import CHUNK, GPU_CHUNK, Context
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.errors import UsageError
from longspan.evals.arguments import DTYPES, dtype_of, guarded, parser, say, specs_of
from longspan.evals.environment import environment
from longspan.evals.haystack import prose
from longspan.hf.loading import plain_transformers
from longspan.hf.model import CausalModel
from longspan.lengths import lengths_of
from longspan.peers.process import Peer

_DECODED = 24

Times = tuple[float, float | None]
"""Seconds of prefill, and of a decoded token (None: this side does not decode)."""


@dataclass(frozen=True)
class Options:
    """A command line's options, as they were written."""

    model: str | None
    device: str
    mechanisms: str
    lengths: str
    dtype: str | None
    prefill: str | None
    weights: str
    adapter: str | None
    peer_python: Path | None
    peer_model: Path | None
    repeats: int


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


def measure(
    llm: LLM, plain: Any, specs: list[str], length: int, repeats: int, peer: Peer | None = None
) -> list[dict[str, Any]]:
    """Return a row a mechanism at one length: tokens/s of all sides, and the ratio of ours to each other's."""
    model: CausalModel = llm.model
    tokens = model.tokens(prose()[: length * 8])[:length]
    rows = []
    for spec in specs:
        mechanism = parse(spec)
        mine: list[Times] = []
        others: dict[str, list[Times]] = {}
        for _ in range(repeats):
            prefill, step, logits = _ours(llm, mechanism, tokens)
            mine.append((prefill, step))
            other_prefill, other_step, wanted = _theirs(plain, tokens)
            others.setdefault("transformers", []).append((other_prefill, other_step))
            if mechanism.exact and llm.prefill_by is None and logits is not None:
                difference = float((logits - wanted).abs().max())
                if not difference < _tolerance(model.dtype) * float(wanted.abs().max()):
                    raise AssertionError(f"{spec} differs from transformers by {difference}: not timed")
            if peer is not None:
                found = peer.ask({"tokens": tokens, "decode": _DECODED})
                if found["tokens"][0] not in wanted.topk(3).indices.tolist():  # its weights are rounded otherwise
                    raise AssertionError(f"{peer.name} continues by another token than transformers: not timed")
                others.setdefault("llama_cpp", []).append((found["prefill_s"], found["decode_s"]))
        rows.append({"mechanism": spec, "length": length, **_speeds(length, mine, others)})
    return rows


def _speeds(length: int, mine: list[Times], others: dict[str, list[Times]]) -> dict[str, float]:
    """Return medians of tokens/s of each side, and of the ratios of runs that stood beside one another."""
    row = {"prefill_tokens_per_s": round(statistics.median(length / prefill for prefill, _ in mine), 1)}
    decodes = all(step for _, step in mine)
    if decodes:
        row["decode_tokens_per_s"] = round(statistics.median(1 / step for _, step in mine if step), 1)
    for name, theirs in others.items():
        ratio = "ratio" if name == "transformers" else f"ratio_{name}"
        row[f"{name}_prefill_tokens_per_s"] = round(statistics.median(length / prefill for prefill, _ in theirs), 1)
        row[f"prefill_{ratio}"] = round(statistics.median(b[0] / a[0] for a, b in zip(mine, theirs, strict=True)), 2)
        if decodes:
            row[f"{name}_decode_tokens_per_s"] = round(statistics.median(1 / step for _, step in theirs if step), 1)
            pairs = [(a[1], b[1]) for a, b in zip(mine, theirs, strict=True) if a[1] and b[1]]
            row[f"decode_{ratio}"] = round(statistics.median(b / a for a, b in pairs), 2)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; prints a table, or with --json one JSON object."""
    return guarded("bench", lambda: _main(sys.argv[1:] if arguments is None else arguments))


def run(given: Options, command: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Do what a command line asks for, and return environment and rows (see `measure`).

    Args:
        given: its options.
        command: what measures the same again.
        tell: told the progress.

    Raises:
        UsageError: an option that can't be used.
    """
    specs, lengths = specs_of(given.mechanisms), lengths_of(given.lengths)
    if given.repeats < 1:
        raise UsageError(f"--repeats {given.repeats} measures nothing: give at least 1")
    if (given.peer_python is None) != (given.peer_model is None):
        raise UsageError("llama.cpp needs both --peer-python and --peer-model")
    dtype = None if given.dtype is None else dtype_of(given.dtype)
    llm = LLM(
        given.model, "dense", given.device, dtype, prefill=given.prefill, weights=given.weights, adapter=given.adapter
    )
    llm.new_context(make("dense")).step([0])  # what is made on first use is no part of a measurement
    plain = plain_transformers(llm.model)
    rows = []
    told: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        peer = None
        if given.peer_python is not None and given.peer_model is not None:
            room, threads = max(lengths) + 2 * _DECODED, torch.get_num_threads()
            peer = Peer("llama.cpp", given.peer_python, given.peer_model, [str(room), str(threads)])
            told["llama.cpp"] = stack.enter_context(peer).about
        for length in lengths:
            rows += measure(llm, plain, specs, length, given.repeats, peer)
            tell(f"{length} done")
    about = environment(llm.model.device, "", []) | {"command": command}
    about |= told | {"model": llm.model.name, "dtype": str(llm.model.dtype).removeprefix("torch.")}
    return {**about, "rows": rows}


def _main(arguments: list[str]) -> int:
    made = parser(
        "longspan.bench.model",
        (__doc__ or "").splitlines()[0],
        mechanisms="dense streaming superlinear retrieval",
        lengths="1K,4K,8000",
    )
    made.add_argument("--dtype", choices=DTYPES, help="default: what the device is best at")
    made.add_argument(
        "--prefill", metavar="SPEC", help="by what ours reads, such as xattention; default: as it attends"
    )
    made.add_argument("--weights", default="auto", metavar="HOW", help="auto, own or int8; default: %(default)s")
    made.add_argument("--adapter", metavar="FOLDER", help="what longspan convert or extend trained for the model")
    made.add_argument("--peer-python", type=Path, metavar="FILE", help="an interpreter that has llama-cpp-python")
    made.add_argument("--peer-model", type=Path, metavar="FILE.gguf", help="what llama.cpp loads")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="of which medians; default: %(default)s")
    given = vars(made.parse_args(arguments))
    as_json = given.pop("json")
    found = run(Options(**given), f"python -m longspan.bench.model {shlex.join(arguments)}", say)
    if as_json:
        print(json.dumps(found))
        return 0
    for row in found["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
