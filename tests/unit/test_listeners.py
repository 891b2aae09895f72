"""What listens to a run's facts, and the table of what came of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.progress import LiveProgress
from flows.results import result_rows, result_table
from forge_core.config import RunConfig
from storage import facts
from tasks.sinks import open_sinks

CONFIG = RunConfig()


def step(number: int, **metrics: float) -> facts.Step:
    return facts.Step(
        step=number,
        group_ids=("run-00000000",),
        score_set="run",
        weights_digest="d",
        policy_version=number,
        optimizer_updates=1,
        age_max=number % 3,
        age_mean=0.0,
        metrics=metrics,
        checkpoint=None,
    )


def evaluated(name: str, policy_version: int, sampled: float, greedy: float) -> facts.Evaluated:
    return facts.Evaluated(
        name=name,
        policy_version=policy_version,
        sampled=sampled,
        greedy=greedy,
        num_prompts=500,
        parts=(),
    )


def published(policy_version: int, mean: float | None) -> facts.Published:
    parity = None
    if mean is not None:
        parity = facts.Parity(mean=mean, max=4 * mean, tokens=256, entropy=1.0)
    return facts.Published(
        policy_version=policy_version, weights_digest="d", parity=parity, bytes=1, seconds=0.1
    )


def lines_of(told: list[facts.Fact], steps: int) -> list[str]:
    """What a progress display prints where there is no terminal."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=200)
    with LiveProgress(console, steps=steps) as progress:
        for fact in told:
            progress(fact)
    return file.getvalue().splitlines()


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    speed = {"generate/tokens_per_second": 12345.6}
    warm = facts.WarmStarted(steps=50, loss=0.12345, weights_digest="d", seconds=12.4)
    told: list[facts.Fact] = [
        facts.Started(run_id="run", meshes=()),
        warm,
        evaluated("initial", 0, 0.25, 0.5),
        *(step(number, reward=number / 100, **speed) for number in range(1, 22)),
        facts.Retry(stage="generate", attempt=1, cause="MeshCall: dead", seconds=2.0),
        step(22),
        evaluated("final", 22, 0.75, 1.0),
        facts.End(status="finished", reason=None),
    ]
    assert lines_of(told, steps=22) == [
        "warm start: 50 steps in 12 s, loss 0.123 nats per token",
        "evaluation initial: sampled 0.250, greedy 0.500 on 500 held-out prompts",
        "step 10 of 22: reward 0.100, 12,346 tok/s",
        "step 20 of 22: reward 0.200, 12,346 tok/s",
        "retry of generate (attempt 1): MeshCall: dead",
        "step 22 of 22: reward -, - tok/s",
        "evaluation final: sampled 0.750, greedy 1.000 on 500 held-out prompts",
    ]


def test_a_warm_start_that_was_none_is_not_told() -> None:
    none = facts.WarmStarted(steps=0, loss=None, weights_digest="d", seconds=0.1)
    assert lines_of([none], steps=5) == []
    without_loss = facts.WarmStarted(steps=3, loss=None, weights_digest="d", seconds=1.0)
    assert lines_of([without_loss], steps=5) == ["warm start: 3 steps in 1 s"]


def test_on_a_terminal_a_bar_says_what_is_under_way() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200, color_system=None)
    with LiveProgress(console, steps=20) as progress:
        progress(facts.Batched(step=10, group_ids=()))
        progress(step(10, reward=0.5))
        progress(facts.Admitted(round=11, draws=()))
    *_, last = (line for line in file.getvalue().splitlines() if "reward" in line)
    assert "generate" in last
    assert "10/20" in last
    assert "reward 0.500" in last
    assert "step 10 of 20" not in file.getvalue()


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the folder's event files: steps and values by name."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def test_event_files_hold_what_the_facts_measure(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    with open_sinks(CONFIG, "run", tmp_path) as listener:
        for fact in (
            facts.Started(run_id="run", meshes=()),
            published(0, None),
            evaluated("initial", 0, 0.25, 0.5),
            step(1, reward=0.125, loss=-0.5),
            published(1, 0.0625),
            step(2, reward=0.375),
            evaluated("final", 2, 0.75, 1.0),
        ):
            listener(fact)
    assert read_events(folder) == {
        "reward": [(1, 0.125), (2, 0.375)],
        "loss": [(1, -0.5)],
        "age/max": [(1, 1.0), (2, 2.0)],
        "eval/sampled": [(0, 0.25), (2, 0.75)],
        "eval/greedy": [(0, 0.5), (2, 1.0)],
        "parity/mean": [(1, 0.0625)],
        "parity/max": [(1, 0.25)],
    }


def test_a_run_that_measures_nothing_writes_no_event_files(tmp_path: Path) -> None:
    with open_sinks(CONFIG, "run", tmp_path) as listener:
        listener(facts.Started(run_id="run", meshes=()))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def summary() -> dict[str, Any]:
    """The part of run.json that results are told from."""
    return {
        "run_id": "run",
        "steps": 40,
        "eval": {
            "initial": 0.25,
            "final": 0.8125,
            "greedy_initial": 0.0,
            "greedy_final": None,
            "num_prompts": 500,
        },
        "groups": {"admitted": 128, "trained": 100, "dropped": {"no_signal": 27, "stale": 1}},
        "episodes": {"generated": 1024},
        "tokens": {"response": 1234567},
        "parity": {"mean": 1e-6, "max": 0.000123},
        "retries": 2,
        "failures": 1,
        "seconds": {"total": 61.6},
    }


def test_results_are_told_before_and_after(summary: dict[str, Any]) -> None:
    rows = {what: (before, after) for what, before, after in result_rows(summary)}
    assert rows["score, sampled"] == ("0.250", "0.812")
    assert rows["score, greedy"] == ("0.000", "-")
    assert rows["held-out prompts"] == ("", "500")
    assert rows["steps"] == ("0", "40")
    assert rows["groups trained"] == ("", "100 of 128")
    assert rows["groups dropped"] == ("", "27 no_signal, 1 stale")
    assert rows["episodes generated"] == ("", "1,024")
    assert rows["response tokens"] == ("", "1,234,567")
    assert rows["largest parity gap"] == ("", "1.2e-04 nats")
    assert rows["retries"] == ("", "2")
    assert rows["processes failed"] == ("", "1")
    assert rows["time"] == ("", "62 s")


def test_what_was_not_measured_is_not_told_as_a_number(summary: dict[str, Any]) -> None:
    summary["eval"] = dict.fromkeys(summary["eval"])
    summary["groups"]["dropped"] = {}
    summary["parity"] = {"mean": None, "max": None}
    rows = {what: (before, after) for what, before, after in result_rows(summary)}
    assert rows["score, sampled"] == rows["score, greedy"] == ("-", "-")
    assert rows["held-out prompts"] == ("", "-")
    assert rows["groups dropped"] == ("", "none")
    assert rows["largest parity gap"] == ("", "-")


def test_the_table_shows_every_row(summary: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(result_table(summary))
    for row in result_rows(summary):
        assert any(all(cell in line for cell in row) for line in captured.get().splitlines())
