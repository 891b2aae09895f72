"""`fit-verifiers` on a real Prefect server, and `rescore` by what it has fitted on a real verifier."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

from harness import command, task_runs
from made_episodes import committed
from stored_run import StoredRun, table_of

from forge_core.scorers import begin_set, counted_commits
from storage import layout
from storage.annotations import complete_set, read_scores, write_scores
from storage.episodes import SCHEMA
from storage.objects import LocalStore
from storage.parts import commit_part, read_commit
from storage.records import Controller

NAMES = ("a", "b", "c", "d")
FUNCTIONS = "\n".join(f"def {name}(prompts, completions, **columns): ..." for name in NAMES)


def test_scores_become_an_ensemble_and_the_ensemble_scores(
    tmp_path: Path, prefect_server: str
) -> None:
    file = tmp_path / "weak.py"
    file.write_text(FUNCTIONS)
    run = StoredRun(LocalStore(tmp_path / "store"), "past")
    _commit(run, 1, range(100))
    _commit(run, 2, range(100, 200))
    for name in NAMES:
        _give_scores(run, name, f"{file}:{name}")
    options = [each for name in NAMES for each in ("--scores", name)]
    fitted = _run(run, prefect_server, "fit-verifiers", *options, "--name", "weaver",
                  "--labels", "run")  # fmt: skip
    assert (fitted["name"], fitted["version"], fitted["num_samples"]) == ("weaver", 1, 400)
    assert fitted["report"]["pick_rates"]["ensemble"] > 0.8
    done = {each["name"] for each in task_runs(prefect_server, "past-weaver", at_least=3)}
    assert {name.rpartition("-")[0] for name in done} == {
        "read-scores", "fit-verifiers", "keep-ensemble"
    }  # fmt: skip
    told = _run(run, prefect_server, "rescore", "--verifier", "ensemble:weaver@1", "--name", "mine")
    assert (told["newly_scored"], told["mean"]["run"]) == (400, 0.5)
    assert abs(told["mean"]["mine"] - fitted["class_balance"]) < 0.05
    scores = read_scores(run.store, counted_commits(run.store, "past")[0], "mine")
    assert all(0 < score < 1 for score in scores.values())


def _commit(run: StoredRun, number: int, draws: range) -> None:
    """A round of two samples a prompt, of which the second is right."""
    table = table_of(run.run_id, draws, reward=lambda draw, sample: float(sample))
    place = table.schema.get_field_index("metadata")
    index = [f'{{"index": {draw}}}' for draw in table["draw"].to_pylist()]
    table = table.set_column(place, SCHEMA.field("metadata"), [index])
    run.admit(number, draws)
    commit = commit_part(run.store, run.run_id, layout.part_name(number, 0), table)
    run.log.append(committed(number, commit))


def _give_scores(run: StoredRun, name: str, verifier: str) -> None:
    """A set of scores of a verifier that errs once in five times."""
    me = Controller.this_process(versions={}, git_commit=None)
    begin_set(run.store, run.run_id, name, verifier, me)
    chance = random.Random(name)
    commits = counted_commits(run.store, run.run_id)
    for commit in commits:
        rows = read_commit(run.store, commit, ["episode_id", "reward"]).to_pydict()
        scores = [float((reward > 0.5) != (chance.random() < 0.2)) for reward in rows["reward"]]
        details = [{name: score} for score in scores]
        write_scores(run.store, commit, name, rows["episode_id"], scores, details, reward_mean=0.5)
    complete_set(run.store, run.run_id, name, commits)


def _run(run: StoredRun, api: str, name: str, *options: str) -> dict[str, object]:
    done = subprocess.run(
        command(name, run.run_id, *options, "--store", run.store.uri, "--json"),
        env={**os.environ, "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told
