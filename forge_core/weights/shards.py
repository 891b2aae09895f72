"""The trainer's side of a published version: each rank packs what it holds of the model, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from forge_core.sharding import Layout, local_part, whole
from forge_core.weights import packing
from forge_core.weights.digest import checksum, combine, head
from forge_core.weights.manifest import Manifest
from forge_core.weights.slices import Slice


def pack_shards(
    tensors: Mapping[str, torch.Tensor],
    policy_version: int,
    layout: Layout,
    allocate: packing.Allocate,
) -> tuple[Manifest, dict[int, torch.Tensor]]:
    """The manifest of a version, the same on every rank, and this rank's buckets by their index. Collective.

    Every element is in one bucket, also where several ranks hold it. The digest is of whole tensors, so that it is the
    same whatever the layout; ranks share the work of it. `allocate` gives the memory of the buckets.
    """
    held: dict[str, tuple[Slice, tuple[int, ...]]] = {}
    parts: dict[int, torch.Tensor] = {}
    pieces = []
    for name, tensor in tensors.items():
        own = held_slice(tensor, layout)
        if own is not None:
            # Tied parameters are one object under two names, and stay one.
            if id(tensor) not in parts:
                parts[id(tensor)] = local_part(tensor).detach().cpu()
            pieces.append((name, parts[id(tensor)]))
            held[name] = own, tuple(tensor.shape)
    part, buckets = packing.pack(pieces, policy_version, held, allocate)
    if layout.mesh.size() == 1:
        return part, buckets
    digest = _digest(tensors, layout)
    of_ranks: list[Any] = [None] * layout.mesh.size()
    dist.all_gather_object(of_ranks, part)
    first = sum(len(each.bucket_bytes) for each in of_ranks[: dist.get_rank()])
    manifest = packing.join(of_ranks, list(tensors), digest)
    return manifest, {first + at: bucket for at, bucket in buckets.items()}


def held_slice(tensor: torch.Tensor, layout: Layout) -> Slice | None:
    """What this rank has to give of a tensor; None if that is nothing, or another rank gives the same."""
    if not isinstance(tensor, DTensor):
        return Slice.whole(tuple(tensor.shape)) if dist.get_rank() == 0 else None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh of each of its tensors"
    is_first = all(
        at == 0
        for at, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )
    if mesh.ndim == 1 and layout.tensor is not None:
        is_first = layout.tensor.get_local_rank() == 0
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    is_empty = any(size == 0 for size in shape)
    return Slice(tuple(offsets), tuple(shape)) if is_first and not is_empty else None


def _digest(tensors: Mapping[str, torch.Tensor], layout: Layout) -> str:
    """`digest` of the whole tensors; each is gathered, and let go once one rank has summed it."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    sums: dict[str, str] = {}
    for turn, of_one in enumerate(names.values()):
        full = whole(tensors[of_one[0]])
        if turn % layout.mesh.size() == dist.get_rank():
            on_host = full.to("cpu")
            total = checksum(on_host)
            sums |= {head(name, full.dtype, tuple(full.shape)): total for name in of_one}
    of_ranks: list[Any] = [None] * layout.mesh.size()
    dist.all_gather_object(of_ranks, sums)
    return combine({name: each for found in of_ranks for name, each in found.items()})
