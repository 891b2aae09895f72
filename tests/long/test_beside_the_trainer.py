"""PPO with a critic and a refreshed reference: a run that was killed, or whose reference and critic were, comes to the
weights of the undisturbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from audits import audit_store
from harness import Finished, assert_verified
from sufferer import Sufferer

from benchmarks.kill_matrix import SMALL, Point, Survivor, survive, weights_bytes
from storage.ledger import Ledger
from storage.objects import LocalStore
from storage.resume import read_ledger

RUN_SECONDS = 280
pytestmark = pytest.mark.timeout(600)

OPTIONS = (
    *SMALL,
    "--set", "algorithm.loss=ppo",
    "--set", "algorithm.kl.coefficient=0.02", "--set", "algorithm.kl.place=reward",
    "--set", "algorithm.kl.estimator=k1", "--set", "algorithm.kl.refresh_steps=2",
)  # fmt: skip
CASES: dict[str, list[Point]] = {
    "undisturbed": [],
    # After the checkpoint of step 4, which is the reference's, in the step that needs it and the critic for the second
    # time since.
    "killed": [Point(kind="step", nth=5, delay_seconds=0.0)],
}


@pytest.fixture(scope="module")
def survivors(
    prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalStore, dict[str, Future[Survivor]]]]:
    """Both under way at the same time, and a third beside them."""
    folder = tmp_path_factory.mktemp("beside")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("PREFECT_API_URL", prefect_server)
        yield (
            LocalStore(folder),
            {
                name: pool.submit(survive, str(folder), name, "sync", points, audit_store, OPTIONS)
                for name, points in CASES.items()
            },
        )


def ledger_of(survivors: tuple[LocalStore, dict[str, Future[Survivor]]], name: str) -> Ledger:
    store, futures = survivors
    survivor = futures[name].result(RUN_SECONDS)
    assert survivor.problems == [], "verify and an audit of its own find nothing"
    return read_ledger(store, name)


def test_each_step_has_logprobs_of_its_reference_and_values_of_the_critic(
    survivors: tuple[LocalStore, dict[str, Future[Survivor]]],
) -> None:
    ledger = ledger_of(survivors, "undisturbed")
    told = {
        step: {t.what: t.weights_step for t in e.values()} for step, e in ledger.estimates.items()
    }
    assert told == {
        step: {"values": step - 1, "reference_logprobs": (step - 1) // 2 * 2}
        for step in range(1, 7)
    }
    metrics = [ledger.steps[step].metrics for step in range(1, 7)]
    # Version 0 is its own reference at first; then the policy moves away from it.
    assert abs(metrics[0]["kl_penalty"]) < 1e-4
    assert metrics[1]["kl"] != 0.0
    assert all(m["critic/grad_norm"] > 0 for m in metrics)
    # It has learned something of the rewards.
    assert metrics[-1]["loss/value_avg"] < metrics[0]["loss/value_avg"]
    assert metrics[-1]["val/value_mean"] > 0.1 > metrics[0]["val/value_mean"] == 0.0
    assert {"reference", "critic"} <= ledger.meshes.keys()
    assert ledger.checkpoints[4].critic and not ledger.checkpoints[0].critic


def test_a_killed_run_comes_to_the_same_weights(
    survivors: tuple[LocalStore, dict[str, Future[Survivor]]],
) -> None:
    whole, again = (ledger_of(survivors, name) for name in CASES)
    (death,) = survivors[1]["killed"].result().deaths
    assert death.is_provisional, "a step was trained again, with the same estimates"
    assert len(again.trained) > len(again.steps) == 6
    assert again.weights == whole.weights
    assert weights_bytes(survivors[0], "killed") == weights_bytes(survivors[0], "undisturbed")
    last = [ledger.checkpoints[6].critic for ledger in (whole, again)]
    assert [file.sha256 for file in last[0]] == [file.sha256 for file in last[1]] != []


def test_so_does_one_whose_reference_and_critic_are_killed(
    survivors: tuple[LocalStore, dict[str, Future[Survivor]]],
) -> None:
    store, _ = survivors
    finished = _killed_beside(store.root)
    assert finished.code == 0, finished.errors
    assert_verified("beside", store.root)
    assert [failure["mesh"] for failure in finished.facts("failed")] == ["reference", "critic"]
    whole, mended = ledger_of(survivors, "undisturbed"), read_ledger(store, "beside")
    assert mended.weights == whole.weights
    assert weights_bytes(store, "beside") == weights_bytes(store, "undisturbed")
    critics = [ledger.checkpoints[6].critic for ledger in (whole, mended)]
    assert [file.sha256 for file in critics[0]] == [file.sha256 for file in critics[1]] != []


def _killed_beside(store: Path) -> Finished:
    """A run whose reference dies after its second step, and its critic after the next."""
    run = Sufferer(store, "beside", "--regime", "sync", *OPTIONS)
    try:
        for number, mesh in enumerate(("reference", "critic")):
            run.until("step", 2 + number)
            run.processes(mesh)[0].kill()
            run.until("failed", number + 1)
        return run.finish()
    finally:
        run.end()
