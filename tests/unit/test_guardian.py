"""The guardian: whatever becomes of its owner, child and folder are gone soon after."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forge_core import guardian
from forge_core.guardian import CHILD_ENDED

GONE_SECONDS = 3.0
GUARDIAN = [sys.executable, "-S", "-E", guardian.__file__]
CHILD = "echo child $$; exec sleep 100"
DEAF_CHILD = "trap '' TERM; echo child $$; exec sleep 100"

# Starts a guardian, holds its standard input, and waits for the end that the test brings it.
OWNER = """
import subprocess, sys, time
keeper = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print("guardian", keeper.pid, flush=True)
time.sleep(100)
"""

Watch = Callable[[int], Callable[[float], bool]]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder that is not empty."""
    workdir = tmp_path / "work"
    (workdir / "deep" / "er").mkdir(parents=True)
    (workdir / "deep" / "er" / "file").write_text("content")
    return workdir


@pytest.fixture
def watch() -> Iterator[Watch]:
    """`watch(pid)` gives a function that waits, at most so many seconds, for the process to end.

    A process that still lives when the test ends is killed.
    """
    handles: list[int] = []

    def begin(pid: int) -> Callable[[float], bool]:
        handle = os.pidfd_open(pid)
        handles.append(handle)
        return lambda seconds: has_ended(handle, seconds)

    yield begin
    for handle in handles:
        if not has_ended(handle, 0.0):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def has_ended(handle: int, seconds: float) -> bool:
    """Waits for the process behind a pidfd, which its number's next owner is not."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def start(command: list[str], stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True)


def read_pids(process: subprocess.Popen[str], num_lines: int) -> dict[str, int]:
    """Who is who, as the processes tell on their common standard output, in any order."""
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(num_lines)]
    return {name: int(pid) for name, pid in lines}


@pytest.mark.parametrize("child_command", [CHILD, DEAF_CHILD])
def test_a_killed_owner_leaves_nothing_behind(
    workdir: Path, watch: Watch, child_command: str
) -> None:
    command = [*GUARDIAN, str(workdir), "sh", "-c", child_command]
    with start([sys.executable, "-c", OWNER, *command]) as owner:
        owner_ended = watch(owner.pid)
        pids = read_pids(owner, 2)
        guardian_ended, child_ended = watch(pids["guardian"]), watch(pids["child"])
        assert workdir.exists() and not child_ended(0.0)
        owner.send_signal(signal.SIGKILL)
        assert owner_ended(GONE_SECONDS)
        assert guardian_ended(GONE_SECONDS)
        assert child_ended(0.0)
    assert not workdir.exists()


def test_a_closed_input_ends_child_and_folder(workdir: Path, watch: Watch) -> None:
    keeper = start([*GUARDIAN, str(workdir), "sh", "-c", CHILD], stdin=subprocess.PIPE)
    with keeper:
        guardian_ended, child_ended = watch(keeper.pid), watch(read_pids(keeper, 1)["child"])
        assert keeper.stdin is not None
        keeper.stdin.close()
        assert guardian_ended(GONE_SECONDS)
        assert child_ended(0.0)
    assert keeper.returncode == 0
    assert not workdir.exists()


def test_a_child_that_ends_by_itself_takes_nothing_with_it(workdir: Path, watch: Watch) -> None:
    """The owner goes on, say without its Prefect server, and still needs its folder."""
    with start([*GUARDIAN, str(workdir), "true"], stdin=subprocess.PIPE) as keeper:
        ended = watch(keeper.pid)
        deadline = time.monotonic() + GONE_SECONDS
        while not (workdir / CHILD_ENDED).exists():
            assert time.monotonic() < deadline
            assert not ended(0.05)
        assert not ended(0.6)
        assert workdir.exists()
        assert keeper.stdin is not None
        keeper.stdin.close()
        assert ended(GONE_SECONDS)
    assert not workdir.exists()


def test_without_a_child_the_folder_goes_all_the_same(workdir: Path, watch: Watch) -> None:
    with start([*GUARDIAN, str(workdir)], stdin=subprocess.PIPE) as keeper:
        ended = watch(keeper.pid)
        assert keeper.stdin is not None
        keeper.stdin.close()
        assert ended(GONE_SECONDS)
    assert keeper.returncode == 0
    assert not workdir.exists()


def test_signals_of_a_terminal_do_not_end_it(workdir: Path, watch: Watch) -> None:
    keeper = start([*GUARDIAN, str(workdir), "sh", "-c", CHILD], stdin=subprocess.PIPE)
    with keeper:
        # Once the child tells its pid, the guardian has long chosen which signals it heeds.
        guardian_ended, child_ended = watch(keeper.pid), watch(read_pids(keeper, 1)["child"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            keeper.send_signal(number)
        assert not guardian_ended(0.3)
        assert not child_ended(0.0)
        assert workdir.exists()
        assert keeper.stdin is not None
        keeper.stdin.close()
        assert guardian_ended(GONE_SECONDS)
        assert child_ended(0.0)
    assert keeper.returncode == 0
    assert not workdir.exists()


def test_the_child_dies_with_a_killed_guardian(workdir: Path, watch: Watch) -> None:
    keeper = start([*GUARDIAN, str(workdir), "sh", "-c", CHILD], stdin=subprocess.PIPE)
    with keeper:
        watch(keeper.pid)
        child_ended = watch(read_pids(keeper, 1)["child"])
        keeper.kill()
        assert child_ended(GONE_SECONDS)
