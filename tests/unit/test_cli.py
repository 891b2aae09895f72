"""The command line as people meet it: a process with an exit code and two streams."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "vllm", "transformers", "monarch")


def forgeflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "--preset"),
        (["run", "--preset", "tinny"], "'tinny'"),
        (["run", "--preset", "tiny", "--set", "steps=many"], "steps = 'many'"),
        (["run", "--preset", "tiny", "--set", "environment.name=no_task"], "'no_task'"),
        (["run", "--preset", "tiny", "--regime", "sometimes"], "regime = 'sometimes'"),
        (["run", "--preset", "tiny", "--bogus"], "--bogus"),
        (["show", "no-such-run"], "'no-such-run'"),
        (["verify", "no-such-run"], "'no-such-run'"),
        (["episodes", "no-such-run"], "'no-such-run'"),
        (["episodes", "x", "--limit", "0"], "--limit"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_refused_input(tmp_path: Path, arguments: list[str], words: str) -> None:
    store = tmp_path / "store"
    option = [] if arguments == ["frobnicate"] else ["--store", str(store)]
    start = time.monotonic()
    done = forgeflow(*arguments, *option)
    assert time.monotonic() - start < 20
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not store.exists()


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = ["run", "--preset", "tiny", "--dry-run", "--set", "steps=7", "--store", str(store)]
    done = forgeflow(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["config"]["steps"] == 7
    for_people = forgeflow(*arguments)
    assert for_people.returncode == 0
    assert "steps: 7" in for_people.stdout
    assert not store.exists()


def test_runs_of_an_empty_store(tmp_path: Path) -> None:
    done = forgeflow("runs", "--store", str(tmp_path / "store"), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_importing_every_flow_module_loads_no_engine() -> None:
    root = Path(__file__).parents[2]
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted((root / "flows").rglob("*.py"))
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "flows.cli" in names
    assert done.stdout == "[]\n", done.stderr
