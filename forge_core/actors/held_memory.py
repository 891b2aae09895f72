"""What a process holds of the memory that colocated meshes share."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

from forge_core.actors.messages import HeldMemory
from forge_core.placement.hosts import this_machine

_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def held_memory(device: torch.device) -> HeldMemory:
    """What is held now and was held at most since this was asked before.

    On CPU that is this process's resident memory. On a GPU it is the whole device's, of all processes together, and
    only what is held now: the driver keeps no peak.
    """
    if device.type != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        used = int(total - free)
        return HeldMemory(bytes=used, peak_bytes=used, total_bytes=int(total), is_of_device=True)
    held, peak = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    # Not every container lets a process do so; the peak is then that of its whole life.
    with contextlib.suppress(OSError):
        _CLEAR_REFERENCES.write_text(_RESET_PEAK, "ascii")
    memory = this_machine().memory_bytes
    assert memory is not None, "a machine knows its own"
    return HeldMemory(
        bytes=held, peak_bytes=max(held, peak), total_bytes=memory, is_of_device=False
    )


def give_back(device: torch.device) -> None:
    """Return freed memory to whom it came from, which allocators like to keep."""
    if device.type != "cpu":
        torch.cuda.empty_cache()
        return
    # glibc's; other C libraries return what is freed by themselves.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text("ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} does not tell {name}")
