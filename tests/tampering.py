"""Planting faults in sound runs, and seeing that `forgeflow verify` names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from made_run import MadeRun
from typer.testing import CliRunner

from flows.cli import app
from storage.objects import LocalStore

Plant = Callable[[MadeRun], str]
"""Plants a fault; words of the problem that must be told."""


def run_verify(store: LocalStore, run_id: str) -> tuple[int, list[str]]:
    """Exit code of `forgeflow verify`, and the problems that it tells."""
    arguments = ["verify", run_id, "--store", store.uri, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.stdout, done.stderr
    return done.exit_code, json.loads(done.stdout)["problems"]


def flip(path: Path) -> None:
    """Alter one bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def is_found(run: MadeRun, plant: Plant) -> None:
    """A sound run is not sound any more, and the command says why."""
    assert run_verify(run.store, run.run_id) == (0, [])
    words = plant(run)
    code, problems = run_verify(run.store, run.run_id)
    assert code == 1
    assert words in " | ".join(problems)
