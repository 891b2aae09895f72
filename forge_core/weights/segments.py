"""Memory that processes of one machine share: what one wrote, the others read where it lies.

A segment is an anonymous file in memory (memfd_create(2)), which has no name, needs no folder of a certain size, and is
gone with the last process that has it open, however that one ends. Others open it by way of /proc. Who reads a segment
holds a shared lock (flock(2)) on it for as long as any tensor of it is left; who owns it writes into it again only when
nobody does. The kernel gives up the lock of a process that dies.

Reuse matters: the first write to fresh memory costs tens of times as much as one to memory that is there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Where a process of this machine finds a segment."""

    pid: int
    """Process that has it open."""
    descriptor: int
    """Number of the open file in that process."""
    inode: int
    """Of the file: another may have taken the number since."""
    size_bytes: int
    """Its size."""
    owner: int
    """Process that writes into it."""


class _File:
    """An open file, closed with this object."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


_handles = WeakTensorKeyDictionary()
"""Handles of the tensors that are segments, whole."""
_mapped: dict[int, tuple[int, mmap.mmap]] = {}
"""By inode, the owner of a segment and where it lies here: to map its pages again costs nearly as much as to copy."""


def handle_of(tensor: torch.Tensor) -> Handle | None:
    """Where others find the memory of a tensor; None if it is no segment."""
    found: Handle | None = _handles.get(tensor)
    return found


def attach(handle: Handle, *, is_read: bool = True) -> torch.Tensor:
    """The bytes of a segment, uint8, not to be written: whoever tries dies of it. Locked until no view of it is left.

    Without `is_read` they are only kept for others. Raises OSError if the process that had it has gone.
    """
    file = _open(handle)
    memory = _map_for_reading(file, handle) if is_read else _map(file.descriptor, handle)
    here = dataclasses.replace(handle, pid=os.getpid(), descriptor=file.descriptor)
    return _tensor(memory, file, here)


def _open(handle: Handle) -> _File:
    """The segment's file once more, with a shared lock."""
    file = _File(os.open(f"/proc/{handle.pid}/fd/{handle.descriptor}", os.O_RDONLY))
    found = os.fstat(file.descriptor)
    if (found.st_ino, found.st_size) != (handle.inode, handle.size_bytes):
        raise FileNotFoundError(
            f"process {handle.pid} no longer has the memory that was to be read"
        )
    fcntl.flock(file.descriptor, fcntl.LOCK_SH)
    return file


def _tensor(memory: mmap.mmap, file: _File, handle: Handle) -> torch.Tensor:
    """Mapped memory as bytes that have a handle, and keep the file open as long as any view of them is left."""
    # ctypes takes read-only memory by its address alone.
    address = np.frombuffer(memory, np.uint8).ctypes.data
    array = (ctypes.c_ubyte * handle.size_bytes).from_address(address)
    array.keeps = (memory, file)  # type: ignore[attr-defined]
    tensor = torch.frombuffer(array, dtype=torch.uint8)
    _handles[tensor] = handle
    return tensor


def _map_for_reading(file: _File, handle: Handle) -> mmap.mmap:
    """All pages at once, and only the first time."""
    if handle.inode not in _mapped:
        # A trainer that was started again has segments of its own; those of the one before are let go.
        for inode, (owner, _) in list(_mapped.items()):
            if not os.path.exists(f"/proc/{owner}"):
                del _mapped[inode]
        # A mapping keeps its opening of the file, and with it that one's lock: so it has one without.
        unlocked = os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY)
        try:
            memory = _map(unlocked, handle, mmap.MAP_POPULATE)
        finally:
            os.close(unlocked)
        _mapped[handle.inode] = (handle.owner, memory)
    return _mapped[handle.inode][1]


def _map(descriptor: int, handle: Handle, flags: int = 0) -> mmap.mmap:
    return mmap.mmap(
        descriptor, handle.size_bytes, flags=mmap.MAP_SHARED | flags, prot=mmap.PROT_READ
    )


class Segment:
    """A segment that this process owns."""

    def __init__(self, size_bytes: int) -> None:
        """Zeros. Raises OSError if there is no memory for it."""
        self._file = _File(os.memfd_create("forgeflow-weights", os.MFD_CLOEXEC))
        descriptor, pid = self._file.descriptor, os.getpid()
        os.ftruncate(descriptor, size_bytes)
        handle = Handle(
            pid=pid,
            descriptor=descriptor,
            inode=os.fstat(descriptor).st_ino,
            size_bytes=size_bytes,
            owner=pid,
        )
        self.tensor = _tensor(mmap.mmap(descriptor, size_bytes), self._file, handle)
        """Its bytes, uint8, to be written."""

    @property
    def is_free(self) -> bool:
        """Whether no process holds a view of it."""
        # A lock belongs to an opening of the file, so that this needs one of its own.
        descriptor = os.open(f"/proc/self/fd/{self._file.descriptor}", os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


class Pool:
    """Segments for one version after another: the one that is served keeps its own while the next is written."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def take(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """A segment for each size in bytes, none of which anyone reads; what they held before is still in them.

        Any that were taken before and are in no store count as free.
        """
        taken: list[Segment] = []
        free = [segment for segment in self._segments if segment.is_free]
        for size in sizes:
            found = next((s for s in free if s.tensor.numel() == size), None)
            if found is None:
                found = Segment(size)
            else:
                free.remove(found)
            taken.append(found)
        # Of what is left over, as much is kept as one version needs.
        rest = [s for s in self._segments if s not in free and s not in taken]
        self._segments = taken + rest + (free[: max(0, len(sizes) - len(rest))])
        return [segment.tensor for segment in taken]
