"""What a replay buffer costs as it grows: up to 1,000,000 groups admitted, and batches of them sampled and used.

    python -m benchmarks.bench_buffers
    python -m benchmarks.bench_buffers --most 100000      up to a tenth of the size, for a look

Each policy is filled to two sizes, the larger with 100 times the groups of the smaller. The ratios are of the time of
one group (admitted to a full buffer, so that another leaves; sampled in a batch of 64, used, and its priority made
anew) in the larger buffer to that in the smaller, turn by turn in one process: medians. `lines_ratio` is the same of
the lines of Python that are executed, which no cache and no neighbour changes; `log_ratio` is what a logarithm allows,
and `memory_ratio` what it costs to find an object at random in a plain dict of so many, next to one of a hundredth.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from benchmarks.record import write_record
from forge_core.buffers.chance import stream
from forge_core.buffers.fifo import Fifo
from forge_core.buffers.prioritised import Prioritised
from forge_core.buffers.reservoir import Reservoir
from forge_core.buffers.source import Item, Source

_GROWTH = 100
_BATCH = 64
_TURNS = 15
_PER_TURN = 2048

POLICIES: dict[str, Callable[[int], Source]] = {
    "fifo": lambda size: Fifo(capacity=size, max_age=10**9),
    "prioritised": lambda size: Prioritised(capacity=size, max_age=10**9, use_discount=0.5),
    "reservoir": lambda size: Reservoir(capacity=size, max_age=10**9, seed=0),
}


class _Filled:
    """A source with as many groups as it holds, and the seconds that one of them takes."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._next = 0
        self.fill_seconds = self._admit(size) / size

    def _admit(self, number: int) -> float:
        items = [
            Item(group_id=f"run-{n:08d}", policy_version=n // _BATCH, priority=1.0 + n % 7)
            for n in range(self._next, self._next + number)
        ]
        self._next += number
        started = time.perf_counter()
        for each in items:
            self._source.admit(each)
        return time.perf_counter() - started

    def admit(self, number: int = _PER_TURN) -> float:
        return self._admit(number) / number

    def sample(self, number: int = _PER_TURN) -> float:
        started = time.perf_counter()
        for batch in range(number // _BATCH):
            for drawn in self._source.sample(_BATCH, stream(0, self._next, batch)):
                self._source.use(drawn.group_id)
        return (time.perf_counter() - started) / number


def _lines(act: Callable[[int], float]) -> float:
    """Lines of Python that are executed for one group, on average of some."""
    lines = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    number = 8 * _BATCH
    sys.settrace(count)
    try:
        act(number)
    finally:
        sys.settrace(None)
    return lines / number


def memory_ratio(most: int) -> float:
    """How much longer a look-up in a large dict takes than in a small one, at random."""
    draw = random.Random(0)
    seconds = []
    for size in (most // _GROWTH, most):
        table = {f"run-{n:08d}": Item(group_id=str(n), policy_version=n) for n in range(size)}
        names = [f"run-{draw.randrange(size):08d}" for _ in range(_TURNS * _PER_TURN)]
        started = time.perf_counter()
        for name in names:
            table[name].policy_version  # noqa: B018
        seconds.append(time.perf_counter() - started)
    return seconds[1] / seconds[0]


def measure(name: str, most: int) -> dict[str, float]:
    """The costs of one policy."""
    make = POLICIES[name]
    gc.collect()
    small, large = (_Filled(make(size), size) for size in (most // _GROWTH, most))
    figures: dict[str, float] = {
        "groups": most,
        "fill_microseconds_a_group": 1e6 * large.fill_seconds,
    }
    for act in ("admit", "sample"):
        pairs = [(getattr(small, act)(), getattr(large, act)()) for _ in range(_TURNS)]
        figures[f"{act}_microseconds_a_group"] = 1e6 * statistics.median(b for _, b in pairs)
        figures[f"{act}_ratio"] = statistics.median(b / a for a, b in pairs)
        lines = _lines(getattr(large, act))
        figures[f"{act}_lines_a_group"] = lines
        figures[f"{act}_lines_ratio"] = lines / _lines(getattr(small, act))
    figures["log_ratio"] = math.log2(most) / math.log2(most // _GROWTH)
    return {key: round(value, 3) for key, value in figures.items()}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=1_000_000)
    most = parser.parse_args().most
    # As in a controller: objects that live as long as the run are not looked through again and again.
    gc.freeze()
    result: dict[str, Any] = {name: measure(name, most) for name in POLICIES}
    result["memory_ratio"] = round(memory_ratio(most), 3)
    print(json.dumps(result, indent=2))
    if most >= 1_000_000:
        print(write_record("buffers", "python -m benchmarks.bench_buffers", result))


if __name__ == "__main__":
    main()
