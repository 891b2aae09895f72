"""The time in which generating and training overlap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.facts import Interval
from storage.ledger import Ledger
from storage.overlap import overlap_seconds


def _ledger(**meshes: list[tuple[str, int, int]]) -> Ledger:
    ledger = Ledger(incarnations=())
    for mesh, intervals in meshes.items():
        ledger.meshes[mesh] = [
            Interval(kind=kind, start=float(start), end=float(end))  # type: ignore[arg-type]
            for kind, start, end in intervals
        ]
    return ledger


def test_other_kinds_are_neither():
    ledger = _ledger(
        generator=[("evaluate", 0, 9)], trainer=[("warm_start", 0, 5), ("train", 5, 7)]
    )
    assert overlap_seconds(ledger) == {"generate": 0.0, "train": 2.0, "both": 0.0}


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=8),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=8),
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=8),
)
def test_it_is_what_counting_seconds_gives(first, second, training):
    ledger = _ledger(
        generator_0=[("generate", start, start + length) for start, length in first],
        generator_1=[("generate", start, start + length) for start, length in second],
        trainer=[("train", start, start + length) for start, length in training],
    )
    generates = {s for start, length in first + second for s in range(start, start + length)}
    trains = {s for start, length in training for s in range(start, start + length)}
    assert overlap_seconds(ledger) == {
        "generate": len(generates),
        "train": len(trains),
        "both": len(generates & trains),
    }
