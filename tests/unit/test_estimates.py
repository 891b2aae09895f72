"""What reference and critic say of a batch: of the weights due, told once, kept for a retraining.

The meshes are left out; log, ledger and store are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from forge_core.actors.messages import (
    CheckpointReply,
    CriticReply,
    EstimateReply,
    TrainReply,
)
from forge_core.config import RunConfig
from forge_core.meshes import Mesh, Meshes
from storage import facts, layout
from storage.estimates import reference_step
from storage.ledger import Ledger
from storage.log import RunLog, read_incarnations
from storage.objects import LocalStore
from storage.records import Controller, FileRef
from storage.verify_estimates import estimate_problems
from tasks.checkpoints import superfluous
from tasks.learn import train_step
from tasks.references import StepBatch
from tasks.run import ActiveRun

LEARNED = CriticReply(metrics={"loss/value_avg": 0.5}, nonfinite=None, batch_key=None, intervals=())
TRAINED = TrainReply(
    step=1, weights_digest="w1", optimizer_updates=1, age_max=1, age_mean=1.0, metrics={},
    seconds=0.5, intervals=(),
)  # fmt: skip


class FakeMesh:
    """Answers each endpoint and remembers what it was asked."""

    def __init__(self, name: str, answers: dict[str, Any]) -> None:
        self.name, self.answers, self.openings = name, answers, 1
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def has_failed(self) -> bool:
        return False

    async def call(self, endpoint: str, *arguments: Any, timeout_seconds: float) -> list[Any]:
        assert timeout_seconds > 0
        self.asked.append((endpoint, arguments))
        answer = self.answers[endpoint]
        return [answer(*arguments) if callable(answer) else answer]

    def endpoints(self) -> list[str]:
        return [endpoint for endpoint, _ in self.asked]


def a_file(store: LocalStore, key: str) -> FileRef:
    store.put_if_absent(key, b"figures")
    digest = hashlib.sha256(b"figures").hexdigest()
    return FileRef(key=key, sha256=digest, bytes=7)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ActiveRun]:
    """A run of ppo with a reference that is refreshed every two steps, at its beginning."""
    store = LocalStore(tmp_path)
    document = {
        "algorithm": {"loss": "ppo", "kl": {"coefficient": 0.1, "refresh_steps": 2}},
        "checkpoint": {"keep_last": 1},
    }

    def checkpointed(request: Any) -> CheckpointReply:
        return CheckpointReply(step=request.step, weights_digest=f"w{request.step}")

    def finished(step: int, digest: str, wait: bool) -> CheckpointReply:
        key = layout.checkpoint_folder("r", step)
        return CheckpointReply(step=step, weights_digest=digest, key=key)

    trainer = FakeMesh(
        "trainer",
        {
            "train": lambda request: dataclasses.replace(
                TRAINED, step=request.step, weights_digest=f"w{request.step}"
            ),
            "begin_checkpoint": checkpointed,
            "finish_checkpoint": finished,
        },
    )
    reference = FakeMesh(
        "reference", {"estimate": EstimateReply(file=a_file(store, "logprobs"), intervals=())}
    )
    critic = FakeMesh(
        "critic",
        {
            "restore": (), "train": LEARNED, "undo": None,
            "checkpoint": lambda request: (FileRef(key=f"c{request.step}", sha256="0" * 64, bytes=0),),
            "estimate": EstimateReply(file=a_file(store, "values"), intervals=()),
        },
    )  # fmt: skip
    log = RunLog.claim(store, "r", Controller.this_process(versions={}, git_commit=None))
    made = ActiveRun(
        run_id="r",
        config=RunConfig.model_validate(document),
        store_uri=store.uri,
        store=store,
        folder=store.root,
        log=log,
        ledger=Ledger.fold([], read_incarnations(store, "r")),
        meshes=Meshes(
            generators=(),
            opened_trainer=cast(Mesh, trainer),
            opened_verifier=None,
            opened_reference=cast(Mesh, reference),
            opened_critic=cast(Mesh, critic),
        ),
        environment=cast(Any, None),
    )
    made.append(
        facts.Checkpoint(
            step=0, key=layout.checkpoint_folder("r", 0), weights_digest="w0", files=()
        )
    )
    yield made


def fake(mesh: Any) -> FakeMesh:
    return cast(FakeMesh, mesh)


def a_batch(run: ActiveRun, step: int, name: str = "g") -> StepBatch:
    groups = (f"{name}{step}",)
    run.append(facts.Batched(step=step, group_ids=groups))
    return StepBatch(step=step, commits=(), group_ids=groups, metrics={})


def train(run: ActiveRun, batch: StepBatch) -> bool:
    return asyncio.run(train_step(run, batch))


def test_a_reference_is_the_policy_after_the_last_multiple_before_the_step() -> None:
    def steps(base: int, every: int) -> list[int]:
        found = range(base + 1, base + 8)
        return [reference_step(s, base_step=base, refresh_steps=every) for s in found]

    assert steps(0, 0) == [0] * 7
    assert steps(5, 0) == [5] * 7
    assert steps(0, 3) == [0, 0, 0, 3, 3, 3, 6]
    assert steps(5, 2) == [5, 5, 7, 7, 9, 9, 11]


def test_each_step_has_the_logprobs_of_its_reference_and_the_values_before_it(
    run: ActiveRun,
) -> None:
    for step in range(1, 6):
        assert train(run, a_batch(run, step))
    weights = [asked.weights for _, (asked,) in fake(run.meshes.reference).asked]
    assert [(each.step, each.weights_digest) for each in weights] == [
        (0, "w0"), (0, "w0"), (2, "w2"), (2, "w2"), (4, "w4"),
    ]  # fmt: skip
    # Taken for the reference alone, and only the newest of them is still needed.
    assert sorted(run.ledger.checkpoints) == [0, 2, 4]
    assert sorted(run.ledger.pruned) == [2]
    assert run.ledger.checkpoints[4].critic[0].key == "c4"
    assert run.ledger.checkpoints[0].critic == ()
    trained = [asked for name, (asked, *_) in fake(run.meshes.trainer).asked if name == "train"]
    assert {(r.reference_logprobs.key, r.values.key) for r in trained} == {("logprobs", "values")}
    told = [each for of_step in run.ledger.estimates.values() for each in of_step.values()]
    assert [(t.step, t.weights_step) for t in told if t.what == "values"] == [
        (step, step - 1) for step in range(1, 6)
    ]
    assert run.ledger.steps[5].metrics["loss/value_avg"] == 0.5
    assert fake(run.meshes.critic).endpoints()[:3] == ["restore", "estimate", "train"]
    assert fake(run.meshes.critic).endpoints().count("restore") == 1
    assert [p for p in run.ledger.problems if p.kind == "estimated"] == []


def test_the_checkpoint_of_the_reference_is_kept(run: ActiveRun) -> None:
    for step in (1, 2, 3):
        train(run, a_batch(run, step))
    run.append(
        facts.Checkpoint(step=3, key="k", weights_digest="w3", files=()),
    )
    assert superfluous(run) == ()
    train(run, a_batch(run, 4))
    train(run, a_batch(run, 5))
    assert set(superfluous(run)).isdisjoint({0, 4})


def test_a_step_that_is_trained_again_has_what_was_told_before(run: ActiveRun) -> None:
    batch = a_batch(run, 1)
    train(run, batch)
    run.append(facts.Restored(step=0, weights_digest="w0"))
    train(run, batch)
    assert fake(run.meshes.reference).endpoints() == ["estimate"]
    assert fake(run.meshes.critic).endpoints() == ["restore", "estimate", "train", "train"]


def test_a_batch_that_is_given_up_is_unlearned_and_told_of_anew(run: ActiveRun) -> None:
    good = fake(run.meshes.trainer).answers["train"]
    fake(run.meshes.trainer).answers["train"] = dataclasses.replace(
        TRAINED, weights_digest="w0", nonfinite="the loss is nan", batch_key="k"
    )
    run.append(
        facts.Admitted(
            round=1,
            draws=(facts.Draw(draw=0, group_id="g1", prompt_id="p", environment="e", index=0),),
        )
    )
    assert not train(run, a_batch(run, 1))
    assert fake(run.meshes.critic).asked[-1] == ("undo", (1,))
    assert run.ledger.estimates == {}
    fake(run.meshes.trainer).answers["train"] = good
    assert train(run, a_batch(run, 1, "h"))
    assert fake(run.meshes.reference).endpoints() == ["estimate", "estimate"]


def test_a_critic_that_is_not_finite_costs_the_batch_before_the_policy_learns(
    run: ActiveRun,
) -> None:
    fake(run.meshes.critic).answers["train"] = CriticReply(
        metrics={}, nonfinite="the critic's loss is nan", batch_key="k", intervals=()
    )
    run.append(
        facts.Admitted(
            round=1,
            draws=(facts.Draw(draw=0, group_id="g1", prompt_id="p", environment="e", index=0),),
        )
    )
    assert not train(run, a_batch(run, 1))
    assert fake(run.meshes.trainer).asked == []
    assert run.ledger.nonfinite == {1: 1}


def test_a_run_without_either_asks_nobody(run: ActiveRun) -> None:
    run.meshes = dataclasses.replace(run.meshes, opened_reference=None, opened_critic=None)
    assert train(run, a_batch(run, 1))
    assert run.ledger.estimates == {}
    ((_, (asked,)),) = fake(run.meshes.trainer).asked
    assert (asked.reference_logprobs, asked.values) == (None, None)


def problems(run: ActiveRun, **algorithm: Any) -> list[str]:
    config = run.config.model_dump(mode="json")
    config["algorithm"].update(algorithm)
    found = estimate_problems(run.store, config, run.ledger, Counter())
    return [problem.sentence for problem in found]


def test_verify_finds_estimates_that_lack_or_are_of_other_weights(run: ActiveRun) -> None:
    for step in (1, 2, 3):
        train(run, a_batch(run, step))
    assert problems(run) == []
    assert problems(run, kl={"coefficient": 0.1, "refresh_steps": 0}) == [
        "the reference_logprobs of step 3 are of step 2; 0 is due"
    ]
    assert "the values of step 1 are of step 0; 0 is due" in problems(run, loss="dapo")
    del run.ledger.estimates[2]["values"]
    assert problems(run) == ["step 2 was trained without values, which its config asks for"]
