"""What `runs`, `show`, `verify` and `episodes` print of a run, as documents and for people."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from made_episodes import draw_of, episode

from forge_core.settings import load_config
from storage import facts, layout
from storage.episodes import SCHEMA
from storage.log import RunLog
from storage.objects import LocalStore
from storage.parts import commit_part
from storage.records import Controller
from storage.runs import store_config

NUM_EPISODES = 8


def _episode(number: int) -> dict[str, Any]:
    return episode(
        number // 2,
        number % 2,
        prompt=f"{number}+1=\n",
        answer=str(number + 1),
        response="[bold]2",
        reward=number / 4,
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run whose controller is gone, with two commits that its log counts and one that it does not."""
    store = LocalStore(tmp_path / "store")
    config = load_config(preset="tiny", file=None, overrides=["group_size=2", "groups_per_step=4"])
    store_config(store, "run", config.model_dump(mode="json"))
    me = Controller.this_process(versions={}, git_commit=None)
    log = RunLog.claim(store, "run", me.model_copy(update={"pid": 2**22 - 1}))
    log.append(facts.Started(run_id="run", meshes=("trainer",)))
    draws = tuple(draw_of("run", n) for n in range(NUM_EPISODES // 2))
    log.append(facts.Admitted(round=0, draws=draws))
    for number, first in enumerate((0, 4, 100)):
        rows = [_episode(first + offset) for offset in range(4)]
        commit = commit_part(store, "run", f"c{number}", pa.Table.from_pylist(rows, SCHEMA))
        if first < NUM_EPISODES:
            fact = facts.Committed(
                round=0,
                commit=layout.commit_key("run", commit.key),
                group_ids=commit.group_ids,
                episodes=commit.rows,
                score_set="run",
            )
            log.append(fact)
    return store


def forgeflow(store: LocalStore, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments, "--store", store.uri]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def document(store: LocalStore, *arguments: str) -> Any:
    done = forgeflow(store, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_show_and_runs_tell_that_the_controller_is_gone(store: LocalStore) -> None:
    shown = document(store, "show", "run")
    assert (shown["run_id"], shown["status"]) == ("run", "interrupted")
    assert shown["groups"]["admitted"] == shown["groups"]["pending"] == 4
    assert [each["status"] for each in document(store, "runs")] == ["interrupted"]
    for arguments in (("show", "run"), ("runs",)):
        done = forgeflow(store, *arguments)
        assert done.returncode == 0, done.stderr
        assert "interrupted" in done.stdout


def test_episodes_are_the_newest_that_the_log_counts(store: LocalStore) -> None:
    newest = [_episode(number)["episode_id"] for number in reversed(range(NUM_EPISODES))]
    for limit in (6, 100):
        rows = document(store, "episodes", "run", "--limit", str(limit))
        assert [row["episode_id"] for row in rows] == newest[:limit]
    done = forgeflow(store, "episodes", "run", "--limit", "1")
    assert done.returncode == 0, done.stderr
    for text in ("run-00000003-001", "reward 1.75", "7+1=\\n", "[bold]2"):
        assert text in done.stdout


def test_verify_says_what_is_wrong_and_fails(store: LocalStore) -> None:
    [part] = [key for key in store.keys("episodes/data/run/") if "/c0-" in key]
    store.local_path(part).unlink()
    done = forgeflow(store, "verify", "run", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert any(part in problem for problem in found["problems"])
    for_people = forgeflow(store, "verify", "run")
    assert for_people.returncode == 1
    assert "Problem: " in for_people.stdout
    assert "entries" in for_people.stdout
