"""Many records held in little memory: for what a run's controller must know to its end and seldom looks at again.

A record of pydantic takes about a kilobyte for what is a hundred bytes of JSON. Long runs have a million.
"""

import zlib
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar, get_args, overload

from pydantic import TypeAdapter

from storage.process_facts import Interval, IntervalKind
from storage.records import Record

RecordType = TypeVar("RecordType", bound=Record)
Key = TypeVar("Key", bound=Hashable)

_CHUNK = 128
"""Records that are packed together: many enough to compress well, few enough to unpack for one of them."""
_KINDS: tuple[IntervalKind, ...] = get_args(IntervalKind)
_KIND_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}


class PackedRecords(Sequence[RecordType]):
    """Records of one type in the order in which they came; all but the newest lie as compressed JSON."""

    def __init__(self, record_type: type[RecordType]) -> None:
        self._form = TypeAdapter(list[record_type])  # type: ignore[valid-type]
        self._packed: list[bytes] = []
        self._newest: list[RecordType] = []
        self._opened: tuple[int, list[RecordType]] = (-1, [])

    def append(self, record: RecordType) -> None:
        """One more record."""
        if len(self._newest) == _CHUNK:
            self._packed.append(zlib.compress(self._form.dump_json(self._newest), level=1))
            self._newest = []
        self._newest.append(record)

    def __len__(self) -> int:
        return len(self._packed) * _CHUNK + len(self._newest)

    @overload
    def __getitem__(self, position: int) -> RecordType: ...
    @overload
    def __getitem__(self, position: slice) -> list[RecordType]: ...
    def __getitem__(self, position: int | slice) -> RecordType | list[RecordType]:
        if isinstance(position, slice):
            return [self[each] for each in range(len(self))[position]]
        number, place = divmod(range(len(self))[position], _CHUNK)
        return self._chunk(number)[place]

    def __iter__(self) -> Iterator[RecordType]:
        for number in range(len(self._packed) + 1):
            yield from self._chunk(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _chunk(self, number: int) -> list[RecordType]:
        if number == len(self._packed):
            return self._newest
        if self._opened[0] != number:
            packed = zlib.decompress(self._packed[number])
            self._opened = (number, self._form.validate_json(packed, strict=True))
        return self._opened[1]


class Index(Mapping[Key, RecordType], Generic[Key, RecordType]):
    """Records of a sequence by key; in the order of the keys' first mention."""

    def __init__(self, records: PackedRecords[RecordType]) -> None:
        self._records = records
        self._position: dict[Key, int] = {}

    def note_newest(self, key: Key) -> None:
        """The sequence's newest record is the one under this key, from now on."""
        self._position[key] = len(self._records) - 1

    def __getitem__(self, key: Key) -> RecordType:
        return self._records[self._position[key]]

    def __contains__(self, key: object) -> bool:
        return key in self._position

    def __iter__(self) -> Iterator[Key]:
        return iter(self._position)

    def __len__(self) -> int:
        return len(self._position)


class ListIndex(Mapping[Key, list[RecordType]], Generic[Key, RecordType]):
    """Lists of the records of a sequence by key."""

    def __init__(self, records: PackedRecords[RecordType]) -> None:
        self._records = records
        self._positions: dict[Key, tuple[int, ...]] = {}

    def note_newest(self, key: Key) -> None:
        """The sequence's newest record is one more under this key."""
        self._positions[key] = (*self._positions.get(key, ()), len(self._records) - 1)

    def __getitem__(self, key: Key) -> list[RecordType]:
        return [self._records[position] for position in self._positions[key]]

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[Key]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


class PackedIntervals(Sequence[Interval]):
    """Intervals of one mesh, as columns of numbers."""

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self._kinds = bytearray()
        self._bounds = array("d")
        self.extend(intervals)

    def extend(self, intervals: Iterable[Interval]) -> None:
        """More intervals, after those before."""
        for each in intervals:
            self._kinds.append(_KIND_NUMBER[each.kind])
            self._bounds.extend((each.start, each.end))

    def __len__(self) -> int:
        return len(self._kinds)

    @overload
    def __getitem__(self, position: int) -> Interval: ...
    @overload
    def __getitem__(self, position: slice) -> list[Interval]: ...
    def __getitem__(self, position: int | slice) -> Interval | list[Interval]:
        if isinstance(position, slice):
            return [self[each] for each in range(len(self))[position]]
        place = range(len(self))[position]
        kind, start, end = self._kinds[place], self._bounds[2 * place], self._bounds[2 * place + 1]
        # They were valid when they came.
        return Interval.model_construct(kind=_KINDS[kind], start=start, end=end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
