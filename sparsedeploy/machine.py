"""What this machine is: system, processor, flags, cores and memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MACHINES = {"amd64": "x86_64", "AMD64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Machine:
    """The facts that decide whether a runtime can run here, and that a measurement must name.

    Attributes:
        system: ``Linux``, ``Darwin`` or ``Windows``.
        machine: ``x86_64`` or ``aarch64``.
        processor: the processor's name, as the system reports it.
        flags: instruction-set flags (empty where the system does not report them), sorted.
        cores: logical processors that this process may use.
        memory_bytes: of the whole machine; None where unknown.
        last_level_cache_bytes: the largest cache; None where unknown.
        frequency_governor: of the first core, such as ``performance``; None where the system does not tell.
    """

    system: str
    machine: str
    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    last_level_cache_bytes: int | None
    frequency_governor: str | None = None


@cache
def this_machine() -> Machine:
    """Read the facts once."""
    facts = _read_cpuinfo()
    return Machine(
        system=platform.system(),
        machine=_MACHINES.get(platform.machine(), platform.machine()),
        processor=facts.get("model name") or platform.processor() or "unknown",
        flags=tuple(sorted((facts.get("flags") or facts.get("Features") or "").split())),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        last_level_cache_bytes=_last_level_cache_bytes(),
        frequency_governor=_frequency_governor(),
    )


def usable_cores() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _frequency_governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _last_level_cache_bytes() -> int | None:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=None)
