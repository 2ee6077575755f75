"""How long a saved session takes to its first token: page by page, and after all of it was read; and at what rate.

    python -m benchmarks.restoring --gigabytes 1 --out benchmarks/results/restoring-cpu.json

A model with random weights, in the shape of a small one with a long text, over keys and values that are random numbers:
what is chosen is scattered more than in a text, which brings more pages. The system forgets the file before each
measurement (POSIX_FADV_DONTNEED), and logits are compared bit by bit with those of the context that was saved. The
disk's own rate is the best of reading the file with one and two threads, in pieces as large as a restore's: into
buffers that are used again, and into memory that is new, as a restore's is (making that may take as long as reading).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import longspan
from benchmarks.decode import filled
from longspan import LLM, large
from longspan.attention import parse
from longspan.engine import contexts, prompts
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.sessions import files
from longspan.sessions.rows import READ, memory_of
from longspan.sessions.session import Session
from longspan.sessions.store import SessionStore

TESTS = Path(__file__).resolve().parent.parent / "tests"
SHAPE = {
    "num_hidden_layers": 24,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}
SPECS = ("dense", "quest", "superlinear")
QUESTION = [5, 7, 11, 13, 17, 19, 23, 29]
_TIMES = 3
_PLANE = 16 * READ


def saved(llm: LLM, spec: str, length: int) -> tuple[Path, torch.Tensor]:
    """Save a session of so many tokens, and return its file and the logits after the question."""
    session, head = llm.session("big"), prompts.before_documents(llm.model)
    text = "x" * (length - len(head))
    session.add_document("big.txt", text, [9] * len(text), [(i, i + 1) for i in range(len(text))], [])
    session.head, session.memory = len(head), filled(llm.model, length, [parse(spec)])
    session.memory.attend_by(parse(spec))
    session.memory.tokens = head + session.tokens
    llm.save(session)
    (path,) = (llm.store.root / "big").iterdir()
    return path, session.memory.step(QUESTION)


def drop(path: Path) -> None:
    """Forget what the system holds of a file."""
    handle = files.open_to_read(path)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def raw_seconds(path: Path, threads: int, new_memory: bool) -> float:
    """Return how long reading a file takes, in a restore's pieces."""
    handle, size = files.open_to_read(path), path.stat().st_size
    # As a layer's planes: a few MiB each.
    tensors = [large.empty((_PLANE,), torch.uint8) for _ in range(-(-size // _PLANE) if new_memory else threads)]
    planes = [memory_of(tensor) for tensor in tensors]

    def read(first: int) -> None:
        for at in range(first * READ, size, threads * READ):
            plane, start = divmod(at, _PLANE) if new_memory else (first, 0)
            files.read_into(handle, planes[plane][start : start + READ], at)

    drop(path)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    seconds = time.perf_counter() - started
    os.close(handle)
    return seconds


def opened(model: CausalModel, spec: str, root: Path, path: Path, whole: bool) -> tuple[Session, float, float]:
    """Open a session that the system has forgotten; returns it, and the seconds until then and until all is there."""
    llm = LLM(model, spec, store=SessionStore(root))
    drop(path)
    started = time.perf_counter()
    session = llm.session("big")
    there = opening = time.perf_counter() - started
    if whole:
        pools = [kv.pool for kv in session.memory.layers]
        for pool in pools:
            pool.want()
        for pool in pools:
            for plane in pool.planes:
                plane.need(None)
        there = time.perf_counter() - started
    return session, opening, there


def measured(model: CausalModel, spec: str, root: Path, length: int) -> dict[str, Any]:
    """Measure one mechanism."""
    llm = LLM(model, spec, store=SessionStore(root))
    path, wanted = saved(llm, spec, length)
    del llm
    size = path.stat().st_size
    row: dict[str, Any] = {"mechanism": spec, "tokens": length, "bytes": size}
    lazy, all_first, opening, reading = [], [], [], []
    disk: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_TIMES):
        for new_memory, seconds_each in disk.items():
            seconds_each += [raw_seconds(path, threads, new_memory) for threads in (1, 2)]
        session, seconds, _ = opened(model, spec, root, path, whole=False)
        started = time.perf_counter()
        said = session.memory.step(QUESTION)
        lazy.append(seconds + time.perf_counter() - started)
        assert torch.equal(said, wanted), "no figure of a wrong answer"
        opening.append(seconds)
        session, _, seconds = opened(model, spec, root, path, whole=True)
        reading.append(seconds)
        started = time.perf_counter()
        said = session.memory.step(QUESTION)
        all_first.append(seconds + time.perf_counter() - started)
        assert torch.equal(said, wanted), "no figure of a wrong answer"
    rate, into_new = (size / min(each) for each in disk.values())
    return row | {
        "first_token_page_by_page_ms": round(1e3 * min(lazy), 1),
        "first_token_after_all_ms": round(1e3 * min(all_first), 1),
        "opening_ms": round(1e3 * min(opening), 1),
        "pages_read_share": _read_share(model, spec, root),
        "disk_gib_per_s": round(rate / 2**30, 2),
        "disk_into_new_memory_gib_per_s": round(into_new / 2**30, 2),
        "restore_gib_per_s": round(size / min(reading) / 2**30, 2),
        "restore_share_of_disk": round(size / min(reading) / rate, 3),
        "restore_share_of_disk_into_new_memory": round(size / min(reading) / into_new, 3),
    }


def _read_share(model: CausalModel, spec: str, root: Path) -> float:
    """Return which share of the pages' keys and values the first token brings, with nothing in the background."""
    before, contexts.Arrivals.start = contexts.Arrivals.start, lambda self: None  # type: ignore[method-assign]
    try:
        memory = LLM(model, spec, store=SessionStore(root)).session("big").memory
        memory.step(QUESTION)
    finally:
        contexts.Arrivals.start = before  # type: ignore[method-assign]
    away = sum(plane.coming.left() for kv in memory.layers for plane in kv.pool.planes if plane.coming)
    return round(1 - away / (2 * sum(kv.pages_held for kv in memory.layers)), 3)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of keys and values (2^30 bytes)")
    parser.add_argument("--mechanisms", default=" ".join(SPECS), help="between spaces")
    parser.add_argument("--folder", help="on the disk that is to be measured; default: where temporary files go")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import transformers

    from tiny_llama import save_model

    result: dict[str, Any] = {
        "device": f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longspan": longspan.__version__,
        "command": f"python -m benchmarks.restoring --gigabytes {given.gigabytes:g}",
        "shape": "24 layers, 4 query heads, 1 KV head of 64, float32",
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        model = load(str(save_model(Path(place) / "model", **SHAPE)), dtype=torch.float32)
        sizes = model.dimensions
        length = int(given.gigabytes * 2**30) // (sizes.layers * sizes.kv_heads * sizes.head_dim * 2 * 4)
        for spec in given.mechanisms.split():
            root = Path(place) / spec.partition(":")[0]
            result["rows"].append(measured(model, spec, root, length))
            print(json.dumps(result["rows"][-1]), flush=True)
            if given.out:
                Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            files.discard([root])


if __name__ == "__main__":
    main()
