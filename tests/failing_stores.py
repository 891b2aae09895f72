"""What tests of failing stores share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from many_writers import RUN_ID

from storage.log import RunLog
from storage.objects import ObjectStore
from storage.records import Controller
from storage.s3_calls import Patience

QUICK = Patience(
    connect_seconds=5, read_seconds=10, first_wait_seconds=0.01, longest_wait_seconds=0.05
)
BRISK = replace(QUICK, read_seconds=0.3)
"""For servers that say nothing."""
BRIEF = replace(BRISK, deadline_seconds=0.2)
"""For faults that do not pass."""


def claim(store: ObjectStore) -> RunLog:
    """Take over the run that these tests write."""
    controller = Controller.this_process(versions={}, git_commit=None)
    return RunLog.claim(store, RUN_ID, controller)


def retries(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The retries that were logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "storage.s3" and record.levelname == "WARNING"
    ]


def assert_sentence(error: BaseException, *words: str) -> None:
    """The error is told in one line that has all of the words."""
    text = str(error)
    assert all(word in text for word in words), text
    assert "\n" not in text and "Traceback" not in text


def all_uses(store: ObjectStore) -> list[Callable[[], object]]:
    """Calls of each kind."""
    return [
        lambda: store.read("a"),
        lambda: store.read_many(["a"]),
        lambda: store.exists("a"),
        lambda: store.keys(""),
        lambda: store.folders(""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.replace("a", b""),
        lambda: store.delete("a"),
    ]
