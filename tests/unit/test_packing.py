"""Weights as buckets of bytes: what goes in comes out, and the digest sees every bit of it."""

from collections.abc import Callable

import pytest
import torch
import xxhash

from forge_core.weights import packing
from forge_core.weights.digest import checksum, digest
from forge_core.weights.manifest import Manifest
from forge_core.weights.packing import join, pack, touched, unpack, view
from forge_core.weights.slices import Slice

Named = list[tuple[str, torch.Tensor]]


@pytest.fixture
def named() -> Named:
    """Several types and shapes; the first and the last are one object."""
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(11, 3, generator=generator)
    return [
        ("embed.weight", embedding),
        ("scale", torch.tensor(-0.0)),
        ("half.weight", torch.randn(5, 7, generator=generator).bfloat16()),
        ("mask", torch.tensor([True, False, True])),
        ("transposed", torch.randn(4, 6, generator=generator).T),
        ("count", torch.arange(9)),
        ("head.weight", embedding),
    ]


def assert_same(found: dict[str, torch.Tensor], named: Named) -> None:
    assert list(found) == [name for name, _ in named]
    for name, tensor in named:
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        bits = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(bits, tensor.contiguous().reshape(-1).view(torch.uint8))


def test_what_is_packed_is_unpacked_to_the_bit(named: Named) -> None:
    manifest, buckets = pack(named, 17)
    found = unpack(manifest, buckets)
    assert_same(found, named)
    assert manifest.policy_version == 17
    assert manifest.digest == digest(dict(named)) == digest(found)
    assert manifest.bucket_bytes == tuple(bucket.numel() for bucket in buckets.values())
    assert len(manifest.keys) == len(buckets) == 1


def test_a_tied_tensor_travels_once_under_both_names(named: Named) -> None:
    manifest, buckets = pack(named, 0)
    untied, more = pack([*named[:-1], ("head.weight", named[0][1].clone())], 0)
    assert (
        manifest.total_bytes < untied.total_bytes == sum(bucket.numel() for bucket in more.values())
    )
    assert manifest.digest == untied.digest
    found = unpack(manifest, buckets)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    assert found["head.weight"].data_ptr() != found["half.weight"].data_ptr()


@pytest.mark.parametrize("limit", [1, 128, 200, 320])
def test_small_buckets_hold_whole_tensors(
    named: Named, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BUCKET_BYTES", limit)
    manifest, buckets = pack(named, 0)
    assert len(buckets) > 1
    assert len(set(manifest.keys)) == len(buckets)
    assert_same(unpack(manifest, buckets), named)
    largest = max(tensor.numel() * tensor.element_size() for _, tensor in named)
    assert max(manifest.bucket_bytes) <= max(limit, largest) + 63
    ranges: dict[tuple[int, int], int] = {}
    for slot in manifest.slots:
        ranges[slot.bucket, slot.offset_bytes] = slot.offset_bytes + slot.size_bytes
    for (bucket, offset), end in ranges.items():
        assert end <= manifest.bucket_bytes[bucket]
        others = ((o, e) for (b, o), e in ranges.items() if b == bucket and o != offset)
        assert all(other_end <= offset or other >= end for other, other_end in others)


def test_equal_weights_are_equal_bytes(named: Named) -> None:
    first = pack(named, 0)
    second = pack([(name, tensor.clone()) for name, tensor in named[:-1]], 0)
    assert torch.equal(first[1][0], second[1][0])


def _flip_a_bit(named: Named) -> Named:
    changed = named[2][1].clone()
    changed.view(torch.uint8)[4, 13] ^= 1
    return [*named[:2], (named[2][0], changed), *named[3:]]


def _flip_a_sign_of_zero(named: Named) -> Named:
    return [named[0], ("scale", torch.tensor(0.0)), *named[2:]]


def _rename(named: Named) -> Named:
    return [*named[:3], ("masks", named[3][1]), *named[4:]]


def _swap_names(named: Named) -> Named:
    return [*named[:3], ("count", named[3][1]), named[4], ("mask", named[5][1]), named[6]]


def _other_dtype(named: Named) -> Named:
    return [*named[:2], (named[2][0], named[2][1].view(torch.float16)), *named[3:]]


def _other_shape(named: Named) -> Named:
    return [*named[:2], (named[2][0], named[2][1].reshape(7, 5)), *named[3:]]


def _one_less(named: Named) -> Named:
    return named[:-1]


@pytest.mark.parametrize(
    "change",
    [
        _flip_a_bit,
        _flip_a_sign_of_zero,
        _rename,
        _swap_names,
        _other_dtype,
        _other_shape,
        _one_less,
    ],
)
def test_the_digest_sees_every_difference(named: Named, change: Callable[[Named], Named]) -> None:
    changed = change(named)
    assert digest(dict(changed)) != digest(dict(named))
    assert pack(changed, 0)[0].digest != pack(named, 0)[0].digest


def test_the_digest_does_not_see_order_and_layout(named: Named) -> None:
    assert digest(dict(reversed(named))) == digest(dict(named))
    contiguous = {name: tensor.contiguous() for name, tensor in named}
    assert digest(contiguous) == digest(dict(named))


def test_a_bucket_of_another_size_is_refused(named: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BUCKET_BYTES", 200)
    manifest, buckets = pack(named, 0)
    size = buckets[1].numel()
    for wrong in (buckets[1][:-1], torch.cat([buckets[1], buckets[1][:1]])):
        with pytest.raises(ValueError, match=f"bucket 1 has {wrong.numel()} bytes .* {size}$"):
            unpack(manifest, {**buckets, 1: wrong})
    last = len(buckets) - 1
    del buckets[last]
    with pytest.raises(ValueError, match=f"bucket {last} is not there"):
        unpack(manifest, buckets)


WHOLE = torch.arange(48, dtype=torch.float32).reshape(8, 6)
ROWS = [Slice.part((8, 6), 0, index, 4) for index in range(4)]
COLUMNS = [Slice.part((8, 6), 1, index, 3) for index in range(3)]


def _cut(tensor: torch.Tensor, held: Slice) -> torch.Tensor:
    return tensor[held.within(Slice.whole(tuple(tensor.shape)))]


def _joined(held: list[Slice]) -> tuple[Manifest, dict[int, torch.Tensor]]:
    """A version to which each of some ranks has given a slice of one tensor, and the first a norm."""
    norm, parts, buckets = torch.arange(6.0), [], []
    for rank, each in enumerate(held):
        pieces = [("w", _cut(WHOLE, each)), *([("norm", norm)] if rank == 0 else [])]
        part, own = pack(pieces, 3, {"w": (each, (8, 6))})
        parts.append(part)
        buckets += own.values()
    manifest = join(parts, ["norm", "w"], digest({"w": WHOLE, "norm": norm}))
    return manifest, dict(enumerate(buckets))


@pytest.mark.parametrize("held", [ROWS, COLUMNS, [Slice.whole((8, 6))]])
@pytest.mark.parametrize("wanted", [*ROWS, *COLUMNS, Slice((3, 1), (4, 5)), Slice((7, 5), (1, 1))])
def test_any_slice_is_assembled_of_any_slices(held: list[Slice], wanted: Slice) -> None:
    manifest, buckets = _joined(held)
    touching = {slot.bucket for slot in touched(manifest, {"w": wanted})}
    assert len(touching) == sum(each.overlap(wanted) is not None for each in held)
    only = {index: bucket for index, bucket in buckets.items() if index in touching}
    found = unpack(manifest, only, {"w": wanted})
    assert list(found) == ["w"]
    assert torch.equal(found["w"], _cut(WHOLE, wanted))


@pytest.mark.parametrize("held", [ROWS, COLUMNS])
def test_whole_tensors_of_slices_have_the_digest_of_whole_tensors(held: list[Slice]) -> None:
    manifest, buckets = _joined(held)
    found = unpack(manifest, buckets)
    assert list(found) == ["norm", "w"]
    assert torch.equal(found["w"], WHOLE)
    assert digest(found) == manifest.digest
    assert all(checksum(view(manifest, slot, buckets)) == slot.checksum for slot in manifest.slots)


def test_slices_that_are_not_there_are_refused() -> None:
    manifest, buckets = _joined(ROWS)
    for wanted, words in (
        ({"v": ROWS[0]}, "'v' .* version 3 has not got"),
        ({"w": Slice((0, 0), (9, 6))}, r"'w' .*\(9, 6\), and .* \(8, 6\)"),
        ({"w": Slice((-1, 0), (2, 6))}, "begins at"),
        ({"w": Slice((0,), (2,))}, "begins at"),
    ):
        with pytest.raises(ValueError, match=words):
            unpack(manifest, buckets, wanted)
    short = _joined(ROWS[:-1])
    with pytest.raises(ValueError, match="36 elements of 'w' where 48"):
        unpack(*short)
    with pytest.raises(ValueError, match="cannot be cut into 4 equal parts"):
        Slice.part((8, 6), 1, 0, 4)


def test_a_packed_tensor_can_still_give_up_its_memory() -> None:
    """As a trainer's do that takes turns with the generators on one device."""
    tensor = torch.arange(6, dtype=torch.float32)
    pack([("a", tensor)], 1)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0


def test_the_checksum_is_of_the_bytes() -> None:
    tensor = torch.arange(12, dtype=torch.float32)[::2].view(2, 3)
    assert checksum(tensor) == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()
    assert checksum(torch.empty(0)) == xxhash.xxh3_128(b"").hexdigest()


def test_memory_that_is_used_again_makes_the_same_bytes(named: Named) -> None:
    fresh_manifest, fresh = pack(named, 0)
    dirty = [torch.full((size,), 255, dtype=torch.uint8) for size in fresh_manifest.bucket_bytes]
    manifest, buckets = pack(named, 0, allocate=lambda sizes: dirty)
    assert manifest == fresh_manifest
    assert buckets[0] is dirty[0]
    assert torch.equal(buckets[0], fresh[0])
