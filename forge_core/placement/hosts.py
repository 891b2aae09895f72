"""What a host has, as far as a run may use it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

THIS_MACHINE = "this machine"
"""Name of the host that the controller runs on."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine's devices, in the order in which they are handed out."""

    name: str
    """What sentences call it."""
    cores: tuple[int, ...]
    """Numbers of its cores, as `taskset` knows them."""
    gpus: tuple[str, ...]
    """Names of its GPUs, as `CUDA_VISIBLE_DEVICES` knows them."""
    memory_bytes: int | None
    """Its memory; None where nobody can say."""


def this_machine() -> Host:
    """The machine that asks, less what is hidden from this process."""
    return Host(
        name=THIS_MACHINE,
        cores=_visible_cores(),
        gpus=visible_gpus(),
        memory_bytes=_visible_memory(),
    )


def visible_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs of this machine that this process may use."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(index) for index in range(present))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # As CUDA does: the first index that is out of range hides all that follow.
    for position, name in enumerate(names):
        if name.lstrip("-").isdigit() and not 0 <= int(name) < present:
            return tuple(names[:position])
    return tuple(names[:present])


def _visible_cores() -> tuple[int, ...]:
    """One thread of each physical core first: two busy threads on one core slow each other."""
    by_physical: dict[int, list[int]] = {}
    for core in sorted(os.sched_getaffinity(0)):
        by_physical.setdefault(_physical_core(core), []).append(core)
    first = [threads[0] for threads in by_physical.values()]
    return (*first, *(core for threads in by_physical.values() for core in threads[1:]))


def _physical_core(core: int) -> int:
    """The lowest number among the threads that share a core."""
    try:
        siblings = Path(_SIBLINGS.format(core)).read_text("ascii")
    except OSError:  # not every container shows it
        return core
    return int(siblings.replace("-", ",").split(",")[0])


def _visible_memory() -> int:
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text("ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
