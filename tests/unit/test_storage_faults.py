"""Stores whose medium fails: what was acknowledged is there, what can be retried is, the rest is one sentence."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from many_writers import RUN_ID, episodes
from s3_proxy import (
    Behaviour,
    Exchange,
    FaultyProxy,
    cut,
    ignore_condition,
    lose,
    refuse,
    reset,
    stall,
)
from s3_server import READER, WRITER, S3Server

import storage
from storage import s3_upload
from storage.contract import StoreError
from storage.facts import Started
from storage.log import RunLog, read_entries
from storage.objects import LocalStore, ObjectNotFound, ObjectStore, check_writable, open_store
from storage.parts import commit_part, read_commits, read_part
from storage.records import Controller
from storage.s3 import S3Store
from storage.s3_calls import Patience

QUICK = Patience(
    connect_seconds=5, read_seconds=10, first_wait_seconds=0.01, longest_wait_seconds=0.05
)
BRISK = replace(QUICK, read_seconds=0.3)
"""For servers that say nothing."""
BRIEF = replace(BRISK, deadline_seconds=0.2)
"""For faults that do not pass."""

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


@pytest.fixture(scope="module")
def running_proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """One for all tests: for each new address a process makes a new client, which takes a while."""
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(
    running_proxy: FaultyProxy, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> FaultyProxy:
    """A proxy in front of the server, which does no harm yet; the environment leads to it."""
    running_proxy.recover()
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.endpoint)
    return running_proxy


@pytest.fixture
def store(proxy: FaultyProxy, s3_store_uri: str) -> S3Store:
    return replace(S3Store.from_uri(s3_store_uri), patience=QUICK)


@pytest.fixture
def hasty(store: S3Store) -> S3Store:
    """The same, which soon gives up."""
    return replace(store, patience=BRIEF)


def _claim(store: ObjectStore) -> RunLog:
    controller = Controller.this_process(versions={}, git_commit=None)
    return RunLog.claim(store, RUN_ID, controller)


def _retries(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "storage.s3" and record.levelname == "WARNING"
    ]


def _assert_sentence(error: BaseException, *words: str) -> None:
    text = str(error)
    assert all(word in text for word in words), text
    assert "\n" not in text and "Traceback" not in text


BROKEN = ("reset", "lost answer")
"""When a connection breaks that has been of use before, the HTTP client itself tries a new one, once and unseen."""


@pytest.mark.parametrize("name", [name for name in PASSING if name != "cut answer"])
def test_a_write_outlasts_what_passes(
    name: str, store: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = replace(store, patience=BRISK if name == "silence" else QUICK)
    proxy.plan(PASSING[name], PASSING[name], method="PUT")
    created = store.put_if_absent("a/b", b"data")
    # A server that was not heard may have done it; then the next attempt found our own object.
    assert created or name in ("lost answer", "silence")
    assert proxy.num_planned == 0
    assert store.read("a/b") == b"data"
    assert not store.put_if_absent("a/b", b"other")
    told = _retries(caplog)
    assert len(told) >= (1 if name in BROKEN else 2)
    for attempt, line in enumerate(told, 1):
        assert f"{store.uri} could not write 'a/b' (" in line
        assert f": attempt {attempt}, the next in " in line
    assert not name.isdigit() or f"({name} " in told[0]
    assert WRITER[1] not in caplog.text


@pytest.mark.parametrize("name", PASSING)
def test_reading_listing_and_deleting_outlast_what_passes(
    name: str, store: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
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
        proxy.plan(*[PASSING[name]] * num_faults, method="GET")
        assert use() == expected
        assert proxy.num_planned == 0
        assert _retries(caplog)
    proxy.plan(PASSING[name], method="DELETE")
    store.delete("a/b")
    assert proxy.num_planned == 0
    assert store.keys("") == []


@pytest.mark.parametrize("fault", [refuse(503, "SlowDown"), stall, reset])
def test_what_does_not_pass_is_one_sentence_and_never_a_missing_object(
    fault: Behaviour, hasty: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    hasty.exists("a")  # Sets the client up, which would take much of the time there is.
    for method in ("GET", "PUT", "DELETE"):
        proxy.plan(*[fault] * 1000, method=method)
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
        _assert_sentence(error.value, f"store {hasty.uri!r} could not {doing} (", "resume RUN")
    assert _retries(caplog) or fault is stall  # One silence takes all the time there is.
    with pytest.raises(StoreError):
        hasty.read_many([f"many/{number}" for number in range(50)])


def test_a_log_on_a_bad_day_holds_each_acknowledged_entry_once(
    store: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = replace(store, patience=BRISK)
    log = _claim(store)
    appended = []
    for fault in PASSING.values():
        proxy.plan(fault, method="PUT")
        appended.append(log.append(Started(run_id=RUN_ID, meshes=("trainer",))))
    assert proxy.num_planned == 0
    assert read_entries(store, RUN_ID) == appended
    # A cut answer to a write has no body to cut; on two see BROKEN.
    assert len(_retries(caplog)) >= len(PASSING) - 3


def test_commits_on_a_bad_day_count_once(store: S3Store, proxy: FaultyProxy) -> None:
    store = replace(store, patience=BRISK)
    committed = []
    for number, fault in enumerate(PASSING.values()):
        proxy.plan(*[fault] * (1 + number % 2), method="PUT")
        commit = commit_part(store, RUN_ID, f"name-{number}", episodes(seed=number))
        assert commit_part(store, RUN_ID, f"name-{number}", episodes(seed=99)) == commit
        committed.append(commit)
    assert read_commits(store, RUN_ID) == committed
    for number, commit in enumerate(committed):
        assert read_part(store, commit.part) == episodes(seed=number)


def test_an_append_that_failed_is_settled_when_the_store_is_back(
    hasty: S3Store, proxy: FaultyProxy
) -> None:
    log = _claim(hasty)
    first = log.append(Started(run_id=RUN_ID, meshes=()))
    proxy.plan(lose, *[refuse(503, "SlowDown")] * 100, method="PUT")
    with pytest.raises(StoreError):
        log.append(Started(run_id=RUN_ID, meshes=("trainer",)))
    proxy.recover()
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
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 2**20)
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * 2**20)
    store = replace(store, patience=replace(QUICK, read_seconds=2) if stall in faults else QUICK)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * 2**20))
    proxy.plan(*faults, method=method)
    assert store.put_file_if_absent("big", path) == created
    assert proxy.num_planned == 0
    # After these S3 would not take the end of the same upload again.
    restarted = faults[1:] in (VANISHED, CONFLICT)
    assert sum(each.endswith("?uploads") for _, each in proxy.requests) >= 1 + restarted
    assert store.read("big") == path.read_bytes()
    assert _num_uploads(store) == 0


def test_a_write_in_parts_that_fails_leaves_no_parts(
    hasty: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "WHOLE_BYTES", 2**20)
    proxy.plan(*[refuse(503, "SlowDown")] * 100, method="PUT")
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


def test_a_write_that_a_signal_ends_is_not_tried_again(store: S3Store, proxy: FaultyProxy) -> None:
    given_up = threading.Event()

    def interrupt(exchange: Exchange) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        stall(exchange)
        given_up.set()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        proxy.plan(interrupt, method="PUT")
        with pytest.raises(KeyboardInterrupt):
            store.put_if_absent("a", b"data")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert given_up.wait(store.patience.read_seconds / 2), "the request was left to go on"
    assert store.keys("") == []
    assert [method for method, _ in proxy.requests].count("PUT") == 1


def _profile(path: Path, credentials: tuple[str, str]) -> None:
    key, secret = credentials
    path.write_text(f"[runs]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: FaultyProxy) -> Path:
    """A file of credentials that the environment names instead of holding them."""
    path = tmp_path / "credentials"
    _profile(path, WRITER)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "runs")
    return path


@pytest.mark.parametrize(
    "refusal", [refuse(400, "ExpiredToken"), refuse(403, "InvalidAccessKeyId")]
)
def test_credentials_that_expire_in_mid_run_are_read_anew(
    refusal: Behaviour,
    profile: Path,
    store: S3Store,
    proxy: FaultyProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _profile(profile, READER)
    assert store.keys("") == []

    def renew(exchange: Exchange) -> None:
        _profile(profile, WRITER)
        refusal(exchange)

    proxy.plan(renew, method="PUT")
    assert store.put_if_absent("a", b"data")  # The old ones had no right to.
    assert len(_retries(caplog)) == 1
    assert not any(secret in caplog.text for secret in (*WRITER, *READER))


def test_credentials_that_stay_expired_are_one_sentence(
    profile: Path, store: S3Store, proxy: FaultyProxy
) -> None:
    log = _claim(store)
    entry = log.append(Started(run_id=RUN_ID, meshes=()))
    proxy.plan(*[refuse(400, "ExpiredToken")] * 100, method="PUT")
    with pytest.raises(StoreError) as error:
        log.append(Started(run_id=RUN_ID, meshes=("trainer",)))
    _assert_sentence(
        error.value, f"credentials of store {store.uri!r} have expired", "renew", "resume RUN"
    )
    assert proxy.num_planned > 90
    proxy.recover()
    assert read_entries(store, RUN_ID) == [entry]
    assert log.settle() is None


def _all_uses(store: ObjectStore) -> list[Callable[[], object]]:
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


def test_a_missing_bucket_is_no_missing_object(s3_store_uri: str) -> None:
    uri = "s3://no-such-bucket/store"
    for use in _all_uses(open_store(uri)):
        with pytest.raises(StoreError) as error:
            use()
        # The server tells only who may make buckets that one is missing, if it is to be written to.
        assert "NoSuchBucket" in str(error.value) or "AccessDenied" in str(error.value)
        _assert_sentence(error.value, repr(uri))
    with pytest.raises(ValueError, match=f"store '{uri}' could not write "):
        check_writable(uri)


def test_a_bucket_that_goes_missing_in_mid_run_is_told(hasty: S3Store, proxy: FaultyProxy) -> None:
    gone = refuse(404, "NoSuchBucket")
    for method in ("GET", "PUT", "DELETE"):
        proxy.plan(*[gone] * 8, method=method)
    for use in _all_uses(hasty):
        with pytest.raises(StoreError, match=r"NoSuchBucket.*: create the bucket"):
            use()


def test_denied_access_is_told_with_the_rights_to_give(
    hasty: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty.put_if_absent("a", b"data")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    assert hasty.read("a") == b"data"
    sentence = r"\(403 AccessDenied.*: give the credentials the rights that docs/s3.md lists"
    for use in (lambda: hasty.put_if_absent("b", b""), lambda: hasty.delete("a")):
        with pytest.raises(StoreError, match=sentence):
            use()
    with pytest.raises(ValueError, match=sentence):
        hasty.probe()
    for method in ("GET", "GET", "GET"):
        proxy.plan(refuse(403, "AccessDenied"), method=method)
    for look in (lambda: hasty.read("a"), lambda: hasty.exists("a"), lambda: hasty.keys("")):
        with pytest.raises(StoreError, match=sentence):
            look()


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_server_that_ignores_conditions_is_refused(
    method: str, store: S3Store, proxy: FaultyProxy
) -> None:
    proxy.always = lambda exchange: (
        ignore_condition(exchange)
        if exchange.handler.command == method
        else exchange.relay(exchange.forward())
    )
    with pytest.raises(ValueError, match=r"ignores If-None-Match.*: use a server that") as error:
        store.probe()
    assert repr(store.uri) in str(error.value)
    assert store.keys("") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "have expired or are refused .*: renew them"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "have expired or are refused .*: renew them"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "could not write .*AWS_ENDPOINT_URL is right"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, r"\(Invalid endpoint: nowhere\): correct AWS_ENDPOINT_URL"),
        ({"AWS_PROFILE": "none"}, r"have expired or are refused .*profile \(none\).*: renew them"),
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_used_is_refused_before_a_run(
    change: dict[str, str], sentence: str, hasty: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence) as error:
        hasty.probe()
    _assert_sentence(error.value, repr(hasty.uri))


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return open_store(request.getfixturevalue("s3_store_uri"))


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_part_is_told(any_store: ObjectStore, kept: int) -> None:
    commit = commit_part(any_store, RUN_ID, "name", episodes(seed=1))
    any_store.replace(commit.part.key, any_store.read(commit.part.key)[:kept])
    with pytest.raises(ValueError, match=rf"{commit.part.key} has \d+ bytes and was written with"):
        read_part(any_store, commit.part)
    any_store.delete(commit.part.key)
    with pytest.raises(ObjectNotFound, match=commit.part.key):
        read_part(any_store, commit.part)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"\xff\xfe", b"null"])
def test_an_unreadable_commit_is_told_and_never_taken_for_none(
    any_store: ObjectStore, data: bytes
) -> None:
    commit_part(any_store, RUN_ID, "good", episodes(seed=1))
    commit_part(any_store, RUN_ID, "bad", episodes(seed=2))
    any_store.replace(f"episodes/commits/{RUN_ID}/bad.json", data)
    for use in (
        lambda: read_commits(any_store, RUN_ID),
        lambda: commit_part(any_store, RUN_ID, "bad", episodes(seed=2)),
    ):
        with pytest.raises(ValueError, match=r"bad.json is no valid Commit: "):
            use()


def _on_disk(program: str, folder: Path) -> dict[str, Any]:
    """What a program told that has `fill`, `freeze` and a store in the folder to itself."""
    root = Path(storage.__file__).parents[1]
    start = (
        "import json, os, sys; from pathlib import Path\n"
        "from small_disk import fill, freeze\n"
        "from storage.objects import *\n"
        "folder = Path(sys.argv[1]); store = LocalStore(folder)\n"
        "def failure(use, *arguments):\n"
        "    try: use(*arguments)\n"
        "    except StoreError as error: return [error.errno, str(error)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + program, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_full_disk_is_told_and_left_no_fuller(tmp_path: Path) -> None:
    told = _on_disk(
        "number = fill(folder, 65536)\n"
        "big = folder.parent / 'big'; big.write_bytes(bytes(60000))\n"
        "acknowledged = {f'log/{n}': b'x' * 5000 for n in range(3)}\n"
        "for key, data in acknowledged.items(): assert store.put_if_absent(key, data)\n"
        "failures = [failure(store.put_if_absent, 'log/3', bytes(70000)),\n"
        "            failure(store.replace, 'log/0', bytes(70000)),\n"
        "            failure(store.replace, 'run.json', bytes(70000))]\n"
        "big.write_bytes(bytes(70000)) if number == 27 else None\n"
        "failures.append(failure(store.put_file_if_absent, 'log/3', big) or "
        "failure(store.put_if_absent, 'log/4', bytes(70000)))\n"
        "kept = all(store.read(key) == data for key, data in acknowledged.items())\n"
        "print(json.dumps(dict(number=number, failures=failures, kept=kept,\n"
        "    files=sorted(str(path.relative_to(folder)) for path in folder.rglob('*')),\n"
        "    smaller=store.put_if_absent('log/3', b'fits'))))",
        tmp_path,
    )
    assert told["number"] in (errno.ENOSPC, errno.EFBIG)
    for failure in told["failures"]:
        number, sentence = failure
        assert number == told["number"]
        assert (
            f"store {str(tmp_path)!r} could not write 'log/" in sentence or "run.json" in sentence
        )
        assert os.strerror(number) in sentence
        assert "another disk" in sentence
    assert told["kept"]
    assert told["files"] == ["log", "log/0", "log/1", "log/2"]
    assert told["smaller"]


def test_a_folder_that_turns_read_only_is_told_and_still_read(tmp_path: Path) -> None:
    told = _on_disk(
        "assert store.put_if_absent('log/0', b'acknowledged')\n"
        "number = freeze(folder)\n"
        "refused = None\n"
        "try: store.probe()\n"
        "except ValueError as error: refused = str(error)\n"
        "print(json.dumps(dict(number=number, refused=refused, failures=[\n"
        "    failure(store.put_if_absent, 'log/1', b''), failure(store.put_if_absent, 'new/1', b''),\n"
        "    failure(store.replace, 'log/0', b''), failure(store.delete, 'log/0')],\n"
        "    kept=[store.read('log/0').decode(), store.keys('')])))",
        tmp_path,
    )
    assert told["number"] in (errno.EROFS, errno.EACCES)
    for failure in told["failures"]:
        number, sentence = failure
        assert number == told["number"]
        assert f"store {str(tmp_path)!r} could not " in sentence
        assert os.strerror(number) in sentence
        assert "that can be written" in sentence
    assert "cannot be written (" in told["refused"]
    assert told["kept"] == ["acknowledged", ["log/0"]]


def test_what_cannot_be_looked_at_is_not_taken_for_empty(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / ("x" * 300))  # Longer than a name can be.
    for use in _all_uses(store):
        with pytest.raises(StoreError) as error:
            use()
        assert error.value.errno == errno.ENAMETOOLONG


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreError("store 'a' is full", errno.ENOSPC)))
    assert isinstance(error, StoreError)
    assert (str(error), error.errno) == ("store 'a' is full", errno.ENOSPC)


def test_an_unreadable_disk_is_no_missing_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "bad").symlink_to("/proc/self/mem")  # Its first bytes cannot be read.
    with pytest.raises(StoreError) as error:
        store.read("bad")
    assert error.value.errno == errno.EIO
    _assert_sentence(error.value, f"store {str(tmp_path)!r} could not read 'bad' (")
