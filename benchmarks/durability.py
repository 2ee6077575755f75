"""Proof that sessions last: killed, flipped, filled up, shared, refused; how fast they are listed, forked, restored.

    python -m benchmarks.durability --out benchmarks/results/durability-cpu.json
    python -m benchmarks.durability --only kill --kills 200 --out ...

A tiny model with random weights runs through the real engine and the real store. Children are forked from a process
that has loaded it and killed with SIGKILL at random moments; what they acknowledged (after a commit had returned) is
looked for afterwards, and logits are compared bit by bit with those of an engine that was never interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import longspan
from longspan import LLM
from longspan.errors import LongspanError
from longspan.hf.loading import load
from longspan.kv.pages import PagedKV, PagePool
from longspan.sessions import archive, committing, files, upkeep
from longspan.sessions.store import Rows, SessionStore

TESTS = Path(__file__).resolve().parent.parent / "tests"
PIECE = "The code of the tower in street {0} is {1}. Nobody had asked for the lantern of house {2}. "
KINDS = ("ingest", "answer", "save", "eviction", "gc")


class Rig:
    """A tiny model, a folder of sessions, and the logits of reading that nothing interrupted."""

    def __init__(self, place: Path) -> None:
        sys.path.insert(0, str(TESTS))
        from tiny_llama import save_model

        self.place = place
        self.model = load(str(save_model(place / "model", max_position_embeddings=8192)), dtype=torch.float32)
        self.other = load(str(save_model(place / "other", seed=1, max_position_embeddings=8192)), dtype=torch.float32)
        self._known: dict[int, torch.Tensor] = {}

    def llm(self, root: Path, **options: Any) -> LLM:
        """Return an engine over a folder of sessions."""
        return LLM(self.model, options.pop("attention", "dense"), store=SessionStore(root), reuse=False, **options)

    def piece(self, i: int) -> str:
        """Return the text of a document."""
        return "".join(PIECE.format(i, i * 7919 % 10007, j) for j in range(4))

    def read(self, llm: LLM, session: Any, count: int) -> None:
        """Read documents until there are so many."""
        while len(session.documents) < count:
            i = len(session.documents)
            llm.add_text(session, self.piece(i), f"piece {i}")
            llm.prefill(session)

    def logits(self, count: int) -> torch.Tensor:
        """After so many pieces, read one after the other by an engine that was never interrupted."""
        if count not in self._known:
            llm = self.llm(self.place / "none")
            session = llm.session()
            self.read(llm, session, count)
            self._known[count] = session.memory.step([7, 8, 9])
        return self._known[count]


def kills(rig: Rig, count: int, rng: random.Random, seconds: float = 300.0) -> dict[str, Any]:
    """SIGKILL at random moments in every kind of work, so often or for so long."""
    started = time.perf_counter()
    out: dict[str, Any] = {"kills": 0, "acknowledged": 0, "lost": 0, "logits_differ": 0, "orphans": 0, "damaged": 0}
    by_kind = dict.fromkeys(KINDS, 0)
    for n in range(count):
        if time.perf_counter() - started > seconds:
            break
        kind = KINDS[n % len(KINDS)]
        root = rig.place / f"kill-{n}"
        acknowledged = _killed(rig, kind, root, rng)
        if acknowledged is None:
            continue
        by_kind[kind] += 1
        out["kills"] += 1
        out["acknowledged"] += len(acknowledged)
        store = SessionStore(root)
        upkeep.collect(store)
        out["damaged"] += len(upkeep.verify(store))
        for path in _orphans(store):
            out["orphans"] += 1
            print(f"{kind}: an orphan: {path}", file=sys.stderr)
        documents, turns = max((a for a in acknowledged), default=(0, 0))
        if (documents, turns) == (0, 0):
            shutil.rmtree(root, ignore_errors=True)
            continue
        try:
            session = rig.llm(root).session("kept")
            whole = len(session.documents) >= documents and (len(session.documents), len(session.turns)) >= (
                documents,
                turns,
            )
            whole = whole and session.memory.length >= sum(d.last - d.first for d in session.documents)
            out["lost"] += not whole
            if whole:
                found = session.memory.step([7, 8, 9])
                out["logits_differ"] += not torch.equal(found, rig.logits(len(session.documents)))
        except LongspanError:
            out["lost"] += 1
        shutil.rmtree(root, ignore_errors=True)
    return out | {"by_kind": by_kind}


def _killed(rig: Rig, kind: str, root: Path, rng: random.Random) -> list[tuple[int, int]] | None:
    """Fork a child that works, kill it, and return what it acknowledged; None: it had ended before."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            _work(rig, kind, root, lambda *told: os.write(writer, (json.dumps(told) + "\n").encode()))
        os._exit(0)
    os.close(writer)
    time.sleep(rng.uniform(0.02, 0.6))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as lines:
        told = [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
    return told if os.WIFSIGNALED(status) else None  # type: ignore[return-value]


def _work(rig: Rig, kind: str, root: Path, tell: Callable[[int, int], object]) -> None:
    llm = rig.llm(root)
    session = llm.session("kept")
    rig.read(llm, session, 1)
    llm.save(session)
    tell(1, 0)
    for i in range(2, 200):
        if kind == "ingest":
            rig.read(llm, session, i)
            llm.save(session)
        elif kind == "answer":
            llm.ask("What is the code?", session, max_tokens=4, remember=True)
            llm.save(session)
        elif kind == "save":
            committing.COMPACTED = 0
            rig.read(llm, session, min(i, 4))
            session.saved_length = -1
            llm.save(session)
            llm.fork(session, f"fork-{i}")
            if i > 2:
                llm.store.remove(f"fork-{i - 1}")
        elif kind == "eviction":
            store = SessionStore(root, quota=400_000)
            store.save(f"cache-{i}", {}, {}, {"g": {"x": torch.full((20_000,), i)}}, {}, kept=False)
        else:
            committing.COMPACTED = 0
            llm.store.save("waste", {}, {}, {"g": {"x": torch.full((4000,), i)}}, {}, kept=False, ttl=1e-3)
            upkeep.collect(llm.store)
        tell(len(session.documents), len(session.turns))


def _orphans(store: SessionStore) -> Iterator[Path]:
    """Yield what belongs to no session."""
    names = set(store.names())
    for path in store.root.iterdir() if store.root.is_dir() else ():
        if path.name in names:
            needed = {segment.path for segment in store.opened(path.name, path)[0].segments}
            yield from (each for each in path.iterdir() if each not in needed)
        elif not path.name.startswith(".catalogue") and path.name.removeprefix(".").removesuffix(".lock") not in names:
            yield path


def flips(rig: Rig, count: int, rng: random.Random) -> dict[str, Any]:
    """A random bit flipped in every kind of file: found, and named with the file."""
    root = rig.place / "flips"
    llm = rig.llm(root)
    session = llm.session("kept")
    rig.read(llm, session, 3)
    llm.save(session)
    llm.fork(session, "fork")
    store = llm.store
    exported = archive.export(store, "kept", rig.place / "kept.longspan")
    own = max((store.root / "fork").iterdir())
    shared = min((store.root / "fork").iterdir())
    out = {}
    for what, path in (("journal", shared), ("fork's own segment", own), ("exported file", exported)):
        size, found = path.stat().st_size, 0
        for _ in range(count):
            at, bit = rng.randrange(size), 1 << rng.randrange(8)
            _flip(path, at, bit)
            problems = upkeep.verify_file(path) if path == exported else upkeep.verify(store)
            found += any(problem.file.endswith(path.name) for problem in problems)
            _flip(path, at, bit)
        out[what] = {"flipped": count, "found": found}
    store.catalogue.close()
    path = store.catalogue.path
    data, found, harmless = path.read_bytes(), 0, 0
    seal = path.with_name(path.name + ".seal")
    sealed = seal.read_bytes()
    told = [(info.name, info.state, info.identity) for info in SessionStore(root).infos()]
    for _ in range(count):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        seal.write_bytes(sealed)  # made anew with the catalogue, where damage was found before
        other = SessionStore(root)
        if any(str(path) in problem.line() for problem in upkeep.verify(other)):
            found += 1
        elif [(info.name, info.state, info.identity) for info in other.infos()] == told:
            harmless += 1
        other.catalogue.close()
    path.write_bytes(data)
    out["catalogue"] = {"flipped": count, "found": found, "in bytes that say nothing": harmless}
    return out


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ bit]), at)


def full_disk(rig: Rig, step: int = 2048) -> dict[str, Any]:
    """Files that may not grow beyond a byte, for every step of a save: the commit before stays until there is room."""
    root = rig.place / "full"
    llm = rig.llm(root)
    session = llm.session("kept")
    rig.read(llm, session, 2)
    llm.save(session)
    (journal,) = (root / "kept").iterdir()
    start, before = journal.stat().st_size, journal.read_bytes()
    rig.read(llm, session, 3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    refused = intact = 0
    limit, hard = start, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    while True:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            llm.save(session)
            break
        except LongspanError:
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        intact += journal.read_bytes() == before
        limit += step
    whole = upkeep.verify(llm.store) == [] and len(rig.llm(root).session("kept").documents) == 3
    return {"write_points": refused, "commit_before_intact": intact, "whole_with_room": whole}


def two_processes(rig: Rig, seconds: float = 3.0) -> dict[str, Any]:
    """Two processes save, fork and remove in one folder while a third reads."""
    root, children = rig.place / "shared", []
    for who in range(2):
        child = os.fork()
        if child == 0:
            store, code, end = SessionStore(root), 0, time.time() + seconds
            try:
                for i in range(10**6):
                    if time.time() > end:
                        break
                    store.save("kept", {}, {"by": who, "i": i}, {"g": {"x": torch.full((3000,), who * 10**6 + i)}}, {})
                    if i % 10 == 9:
                        store.fork("kept", f"fork-{who}")
                        store.remove(f"fork-{who}")
            except BaseException:
                code = 1
            os._exit(code)
        children.append(child)
    reads = torn = 0
    while children:
        with contextlib.suppress(LongspanError):
            saved = SessionStore(root).load("kept")
            reads += 1
            state: Any = saved.state
            torn += not bool((saved.tensors["g"]["x"] == state["by"] * 10**6 + state["i"]).all())
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    return {"reads": reads, "torn": torn, "problems": len(upkeep.verify(SessionStore(root)))}


def refusals(rig: Rig) -> dict[str, str]:
    """What is refused, and in what words."""
    root = rig.place / "refusals"
    llm = rig.llm(root)
    session = llm.session("kept")
    rig.read(llm, session, 1)
    llm.save(session)
    told = {}
    tokenizer = rig.llm(root)
    same = tokenizer._identity()
    cases: dict[str, Callable[[], object]] = {
        "model": lambda: LLM(rig.other, "dense", store=SessionStore(root)).session("kept"),
        "tokenizer": lambda: SessionStore(root).load("kept", {**same, "tokenizer": "another"}),
        "mechanism": lambda: rig.llm(root, attention="superlinear:window=80").session("kept"),
        "KV format": lambda: rig.llm(root, kv="int8").session("kept"),
        "newer version": lambda: _newer(root),
        "path traversal": lambda: llm.session("../../etc/passwd"),
        "absolute path": lambda: llm.store.fork("kept", "/tmp/x"),
    }
    for what, case in cases.items():
        try:
            case()
            told[what] = "NOT REFUSED"
        except LongspanError as error:
            told[what] = f"{type(error).__name__}: {str(error).replace(str(rig.place), '')}"
    return told


def _newer(root: Path) -> None:
    from longspan.sessions import manifest

    store = SessionStore(root)
    before, manifest.FORMAT = manifest.FORMAT, manifest.FORMAT + 1
    try:
        store.save("newer", {}, {}, {}, {})
    finally:
        manifest.FORMAT = before
    store.load("newer")


def clocks(rig: Rig) -> dict[str, Any]:
    """The clock jumps: nothing that is kept goes, and nothing goes because the clock went back."""
    store = SessionStore(rig.place / "clocks")
    store.save("kept", {}, {}, {}, {})
    store.save("cache", {}, {}, {}, {}, kept=False, ttl=3600)
    now, out = time.time(), {}
    for what, jump in (
        ("ten years back", -10 * 365 * 86400),
        ("half an hour on", 1800),
        ("ten years on", 10 * 365 * 86400),
    ):
        done = upkeep.collect(store, now=now + jump)
        out[what] = {"removed": done.sessions, "left": store.names()}
    return out


def speeds(rig: Rig, gigabytes: float) -> dict[str, Any]:
    """Listing, forking, restoring."""
    out: dict[str, Any] = {}
    root = rig.place / "many"
    store = SessionStore(root)
    state = {"documents": [{"name": "a.pdf", "first": 0, "last": 900}], "turns": 0, "head": 0}
    for i in range(1000):
        store.save(f"session-{i}", {"model": "m", "attention": "dense"}, state, {}, {})
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert len(SessionStore(root).infos()) == 1000
        times.append(time.perf_counter() - started)
    out["list_1000_ms"] = round(1e3 * min(times), 1)
    started = time.perf_counter()
    env = {**os.environ, "LONGSPAN_SESSIONS": str(root)}
    subprocess.run(
        [sys.executable, "-m", "longspan.cli", "session", "ls", "--json"], env=env, capture_output=True, check=True
    )
    out["list_1000_command_ms"] = round(1e3 * (time.perf_counter() - started), 1)
    out["fork_100k_memory_ms"] = round(1e3 * _fork_seconds(100_000), 2)
    pages = torch.randint(0, 255, (int(gigabytes * 2**30) // 16 // 65536, 65536), dtype=torch.uint8)
    tensors = {f"{i}.k": Rows(pages) for i in range(16)}
    store = SessionStore(rig.place / "big")
    out["save_gb_per_s"] = round(gigabytes / _timed(lambda: store.save("big", {}, {}, {"memory": tensors}, {})), 2)
    forks = iter(range(100))
    out["fork_on_disk_ms"] = round(1e3 * min(_timed(lambda: store.fork("big", f"f{next(forks)}")) for _ in range(5)), 2)
    (path,) = (store.root / "big").iterdir()
    raw, restored = [], []
    for _ in range(3):
        _drop(path)
        raw.append(gigabytes / _timed(lambda: _read_all(path)))
        _drop(path)
        restored.append(gigabytes / _timed(lambda: dict(store.load("big", lazily=True).tensors["memory"])))
    out |= {
        "gigabytes": gigabytes,
        "disk_read_gib_per_s": round(max(raw), 2),
        "restore_gib_per_s": round(max(restored), 2),
    }
    return out | {"restore_share_of_disk": round(max(restored) / max(raw), 3)}


def _fork_seconds(tokens: int) -> float:
    """Return the seconds that forking the pages of 30 layers takes."""
    layers = []
    for _ in range(30):
        kv = PagedKV(PagePool(1, 8, 8, torch.float32, torch.device("cpu")))
        kv.append(torch.rand(1, 1, tokens, 8), torch.rand(1, 1, tokens, 8))
        kv.commit()
        layers.append(kv)
    return min(_timed(lambda: [kv.fork() for kv in layers]) for _ in range(5))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _drop(path: Path) -> None:
    """Forget what the system holds of a file."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _read_all(path: Path) -> None:
    """Read a file in pieces as large as a restore's, into memory that is new each time, as a restore's is."""
    handle, buffer, at = files.open_to_read(path), memoryview(bytearray(8 * 2**20)), 0
    while count := files.read_into(handle, buffer, at):
        at += count
    os.close(handle)


def main() -> None:
    """Run the parts that were asked for, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, between commas")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", help="on the disk that is to be measured; default: the system's for temporary files"
    )
    parser.add_argument("--out", help="a JSON file; parts that it holds already and are not run again stay")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(given.seed)
    parts: dict[str, Callable[[Rig], Any]] = {
        "kill": lambda rig: kills(rig, given.kills, rng),
        "flip": lambda rig: flips(rig, given.flips, rng),
        "full": full_disk,
        "shared": two_processes,
        "refused": refusals,
        "clock": clocks,
        "speed": lambda rig: speeds(rig, given.gigabytes),
    }
    wanted = given.only.split(",") if given.only else list(parts)
    out = Path(given.out) if given.out else None
    import transformers

    result: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    result |= {
        "device": f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longspan": longspan.__version__,
        "command": "python -m benchmarks.durability --kills 200 --flips 200 --gigabytes 1",
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        rig = Rig(Path(place))
        for part in wanted:
            started = time.perf_counter()
            result[part] = parts[part](rig)
            print(f"{part}: {time.perf_counter() - started:.1f} s: {json.dumps(result[part])}", flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
