"""Named tensors as a few large byte buffers, and back.

TorchStore spends about 6 ms on every key, whatever its size, so a model travels as a handful of buckets
instead of one key per parameter. A tensor never spans two buckets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from forge_core.weights.manifest import Manifest, Slot

BUCKET_BYTES = 256 * 2**20
_ALIGNMENT_BYTES = 64


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a CPU tensor as a flat uint8 view (a copy only if it is not contiguous)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of `tensors`, whatever their order.

    A hash of hashes, one per tensor, so that it can be computed piecewise and in parallel.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|"
        total.update(hashlib.sha256(head.encode() + as_bytes(tensor).numpy().tobytes()).digest())
    return total.hexdigest()


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
) -> tuple[Manifest, list[torch.Tensor]]:
    """Lay out CPU tensors in buckets: a manifest and the flat uint8 buckets.

    Names that share one tensor object (tied embeddings) share its bytes and keep both names: vLLM has to be
    told each of them, or it goes on with the old output layer.
    """
    named = list(tensors)
    slots: list[Slot] = []
    sizes: list[int] = []
    placed: dict[int, Slot] = {}
    for name, tensor in named:
        if (twin := placed.get(id(tensor))) is not None:
            slots.append(replace(twin, name=name))
            continue
        size = tensor.numel() * tensor.element_size()
        if not sizes or sizes[-1] + size > BUCKET_BYTES:
            sizes.append(0)
        slots.append(
            Slot(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                bucket=len(sizes) - 1,
                offset_bytes=sizes[-1],
                size_bytes=size,
            )
        )
        placed[id(tensor)] = slots[-1]
        sizes[-1] += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    # Alignment gaps are zeroed: the same weights make the same bytes.
    buckets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for (_, tensor), slot in zip(named, slots, strict=True):
        end = slot.offset_bytes + slot.size_bytes
        buckets[slot.bucket][slot.offset_bytes : end].copy_(as_bytes(tensor))
    manifest = Manifest(
        policy_version=policy_version,
        slots=tuple(slots),
        bucket_bytes=tuple(sizes),
        digest=digest(dict(named)),
    )
    return manifest, buckets


def unpack(manifest: Manifest, buckets: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views into the buckets, by name; raises ValueError if a bucket has another size than the manifest says."""
    for index, (bucket, size) in enumerate(zip(buckets, manifest.bucket_bytes, strict=True)):
        if bucket.numel() != size:
            raise ValueError(
                f"bucket {index} has {bucket.numel()} bytes where the manifest says {size}"
            )
    tensors = {}
    for slot in manifest.slots:
        flat = buckets[slot.bucket][slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
        tensors[slot.name] = flat.view(getattr(torch, slot.dtype)).reshape(slot.shape)
    return tensors
