"""What devices have and can do at best: memory, bandwidth, FLOPs, links. The figures and their sources are a data file.

It knows nominal peaks only; what of them is reached is `measured`'s.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longspan.errors import UnknownNameError
from longspan.planner import detected

NETWORK = 50e9
"""Bytes a second that one GPU sends to another node where nothing else is said: a 400 Gb/s adapter for each GPU."""
_FILE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class Device:
    """One kind of GPU, or this machine's CPU."""

    name: str
    title: str
    memory: int
    """Bytes, as the driver tells them."""
    nominal: int
    """Bytes by the name it is sold under, in decimal units."""
    bandwidth: float
    """Bytes a second."""
    flops: Mapping[str, float]
    """Dense products, by number type."""
    link: float
    """Bytes a second to another GPU of the same host, one way."""
    host: float
    """Bytes a second from host memory."""
    link_name: str
    cores: int
    """CPU cores; 0: a GPU."""
    match: Sequence[str]
    """What the driver's name of it contains."""
    sources: Sequence[str]

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.cores == 0

    def peak(self, numbers: str) -> float:
        """Return FLOPs a second for products of a number type; one that it lacks is computed in 16 bits, or 32."""
        return self.flops.get(numbers) or self.flops.get("bf16") or next(iter(self.flops.values()))


@functools.cache
def devices() -> dict[str, Device]:
    """Return every device of the data file by name; `cpu` has this machine's cores and memory."""
    found = {}
    for name, entry in json.loads(_FILE.read_text(encoding="utf-8")).items():
        found[name] = Device(
            name=name,
            title=entry["title"],
            memory=entry["mib"] << 20,
            nominal=round(entry["nominal_gb"] * 1e9),
            bandwidth=entry["bandwidth_gb_s"] * 1e9,
            flops={kind: rate * 1e12 for kind, rate in entry["tflops"].items()},
            link=entry["link_gb_s"] * 1e9,
            host=entry["host_gb_s"] * 1e9,
            link_name=entry["link"],
            cores=0,
            match=tuple(entry["match"]),
            sources=tuple(entry["sources"]),
        )
    found["cpu"] = of_cores(found["cpu"], _cores(), _memory())
    return found


def one_core() -> Device:
    """Return what one core of a CPU is taken for."""
    cpu = devices()["cpu"]
    share = {kind: rate / cpu.cores for kind, rate in cpu.flops.items()}
    return replace(cpu, bandwidth=cpu.bandwidth / cpu.cores, flops=share, cores=1)


def of_cores(one: Device, cores: int, memory: int) -> Device:
    """Return a CPU of so many cores, given what one of them does."""
    return replace(
        one,
        title=f"CPU, {cores} core{'s' if cores != 1 else ''}",
        memory=memory,
        nominal=memory,
        bandwidth=one.bandwidth * cores,
        flops={kind: rate * cores for kind, rate in one.flops.items()},
        cores=cores,
    )


def device(name: str) -> Device:
    """Return a device by name, `auto` for what is here.

    Raises:
        UnknownNameError: no such device, or what is here is a GPU that the data file lacks; the names are listed.
    """
    key = name.lower().replace("-", "").replace(" ", "")
    if key == "auto":
        told = detected.device()
        if told.startswith("cuda") and not of(told).gpu:  # a GPU of another kind
            raise UnknownNameError(f"{told} is no device of the planner: name one with --gpu: {', '.join(devices())}")
        return of(told)
    if key not in devices():
        raise UnknownNameError(f"unknown device {name!r}: use one of auto, {', '.join(devices())}")
    return devices()[key]


def of(told: str) -> Device:
    """Return the device that a driver's or result's name stands for; one that is not in the data file is the CPU."""
    for each in devices().values():
        if any(word in told for word in each.match):
            return each
    return devices()["cpu"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Return the bytes of this machine's memory; where the system does not tell, 16 GB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 16_000_000_000
