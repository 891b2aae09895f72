"""Which texts may be nearly the same, without comparing each with each.

MinHash (A. Broder, 1997, "On the resemblance and containment of documents") with bands: two texts whose sets of five
bytes in a row have the share J of their union in common have the same minimum under a random hash with probability J,
and become a pair with probability 1 - (1 - J^3)^20: 0.93 at J = 0.5, 0.998 at J = 0.65, and 0.0025 at J = 0.05.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

_GRAM = 5
_BANDS = 20
_ROWS = 3
_PARTNERS = 32
"""Texts of one bucket that each is paired with at most."""
_random = np.random.default_rng(0)
_FACTORS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) * 2 + 1
_TERMS = _random.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)


def candidates(texts: list[str]) -> list[tuple[int, int]]:
    """Pairs of texts, by their numbers from 0, that are probably alike; the same for the same texts."""
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        minima = _minima(text)
        for band in range(_BANDS):
            buckets[band, minima[band * _ROWS : (band + 1) * _ROWS].tobytes()].append(number)
    found: dict[tuple[int, int], None] = {}
    for bucket in buckets.values():
        for place, one in enumerate(bucket):
            # Where very many are alike, each is paired with some: all of them would not fit into memory.
            found.update(
                ((one, other), None) for other in bucket[place + 1 : place + 1 + _PARTNERS]
            )
    return sorted(found)


def _minima(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The least hash of a text's grams under each function, (bands x rows,)."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass").ljust(_GRAM), np.uint8)
    wide = data.astype(np.uint64)
    count = len(wide) - _GRAM + 1
    grams = sum((wide[i : i + count] << np.uint64(8 * i) for i in range(_GRAM)), np.uint64(0))
    # Overflow is meant: arithmetic modulo 2^64.
    hashed = np.unique(grams)[:, None] * _FACTORS + _TERMS
    minima: np.ndarray[tuple[int], np.dtype[np.uint64]] = hashed.min(axis=0)
    return minima
