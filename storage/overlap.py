"""How long a run generated and trained at the same time, from the intervals that its meshes logged."""

import math
from collections.abc import Iterable

from storage.facts import Interval
from storage.ledger import Ledger

_Span = tuple[float, float]


def overlap_seconds(ledger: Ledger) -> dict[str, float]:
    """Seconds in which any generator generated, in which the trainer trained, and in which both was so.

    Warm start and evaluations are neither.
    """
    everything = [each for intervals in ledger.meshes.values() for each in intervals]
    generating, training = _union(everything, "generate"), _union(everything, "train")
    return {
        "generate": _length(generating),
        "train": _length(training),
        "both": _length(_intersection(generating, training)),
    }


def _union(intervals: Iterable[Interval], kind: str) -> list[_Span]:
    """The times that any interval of a kind covers, as spans in order that do not touch."""
    spans: list[_Span] = []
    for start, end in sorted((each.start, each.end) for each in intervals if each.kind == kind):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def _intersection(left: list[_Span], right: list[_Span]) -> list[_Span]:
    common = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(spans: list[_Span]) -> float:
    return math.fsum(end - start for start, end in spans)
