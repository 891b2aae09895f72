"""What a published version consists of. Free of torch, for it travels with messages."""

from __future__ import annotations

from dataclasses import dataclass

from forge_core.weights.slices import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one tensor, or a slice of it that a rank holds, lies."""

    name: str
    """Parameter name in Hugging Face layout."""
    dtype: str
    """Name of the torch dtype, such as `float32`."""
    shape: tuple[int, ...]
    """Full, unsharded shape."""
    held: Slice
    """What of it lies here."""
    bucket: int
    """Index of the bucket that holds it."""
    offset_bytes: int
    """First byte in the bucket."""
    size_bytes: int
    """Number of bytes."""
    checksum: str
    """XXH3-128 of the bytes of what lies here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a published version consists of; small enough for a message."""

    policy_version: int
    """Steps completed when these weights came to be."""
    slots: tuple[Slot, ...]
    """One or several per tensor, which together hold all of it once; tensors in the model's own order."""
    bucket_bytes: tuple[int, ...]
    """Size of each bucket."""
    digest: str
    """`digest()` of the whole tensors."""
    store: str = ""
    """Name of the TorchStore that holds the version; empty for one that is in none."""

    @property
    def keys(self) -> list[str]:
        """TorchStore keys of the buckets, in order."""
        return [f"weights/{self.policy_version}/{i}" for i in range(len(self.bucket_bytes))]

    @property
    def total_bytes(self) -> int:
        """Bytes of all buckets."""
        return sum(self.bucket_bytes)
