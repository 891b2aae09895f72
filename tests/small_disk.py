"""Disks that are full or read-only, for a program of its own to try a store on.

They are mounts that only this process and its children see, which end with it, and for which the kernel asks no
privilege where it allows user namespaces. Where it does not, the nearest that any process can have takes their place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from pathlib import Path

_CAPABILITIES_VERSION = 0x20080522
_NEW_MOUNTS, _NEW_USERS = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000


def fill(folder: Path, num_bytes: int) -> int:
    """Let the folder lie on a disk of this size from now on; the error of a write that is too much for it."""
    if _own_mounts():
        _mount("tmpfs", folder, 0, f"size={num_bytes}")
        return errno.ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return errno.EFBIG


def freeze(folder: Path) -> int:
    """Let nothing be written to what is in the folder from now on; the error of an attempt."""
    if _own_mounts():
        _mount(str(folder), folder, _BIND, "")  # A mount of its own, of the same files.
        _mount("", folder, _REMOUNT | _READ_ONLY | _BIND, "")
        return errno.EROFS
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # Without its capabilities root, too, obeys these bits.
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())
    return errno.EACCES


def _own_mounts() -> bool:
    """Part from the mounts of all other processes; whether that is allowed."""
    user, group = os.getuid(), os.getgid()
    try:
        try:
            _call("unshare", _NEW_MOUNTS)
        except PermissionError:
            _call("unshare", _NEW_MOUNTS | _NEW_USERS)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _mount("", Path("/"), _RECURSIVE | _PRIVATE, "")
    except OSError:
        return False
    return True


def _mount(source: str, target: Path, flags: int, options: str) -> None:
    _call("mount", source.encode(), str(target).encode(), b"tmpfs", flags, options.encode())


def _call(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
