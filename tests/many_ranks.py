"""Run tests/restoring.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("restoring.py")
RUN_SECONDS = 270.0
"""Less than a test may take, so that no rank outlives one."""


def run_ranks(folder: Path, *runs: str) -> list[dict[str, Any]]:
    """Do runs in a folder with a model; what rank 0 of each told of its steps."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, folder, *runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Its ranks are processes of their own.
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, errors[-2000:]
    return [json.loads(line) for line in output.splitlines()]
