"""What a process of a mesh logs reaches the controller's log with the heartbeats, by mesh and rank."""

import asyncio
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from forge_core.actors import told_logs
from forge_core.actors.told_logs import LogLine, ToldLogs
from forge_core.processes import ProcessMesh, told


def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("vendor.part", level, "file", 1, message, (), None)


def test_lines_come_once_in_order_and_the_oldest_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_logs, "_MOST", 3)
    logs = ToldLogs(logging.WARNING)
    logs._lines = type(logs._lines)(maxlen=3)
    logs.handle(record(logging.ERROR, "one"))
    assert logs.drain() == (LogLine(logging.ERROR, "vendor.part", "one"),)
    assert logs.drain() == ()
    for number in range(5):
        logs.handle(record(logging.WARNING, str(number)))
    first, *others = logs.drain()
    assert first.message == "2 lines were more than are kept"
    assert [line.message for line in others] == ["2", "3", "4"]


def test_one_that_cannot_be_formatted_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logs = ToldLogs(logging.WARNING)
    broken = record(logging.ERROR, "%d")
    broken.args = ("no number",)
    logs.handle(broken)
    logs.handle(record(logging.ERROR, "after"))
    assert [line.message for line in logs.drain()] == ["after"]


@pytest.mark.parametrize(("level", "heard"), [("warning", ["w"]), ("info", ["i", "w"])])
def test_a_process_hears_from_the_level_that_it_is_given(level: str, heard: list[str]) -> None:
    script = (
        "import logging\n"
        "from forge_core.actors.told_logs import ToldLogs\n"
        "logs = ToldLogs.install()\n"
        "logger = logging.getLogger('vendor')\n"
        "logger.debug('d'); logger.info('i'); logger.warning('w')\n"
        "print([line.message for line in logs.drain()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={"FORGEFLOW_LOG_LEVEL": level, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == str(heard), done.stderr
    # The error stream has what counts as before.
    assert done.stderr.strip() == "w"


def test_the_controller_logs_them_by_mesh_and_rank(caplog: pytest.LogCaptureFixture) -> None:
    lines = (LogLine(logging.WARNING, "vendor", "hot"), LogLine(logging.INFO, "vendor", "cold"))

    async def call_one() -> tuple[LogLine, ...]:
        return lines

    beat: Any = SimpleNamespace(beat=SimpleNamespace(call_one=call_one))
    mesh = ProcessMesh(name="trainer", mesh=None, pids=(1, 2), info=None, heartbeats=(None, beat))
    told.setLevel("WARNING")
    asyncio.run(mesh.beat(1))
    assert [each.getMessage() for each in caplog.records] == ["trainer rank 1: vendor: hot"]
