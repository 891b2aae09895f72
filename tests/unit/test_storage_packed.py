"""Packed records are what went in, by position and by key, wherever the packing cuts them."""

import sys

import pytest

from storage.facts import Interval, Retry
from storage.packed import Index, ListIndex, PackedIntervals, PackedRecords

NUMBER = 300
"""Two full chunks and a part of one."""


def retry(number: int) -> Retry:
    return Retry(stage=f"stage {number}", attempt=number + 1, cause="ä\n", seconds=number / 7)


@pytest.fixture
def many() -> tuple[PackedRecords[Retry], list[Retry]]:
    packed, plain = PackedRecords(Retry), [retry(number) for number in range(NUMBER)]
    for record in plain:
        packed.append(record)
    return packed, plain


def test_all_are_there_in_order(many: tuple[PackedRecords[Retry], list[Retry]]) -> None:
    packed, plain = many
    assert len(packed) == NUMBER
    assert list(packed) == plain
    assert packed == plain
    assert packed != plain[:-1]
    assert list(reversed(packed)) == plain[::-1]


@pytest.mark.parametrize("position", [0, 127, 128, 255, 256, 299, -1, -300])
def test_each_is_at_its_place(
    many: tuple[PackedRecords[Retry], list[Retry]], position: int
) -> None:
    packed, plain = many
    assert packed[position] == plain[position]


def test_a_slice_is_a_list(many: tuple[PackedRecords[Retry], list[Retry]]) -> None:
    packed, plain = many
    assert packed[120:270:7] == plain[120:270:7]


@pytest.mark.parametrize("position", [300, -301])
def test_there_is_none_beyond(
    many: tuple[PackedRecords[Retry], list[Retry]], position: int
) -> None:
    with pytest.raises(IndexError):
        many[0][position]


def test_a_key_names_the_record_that_was_noted_last() -> None:
    records = PackedRecords(Retry)
    by_stage, by_parity = Index[str, Retry](records), ListIndex[int, Retry](records)
    assert not by_stage
    for number in range(NUMBER):
        records.append(retry(number))
        by_stage.note_newest(f"stage {number % 200}")
        by_parity.note_newest(number % 2)
    assert by_stage["stage 7"] == retry(207)
    assert by_stage["stage 150"] == retry(150)
    assert len(by_stage) == 200
    assert "stage 201" not in by_stage
    assert by_stage.get("stage 201") is None
    assert by_parity[1] == [retry(number) for number in range(1, NUMBER, 2)]
    assert by_parity.get(2) is None


def test_intervals_are_columns() -> None:
    plain = [Interval(kind="train", start=float(n), end=n + 0.25) for n in range(5)]
    plain.append(Interval(kind="wait_slot", start=5.5, end=6.0))
    packed = PackedIntervals(plain[:2])
    packed.extend(plain[2:])
    assert packed == plain
    assert packed[-1] == plain[-1]
    assert packed[1:3] == plain[1:3]
    with pytest.raises(IndexError):
        packed[6]


def test_what_is_packed_is_no_object_any_more() -> None:
    records = PackedRecords(Retry)
    before = sys.getallocatedblocks()
    for number in range(128 * 100):
        records.append(retry(number))
    # Plain ones are five blocks each; what is left is the newest chunk, and a block for each packed one.
    assert sys.getallocatedblocks() - before < 128 * 10
