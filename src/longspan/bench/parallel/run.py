"""One layer's attention over several ranks: time, TFLOP/s, efficiency, bytes and memory of each scheme, checked first.

    torchrun --nproc-per-node 2 -m longspan.bench.parallel --lengths 128K,256K,512K,1M \\
        --schemes ring,context_parallel,star,torch --heads 32/8 --json --out parallel.json

On GPUs (NCCL) numbers are bfloat16; without any, the same code runs over gloo on a CPU with small sizes. Rank 0 prints
one JSON object with --json; with --out the file holds it after every row, so that what was measured outlives a run that
is stopped. Star reads with its anchor; its figures are of the FLOPs that it needs, its speedup is over dense attention.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from longspan import settings
from longspan.bench.parallel.inputs import Inputs
from longspan.bench.parallel.measure import Asked, measured
from longspan.bench.parallel.schemes import SCHEMES
from longspan.distributed.group import Group
from longspan.errors import UnknownNameError, UsageError
from longspan.evals.arguments import DTYPES, Parser, dtype_of, guarded, say
from longspan.evals.environment import environment
from longspan.lengths import lengths_of, tokens_of

WHATS = ("prefill", "decode")
_MODULE = "longspan.bench.parallel"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line, on every rank."""
    return guarded("bench parallel", lambda: _main(sys.argv[1:] if arguments is None else arguments))


def parser() -> Parser:
    """Return the command line's parser."""
    made = Parser(
        prog=f"torchrun --nproc-per-node N -m {_MODULE}",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"example: torchrun --nproc-per-node 2 -m {_MODULE} --lengths 128K --schemes ring,torch --json",
    )
    made.add_argument("--lengths", default="4K", help="tokens, commas between; default: %(default)s")
    made.add_argument(
        "--schemes",
        default="ring,context_parallel,star",
        help=f"of {', '.join(SCHEMES)}, or none; default: %(default)s",
    )
    made.add_argument(
        "--mechanisms", default="", metavar="SPECS", help="that search over ranks too, spaces between: superlinear tree"
    )
    made.add_argument("--what", default="prefill,decode", help="default: %(default)s")
    made.add_argument("--heads", default="32/8", metavar="HQ/HKV", help="query and KV heads; default: %(default)s")
    made.add_argument("--head-dim", type=int, default=128, metavar="N", help="default: %(default)s")
    made.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on GPUs, float32 on a CPU")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: GPUs where there are any")
    made.add_argument("--anchor", metavar="N", help="tokens of star's anchor; default: a block's")
    made.add_argument("--block", metavar="N", help="tokens of star's blocks; default: a rank's share")
    made.add_argument("--seconds", type=float, default=3.0, help="of timing for each figure; default: %(default)s")
    made.add_argument("--timeout", type=float, default=120.0, help="seconds that a rank may take; default: %(default)s")
    made.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    made.add_argument("--out", type=Path, metavar="FILE", help="keep the result here as rows come")
    return made


def _main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    heads = _heads(given.heads)
    lengths, whats = lengths_of(given.lengths), _names(given.what)
    schemes = () if given.schemes == "none" else _names(given.schemes)
    for kind, names, known in (("scheme", schemes, tuple(SCHEMES)), ("part", whats, WHATS)):
        for name in names:
            if name not in known:
                raise UnknownNameError(f"unknown {kind} {name!r}: use one of {', '.join(known)}")
    for name, number in (("--head-dim", given.head_dim), ("--seconds", given.seconds), ("--timeout", given.timeout)):
        if not number > 0:
            raise UsageError(f"{name} {number} is too small: give more than 0")
    if (threads := settings.threads()) is not None:
        torch.set_num_threads(threads)
    group = Group.start(given.device, timeout=given.timeout)
    dtype = dtype_of(given.dtype) if given.dtype else torch.bfloat16 if group.device.type == "cuda" else torch.float32
    asked = Asked(
        lengths=tuple(lengths),
        schemes=schemes,
        whats=whats,
        inputs=Inputs(*heads, given.head_dim, dtype, group.device, given.seed),
        anchor=tokens_of(given.anchor) if given.anchor else None,
        block=tokens_of(given.block) if given.block else None,
        seconds=given.seconds,
        mechanisms=tuple(given.mechanisms.split()),
    )
    found = about(group, asked, arguments)

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        if given.out is not None and group.rank == 0:
            part = given.out.with_name(given.out.name + ".part")
            part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            part.replace(given.out)

    try:
        measured(group, asked, say if group.rank == 0 else lambda _: None, keep)
    finally:
        group.close()
    if group.rank == 0 and given.json:
        print(json.dumps(found))
    return 0


def about(group: Group, asked: Asked, arguments: list[str]) -> dict[str, Any]:
    """Return what was measured, where and with what; rows are still to come."""
    told = environment(group.device, _MODULE, arguments)
    told["command"] = told["command"].replace("python", f"torchrun --nproc-per-node {group.size}", 1)
    inputs = asked.inputs
    return told | {
        "ranks": group.size,
        "heads": inputs.heads,
        "kv_heads": inputs.kv_heads,
        "head_dim": inputs.head_dim,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "anchor": asked.anchor,
        "block": asked.block,
        "seed": inputs.seed,
        "rows": [],
    }


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("nothing is named: give names with commas between")
    return names


def _heads(text: str) -> tuple[int, int]:
    """Return query and KV heads of `32/8`, or of `32`: as many."""
    query, _, kv = text.partition("/")
    kv = kv or query
    if not (query.isdecimal() and kv.isdecimal()) or min(int(query), int(kv)) < 1 or int(query) % int(kv):
        raise UsageError(f"--heads {text} are no heads: give query heads, a multiple of KV heads, such as 32/8")
    return int(query), int(kv)
