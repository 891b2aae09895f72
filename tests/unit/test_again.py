"""Groups that are trained on again, in a run's log: drawn, weighed, accounted for, the same when the run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
from made_episodes import table
from made_run import MadeRun
from pydantic import ValidationError

from forge_core.actors.messages import TrainRequest
from forge_core.algorithms.data import load_batch
from forge_core.config import RunConfig
from storage import facts, layout
from storage.groups import GroupState
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from storage.objects import LocalStore
from storage.verify import verify
from tasks.again import rebuild
from tasks.batches import choose_batch
from tasks.references import StepBatch
from tasks.run import ActiveRun

STEPS, SIZE = 6, 4
MIXTURE: dict[str, Any] = {
    "policy": "hybrid",
    "max_uses": 3,
    "sources": {
        "new": {"policy": "fresh", "fraction": 0.5},
        "success": {"policy": "fifo", "fraction": 0.25, "min_reward": 1.0, "capacity": 6},
        "hard": {"policy": "prioritised", "fraction": 0.25, "max_age": 2, "capacity": 6},
    },
}


def configure(buffer: dict[str, Any], **more: Any) -> RunConfig:
    given = {
        "regime": "hybrid",
        "steps_per_round": 1,
        "max_policy_age": 3,
        "group_size": 2,
        "groups_per_step": SIZE,
        "steps": STEPS,
        "buffer": buffer,
    }
    return RunConfig.model_validate({**given, **more})


class Run:
    """A run in a store whose steps are chosen by the code under test, and trained on by nobody."""

    def __init__(self, store: LocalStore, config: RunConfig) -> None:
        self.config = config
        self.made = MadeRun(store, **config.model_dump(mode="json"))
        self.made.warm_start()
        self.made.checkpoint(0)
        self.made.evaluate("initial", 0)
        self.active = self.take()

    def take(self) -> ActiveRun:
        """The run as a controller has it that goes on from the log."""
        made = self.made
        return ActiveRun(
            run_id="run",
            config=self.config,
            store_uri=made.store.uri,
            store=made.store,
            log=made.log,
            ledger=self.ledger(),
            meshes=cast(Any, None),
            environment=cast(Any, None),
            folder=made.store.root,
        )

    def ledger(self) -> Ledger:
        store = self.made.store
        return Ledger.fold(read_entries(store, "run"), read_incarnations(store, "run"))

    def step(self, step: int, *, flat: tuple[int, ...] = ()) -> StepBatch:
        draws = range(SIZE * (step - 1), SIZE * step)
        versions = [step - 1, step - 1]
        self.made.round(step, draws, table(draws, versions, flat=flat))
        self.active.ledger = self.ledger()
        batch = choose_batch(
            self.active,
            step,
            [layout.group_id("run", draw) for draw in draws],
            tokens_per_second=0.0,
        )
        ages = [step - 1 - int(group_id[-8:]) // SIZE for group_id in batch.group_ids]
        fact = facts.Step(
            step=step,
            group_ids=batch.group_ids,
            score_set="run",
            weights_digest=f"w{step}",
            policy_version=step,
            optimizer_updates=1,
            age_max=max(ages),
            age_mean=sum(ages) / len(ages),
            metrics={},
            checkpoint=None,
        )
        self.active.append(fact)
        return batch


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def run_through(store: LocalStore, config: RunConfig) -> tuple[Run, list[StepBatch]]:
    run = Run(store, config)
    return run, [run.step(step, flat=(5,)) for step in range(1, STEPS + 1)]


def about_groups(run: Run) -> list[tuple[str, str]]:
    """What `verify` finds, but for weights and checkpoints, which this run has not got."""
    other = ("weights", "checkpoint", "run_json", "evaluation")
    problems = verify(run.made.store, "run").problems
    return [(each.kind, each.sentence) for each in problems if each.kind not in other]


def test_a_mixture_reuses_groups_and_accounts_for_each(store: LocalStore) -> None:
    run, batches = run_through(store, configure(MIXTURE))
    run.active.append(facts.End(status="finished", reason=None))
    ledger = run.active.ledger
    assert [len(batch.group_ids) for batch in batches[2:]] == [8] * 4
    uses = [len(group.steps) for group in ledger.groups.values()]
    assert max(uses) == 3 and sum(uses) == sum(len(batch.group_ids) for batch in batches)
    assert uses.count(0) == 1, "the group without a signal"
    assert ledger.pending == [] and ledger.dropped == {"no_signal": 1}
    assert {group.released for group in ledger.groups.values()} >= {"used_up", "end_of_run", None}
    assert batches[0].metrics["buffer/frac_reused"] == 0.0
    assert batches[5].metrics["buffer/frac_reused"] == 0.5
    assert batches[5].weights is not None and max(batches[5].weights) == 1.0
    assert about_groups(run) == []
    assert verify(store, "run").counted["uses"] == sum(uses)


@pytest.mark.parametrize("policy", ["fifo", "prioritised", "reservoir"])
def test_a_buffer_without_fresh_groups_drops_what_it_never_drew(
    store: LocalStore, policy: str
) -> None:
    buffer = {"policy": policy, "max_uses": 2, "capacity": SIZE + 3}
    run, batches = run_through(store, configure(buffer))
    run.active.append(facts.End(status="finished", reason=None))
    assert all(0 < len(batch.group_ids) <= SIZE for batch in batches)
    ledger = run.active.ledger
    dropped = [group for group in ledger.groups.values() if group.state is GroupState.DROPPED]
    assert {group.reason for group in dropped} <= {
        "no_signal", "evicted", "passed_over", "stale", "end_of_run",
    }  # fmt: skip
    assert len(dropped) > 1 and ledger.pending == [] and not ledger.problems
    assert about_groups(run) == []


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    _, whole = run_through(LocalStore(tmp_path / "whole"), configure(MIXTURE))
    run = Run(LocalStore(tmp_path / "broken"), configure(MIXTURE))
    broken = []
    for step in range(1, STEPS + 1):
        run.active = run.take()
        broken.append(run.step(step, flat=(5,)))
    assert broken == whole


def test_a_batch_that_the_log_has_is_the_batch(store: LocalStore) -> None:
    run, batches = run_through(store, configure(MIXTURE))
    before = len(list(read_entries(store, "run")))
    again = run.take()
    for batch in batches:
        considered = again.ledger.considered(batch.step)
        assert len(considered) == SIZE
        assert choose_batch(again, batch.step, considered, tokens_per_second=0.0) == batch
    assert len(list(read_entries(store, "run"))) == before


def test_a_buffer_that_could_not_be_logged_is_made_anew(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(store, configure(MIXTURE))
    first = run.step(1)
    put = LocalStore.put_if_absent

    def refuses(self: LocalStore, key: str, data: bytes) -> Any:
        if b'"batched"' in data:
            raise OSError("no space")
        return put(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", refuses)
        with pytest.raises(OSError, match="no space"):
            run.step(2)
    groups = [layout.group_id("run", draw) for draw in range(SIZE, 2 * SIZE)]
    batch = choose_batch(run.active, 2, groups, tokens_per_second=0.0)
    assert set(groups) < set(batch.group_ids) and set(batch.group_ids) - set(groups) <= set(
        first.group_ids
    )


def test_a_log_whose_buffer_let_others_go_is_refused(store: LocalStore) -> None:
    run, _ = run_through(store, configure(MIXTURE))
    run.made.edit_fact("released", reason="stale")
    with pytest.raises(ValueError, match="other groups leave the buffer than the log says"):
        rebuild(run.config, run.ledger())


def test_verify_holds_uses_ages_weights_and_accounts_against_the_log(store: LocalStore) -> None:
    run, _ = run_through(store, configure(MIXTURE))
    run.active.append(facts.End(status="finished", reason=None))
    made = run.made

    def found(kind: str) -> str:
        return " | ".join(sentence for k, sentence in about_groups(run) if k == kind)

    key = layout.config_key("run")
    was = store.read(key)
    made.edit(key, lambda config: config["buffer"].update(max_uses=2))
    assert "and may be used 2x" in found("uses") and "may be used 2x" in found("trained_twice")
    store.replace(key, was)
    made.edit(key, lambda config: config["buffer"]["sources"]["hard"].update(max_age=1))
    made.edit(key, lambda config: config["buffer"]["sources"]["success"].update(max_age=1))
    assert "at most 1 is allowed" in found("age")
    store.replace(key, was)
    made.edit(key, lambda config: config.update(buffer={"policy": "once"}))
    assert "the config says otherwise" in found("buffer")
    store.replace(key, was)

    entry, place = made.find("batched", 3)
    was = store.read(entry)

    def tampered(change: Any, kind: str) -> str:
        made.edit(entry, lambda content: change(content["facts"][place]))
        told = found(kind)
        store.replace(entry, was)
        return told

    assert "has weight 0.0" in tampered(lambda f: f["uses"][0].update(weight=0.0), "buffer")
    assert "'other', which the config" in tampered(
        lambda f: f["uses"][0].update(source="other"), "buffer"
    )
    assert "which was not given it" in tampered(
        lambda f: f["uses"][-1].update(source="fresh"), "buffer"
    )
    assert "has tokens of version 3" in tampered(
        lambda f: f["kept"][0].update(policy_version=4), "buffer"
    )
    assert "with a mean reward of 7" in tampered(lambda f: f["kept"][0].update(reward=7), "buffer")
    assert "8 groups and 7 uses" in tampered(lambda f: f["uses"].pop(), "buffer")
    assert "at steps 3 and 4" in tampered(
        lambda f: f["kept"][0].update(group_id="run-00000008"), "buffer"
    )

    made.edit_fact("released", group_ids=[])
    assert "never let go" in found("buffer")


def test_a_group_that_left_is_in_no_later_batch(store: LocalStore) -> None:
    run, batches = run_through(store, configure(MIXTURE))
    made = run.made
    made.log.append(
        facts.Released(step=6, group_ids=(batches[0].group_ids[0],), reason="evicted"),
        facts.Batched(step=7, group_ids=(batches[0].group_ids[0],)),
    )
    told = [problem.sentence for problem in run.ledger().problems]
    assert any("left the buffer as" in each and "and as evicted" in each for each in told)
    assert any("before it was batched for step 7" in each for each in told)


def test_weights_reach_the_loss_as_multiples_of_advantages(store: LocalStore) -> None:
    run = Run(store, configure(MIXTURE))
    batch = run.step(1)
    request = TrainRequest(run_id="run", step=1, commits=batch.commits, group_ids=batch.group_ids)
    plain = load_batch(store, request, run.config).sequences
    weighed = load_batch(
        store,
        TrainRequest(
            run_id="run",
            step=1,
            commits=batch.commits,
            group_ids=batch.group_ids,
            weights=(1.0, 0.5, 0.25, 1.0),
        ),
        run.config,
    ).sequences
    ratios = [b.advantage / a.advantage for a, b in zip(plain, weighed, strict=True)]
    assert ratios == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 1.0, 1.0])


@pytest.mark.parametrize(
    ("buffer", "more", "said"),
    [
        ({"policy": "hybrid"}, {}, "buffer.policy 'hybrid' with 0 sources"),
        ({"policy": "once", "max_uses": 2}, {}, "buffer.max_uses 2 is for groups that are kept"),
        ({"policy": "fifo", "capacity": 3}, {}, "buffer.capacity 3 is below groups_per_step 4"),
        ({"policy": "fifo", "max_age": 4}, {}, "buffer.max_age 4 is above max_policy_age 3"),
        (
            {"policy": "fifo", "unbounded": True},
            {},
            "buffer.unbounded trains on groups of any age, and nothing makes up for that",
        ),
        (
            {"policy": "fifo"},
            {"regime": "sync", "max_policy_age": 0},
            "buffer.unbounded is false and max_policy_age 0",
        ),
        (
            {"policy": "fifo"},
            {"regime": "hybrid", "train_rounds": True},
            "buffer.policy 'fifo' keeps what a run draws itself",
        ),
        (
            {**MIXTURE, "max_uses": 1},
            {},
            "buffer.max_uses 1 lets no fresh group be trained on again",
        ),
        (
            {"policy": "hybrid", "sources": {"a": {"policy": "fifo", "fraction": 0.5}}},
            {},
            "buffer.sources have fractions a 0.5, which sum to 0.5",
        ),
        (
            {
                "policy": "hybrid",
                "max_uses": 2,
                "sources": {
                    "a": {"policy": "fresh", "fraction": 0.95},
                    "b": {"policy": "fifo", "fraction": 0.05},
                },
            },
            {},
            "buffer.sources.b.fraction gives source 'b' no group of a step",
        ),
    ],
)
def test_a_buffer_that_cannot_work_is_refused(
    buffer: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    given = {"steps_per_round": 1, **more}
    with pytest.raises(ValidationError) as refused:
        configure(buffer, **given)
    (error,) = refused.value.errors()
    where = ".".join(map(str, error["loc"]))
    sentence = str(error["ctx"]["error"])
    assert (f"{where}.{sentence}" if where else sentence).startswith(said)


def test_groups_of_any_age_are_let_in_with_importance_weights() -> None:
    buffer = {"policy": "reservoir", "unbounded": True, "max_uses": 9}
    config = configure(
        buffer,
        regime="sync",
        max_policy_age=0,
        algorithm={"correction": {"anchor": "proximal"}},
    )
    assert config.buffer.held["reservoir"].max_age is None
