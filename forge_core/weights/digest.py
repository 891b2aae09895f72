"""Checksums of tensors, and one digest of a whole version: XXH3, which keeps up with a copy of the memory.

    checksum   XXH3-128 over the bytes of a tensor, or of a slice of one
    digest     XXH3-128 over name, dtype, shape and checksum of every tensor, by their names

They tell other weights and damaged bytes, not a forger's: the files of a checkpoint have a SHA-256 each.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

PREFIX = "xxh3-"
"""What a digest begins with."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a CPU tensor as a flat uint8 view (a copy only if it is not contiguous)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def checksum(tensor: torch.Tensor) -> str:
    """XXH3-128 over the bytes of a CPU tensor, 32 hexadecimal digits."""
    total = xxhash.xxh3_128()
    _update(total, tensor)
    return total.hexdigest()


def _update(total: Any, tensor: torch.Tensor) -> None:
    flat = as_bytes(tensor)
    if flat.numel():
        # Its memory itself: a copy would cost more than the sum. Not by way of numpy either, after which a storage
        # cannot be resized any more, which is how a colocated trainer falls asleep.
        total.update((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr()))


def head(name: str, dtype: torch.dtype | str, shape: tuple[int, ...]) -> str:
    """What the digest tells of a whole tensor beside its bytes."""
    return f"{name}|{str(dtype).removeprefix('torch.')}|{shape}|"


def combine(checksums: Mapping[str, str]) -> str:
    """The digest, from the checksum of each tensor by its `head`."""
    total = xxhash.xxh3_128()
    for each in sorted(checksums):
        total.update(f"{each}{checksums[each]}\n".encode())
    return PREFIX + total.hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of whole CPU tensors by their names, whatever their order.

    Of sums, one per tensor, so that it can be computed piecewise and in parallel.
    """
    return combine({head(n, t.dtype, tuple(t.shape)): checksum(t) for n, t in tensors.items()})


def is_sha256(told: str) -> bool:
    """Whether a digest was made as runs had it before XXH3."""
    return not told.startswith(PREFIX)


def sha256_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """What runs had for a digest before: SHA-256, to know the weights of their checkpoints by."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        own = hashlib.sha256(head(name, tensor.dtype, tuple(tensor.shape)).encode())
        _update(own, tensor)
        total.update(own.digest())
    return total.hexdigest()
