"""SIGTERM, by which clouds take machines back: the state is kept within the grace, and no step is trained again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import assert_verified, command

from benchmarks.kill_matrix import SMALL
from storage.objects import LocalStore
from storage.resume import read_ledger

pytestmark = pytest.mark.timeout(900)
GRACE_SECONDS = 60
SECONDS = 200


def test_what_was_trained_is_kept_within_the_grace(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    store = LocalStore(tmp_path)
    options = ("--set", "checkpoint.every=100", "--set", f"shutdown.grace_seconds={GRACE_SECONDS}")
    run = ("run", "--preset", "tiny", *SMALL, *options, "--run-id", "taken", "--store", tmp_path)
    process = subprocess.Popen(
        [*command(), *map(str, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not _has_trained(store, 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        process.communicate(timeout=GRACE_SECONDS + 5)
        assert time.monotonic() - asked < GRACE_SECONDS
    finally:
        process.kill()
    ledger = read_ledger(store, "taken")
    assert ledger.status == "cancelled" and 2 <= ledger.current_step < 6
    assert sorted(ledger.checkpoints) == [0, ledger.current_step]
    done = subprocess.run(
        command("resume", "taken", "--store", str(tmp_path), "--json"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["retrained_steps"] == 0
    assert_verified("taken", tmp_path)


def _has_trained(store: LocalStore, steps: int) -> bool:
    try:
        return read_ledger(store, "taken").last_step >= steps
    except ValueError:
        return False  # It has not begun yet.
