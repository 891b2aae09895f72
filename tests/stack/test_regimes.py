"""Async and hybrid on the real stack: overlap, ages within the bound, and nothing lost, whatever answers are."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import Finished, Start, assert_verified, task_runs

SMALL = (
    "--preset", "tiny", "--set", "warm_start.steps=3", "--set", "evaluation.num_prompts=20",
    "--set", "groups_per_step=32", "--set", f"reward={Path(__file__).parent / 'rewards.py'}:by_hash",
)  # fmt: skip


@pytest.fixture(scope="session")
def started(start_run: Start) -> dict[str, Callable[[], Finished]]:
    """Both at the same time. The async one has two replicas, and every one of its stages fails once.

    Its responses are long, one group at once: generation is what the trainer waits for, so that every swap finds
    requests under way, however the machine is loaded.
    """
    faulty = [sys.executable, str(Path(__file__).parent / "faulty_run.py")]
    return {
        "async": start_run(
            "async", *SMALL, "--regime", "async", "--set", "steps=7", "--set", "segment_steps=3",
            "--set", "generators.replicas=2", "--set", "generators.max_sequences=8",
            "--set", "sampling.max_tokens=64", "--set", "groups_per_step=16",
            "--set", "algorithm.minibatches=1",
            program=faulty,
        ),
        "hybrid": start_run(
            "hybrid", *SMALL, "--regime", "hybrid", "--set", "steps=5",
            "--set", "profile.steps=[1,1]",
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def async_run(started: dict[str, Callable[[], Finished]]) -> Finished:
    run = started["async"]()
    assert run.code == 0, run.errors
    return run


@pytest.fixture(scope="session")
def hybrid_run(started: dict[str, Callable[[], Finished]]) -> Finished:
    run = started["hybrid"]()
    assert run.code == 0, run.errors
    return run


def test_async_swaps_weights_under_living_requests(async_run: Finished) -> None:
    versions = [set(row["token_policy_versions"]) for row in _episodes(async_run)]
    assert any(len(of_episode) > 1 for of_episode in versions)
    assert {f["policy_version"] for f in async_run.facts("published")} == set(range(8))


@pytest.mark.parametrize("regime", ["async", "hybrid"])
def test_generating_and_training_overlap(
    regime: str, async_run: Finished, hybrid_run: Finished, tiny_run: Finished
) -> None:
    """How far is proved by `make prove BAR=regimes`, on a machine that does nothing else."""
    run = {"async": async_run, "hybrid": hybrid_run}[regime]
    assert run.summary["seconds"]["overlap"]["both"] > 0
    assert tiny_run.summary["seconds"]["overlap"]["both"] == 0


def test_async_loses_no_draw_and_exceeds_no_age(async_run: Finished) -> None:
    _is_whole(async_run, num_groups=7 * 16)
    assert 1 <= async_run.summary["age"]["max"] <= async_run.summary["config"]["max_policy_age"]
    assert async_run.summary["bitwise"] is False


def test_hybrid_trains_a_round_while_it_collects_the_next(hybrid_run: Finished) -> None:
    _is_whole(hybrid_run, num_groups=5 * 32)
    assert [step["age_max"] for step in hybrid_run.facts("step")] == [0, 1, 2, 3, 2]
    assert [f["policy_version"] for f in hybrid_run.facts("published")] == [0, 2, 4, 5]


def test_async_has_one_task_per_stage_and_segment(async_run: Finished, prefect_server: str) -> None:
    """Stages that lost an answer are tried again, and do not repeat what is true already."""
    retried = Counter(fact["stage"] for fact in async_run.facts("retry"))
    assert retried == {"generate": 1, "score": 1, "buffer": 1, "train": 1}
    runs = task_runs(prefect_server, async_run.run_id, at_least=3 * 4 + 6)
    names = Counter(run["name"].split()[0] for run in runs)
    assert {name: names[name] for name in ("generate", "score", "buffer", "train")} == {
        "generate": 3, "score": 3, "buffer": 3, "train": 3,
    }  # fmt: skip
    twice = Counter(run["name"].split()[0] for run in runs if run["run_count"] == 2)
    assert twice == {"generate": 1, "score": 1, "buffer": 1, "train": 1}


def test_hybrid_has_one_task_per_stage_and_round(hybrid_run: Finished, prefect_server: str) -> None:
    runs = task_runs(prefect_server, hybrid_run.run_id, at_least=3 * 4 + 8)
    names = Counter(run["name"].split()[0] for run in runs)
    assert {name: names[name] for name in ("generate", "score", "buffer", "train")} == {
        "generate": 3, "score": 3, "buffer": 3, "train": 3,
    }  # fmt: skip


def test_a_profiled_step_leaves_traces_and_memory_that_the_report_links(
    hybrid_run: Finished,
) -> None:
    folder = hybrid_run.folder / "profiles"
    names = [
        f"{process}-step-000001.{kind}"
        for process in ("generator-0", "trainer-0")
        for kind in ("memory.json", "trace.json.gz")
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    memory = json.loads((folder / names[2]).read_bytes())
    sizes = memory["tensors_bytes"]
    assert sizes["optimizer"] >= 2 * sizes["parameters"] > 0
    for name in (names[1], names[3]):
        trace = json.loads(gzip.decompress((folder / name).read_bytes()))
        assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])
    report = (hybrid_run.folder / "report.html").read_text()
    assert all(f'href="profiles/{name}"' in report for name in names)


def _is_whole(run: Finished, num_groups: int) -> None:
    groups = run.summary["groups"]
    assert groups["pending"] == 0
    assert groups["dropped"].keys() <= {"no_signal"}
    assert groups["admitted"] == num_groups
    assert groups["trained"] + sum(groups["dropped"].values()) == num_groups
    assert_verified(run.run_id, run.store)


def _episodes(run: Finished) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((run.store / "episodes" / "commits" / run.run_id).iterdir()):
        part = json.loads(path.read_bytes())["part"]["key"]
        rows += pq.read_table(run.store / part, columns=["token_policy_versions"]).to_pylist()
    return rows
