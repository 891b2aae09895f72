"""Children of `forgeflow server`, played by shells: started again, stopped in order, and never left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.serving import Child, Serving, serving

SECONDS = 10.0


def _child(state: Path, name: str, script: str) -> Child:
    return Child(
        name=name,
        command=["sh", "-c", script],
        environment=dict(os.environ),
        log=state / f"{name}.log",
    )


def _begin(held: Serving, name: str, script: str) -> Child:
    child = _child(held.state, name, script)
    child.start()
    held.children.append(child)
    return child


def _until(path: Path, text: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_dies_is_started_again_and_all_are_stopped_in_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as held:
        child = _begin(held, "server", "echo up; exec sleep 100")
        _until(tmp_path / "server.log", "up\n")
        assert child.process is not None
        first = child.process.pid
        os.kill(first, signal.SIGKILL)

        def end() -> None:
            _until(tmp_path / "server.log", "up\nup\n")
            held.stopping.set()

        # Watched from this thread: the kernel takes its end for the parent's.
        ending = threading.Thread(target=end)
        ending.start()
        held.watch()
        ending.join()
        second = child.process.pid
        assert second != first and psutil.pid_exists(second)
    assert not psutil.pid_exists(second)


def test_what_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as held:
        _begin(held, "worker", "exit 3")
        with pytest.raises(RuntimeError, match=r"worker ended 5 times: see .*worker\.log"):
            held.watch()


def test_flows_end_in_order_before_their_worker(tmp_path: Path) -> None:
    """Told to end, a worker would leave its flows without a word."""
    told = tmp_path / "told"
    flow = f"trap 'echo flow >> {told}; exit' TERM; echo up; while :; do sleep 0.05; done"
    worker = f"trap 'echo worker >> {told}; exit' TERM; sh -c \"{flow}\" & wait; sleep 100"
    with serving(tmp_path, 1) as held:
        child = _begin(held, "worker", worker)
        _until(tmp_path / "worker.log", "up")
        assert child.process is not None
        below = psutil.Process(child.process.pid).children(recursive=True)
    assert told.read_text().split()[0] == "flow"
    assert not any(each.is_running() for each in below)


def test_a_folder_of_state_has_one_server(tmp_path: Path) -> None:
    with (
        serving(tmp_path, 1),
        pytest.raises(ValueError, match="held by another server"),
        serving(tmp_path, 2),
    ):
        pass
    with serving(tmp_path, 3):
        pass


def test_a_signal_asks_for_the_end_and_the_work_folder_goes(tmp_path: Path) -> None:
    before = os.environ.get("TMPDIR")
    with serving(tmp_path, 1) as held:
        folder = Path(os.environ["TMPDIR"])
        assert folder.is_dir()
        os.kill(os.getpid(), signal.SIGTERM)
        assert held.stopping.wait(SECONDS)
    assert not folder.exists()
    assert os.environ.get("TMPDIR") == before
