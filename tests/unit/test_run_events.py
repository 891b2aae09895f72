"""Events of a run: checkpoints, and steps that do not come."""

from __future__ import annotations

from typing import Any

import pytest

from flows import run_events
from flows.run_events import RunEvents, StallWatch
from storage import facts


def test_a_stall_is_told_once_after_five_times_the_median_and_anew_after_another_step() -> None:
    watch = StallWatch(last_step=100)
    assert watch.look(1e9) is None
    for step, at in enumerate((0.0, 20.0, 40.0, 100.0), start=1):
        watch.take(step, at)
    assert watch.look(199.9) is None
    stall = watch.look(200.0)
    assert stall is not None
    assert (stall.step, stall.seconds, stall.median_seconds) == (4, 100.0, 20.0)
    assert watch.look(1000.0) is None
    watch.take(5, 1000.0)
    assert watch.look(1100.0) is None
    assert watch.look(1250.0) is not None


@pytest.mark.parametrize(
    ("steps", "quiet_until"),
    [
        ((0.0, 20.0), 1e9),  # one duration is no median
        ((0.0, 0.1, 0.2, 0.3), 30.2),  # half a minute at the least
        ((), 1e9),
    ],
)
def test_what_is_no_stall(steps: tuple[float, ...], quiet_until: float) -> None:
    watch = StallWatch(last_step=100)
    for step, at in enumerate(steps, start=1):
        watch.take(step, at)
    assert watch.look(quiet_until) is None


def test_after_the_last_step_none_is_missing() -> None:
    watch = StallWatch(last_step=3)
    for step in (1, 2, 3):
        watch.take(step, 10.0 * step)
    assert watch.look(1e9) is None


def test_a_checkpoint_is_told_by_the_name_that_evaluate_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(run_events, "emit_event", lambda event, **keys: told.append((event, keys)))
    events = RunEvents("r1", "s3://bucket/prefix", last_step=8)
    events(facts.Checkpoint.model_construct(step=4))
    ((event, keys),) = told
    assert event == "forgeflow.checkpoint.written"
    assert keys["resource"] == {"prefect.resource.id": "forgeflow.checkpoint.r1@4"}
    assert keys["payload"]["checkpoint"] == "r1@4"
    assert keys["payload"]["store"] == "s3://bucket/prefix"
