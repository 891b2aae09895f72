"""Rescore and replay on the real stack: a run's own weights again, and others by other scores; nothing is generated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import Finished, Start, assert_verified, command

REWARDS = Path(__file__).parent / "rewards.py"
NEW_REWARD = """
import os
import signal
import time
from pathlib import Path

def by_length(prompts, completions, **columns):
    print("a reward may print")
    return [float(len(text)) for text in completions]

def raises(prompts, completions, **columns):
    return [1 / 0]

def dies(prompts, completions, **columns):
    # A reward function has a process of its own; its parent is the verifier.
    verifier = os.getppid()
    os.kill(verifier, signal.SIGKILL)
    while os.getppid() == verifier:
        time.sleep(0.01)

def dies_once(prompts, completions, **columns):
    died = Path(__file__).with_suffix(".died")
    if not died.exists():
        died.touch()
        dies(prompts, completions)
    return by_length(prompts, completions)
"""


@pytest.fixture(scope="module")
def past(start_run: Start) -> Finished:
    """A sync run with steps of several updates, whose reward differs within most groups."""
    run = start_run(
        "past", "--preset", "tiny", "--set", "warm_start.steps=3", "--set", "steps=4",
        "--set", "groups_per_step=16", "--set", "evaluation.num_prompts=20",
        "--set", f"reward={REWARDS}:by_hash", "--set", "faults.most_restarts=1",
        "--set", "faults.restart_delay_seconds=0.1",
    )()  # fmt: skip
    assert run.code == 0, run.errors
    return run


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "new.py"
    file.write_text(NEW_REWARD)
    return file


@pytest.fixture(scope="module")
def rescored(past: Finished, rewards: Path, prefect_server: str) -> dict[str, Any]:
    """What `rescore` printed."""
    done = _start(past, prefect_server, "rescore", "past", "--verifier", f"{rewards}:by_length",
                  "--name", "length")  # fmt: skip
    out, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    return json.loads(out)


@pytest.fixture(scope="module")
def whole_started(past: Finished, prefect_server: str) -> subprocess.Popen[str]:
    """A replay by the run's own scores, under way."""
    return _start(past, prefect_server, "replay", "past", "--run-id", "whole")


@pytest.fixture(scope="module")
def replays(
    whole_started: subprocess.Popen[str],
    past: Finished,
    rescored: dict[str, Any],
    prefect_server: str,
) -> dict[str, Finished]:
    """That one, and one by the new scores, which is killed in the midst and resumed."""
    cut = _start(past, prefect_server, "replay", "past", "--scores", "length", "--run-id", "cut")
    _wait_for_steps(past.store / "runs" / "cut" / "log", 2, cut)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    resumed = _start(past, prefect_server, "resume", "cut")
    return {name: _end(past, name, it) for name, it in (("whole", whole_started), ("cut", resumed))}


def test_the_same_loss_on_the_same_episodes_gives_the_runs_own_weights(
    past: Finished, replays: dict[str, Finished]
) -> None:
    """To the bit, after every step."""
    run = replays["whole"]
    assert run.code == 0, run.errors
    assert _digests(run) == _digests(past)
    assert run.facts("checkpoint")[-1]["weights_digest"] == _digests(past)[-1]
    assert run.facts("checkpoint")[-1]["step"] == 4
    assert_verified("whole", past.store)


def test_a_replay_generates_nothing_and_tells_where_it_came_from(
    replays: dict[str, Finished],
) -> None:
    summary = replays["whole"].summary
    assert summary["episodes"]["generated"] == summary["tokens"]["response"] == 0
    assert summary["episodes"]["trained"] > 0
    assert (summary["eval"]["initial"], summary["eval"]["final"]) == (None, None)
    assert (summary["age"]["max"], summary["parent_run_id"]) == (None, "past")
    assert summary["lineage"]["checkpoint"]["step"] == 0
    assert summary["lineage"]["replayed_groups"].keys() == {"past"}
    assert summary["seconds"]["meshes"].keys() == {"trainer"}
    assert summary["bitwise"] is True


def test_evaluated_afterwards_the_same_weights_have_the_same_score(
    past: Finished, replays: dict[str, Finished], prefect_server: str
) -> None:
    """Prompts and seeds are those of any run of the config; a replay's own has no reward."""
    evaluating = _start(past, prefect_server, "evaluate", "whole@4", "--run-id", "judged",
                        "--set", f"reward={REWARDS}:by_hash")  # fmt: skip
    run = _end(past, "judged", evaluating)
    assert run.code == 0, run.errors
    found, due = run.summary["eval"], past.summary["eval"]
    assert (found["final"], found["greedy_final"]) == (due["final"], due["greedy_final"])
    assert (found["num_prompts"], found["initial"]) == (20, None)
    assert (run.summary["parent_run_id"], run.summary["lineage"]["checkpoint"]["step"]) == (
        "whole",
        4,
    )
    assert not run.facts("admitted") and not run.facts("step") and not run.facts("checkpoint")
    assert_verified("judged", past.store)


def test_other_scores_give_other_weights_also_after_a_kill(
    past: Finished, replays: dict[str, Finished]
) -> None:
    run = replays["cut"]
    assert run.code == 0, run.errors
    assert (run.summary["steps"], run.summary["incarnations"]) == (4, 2)
    assert run.summary["retrained_steps"] >= 2
    assert _digests(run)[:4] != _digests(past)
    assert {step["score_set"] for step in run.facts("step")} == {"length"}
    groups = run.summary["groups"]
    assert groups["admitted"] == groups["trained"] + groups["dropped"].get("no_signal", 0) == 64
    assert run.summary["bitwise"] is True
    assert_verified("cut", past.store)


def test_new_scores_stand_beside_the_old(past: Finished, rescored: dict[str, Any]) -> None:
    assert (rescored["episodes"], rescored["newly_scored"]) == (64 * 8, 64 * 8)
    lengths, old = {}, []
    for path in sorted((past.store / "episodes" / "commits" / "past").iterdir()):
        part = json.loads(path.read_bytes())["part"]["key"]
        rows = pq.read_table(past.store / part, columns=["episode_id", "response", "reward"])
        old += rows["reward"].to_pylist()
        lengths.update({r["episode_id"]: float(len(r["response"])) for r in rows.to_pylist()})
    assert _scores(past, "length") == lengths
    assert rescored["mean"]["run"] == pytest.approx(sum(old) / len(old))
    assert rescored["mean"]["length"] == pytest.approx(sum(lengths.values()) / len(lengths))


def test_a_reward_that_fails_is_one_sentence_and_no_scores(
    past: Finished, rewards: Path, prefect_server: str
) -> None:
    failing = _start(past, prefect_server, "rescore", "past", "--verifier", f"{rewards}:raises",
                     "--name", "broken")  # fmt: skip
    out, errors = failing.communicate(timeout=120)
    assert (failing.returncode, out) == (1, "")
    assert "new.py:raises' raised ZeroDivisionError" in errors
    assert "on the prompt '" in errors
    refused = _start(past, prefect_server, "replay", "past", "--scores", "broken")
    out, errors = refused.communicate(timeout=60)
    assert (refused.returncode, out) == (2, "")
    assert "cover 0 of its 4 commits: rescore it again" in errors


def test_a_verifier_that_dies_scores_again_and_loses_nothing(
    past: Finished, rescored: dict[str, Any], rewards: Path, prefect_server: str
) -> None:
    scoring = _start(past, prefect_server, "rescore", "past", "--verifier",
                     f"{rewards}:dies_once", "--name", "once")  # fmt: skip
    out, errors = scoring.communicate(timeout=180)
    assert scoring.returncode == 0, errors
    told = json.loads(out)
    assert (told["episodes"], told["newly_scored"]) == (64 * 8, 64 * 8)
    retry, restart = sorted(told["mended"])
    assert retry.startswith("stage rescore was tried again after attempt 1 (")
    assert restart.startswith("verifier failed (")
    lengths, scores = (_scores(past, name) for name in ("length", "once"))
    assert scores == lengths and len(scores) == 64 * 8


def test_a_verifier_that_keeps_dying_ends_the_command_with_the_cause(
    past: Finished, rewards: Path, prefect_server: str
) -> None:
    scoring = _start(past, prefect_server, "rescore", "past", "--verifier", f"{rewards}:dies",
                     "--name", "never")  # fmt: skip
    out, errors = scoring.communicate(timeout=180)
    assert (scoring.returncode, out) == (1, "")
    assert "verifier failed again after 1 restarts in a row (faults.most_restarts 1)" in errors
    assert _scores(past, "never") == {}


def _start(past: Finished, prefect_server: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments, "--store", str(past.store), "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PREFECT_API_URL": prefect_server},
    )


def _scores(past: Finished, name: str) -> dict[str, float]:
    """By episode, what a set of scores says."""
    folder = past.store / "episodes" / "annotations" / "past" / name
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["episode_id"]: row["score"] for row in rows}


def _end(past: Finished, run_id: str, process: subprocess.Popen[str]) -> Finished:
    out, errors = process.communicate(timeout=180)
    log = past.store / "runs" / run_id / "output.log"
    if process.returncode and log.exists():
        errors += "\n" + log.read_text(errors="replace")[-4000:]
    return Finished(process.returncode, json.loads(out) if out else {}, errors, past.store, run_id)


def _wait_for_steps(log: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Return once the log has so many steps; fail if the process ends before."""
    seen: dict[Path, int] = {}
    while sum(seen.values()) < number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
        for path in log.glob("*.json") if log.exists() else ():
            if path not in seen:
                facts = json.loads(path.read_bytes())["facts"]
                seen[path] = sum(fact["kind"] == "step" for fact in facts)


def _digests(run: Finished) -> list[str]:
    """Of the weights after each step, as last trained."""
    by_step = {step["step"]: step["weights_digest"] for step in run.facts("step")}
    return [by_step[step] for step in sorted(by_step)]
