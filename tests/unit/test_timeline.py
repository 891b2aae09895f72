"""A process's time: no gap, no overlap, and every wait named by what came before it."""

import itertools
import time
from collections.abc import Callable

import pytest

from forge_core.timeline import Interval, Timeline
from storage.process_facts import IntervalKind

WAITS: dict[IntervalKind, IntervalKind] = {"generate": "wait_weights", "weights": "wait_slot"}


@pytest.fixture
def tick() -> Callable[[], None]:
    """Lets the clocks move on, which otherwise may read the same twice."""

    def until_later() -> None:
        start = time.monotonic(), time.time()
        while time.monotonic() - start[0] < 2e-4 or time.time() == start[1]:
            pass

    return until_later


def new_timeline(started_at: float | None = None) -> Timeline:
    start = time.time() - 1.0 if started_at is None else started_at
    return Timeline(started_at=start, waits=WAITS, default_wait="wait_batch")


def kinds(intervals: list[Interval]) -> list[IntervalKind]:
    return [interval.kind for interval in intervals]


def drain(timeline: Timeline) -> list[Interval]:
    """The intervals, which must reach up to now."""
    before = time.time()
    intervals = timeline.drain()
    assert before - 0.05 <= intervals[-1].end <= time.time() + 0.05
    return intervals


def assert_seamless(intervals: list[Interval], start: float) -> None:
    """They begin at the start and go on without gap and overlap, to the bit."""
    assert intervals[0].start == start
    for earlier, later in itertools.pairwise(intervals):
        assert earlier.end == later.start
    assert all(interval.end > interval.start for interval in intervals)


def test_time_is_covered_from_the_start_to_the_drain(tick: Callable[[], None]) -> None:
    started_at = time.time() - 250.0
    timeline = new_timeline(started_at)
    for kind in ("generate", "weights", "train"):
        with timeline.during(kind):
            tick()
        tick()
    intervals = drain(timeline)
    assert_seamless(intervals, started_at)
    assert intervals[0].end - intervals[0].start == pytest.approx(250.0, abs=5.0)
    assert kinds(intervals) == [
        "startup",
        "generate",
        "wait_weights",
        "weights",
        "wait_slot",
        "train",
        "wait_batch",
    ]


def test_work_is_measured_on_the_wall_clock(tick: Callable[[], None]) -> None:
    timeline = new_timeline()
    before = time.time()
    with timeline.during("train"):
        inside = time.time()
        tick()
    after = time.time()
    [work] = [each for each in timeline.drain() if each.kind == "train"]
    assert before - 0.05 <= work.start <= inside + 0.05
    assert inside - 0.05 <= work.end <= after + 0.05
    assert work.end - work.start >= 2e-4


def test_a_drain_cuts_what_is_under_way_and_it_goes_on(tick: Callable[[], None]) -> None:
    timeline = new_timeline()
    with timeline.during("train"):
        tick()
        first = drain(timeline)
        tick()
    tick()
    second = drain(timeline)
    assert kinds(first) == ["startup", "train"]
    assert kinds(second) == ["train", "wait_batch"]
    assert_seamless([*first, *second], first[0].start)
    tick()
    third = drain(timeline)
    assert kinds(third) == ["wait_batch"]
    assert third[0].start == second[-1].end


def test_a_raising_body_closes_its_interval(tick: Callable[[], None]) -> None:
    timeline = new_timeline()
    with pytest.raises(RuntimeError, match="of its own"), timeline.during("generate"):
        tick()
        raise RuntimeError("of its own")
    tick()
    intervals = drain(timeline)
    assert kinds(intervals) == ["startup", "generate", "wait_weights"]
    assert_seamless(intervals, intervals[0].start)


def test_work_within_work_is_counted_once(tick: Callable[[], None]) -> None:
    timeline = new_timeline()
    with timeline.during("evaluate"):
        tick()
        with timeline.during("weights"):
            tick()
        tick()
    tick()
    intervals = drain(timeline)
    assert kinds(intervals)[:3] == ["startup", "evaluate", "weights"]
    assert kinds(intervals)[-1] == "wait_batch"
    assert kinds(intervals).count("weights") == 1
    assert_seamless(intervals, intervals[0].start)


def test_a_start_that_is_yet_to_come_makes_no_negative_interval(tick: Callable[[], None]) -> None:
    """The start is told by another process, whose clock may be ahead."""
    ahead = time.time() + 3600.0
    timeline = new_timeline(ahead)
    with timeline.during("train"):
        tick()
    intervals = timeline.drain()
    assert all(each.start >= ahead and each.end > each.start for each in intervals)
