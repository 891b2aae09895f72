"""Slices of tensors: what a rank holds of one, or wants. Free of torch, for they travel with messages."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slice:
    """A block of a tensor; of a scalar, the scalar."""

    offsets: tuple[int, ...]
    """Where it begins, in each dimension of the whole tensor."""
    shape: tuple[int, ...]
    """How far it goes from there."""

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Slice:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @classmethod
    def part(cls, shape: tuple[int, ...], dim: int, index: int, parts: int) -> Slice:
        """One of equal parts of a tensor along a dimension.

        Raises ValueError if the dimension cannot be cut into so many.
        """
        if shape[dim] % parts:
            raise ValueError(
                f"dimension {dim} of a tensor of shape {shape} cannot be cut into {parts} equal parts"
            )
        size = shape[dim] // parts
        offsets = tuple(index * size if at == dim else 0 for at in range(len(shape)))
        return cls(offsets, (*shape[:dim], size, *shape[dim + 1 :]))

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return math.prod(self.shape)

    def lies_in(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has all of it."""
        return len(shape) == len(self.shape) == len(self.offsets) and all(
            0 <= start and start + size <= whole
            for start, size, whole in zip(self.offsets, self.shape, shape, strict=True)
        )

    def overlap(self, other: Slice) -> Slice | None:
        """What two slices of one tensor have in common; None if that is nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self._ends(), other._ends())
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Slice(starts, shape) if all(size > 0 for size in shape) else None

    def within(self, outer: Slice) -> tuple[slice, ...]:
        """The index that takes this slice out of a tensor that holds `outer`."""
        return tuple(
            slice(start - origin, start - origin + size)
            for start, origin, size in zip(self.offsets, outer.offsets, self.shape, strict=True)
        )

    def _ends(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.offsets, self.shape, strict=True))
