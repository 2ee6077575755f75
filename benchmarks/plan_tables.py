"""The tables of docs/planning.md: what `longspan plan`, `decide` and `cost` say, asked anew each time."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import planner
from longspan.hf.configuration import configuration
from longspan.lengths import short
from longspan.planner import devices, formats, times, tree
from longspan.planner.cost import Hosted, Job, break_evens, lines
from longspan.planner.decide import question
from longspan.planner.limits import longest
from longspan.planner.memory import CHUNK, GPU_CHUNK, memory
from longspan.planner.plan import plan
from longspan.planner.prices import own, price_list
from longspan.planner.reading import model
from longspan.planner.words import money, size, speed, time

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def formula() -> str:
    """`2 L Hkv D n bytes` for models that popular tables get wrong, with the arithmetic."""
    rows = []
    for name, heads, n in (
        ("llama-2-70b", 8, 4096),
        ("llama-2-70b", 64, 4096),
        ("llama-3.1-70b", 8, 10**6),
        ("llama-3.1-70b", 64, 10**6),
        ("llama-2-7b", 32, 131_072),
        ("qwen3-30b-a3b", 4, 10**6),
        ("nemotron-3-nano-30b", 2, 10**6),
    ):
        found = configuration(name)
        made = plan(found.fields | {"num_key_value_heads": heads}, n, gpu="a100", weights="fp16")
        layers, dim = len(made.asked.model.attending), made.asked.model.attending[0].head_dim
        kv, one = made.memory.kv, devices.device("a100").nominal
        rows.append(
            [
                f"{found.name}, {heads} KV heads",
                f"{n:,}",
                f"2 x {layers} x {heads} x {dim} x {n:,} x 2",
                size(kv),
                f"{kv / one:.2f} x 80 GB" if kv > one else "",
            ]
        )
    return markdown(["model", "tokens", "bytes", "keys and values", "A100-80GB for them alone"], rows)


def catalogue() -> str:
    """A plan of 128K tokens for models of every kind, dense, on one H200."""
    rows = []
    for name in ("smollm2", "llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b", "gemma-3-27b", "gpt-oss-120b",
                 "nemotron-3-nano-30b", "deepseek-v3"):  # fmt: skip
        made = plan(name, "128K", gpu="h200")
        asked = made.asked.model
        active = "" if asked.active > 0.8 * asked.parameters else f" ({asked.active / 1e9:.3g}B)"
        rows.append(
            [
                f"`{name}`",
                f"{asked.parameters / 1e9:.3g}B{active}",
                size(made.told()["kv_bytes_per_token"]),
                size(made.memory.weights),
                size(made.memory.kv),
                "yes" if made.fits else f"no, {size(-made.spare)} lack",
                time(made.prefill),
                speed(*made.decode_tokens_per_s),
            ]
        )
    head = ["model", "parameters (active)", "KV a token", "weights", "KV of 128K", "fits", "prefill", "decode"]
    return markdown(head, rows) + "\n`longspan plan --model MODEL --context 128K --gpu h200`\n"


def contexts() -> str:
    """The longest contexts of one model, by mechanism and KV format."""
    rows = []
    found = longest(plan("nemotron-3-nano-30b", "1M", gpu="h100").asked)
    for each in found:
        cells = ("no limit" if count is None else f"{count / 1e6:.2f}M" for count in each.tokens.values())
        rows.append([f"`{each.attention}`", *cells])
    head = ["attention", *(f"KV {kv}" for kv in found[0].tokens)]
    return markdown(head, rows) + "\n`longspan plan --model nemotron-3-nano-30b --gpu h100 --max-context`\n"


@functools.cache
def _tree() -> tree.Branch:
    return tree.tree(question("llama-3.1-8b", gpu="h100"), [(1, 1), (8, 1), (8, 4)])


def decision() -> str:
    """The decision tree of one model on H100."""
    return f"```\n{tree.text(_tree())}```\n\n`longspan decide --model llama-3.1-8b --gpu h100 --tree`\n"


def chart() -> str:
    """The same as a Mermaid flowchart, without several nodes."""
    return f"```mermaid\n{tree.mermaid(tree.Branch(_tree().name, _tree().under[:2]))}```\n"


def predictions() -> str:
    """Several GPUs and nodes, before anyone has run them."""
    rows = []
    for name, n, gpus, nodes, how, spec in (
        ("llama-3.1-8b", "1M", 2, 1, "ring", "dense"),
        ("llama-3.1-8b", "1M", 8, 1, "ring", "dense"),
        ("llama-3.1-8b", "1M", 8, 1, "star", "dense"),
        ("llama-3.1-8b", "1M", 8, 1, "sharded", "superlinear"),
        ("llama-3.1-8b", "10M", 8, 8, "ring", "dense"),
        ("llama-3.1-8b", "10M", 8, 8, "context_parallel", "dense"),
        ("llama-3.1-8b", "10M", 8, 8, "sharded", "superlinear"),
        ("nemotron-3-nano-30b", "10M", 8, 8, "context_parallel", "dense"),
    ):
        made = plan(name, n, gpu="h100", gpus=gpus, nodes=nodes, placement=how, attention=spec)
        assert made.sent is not None
        held = made.memory.total - made.memory.rotated
        rows.append(
            [
                f"`{name}`", n, f"{nodes} x {gpus}", f"`{spec}`, {how}", f"{made.sent.rank_tokens:,}",
                f"{made.sent.steps}, {made.sent.passes}", size(made.sent.bytes), size(held),
                time(made.prefill), speed(*made.decode_tokens_per_s),
            ]
        )  # fmt: skip
    head = ["model", "context", "nodes x GPUs", "by", "tokens a GPU", "steps, passes", "sent by a GPU",
            "memory of a GPU", "prefill", "decode"]  # fmt: skip
    return markdown(head, rows)


def money_table() -> str:
    """What questions cost, at $2 and $8 a million tokens."""
    known = price_list()
    payer = Hosted(own(known.model("gpt-4.1"), 2.0, 8.0, None), known.embedding)
    parts = []
    for job, daily in ((Job(10**6, 10), False), (Job(10**7, 100), True)):
        rows = [
            [each.way, f"{each.read:,}", money(each.once.dollars), money(each.each.dollars), money(each.total.dollars)]
            for each in lines(job, payer, daily=daily)
        ]
        every = "a day" if daily else "all"
        told = f"{short(job.tokens)} tokens, {job.queries} questions{' a day' if daily else ''}:\n\n"
        parts.append(told + markdown(["way", "tokens read", "once", "a question", every], rows))
        parts.append("".join(f"- {line}\n" for line in break_evens(job, payer)))
    return "\n".join(parts)


def reality() -> str:
    """Every committed result of a whole model beside its plan."""
    rows = []
    for row in planner.models():
        work = work_of(row)
        prefill = times.prefill(work)
        line = [f"`{row['mechanism']}`", f"{row['length']:,}", str(row["device"])]
        line.append(_outcome(row, "prefill", work.n / prefill.high, work.n / prefill.low))
        step = times.decode(work)
        line.append(_outcome(row, "decode", 1 / step.high, 1 / step.low))
        held = memory(work.model, work.n, attention=work.attention, weights=work.weights, kv=work.kv, chunk=work.chunk,
                      gpu=work.device.gpu).allocated  # fmt: skip
        peak = row.get("peak_bytes")
        line.append("" if peak is None else f"{size(peak)}, planned {size(held)}")
        line.append(f"{Path(row['file']).name} row {row['row']}")
        rows.append(line)
    head = ["mechanism", "tokens", "device", "prefill, tokens/s", "decode, tokens/s", "peak memory", "from"]
    return markdown(head, rows)


def _outcome(row: dict[str, object], what: str, low: float, high: float) -> str:
    measured = row.get(f"{what}_tokens_per_s")
    if not isinstance(measured, (int, float)):
        return ""
    told = f"{measured:,.0f}" if measured >= 1000 else f"{measured:.4g}"
    if what == "prefill" and "prefill" in row:
        return f"{told} by {row['prefill']}: not planned"
    return f"{told}, planned {speed(low, high).removesuffix(' tokens/s')}"


def work_of(row: dict[str, object]) -> times.Work:
    """Return the work of a row of `planner.models`, on the device that it was measured on."""
    device = devices.of(str(row["device"]))
    if not device.gpu:
        device = devices.of_cores(devices.one_core(), int(str(row.get("threads", 2))), device.memory)
    weights = _DTYPES[str(row["dtype"])]
    chunk = int(str(row.get("chunk") or (GPU_CHUNK if device.gpu else CHUNK)))
    of = model(times.named(str(row["model"])))
    spec, kv = str(row["mechanism"]), formats.kv("auto", weights)
    return times.Work(of, int(str(row["length"])), spec, weights, kv, 1, device, chunk)


TABLES = {
    "plan-formula": formula,
    "plan-catalogue": catalogue,
    "plan-contexts": contexts,
    "plan-tree": decision,
    "plan-chart": chart,
    "plan-parallel": predictions,
    "plan-cost": money_table,
    "plan-reality": reality,
}
"""By the name that stands in the document."""
