"""Named tensors, or slices of them, as a few large byte buffers, and back.

TorchStore spends about 6 ms on every key, whatever its size, so a model travels as a handful of buckets
instead of one key per parameter. What one rank holds of a tensor never spans two buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from forge_core.weights.digest import as_bytes, checksum, combine, head
from forge_core.weights.manifest import Manifest, Slot
from forge_core.weights.slices import Slice

BUCKET_BYTES = 256 * 2**20
_ALIGNMENT_BYTES = 64

Wanted = Mapping[str, Slice]
"""By name of a tensor, the slice of it that somebody wants."""
Buckets = Mapping[int, torch.Tensor]
"""Flat uint8 tensors by their index, not always all of a version's."""


Allocate = Callable[[Sequence[int]], Sequence[torch.Tensor]]
"""Makes flat uint8 tensors of some sizes in bytes, whose contents do not matter."""


def _fresh(sizes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]],
    policy_version: int,
    slices: Mapping[str, tuple[Slice, tuple[int, ...]]] | None = None,
    allocate: Allocate = _fresh,
) -> tuple[Manifest, dict[int, torch.Tensor]]:
    """Lay out CPU tensors in buckets: a manifest and the flat uint8 buckets, by their index.

    `slices` tells of a tensor that is none of its own which slice of a tensor of which shape it is; the manifest is
    then one of several that `join` makes one of. `allocate` gives the memory of the buckets.

    Names that share one tensor object (tied embeddings) share its bytes and keep both names: vLLM has to be
    told each of them, or it goes on with the old output layer.
    """
    slots: list[Slot] = []
    sizes: list[int] = []
    placed: dict[int, Slot] = {}
    sources: list[tuple[Slot, torch.Tensor]] = []
    for name, tensor in tensors:
        if (twin := placed.get(id(tensor))) is not None:
            slots.append(replace(twin, name=name))
            continue
        size = tensor.numel() * tensor.element_size()
        if not sizes or sizes[-1] + size > BUCKET_BYTES:
            sizes.append(0)
        own = tuple(tensor.shape)
        held, shape = (slices or {}).get(name, (Slice.whole(own), own))
        slots.append(
            Slot(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=shape,
                held=held,
                bucket=len(sizes) - 1,
                offset_bytes=sizes[-1],
                size_bytes=size,
                checksum="",
            )
        )
        placed[id(tensor)] = slots[-1]
        sources.append((slots[-1], tensor))
        sizes[-1] += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    buckets = allocate(sizes)
    sums = {}
    for slot, tensor in sources:
        end = slot.offset_bytes + slot.size_bytes
        packed = buckets[slot.bucket][slot.offset_bytes : end]
        packed.copy_(as_bytes(tensor))
        # Of what will be read: it sees a copy that went wrong, and finds a part of the bytes still in the caches.
        sums[slot.bucket, slot.offset_bytes] = checksum(packed)
        # Alignment gaps are zeroed: the same weights make the same bytes.
        buckets[slot.bucket][end : end + -end % _ALIGNMENT_BYTES].zero_()
    slots = [replace(slot, checksum=sums[slot.bucket, slot.offset_bytes]) for slot in slots]
    manifest = Manifest(
        policy_version=policy_version,
        slots=tuple(slots),
        bucket_bytes=tuple(sizes),
        digest=combine({head(s.name, s.dtype, s.held.shape): s.checksum for s in slots}),
    )
    return manifest, dict(enumerate(buckets))


def join(parts: Sequence[Manifest], names: Sequence[str], digest: str) -> Manifest:
    """One version of what several ranks have packed, in their order; tensors in the order of `names`."""
    slots: list[Slot] = []
    sizes: list[int] = []
    for part in parts:
        slots += [replace(slot, bucket=len(sizes) + slot.bucket) for slot in part.slots]
        sizes += part.bucket_bytes
    order = {name: at for at, name in enumerate(names)}
    slots.sort(key=lambda slot: order[slot.name])
    return Manifest(
        policy_version=parts[0].policy_version,
        slots=tuple(slots),
        bucket_bytes=tuple(sizes),
        digest=digest,
    )


def touched(manifest: Manifest, wanted: Wanted | None) -> list[Slot]:
    """The slots that hold anything of what is wanted; all of them where that is everything.

    Raises ValueError for a slice that the version has not got.
    """
    if wanted is None:
        return list(manifest.slots)
    shapes = {slot.name: slot.shape for slot in manifest.slots}
    for name, each in wanted.items():
        if name not in shapes:
            raise ValueError(
                f"a slice of {name!r} is wanted, which version {manifest.policy_version} has not got"
            )
        if not each.lies_in(shapes[name]):
            raise ValueError(
                f"a slice of {name!r} is wanted that begins at {each.offsets} and has shape {each.shape}, and the "
                f"tensor has shape {shapes[name]}"
            )
    return [
        slot
        for slot in manifest.slots
        if slot.name in wanted and slot.held.overlap(wanted[slot.name]) is not None
    ]


def view(manifest: Manifest, slot: Slot, buckets: Buckets) -> torch.Tensor:
    """What lies in a slot; raises ValueError if its bucket has another size than the manifest says."""
    bucket, size = buckets.get(slot.bucket), manifest.bucket_bytes[slot.bucket]
    if bucket is None or bucket.numel() != size:
        found = "is not there" if bucket is None else f"has {bucket.numel()} bytes"
        raise ValueError(f"bucket {slot.bucket} {found} where the manifest says {size}")
    flat = bucket[slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
    return flat.view(getattr(torch, slot.dtype)).reshape(slot.held.shape)


def unpack(
    manifest: Manifest, buckets: Buckets, wanted: Wanted | None = None
) -> dict[str, torch.Tensor]:
    """Whole tensors, or the slices that are wanted, by name; views into the buckets where one holds all of it.

    Raises ValueError for a slice that the version has not got, and for a bucket of another size than the manifest says.
    """
    of_names: dict[str, list[Slot]] = {}
    for slot in touched(manifest, wanted):
        of_names.setdefault(slot.name, []).append(slot)
    found: dict[str, torch.Tensor] = {}
    made: dict[tuple[object, ...], torch.Tensor] = {}
    for name, slots in of_names.items():
        want = Slice.whole(slots[0].shape) if wanted is None else wanted[name]
        # Tied names lie in the same places.
        of_what = (want, *((slot.bucket, slot.offset_bytes) for slot in slots))
        if of_what not in made:
            made[of_what] = _assemble(manifest, slots, buckets, want)
        found[name] = made[of_what]
    return found


def _assemble(manifest: Manifest, slots: list[Slot], buckets: Buckets, want: Slice) -> torch.Tensor:
    """A slice of a tensor, of the slots that hold something of it."""
    if len(slots) == 1 and slots[0].held == want:
        return view(manifest, slots[0], buckets)
    tensor = torch.empty(want.shape, dtype=getattr(torch, slots[0].dtype))
    num_elements = 0
    for slot in slots:
        common = slot.held.overlap(want)
        assert common is not None, "only slots that are touched are given"
        tensor[common.within(want)] = view(manifest, slot, buckets)[common.within(slot.held)]
        num_elements += common.num_elements
    if num_elements != want.num_elements:
        raise ValueError(
            f"version {manifest.policy_version} has {num_elements} elements of {slots[0].name!r} where "
            f"{want.num_elements} are wanted"
        )
    return tensor
