"""Generators and trainer that share a core and memory take turns, and nothing comes out otherwise for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import rewards
from harness import Finished, assert_verified
from sufferer import Sufferer
from watched_run import Watched, watch_run

ALLOWED_BYTES = int(3.3 * 2**30)
"""More than both ever hold in turns, and less than both hold when they work, which is half a GiB more."""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The tiny preset, cut short, in which a generator dies after the second step and the trainer after the third."""
    sufferer = Sufferer(
        tmp_path_factory.mktemp("colocated"), "colocated", "--set", "placement=colocated",
        "--set", "steps=4", "--set", "evaluation.num_prompts=20",
    )  # fmt: skip
    try:
        for number, (step, mesh) in enumerate(((2, "generator-0"), (3, "trainer"))):
            sufferer.until("step", step)
            sufferer.processes(mesh)[0].kill()
            sufferer.until("failed", number + 1)
        finished = sufferer.finish()
    finally:
        sufferer.end()
    assert finished.code == 0, finished.errors
    yield finished


def _episodes(run: Finished) -> dict[tuple[int, int], dict[str, Any]]:
    """Tokens of the first two rounds, by draw and sample."""
    found = {}
    for path in sorted((run.store / "episodes" / "commits" / run.run_id).iterdir()):
        part = json.loads(path.read_bytes())["part"]["key"]
        columns = ["draw", "sample", "response_token_ids", "logprobs"]
        for row in pq.read_table(run.store / part, columns=columns).to_pylist():
            if row["draw"] < 128:
                found[row["draw"], row["sample"]] = row
    return found


def test_sleep_changes_no_bit(run: Finished, tiny_run: Finished) -> None:
    """Weights after warm start and first step, and what two rounds sampled, are those of a run that lies apart."""
    ours, theirs = (
        [fact["weights_digest"] for fact in each.facts("published")][:2] for each in (run, tiny_run)
    )
    assert ours == theirs
    assert _episodes(run) == _episodes(tiny_run)


def test_turns_are_told(run: Finished) -> None:
    first, second, *_ = (fact["metrics"] for fact in run.facts("step"))
    # Load, load, publish and evaluate, and train; then publish and generate, and train.
    assert first["turns/number"] >= 4 and second["turns/number"] == 2
    assert 0 < first["turns/held_share"] <= 0.9
    assert run.summary["seconds"]["overlap"]["both"] == 0.0
    for kinds in run.summary["seconds"]["meshes"].values():
        assert kinds["unaccounted"] <= 0.02 * run.summary["seconds"]["total"]


def test_whoever_dies_comes_back_in_its_turn(run: Finished) -> None:
    """Steps that the trainer trained again gave the weights that the log has of them."""
    assert_verified(run.run_id, run.store)
    assert [failed["mesh"] for failed in run.facts("failed")] == ["generator-0", "trainer"]
    assert run.summary["steps"] == 4 and run.summary["groups"]["pending"] == 0
    assert not run.facts("diverged") and run.summary["bitwise"] is True


@pytest.fixture(scope="session")
def hybrid(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Four steps on one core, with a cache and batches that are large beside what libraries hold."""
    share = ALLOWED_BYTES / psutil.virtual_memory().total
    watched = watch_run(
        tmp_path_factory.mktemp("colocated-hybrid"), "colocated-hybrid", "--regime", "hybrid",
        "--set", "placement=colocated", "--set", f"memory_fraction={share}",
        "--set", "generators.threads=1", "--set", "trainer.ranks=1", "--set", "steps=4",
        "--set", "generators.kv_cache_gib=1.0", "--set", "algorithm.minibatches=1",
        "--set", "warm_start.steps=5", "--set", "evaluation.num_prompts=20",
        "--set", "sampling.max_tokens=32",
        "--set", f"reward={rewards.__file__}:by_hash",
        prefix=("taskset", "-c", "0"),
        environment={**os.environ, "PREFECT_API_URL": prefect_server},
    )  # fmt: skip
    assert watched.finished.code == 0, watched.finished.errors
    return watched


def test_both_are_never_resident_above_the_fraction(hybrid: Watched) -> None:
    assert len(hybrid.samples) > 100
    assert hybrid.largest_bytes <= ALLOWED_BYTES
    # Which they could not have kept awake, both at a time.
    alone = [hybrid.largest_alone(mesh) for mesh in ("generator-0", "trainer")]
    assert sum(alone) > ALLOWED_BYTES


def test_one_core_is_enough(hybrid: Watched) -> None:
    assert hybrid.cores == {"generator-0": {(0,)}, "trainer": {(0,)}}


def test_hybrid_rounds_come_one_after_the_other(hybrid: Watched) -> None:
    run = hybrid.finished
    assert_verified(run.run_id, run.store)
    assert run.summary["seconds"]["overlap"]["both"] == 0.0
    assert [step["age_max"] for step in run.facts("step")] == [0, 1, 2, 3]
    assert run.summary["groups"]["pending"] == 0
