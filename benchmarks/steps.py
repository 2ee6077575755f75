"""How fast a decode step of superlinear attention is by how it is cut into programs and launches: to tune it on a GPU.

    python -m benchmarks.steps --lengths 64K,1M --cut '' --cut split=256,rest=64 --cut split=256,rest=64,last=1

prints one JSON line a length and cut, the cut that is used where none is named, as `longspan bench attention` measures
it: outputs beside float64 first, then 16 steps in a CUDA graph, all cuts taking turns. What a cut does not name is as
it is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from longspan.attention import Mechanism, parse
from longspan.attention.superlinear import Superlinear
from longspan.attention.superlinear_kernels import search_of
from longspan.bench import timing
from longspan.bench.attention import inputs
from longspan.bench.attention.measure import Measured, clean
from longspan.bench.attention.sides import Ours
from longspan.bench.timing import Call, Peaks
from longspan.kernels.held import PAGE, Held
from longspan.kernels.superlinear.triton_decode import Cut, cut_for, decode
from longspan.kernels.tiles import processors
from longspan.lengths import lengths_of

_STEPS = 16


class Step(Ours):
    """A decode step that is cut as a line of the table says."""

    def __init__(self, mechanism: Superlinear, changes: dict[str, int]) -> None:
        """Measure it; the changes are those of `Cut`'s fields."""
        super().__init__(mechanism)
        self.changes = changes
        self.name = ",".join(f"{key}={value}" for key, value in changes.items())  # type: ignore[misc]

    def decode(self, inputs: inputs.Inputs) -> Call:
        """See `Side`."""
        k, v, mechanism = inputs.k, inputs.v, self.truth
        assert isinstance(mechanism, Superlinear)
        table = torch.arange(k.shape[2] // PAGE, device=k.device).unsqueeze(0)
        keys, values = (Held(x.view(x.shape[1], -1, PAGE, x.shape[3]), table) for x in (k, v))
        lengths, q = torch.tensor([k.shape[2]], device=k.device), inputs.q[:, :, 0]
        search, scale = search_of(mechanism), 1.0 / math.sqrt(k.shape[3])
        read = (keys.heads if search.share == "group" else q.shape[1]) * search.spans
        longest = search.longest(k.shape[2])
        used = cut_for(q.dtype, values.kind, k.shape[3], longest, read, 3 * processors(k.device))
        cut = dataclasses.replace(used, **self.changes)
        return lambda: decode(q, keys, values, lengths, search, scale=scale, cut=cut).unsqueeze(2)


def rows(
    mechanism: Superlinear, cuts: Sequence[dict[str, int]], shape: inputs.Shape, length: int, routing: str,
    seconds: float, peaks: Peaks,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return what each cut takes at one length; one that fails says why."""
    measured = Measured("decode", inputs.make(shape, length, 1, routing, 0, _STEPS), peaks, 0)
    for changes in cuts:
        measured.prepare(Step(mechanism, changes), must=False)
    found = []
    for name, figures in measured.time(seconds).items():
        line: dict[str, Any] = {"length": length, "cut": name}
        if "seconds" in figures:
            times = {
                key: round(1e6 * figures[of], 2) for key, of in (("us", "seconds"), ("low", "low"), ("high", "high"))
            }
            line |= times | {"error": float(f"{figures['error']:.2g}"), "turns": figures["turns"]}
        found.append(line | {key: figures[key] for key in ("skipped",) if key in figures})
    return found


def changes_of(text: str) -> dict[str, int]:
    """Return a cut's changes, `name=number` with commas between (ValueError: there is no such field, or no number)."""
    known = {field.name: field.type for field in dataclasses.fields(Cut)}
    pairs = dict(pair.split("=") for pair in text.split(",") if pair)
    if unknown := set(pairs) - set(known):
        raise ValueError(f"no {', '.join(sorted(unknown))}: a cut has {', '.join(known)}")
    return {key: bool(int(value)) if known[key] == "bool" else int(value) for key, value in pairs.items()}


def main() -> None:
    """Check and time each cut that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanism", default="superlinear:gate=routed", metavar="SPEC")
    parser.add_argument("--lengths", default="64K,256K,1M", metavar="N,N", help="tokens of context")
    parser.add_argument("--cut", action="append", metavar="NAME=NUMBER,...", help="fields of `Cut`; any number of them")
    parser.add_argument("--routing", choices=inputs.ROUTINGS, default="random")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring, for each cut at each length")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter, to see that it runs")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no GPU here: steps are tuned on one\n")
    mechanism: Mechanism = parse(options.mechanism)
    if not isinstance(mechanism, Superlinear):
        parser.error(f"--mechanism: {options.mechanism} is not superlinear")
    try:
        cuts, lengths = [changes_of(text) for text in options.cut or [""]], lengths_of(options.lengths)
    except ValueError as error:
        parser.error(str(error))
    dtype = getattr(torch, options.dtype)
    shape = inputs.Shape(options.heads, options.kv_heads, options.head_dim, dtype, device, mechanism.whole_window)
    peaks = timing.peaks(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    of = {"device": name, "mechanism": mechanism.describe(), "routing": options.routing}
    for length in lengths:
        for line in rows(mechanism, cuts, shape, length, options.routing, options.seconds, peaks):
            print(json.dumps(of | line), flush=True)
        clean(device)


if __name__ == "__main__":
    main()
