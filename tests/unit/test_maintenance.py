"""`forgeflow gc`: a dry run unless told otherwise, as a document and for people."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stored_run import StoredRun, table_of
from typer.testing import CliRunner, Result

from flows.cli import app
from storage import layout
from storage.log import RunLog
from storage.objects import LocalStore, StoreError
from storage.parts import write_part
from storage.records import Controller
from storage.snapshots import take_snapshot


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    """A finished run with a stray part that is two days old."""
    run = StoredRun(LocalStore(tmp_path / "store"))
    for number in range(3):
        run.commit([2 * number, 2 * number + 1])
    run.end()
    _stray(run)
    return run


def _stray(run: StoredRun) -> str:
    prefix = layout.episodes_prefix(run.run_id, "000009-000")
    part = write_part(run.store, prefix, table_of(run.run_id, [80]))
    two_days_ago = time.time() - 2 * 86400
    os.utime(run.store.root / part.key, (two_days_ago, two_days_ago))
    return part.key


def _gc(run: StoredRun, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["gc", "--store", run.store.uri, *arguments])


def _document(run: StoredRun, *arguments: str) -> Any:
    done = _gc(run, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_nothing_is_deleted_unless_told_so(run: StoredRun) -> None:
    before = run.store.keys("")
    [stray] = [key for key in before if "000009" in key]
    size = len(run.store.read(stray))
    due = {
        "store": run.store.uri,
        "deleted": False,
        "kinds": {"uncounted parts": {"objects": 1, "bytes": size}},
        "objects": [{"kind": "uncounted parts", "key": stray, "bytes": size}],
        "spared": {},
        "compacted": [],
    }
    assert _document(run) == due
    assert _document(run, "--older-than", "49")["objects"] == []
    said = _gc(run).output
    assert "uncounted parts" in said
    assert f"{size:,}" in said
    assert "Nothing was deleted: --delete deletes these 1 objects." in said
    assert run.store.keys("") == before
    assert _document(run, "--delete") == {**due, "deleted": True}
    assert run.store.keys("") == [key for key in before if key != stray]
    assert "There is nothing to delete." in _gc(run, "--delete").output


def test_compaction_too_is_only_told_of_in_a_dry_run(run: StoredRun) -> None:
    snapshot = take_snapshot(run.store, ["run"])
    episodes = snapshot.table()
    before = run.store.keys("")
    due = [{"run_id": "run", "commits": 3, "episodes": 12, "parts": 1}]
    assert _document(run, "--compact")["compacted"] == due
    assert (
        "Would write 12 episodes of 3 commits of run run as 1 parts."
        in _gc(run, "--compact").output
    )
    assert run.store.keys("") == before
    done = _document(run, "--compact", "--delete", "--older-than", "0")
    assert done["compacted"] == due
    assert done["kinds"]["compacted parts"]["objects"] == 3
    assert not any(run.store.exists(commit.part.key) for commit in snapshot.commits)
    assert snapshot.table().equals(episodes)
    assert _document(run, "--compact")["compacted"] == []


def test_a_run_that_lives_is_left_alone_however_quiet(run: StoredRun) -> None:
    key = _stray(run)
    RunLog.claim(run.store, "run", Controller.this_process(versions={}, git_commit=None))
    for arguments in ((), ("--older-than", "0")):
        found = _document(run, *arguments, "--delete")
        assert (found["objects"], list(found["spared"])) == ([], ["run"])
    assert "Run run is left alone: by its log it is running." in _gc(run).output
    refused = _gc(run, "--run", "run", "--delete", "--older-than", "0")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"process {os.getpid()} on {socket.gethostname()}: cancel it first" in refused.stderr
    assert run.store.exists(key)


def test_a_run_is_deleted_by_name(run: StoredRun) -> None:
    fork = StoredRun(run.store, "fork", parent_run_id="run", parent_step=0)
    refused = _gc(run, "--run", "run", "--delete")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "run 'run' cannot be deleted, for fork came from it" in refused.stderr
    before = run.store.keys("")
    dry = _document(run, "--run", "fork")
    assert (dry["deleted"], dry["runs"][0]["run_id"]) == (False, "fork")
    assert run.store.keys("") == before
    # Interrupted a moment ago: its process is gone.
    assert _document(run, "--run", "fork", "--delete")["runs"] == dry["runs"]
    assert _gc(run, "--run", "run", "--delete").exit_code == 0
    deleted = [layout.deleted_key("fork"), layout.deleted_key("run")]
    assert run.store.keys("") == deleted
    assert "There is nothing to delete." in _gc(fork, "--run", "run").output


def test_runs_expire(run: StoredRun) -> None:
    StoredRun(run.store, "other").end()
    for key in run.store.keys(layout.log_folder("run")):
        entry = json.loads(run.store.read(key))
        run.store.replace(key, json.dumps({**entry, "at": entry["at"] - 5 * 86400}).encode())
    assert [each["run_id"] for each in _document(run, "--expire-days", "4")["runs"]] == ["run"]
    assert run.store.exists(layout.config_key("run"))
    assert _document(run, "--expire-days", "6", "--delete")["runs"] == []
    _document(run, "--expire-days", "4", "--delete")
    assert [run.store.exists(layout.config_key(each)) for each in ("run", "other")] == [False, True]


def test_what_cannot_be_asked_for_is_refused(run: StoredRun) -> None:
    for arguments, complaint in (
        (("--run", "none"), "has no run 'none'"),
        (("--run", "../x"), "is not usable"),
        (("--run", "run", "--expire-days", "3"), "give one at a time"),
        (("--run", "run", "--compact"), "give one at a time"),
        (("--older-than", "-1"), "than or equal to 0"),
    ):
        refused = _gc(run, *arguments)
        assert (refused.exit_code, refused.stdout) == (2, ""), arguments
        assert complaint in refused.stderr
    script = "import sys, flows.maintenance; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_store_that_fails_is_one_sentence(
    run: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LocalStore, key: str) -> None:
        raise StoreError(f"the store could not delete {key!r}: mend it")

    monkeypatch.setattr(LocalStore, "delete", failing)
    failed = _gc(run, "--delete", "--json")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("the store could not delete")
    assert failed.stderr.count("\n") == 1
