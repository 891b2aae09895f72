"""Verifiers by config in a run, each of whose processes is killed in mid-call: every stored score is a true one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from harness import assert_verified
from rewards import by_hash
from sufferer import Sufferer

from storage.objects import open_store
from storage.parts import read_committed

SECONDS = 240
HOLDING = """
import os, time
from pathlib import Path

FOLDER = Path(__file__).parent

def holds(prompts, completions, **columns):
    (FOLDER / f"holding-{os.getpid()}").touch()
    while (FOLDER / "hold").exists():
        time.sleep(0.01)
    import hashlib
    texts = (f"{prompt}\\n{text}" for prompt, text in zip(prompts, completions))
    return [float(hashlib.sha256(text.encode()).digest()[0] % 2) for text in texts]
"""


def _held(run: Sufferer, folder: Path, known: set[int]) -> int:
    """The process of a call that is being held, other than those that are known."""
    deadline = time.monotonic() + SECONDS
    while True:
        pids = {int(path.name.partition("-")[2]) for path in folder.glob("holding-*")}
        if new := sorted(pid for pid in pids - known if psutil.pid_exists(pid)):
            return new[0]
        assert run.process.poll() is None, run.process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_killed_in_mid_call_cost_no_score(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HOLDING)
    (tmp_path / "hold").touch()
    given = {
        "steps": "2", "warm_start.steps": "3", "evaluation.num_prompts": "20", "groups_per_step": "16",
        "trainer.ranks": "1", "scoring.workers": "1", "verifiers.right.kind": "environment",
        "verifiers.form.kind": "regex", "verifiers.form.params.pattern": '"[0-9]"', "verifiers.form.weight": "0.5",
        "verifiers.equal.kind": "math", "verifiers.equal.weight": "0.25", "verifiers.mine.kind": "function",
        "verifiers.mine.params.reference": f"{tmp_path}/mine.py:holds",
    }  # fmt: skip
    options = [option for key, value in given.items() for option in ("--set", f"{key}={value}")]
    run = Sufferer(tmp_path / "store", "r", *options, "--regime", "async")
    try:
        # The process of the function, and with it that of math-verify.
        first = _held(run, tmp_path, set())
        for process in run.processes("verifier"):
            if any("mathematics" in word for word in process.cmdline()):
                process.kill()
        os.kill(first, signal.SIGKILL)
        # Asked again, in another process; now the one that both belong to.
        second = _held(run, tmp_path, {first})
        run.processes("verifier")[0].kill()
        run.until("failed", 1)
        _held(run, tmp_path, {first, second})
        (tmp_path / "hold").unlink()
        finished = run.finish()
    finally:
        run.end()
    assert finished.code == 0, finished.errors
    assert finished.summary["failures"] == 1
    assert "failed" not in finished.summary["groups"]["dropped"]
    assert_verified("r", finished.store)
    columns = ["prompt", "response", "reward", "scores", "scored_by"]
    episodes = read_committed(open_store(str(finished.store)), "r", columns=columns).to_pylist()
    assert len(episodes) >= 2 * 16 * 8
    for episode in episodes:
        scores = {score["name"]: score["value"] for score in episode["scores"]}
        assert scores.keys() == {"right", "form", "equal", "mine"}
        assert [scores["mine"]] == by_hash([episode["prompt"]], [episode["response"]])
        assert scores["form"] == float(any(map(str.isdigit, episode["response"])))
        weights = {"right": 1.0, "form": 0.5, "equal": 0.25, "mine": 1.0}
        due = sum(weights[name] * value for name, value in scores.items())
        assert abs(episode["reward"] - due) < 1e-9
        told = {each["name"]: each for each in episode["scored_by"]}
        assert told.keys() == scores.keys() and all(
            each["seconds"] >= 0.0 for each in told.values()
        )
        assert "math-verify" in told["equal"]["version"] and "sha256" in told["mine"]["version"]
