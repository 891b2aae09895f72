"""S3 on bad days: what was acknowledged is there, what can be retried is, the rest is one sentence."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from failing_stores import BRIEF, BRISK, QUICK, assert_sentence, claim, retries
from many_writers import RUN_ID, episodes
from s3_proxy import Behaviour, Exchange, FaultyProxy, cut, lose, refuse, reset, stall
from s3_server import WRITER

from storage import s3_upload
from storage.contract import StoreError
from storage.facts import Started
from storage.log import read_entries
from storage.parts import commit_part, read_commits, read_part
from storage.s3 import S3Store

PASSING = {
    "500": refuse(500, "InternalError"),
    "503": refuse(503, "SlowDown"),
    "429": refuse(429, "TooManyRequests"),
    "409": refuse(409, "ConditionalRequestConflict"),
    "504": refuse(504, "OfSomeProxy"),
    "silence": stall,
    "reset": reset,
    "lost answer": lose,
    "cut answer": cut,
}


@pytest.fixture
def store(s3_proxy: FaultyProxy, s3_store_uri: str) -> S3Store:
    return replace(S3Store.from_uri(s3_store_uri), patience=QUICK)


@pytest.fixture
def hasty(store: S3Store) -> S3Store:
    """The same, which soon gives up."""
    return replace(store, patience=BRIEF)


BROKEN = ("reset", "lost answer")
"""When a connection breaks that has been of use before, the HTTP client itself tries a new one, once and unseen."""


@pytest.mark.parametrize("name", [name for name in PASSING if name != "cut answer"])
def test_a_write_outlasts_what_passes(
    name: str, store: S3Store, s3_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = replace(store, patience=BRISK if name == "silence" else QUICK)
    s3_proxy.plan(PASSING[name], PASSING[name], method="PUT")
    created = store.put_if_absent("a/b", b"data")
    # A server that was not heard may have done it; then the next attempt found our own object.
    assert created or name in ("lost answer", "silence")
    assert s3_proxy.num_planned == 0
    assert store.read("a/b") == b"data"
    assert not store.put_if_absent("a/b", b"other")
    told = retries(caplog)
    assert len(told) >= (1 if name in BROKEN else 2)
    for attempt, line in enumerate(told, 1):
        assert f"{store.uri} could not write 'a/b' (" in line
        assert f": attempt {attempt}, the next in " in line
    assert not name.isdigit() or f"({name} " in told[0]
    assert WRITER[1] not in caplog.text


@pytest.mark.parametrize("name", PASSING)
def test_reading_listing_and_deleting_outlast_what_passes(
    name: str, store: S3Store, s3_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = replace(store, patience=BRISK if name == "silence" else QUICK)
    data = os.urandom(300_000)
    store.put_if_absent("a/b", data)
    for use, expected in (
        (lambda: store.read("a/b"), data),
        (lambda: store.read_many(["a/b", "a/b"]), [data, data]),
        (lambda: store.keys("a/"), ["a/b"]),
        (lambda: store.exists("a/b"), True),
        (lambda: store.exists("a/c"), False),
    ):
        caplog.clear()
        num_faults = 3 if name in BROKEN else 1  # There may be two connections.
        s3_proxy.plan(*[PASSING[name]] * num_faults, method="GET")
        assert use() == expected
        assert s3_proxy.num_planned == 0
        assert retries(caplog)
    s3_proxy.plan(PASSING[name], method="DELETE")
    store.delete("a/b")
    assert s3_proxy.num_planned == 0
    assert store.keys("") == []


@pytest.mark.parametrize("fault", [refuse(503, "SlowDown"), stall, reset])
def test_what_does_not_pass_is_one_sentence_and_never_a_missing_object(
    fault: Behaviour, hasty: S3Store, s3_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    hasty.exists("a")  # Sets the client up, which would take much of the time there is.
    for method in ("GET", "PUT", "DELETE"):
        s3_proxy.plan(*[fault] * 1000, method=method)
    uses: dict[str, Callable[[], object]] = {
        "read 'a'": lambda: hasty.read("a"),
        "look up 'a'": lambda: hasty.exists("a"),
        "list 'a/'": lambda: hasty.keys("a/"),
        "write 'a'": lambda: hasty.put_if_absent("a", b""),
        "delete 'a'": lambda: hasty.delete("a"),
    }
    for doing, use in uses.items():
        with pytest.raises(StoreError) as error:
            use()
        assert isinstance(error.value, OSError)
        assert_sentence(error.value, f"store {hasty.uri!r} could not {doing} (", "resume RUN")
    assert retries(caplog) or fault is stall  # One silence takes all the time there is.
    with pytest.raises(StoreError):
        hasty.read_many([f"many/{number}" for number in range(50)])


def test_a_log_on_a_bad_day_holds_each_acknowledged_entry_once(
    store: S3Store, s3_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = replace(store, patience=BRISK)
    log = claim(store)
    appended = []
    for fault in PASSING.values():
        s3_proxy.plan(fault, method="PUT")
        appended.append(log.append(Started(run_id=RUN_ID, meshes=("trainer",))))
    assert s3_proxy.num_planned == 0
    assert read_entries(store, RUN_ID) == appended
    # A cut answer to a write has no body to cut; on two see BROKEN.
    assert len(retries(caplog)) >= len(PASSING) - 3


def test_commits_on_a_bad_day_count_once(store: S3Store, s3_proxy: FaultyProxy) -> None:
    store = replace(store, patience=BRISK)
    committed = []
    for number, fault in enumerate(PASSING.values()):
        s3_proxy.plan(*[fault] * (1 + number % 2), method="PUT")
        commit = commit_part(store, RUN_ID, f"name-{number}", episodes(seed=number))
        assert commit_part(store, RUN_ID, f"name-{number}", episodes(seed=99)) == commit
        committed.append(commit)
    assert read_commits(store, RUN_ID) == committed
    for number, commit in enumerate(committed):
        assert read_part(store, commit.part) == episodes(seed=number)


def test_an_append_that_failed_is_settled_when_the_store_is_back(
    hasty: S3Store, s3_proxy: FaultyProxy
) -> None:
    log = claim(hasty)
    first = log.append(Started(run_id=RUN_ID, meshes=()))
    s3_proxy.plan(lose, *[refuse(503, "SlowDown")] * 100, method="PUT")
    with pytest.raises(StoreError):
        log.append(Started(run_id=RUN_ID, meshes=("trainer",)))
    s3_proxy.recover()
    settled = log.settle()
    assert settled is not None, "it was written; the answer was lost"
    last = log.append(Started(run_id=RUN_ID, meshes=("generator",)))
    assert read_entries(hasty, RUN_ID) == [first, settled, last]


VANISHED = [refuse(404, "NoSuchUpload")]
CONFLICT = [refuse(409, "ConditionalRequestConflict")]


def _through(exchange: Exchange) -> None:
    exchange.relay(exchange.forward())


@pytest.mark.parametrize(
    ("method", "faults", "created"),
    [
        ("PUT", [refuse(500, "InternalError"), stall, lose], True),
        ("POST", [refuse(503, "SlowDown")], True),
        ("POST", [_through, refuse(503, "SlowDown"), reset], True),
        ("POST", [_through, *VANISHED], True),
        ("POST", [_through, *CONFLICT], True),
        ("POST", [_through, lose], False),
    ],
)
def test_a_write_in_parts_outlasts_what_passes(
    method: str,
    faults: list[Behaviour],
    created: bool,
    store: S3Store,
    s3_proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 2**20)
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * 2**20)
    store = replace(store, patience=replace(QUICK, read_seconds=2) if stall in faults else QUICK)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * 2**20))
    s3_proxy.plan(*faults, method=method)
    assert store.put_file_if_absent("big", path) == created
    assert s3_proxy.num_planned == 0
    # After these S3 would not take the end of the same upload again.
    restarted = faults[1:] in (VANISHED, CONFLICT)
    assert sum(each.endswith("?uploads") for _, each in s3_proxy.requests) >= 1 + restarted
    assert store.read("big") == path.read_bytes()
    assert _num_uploads(store) == 0


def test_a_write_in_parts_that_fails_leaves_no_parts(
    hasty: S3Store, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 2**20)
    s3_proxy.plan(*[refuse(503, "SlowDown")] * 100, method="PUT")
    with pytest.raises(StoreError, match=r"could not write 'big' \(503 SlowDown"):
        hasty.put_if_absent("big", bytes(2 * 2**20))
    assert not hasty.exists("big")
    assert _num_uploads(hasty) == 0


def _num_uploads(store: S3Store) -> int:
    """Uploads in parts under way in the store."""
    answer: Any = store.requests.run(
        store.requests.call(
            "look",
            lambda files: files._call_s3("list_multipart_uploads", Bucket=store.bucket),
        )
    )
    return sum(each["Key"].startswith(store.prefix) for each in answer.get("Uploads", []))


def test_a_write_that_a_signal_ends_is_not_tried_again(
    store: S3Store, s3_proxy: FaultyProxy
) -> None:
    given_up = threading.Event()

    def interrupt(exchange: Exchange) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        stall(exchange)
        given_up.set()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        s3_proxy.plan(interrupt, method="PUT")
        with pytest.raises(KeyboardInterrupt):
            store.put_if_absent("a", b"data")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert given_up.wait(store.patience.read_seconds / 2), "the request was left to go on"
    assert store.keys("") == []
    assert [method for method, _ in s3_proxy.requests].count("PUT") == 1
