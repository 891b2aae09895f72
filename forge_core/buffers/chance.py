"""Random numbers that follow from a seed and from where they are needed, on every machine and in every version alike.

A generator would have a state that a run that goes on has to find again. These have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count

_BITS = 64


def number(seed: int, *place: int | str) -> int:
    """64 even random bits for a place, such as ("fifo", step, 0)."""
    named = repr((seed, *place)).encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=_BITS // 8).digest(), "big")


def below(bound: int, bits: int) -> int:
    """A whole number from 0 to `bound` - 1 of 64 random bits; uneven by at most bound / 2^64."""
    return (bits * bound) >> _BITS


def fraction(bits: int) -> float:
    """A number from 0 to below 1 of 64 random bits."""
    return (bits >> (_BITS - 53)) * 2.0**-53


def stream(seed: int, *place: int | str) -> Iterator[int]:
    """As many times 64 bits as a place needs."""
    return (number(seed, *place, n) for n in count())
