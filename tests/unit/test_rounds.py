"""Rounds that are collected apart: who gets which, how old they may grow, and what `verify` finds of faults."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import made_run
import pytest
from made_episodes import CONFIG, GROUP_SIZE, draw_of, table, weights_digest
from made_run import MadeRun
from typer.testing import CliRunner

from flows.cli import app
from forge_core.config import RunConfig
from forge_core.rounds import NotYet, claim_round
from storage import facts, layout
from storage.deleting import children
from storage.groups import GroupState
from storage.objects import LocalStore
from storage.resume import read_ledger
from storage.rounds import Claim, collected, read_claims, relied_on, round_steps, waits_for
from storage.runs import read_config, store_config

TRAINER = {
    "regime": "hybrid",
    "group_size": GROUP_SIZE,
    "groups_per_step": 2,
    "max_policy_age": 1,
    "steps_per_round": 1,
    "steps": 4,
    "train_rounds": True,
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


class Trainer(MadeRun):
    """A run that trains on rounds of others, with a whole config."""

    def __init__(self, store: LocalStore, **config: Any) -> None:
        whole = RunConfig.model_validate({**TRAINER, **config}).model_dump(mode="json")
        super().__init__(store, "T", **{**dict.fromkeys(CONFIG), **whole})
        self.warm_start()
        self.checkpoint(0)

    def take_in(self, other: MadeRun, number: int) -> None:
        claim = read_claims(self.store, "T")[number - 1]
        replayed = collected(self.store, claim, group_size=GROUP_SIZE)
        assert replayed is not None, other.run_id
        self.log.append(*replayed)

    def pause(self) -> None:
        self.log.append(facts.End(status="paused", reason="nothing is collected"))


class Collecting(MadeRun):
    """A run that collects a round, up to a point."""

    def __init__(self, store: LocalStore) -> None:
        claimed = claim_round(store, "T")
        assert claimed is not None
        name, config = claimed
        assert config.collect is not None and config.parent_step is not None
        super().__init__(store, name, **{**dict.fromkeys(CONFIG), **read_config(store, name)})
        self.number, self.version = config.collect.round, config.parent_step
        self.draws = range((config.collect.first_step - 1) * 2, config.collect.last_step * 2)
        self.log.append(
            facts.Forked(
                parent_run_id="T",
                parent_step=self.version,
                step=self.version,
                checkpoint=layout.checkpoint_folder("T", self.version),
                weights_digest=weights_digest(self.version),
            )
        )

    def collect(self, version: int | None = None, *, end: bool = True) -> Collecting:
        version = self.version if version is None else version
        draws = [*self.draws]
        self.round(self.number, draws, table(draws, [version], run_id=self.run_id))
        if end:
            self.hand_over()
            self.end()
        return self

    def hand_over(self, to_run: str = "T") -> None:
        groups = tuple(layout.group_id(self.run_id, draw) for draw in self.draws)
        self.log.append(facts.HandedOver(group_ids=groups, to_run=to_run))

    def groups(self) -> list[str]:
        return [layout.group_id(self.run_id, draw) for draw in self.draws]


def _trained(store: LocalStore) -> tuple[Trainer, Collecting, Collecting]:
    """Two rounds of version 0, both trained on."""
    trainer = Trainer(store)
    first, second = Collecting(store).collect(), Collecting(store).collect()
    for number, other in ((1, first), (2, second)):
        trainer.take_in(other, number)
        trainer.train(number, other.groups(), age=number - 1)
        trainer.checkpoint(number)
    trainer.pause()
    return trainer, first, second


# Claims


@pytest.mark.parametrize(
    ("number", "steps"), [(1, [4, 5]), (2, [6, 7]), (3, [8]), (4, []), (9, [])]
)
def test_rounds_follow_each_other_to_the_last_step(number: int, steps: list[int]) -> None:
    assert [*round_steps(number, after_step=3, steps_per_round=2, steps=8)] == steps


def test_a_round_is_claimed_with_the_newest_version_until_it_would_grow_too_old(
    store: LocalStore,
) -> None:
    trainer = Trainer(store)
    for number in (1, 2):
        name, config = claim_round(store, "T") or pytest.fail("none is left")
        assert (name, config.parent_run_id, config.parent_step) == (
            f"T-round-{number:06d}",
            "T",
            0,
        )
        assert config.collect is not None and not config.train_rounds
        assert (config.collect.round, config.collect.first_step) == (number, number)
    with pytest.raises(
        NotYet, match=r"round 3 of run T would be trained on at age 2.*version is 0"
    ):
        claim_round(store, "T")
    assert len(read_claims(store, "T")) == 2
    trainer.train(1, [])
    trainer.checkpoint(1)
    _, config = claim_round(store, "T") or pytest.fail("none is left")
    assert config.parent_step == 1


def test_a_larger_age_bound_lets_more_rounds_be_ahead(store: LocalStore) -> None:
    Trainer(store, max_policy_age=3)
    assert [(claim_round(store, "T") or pytest.fail())[0][-1] for _ in range(4)] == [*"1234"]
    assert claim_round(store, "T") is None


def test_claims_at_once_get_rounds_of_their_own(store: LocalStore) -> None:
    Trainer(store, max_policy_age=15, steps=8)
    with ThreadPoolExecutor(8) as pool:
        claimed = [*pool.map(lambda i: claim_round(store, "T", f"c{i}"), range(8))]
    rounds = [config.collect.round for _, config in claimed if config.collect]  # type: ignore[misc]
    assert sorted(rounds) == [*range(1, 9)]
    assert {claim.run_id for claim in read_claims(store, "T")} == {f"c{i}" for i in range(8)}


def test_what_cannot_be_claimed_is_refused(store: LocalStore) -> None:
    made_run.finished(store)
    with pytest.raises(ValueError, match="has no run 'T'"):
        claim_round(store, "T")
    store_config(store, "own", RunConfig(regime="hybrid").model_dump(mode="json"))
    with pytest.raises(ValueError, match="'own' generates for itself"):
        claim_round(store, "own")
    Trainer(store)
    with pytest.raises(ValueError, match="run 'run' exists"):
        claim_round(store, "T", "run")
    assert read_claims(store, "T") == []


def test_a_run_without_a_checkpoint_is_not_collected_for(store: LocalStore) -> None:
    config = RunConfig.model_validate(TRAINER)
    store_config(store, "T", config.model_dump(mode="json"))
    with pytest.raises(NotYet, match="no checkpoint yet"):
        claim_round(store, "T")


def test_a_claim_whose_process_died_at_once_can_be_resumed(store: LocalStore) -> None:
    Trainer(store)
    claim_round(store, "T")
    store.local_path(layout.config_key("T-round-000001")).unlink()
    assert relied_on(store, "T", 0) is None
    assert "did not begin" in (waits_for(store, "T", 1) or "")
    claim_round(store, "T")
    assert read_config(store, "T-round-000001")["collect"]["round"] == 1
    assert relied_on(store, "T", 0) == {0}
    assert relied_on(store, "T", 2) == set()


@pytest.mark.parametrize(("command", "code"), [("resume", 1), ("train-rounds", 0)])
def test_what_waits_for_a_round_says_so_and_only_a_trainer_has_done_its_work(
    store: LocalStore, command: str, code: int
) -> None:
    Trainer(store).pause()
    done = CliRunner().invoke(app, [command, "T", "--store", store.uri])
    sentence = "Run T has nothing to train: round 1 is not collected: forgeflow collect T.\n"
    assert (done.exit_code, done.stdout) == (code, sentence), done.output


# Handing over


def test_a_round_is_there_once_its_run_has_finished(store: LocalStore) -> None:
    Trainer(store)
    assert waits_for(store, "T", 1) == "round 1 is not collected: forgeflow collect T"
    run = Collecting(store).collect(end=False)
    (claim,) = read_claims(store, "T")
    assert collected(store, claim, group_size=GROUP_SIZE) is None
    assert "is being collected by run T-round-000001" in (waits_for(store, "T", 1) or "")
    run.hand_over()
    run.end()
    (fact,) = collected(store, claim, group_size=GROUP_SIZE) or ()
    assert fact.draws == tuple(draw_of(run.run_id, draw) for draw in (0, 1))
    assert waits_for(store, "T", 1) is None
    ledger = read_ledger(store, run.run_id)
    assert {group.state for group in ledger.groups.values()} == {GroupState.HANDED_OVER}
    assert ledger.pending == []


def test_a_run_that_trained_on_a_round_relies_on_who_collected_it(store: LocalStore) -> None:
    _, first, second = _trained(store)
    assert children(store) == {first.run_id: {"T"}, second.run_id: {"T"}}


def test_sections_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="no rounds that could be collected apart"):
        RunConfig.model_validate({"train_rounds": True})
    section = {"round": 1, "first_step": 1, "last_step": 1}
    with pytest.raises(ValueError, match="exclude each other"):
        RunConfig.model_validate({**TRAINER, "collect": section})
    with pytest.raises(ValueError, match="needs the run that it collects for"):
        RunConfig.model_validate({**TRAINER, "train_rounds": False, "collect": section})


# Verify


def test_sound_runs_have_no_problems(store: LocalStore) -> None:
    for run in _trained(store):
        assert run.problems() == []
    assert read_ledger(store, "T").status == "paused"


def test_a_missing_claim_is_found_by_both(store: LocalStore) -> None:
    trainer, first, _ = _trained(store)
    store.local_path(layout.round_key("T", 1)).unlink()
    assert "not claimed by run T-round-000001" in first.told("round")
    assert "run T-round-000001 were let in, which holds no round" in trainer.told("round")


def test_a_claim_of_other_draws_is_found(store: LocalStore) -> None:
    trainer, *_ = _trained(store)
    trainer.edit(layout.round_key("T", 2), lambda claim: claim.update(first_draw=0))
    assert "of other draws than those of round 2" in trainer.told("round")


def test_groups_in_the_wrong_step_are_found(store: LocalStore) -> None:
    trainer = Trainer(store)
    first, second = Collecting(store).collect(), Collecting(store).collect()
    trainer.take_in(first, 1)
    trainer.take_in(second, 2)
    trainer.train(1, second.groups(), age=0)
    assert "not of the draws of step 1" in trainer.told("round")


def test_a_group_that_is_trained_on_twice_is_found(store: LocalStore) -> None:
    trainer = Trainer(store)
    first = Collecting(store).collect()
    trainer.take_in(first, 1)
    trainer.train(1, first.groups(), age=0)
    trainer.train(2, first.groups(), age=1)
    assert {kind for kind, _ in trainer.problems()} == {"trained_twice", "round"}


def test_a_step_at_too_high_an_age_is_found(store: LocalStore) -> None:
    trainer = Trainer(store, max_policy_age=3)
    runs = [Collecting(store).collect() for _ in range(3)]
    for number, run in enumerate(runs, start=1):
        trainer.take_in(run, number)
        trainer.train(number, run.groups(), age=number - 1)
    assert trainer.problems() == []
    for each in ("T", *(run.run_id for run in runs)):
        trainer.edit(layout.config_key(each), lambda config: config.update(max_policy_age=1))
    assert "step 3 trained on group T-round-000003-00000004 at age 2" in trainer.told("age")
    assert "is 2 steps behind the last step of round 3" in runs[2].told("age")


def test_a_wrong_age_is_found(store: LocalStore) -> None:
    trainer = Trainer(store)
    first = Collecting(store).collect()
    trainer.take_in(first, 1)
    trainer.train(1, first.groups(), age=None)
    assert trainer.problems() == [("age", "step 1")]


def test_part_of_a_round_is_found(store: LocalStore) -> None:
    trainer = Trainer(store)
    first = Collecting(store).collect()
    (fact,) = collected(store, read_claims(store, "T")[0], group_size=GROUP_SIZE) or ()
    trainer.log.append(fact.model_copy(update={"draws": fact.draws[:1]}))
    assert trainer.problems() == [("round", first.groups()[1])]
    assert "handed over and not let in" in trainer.told("round")


def test_other_weights_than_the_trainers_are_found(store: LocalStore) -> None:
    trainer, first, _ = _trained(store)
    first.edit_fact("forked", weights_digest="0" * 64)
    assert "did not collect with weights of this run" in trainer.told("round")
    assert "fork" in {kind for kind, _ in first.problems()}


@pytest.mark.parametrize("left", ["pending", "elsewhere", "trained", "other version"])
def test_a_round_that_is_not_handed_over_as_it_should_is_found(
    store: LocalStore, left: str
) -> None:
    Trainer(store)
    run = Collecting(store).collect(1 if left == "other version" else 0, end=False)
    if left == "elsewhere":
        run.hand_over("another")
    elif left == "trained":
        run.hand_over()
        run.train(1, run.groups(), age=0)
    elif left == "other version":
        run.hand_over()
    run.end()
    found = {kind for kind, _ in run.problems()}
    expected = {
        "pending": {"pending"},
        "elsewhere": {"handed_over"},
        "trained": {"handed_over", "round"},
        "other version": {"round"},
    }
    assert found == expected[left]


def test_a_claim_is_read_back_as_it_was_written(store: LocalStore) -> None:
    Trainer(store)
    claim_round(store, "T", "mine")
    (claim,) = read_claims(store, "T")
    assert Claim.model_validate_json(claim.to_bytes()) == claim
    assert (claim.round, claim.run_id, claim.first_draw, claim.count) == (1, "mine", 0, 2)
