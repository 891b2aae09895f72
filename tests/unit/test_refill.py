"""Steps that lack groups with a signal are filled up with spare draws: how many, how often, and again after a loss.

No process is started: log, ledger and episodes are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from forge_core.meshes import Meshes
from storage import facts
from storage.ledger import Ledger
from storage.log import read_entries, read_incarnations
from tasks import run as run_module
from tasks.collect import buffer
from tasks.references import Round, Scored, StepBatch
from tasks.refill import drawn_for, may_fill_up, spare_round, spare_round_to_batch
from tasks.run import ActiveRun

MakeRun = Callable[..., Any]
PastRun = Any


@pytest.fixture
def past(past_run: MakeRun) -> PastRun:
    """A run of three steps of four groups, each filled up at most twice."""
    return past_run("r", steps=3, algorithm={"dynamic_sampling_attempts": 2})


def taken(past: PastRun) -> ActiveRun:
    """The run as whoever holds it sees it, read from its log."""
    ledger = Ledger.fold(read_entries(past.store, "r"), read_incarnations(past.store, "r"))
    return ActiveRun(
        run_id="r",
        config=past.config,
        store_uri=past.store.uri,
        store=past.store,
        folder=past.store.root,
        log=past.log,
        ledger=ledger,
        meshes=Meshes(generators=(), opened_trainer=None, opened_verifier=None),
        environment=cast(Any, None),
    )


def batches(run: ActiveRun, first: int = 1, last: int = 1) -> tuple[StepBatch, ...]:
    """What the steps of a round are trained on, as far as they have what they need."""
    token = run_module._current.set(run)
    try:
        scored = Scored(
            round=Round(number=first, first_step=first, last_step=last), tokens_per_second=0.0
        )
        return asyncio.run(cast(Any, buffer).__wrapped__(scored))
    finally:
        run_module._current.reset(token)


def test_a_step_that_lacks_groups_draws_so_many_beyond_those_that_are_planned(
    past: PastRun,
) -> None:
    past.round(1, range(4), flat=(1, 2))
    run = taken(past)
    assert batches(run) == ()
    assert run.ledger.dropped == {"no_signal": 2}
    assert run.ledger.batches == {}
    spare = spare_round(run, 1)
    assert (spare.spare_draws, list(spare.ordinals(4))) == ((12, 2), [12, 13])
    assert (spare.number, list(spare.steps)) == (13, [1])
    past.round(13, (12, 13), version=0, fills=1)
    # Whoever goes on from the log comes to the same.
    for _ in range(2):
        run = taken(past)
        (batch,) = batches(run)
        assert batch.group_ids == past.groups((0, 3, 12, 13))
        assert batch.metrics["frac_reward_zero_std"] == pytest.approx(2 / 6)
    assert run.ledger.dropped == {"no_signal": 2}
    assert not run.ledger.problems


def test_attempts_are_bounded_and_the_step_then_does_with_fewer(past: PastRun) -> None:
    past.round(1, range(4), flat=(0, 1, 2))
    assert batches(taken(past)) == ()
    past.round(13, (12, 13, 14), version=0, flat=(12, 13, 14), fills=1)
    run = taken(past)
    assert may_fill_up(run, 1) and batches(run) == ()
    assert spare_round(run, 1).spare_draws == (15, 3)
    past.round(16, (15, 16, 17), version=0, flat=(16, 17), fills=1)
    run = taken(past)
    assert not may_fill_up(run, 1)
    (batch,) = batches(run)
    assert batch.group_ids == past.groups((3, 15))
    assert run.ledger.dropped == {"no_signal": 8}


def test_a_round_of_spare_draws_that_broke_off_is_gone_on_with(past: PastRun) -> None:
    past.round(1, range(4), flat=(0,))
    assert batches(taken(past)) == ()
    past.log.append(
        facts.Admitted(
            round=13,
            step=1,
            draws=(
                facts.Draw(
                    draw=12,
                    group_id=past.groups((12,))[0],
                    prompt_id="p",
                    environment="e",
                    index=12,
                ),
            ),
        )
    )
    run = taken(past)
    assert spare_round(run, 1).spare_draws == (12, 1)
    assert drawn_for(run, 1) == list(past.groups(range(4)))
    assert len(run.ledger.pending) == 4


def test_the_steps_of_a_round_are_filled_up_one_after_the_other(past: PastRun) -> None:
    past.round(1, range(8), flat=(5,))
    run = taken(past)
    (first,) = batches(run, 1, 2)
    assert (first.step, first.group_ids) == (1, past.groups(range(4)))
    assert spare_round(run, 2).spare_draws == (12, 1)
    past.round(13, (12,), version=0, fills=2)
    first, second = batches(taken(past), 1, 2)
    assert second.group_ids == past.groups((4, 6, 7, 12))


def test_unless_asked_for_a_step_does_with_what_there_is(past_run: MakeRun) -> None:
    past = past_run("r", steps=3)
    past.round(1, range(4), flat=(1, 2))
    (batch,) = batches(taken(past))
    assert batch.group_ids == past.groups((0, 3))


@pytest.mark.parametrize("attempts", [0, 2])
def test_a_batch_that_is_given_up_gets_another_whatever_is_asked_for(
    past_run: MakeRun, attempts: int
) -> None:
    past = past_run("r", steps=3, algorithm={"dynamic_sampling_attempts": attempts})
    past.round(1, range(4))
    (batch,) = batches(taken(past))
    assert batch.group_ids == past.groups(range(4))
    past.drop(range(4), "nonfinite", 1)
    run = taken(past)
    assert batches(run) == ()
    assert spare_round(run, 1).spare_draws == (12, 4)
    past.round(13, range(12, 16), version=0, fills=1)
    assert spare_round_to_batch(taken(past), 1).spare_draws == (12, 4)
    run = taken(past)
    (batch,) = batches(run)
    assert batch.group_ids == past.groups(range(12, 16))
    assert spare_round_to_batch(run, 1).spare_draws == (12, 4)
    assert not run.ledger.problems


def test_a_critic_finds_a_signal_in_every_group(past_run: MakeRun) -> None:
    past = past_run("r", steps=3, algorithm={"loss": "ppo"})
    past.round(1, range(4), flat=(1, 2))
    (batch,) = batches(taken(past))
    assert batch.group_ids == past.groups(range(4))
