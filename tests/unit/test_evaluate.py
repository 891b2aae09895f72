"""A run that only evaluates is held to that, and its command says what it cannot evaluate."""

import os
from collections.abc import Callable
from pathlib import Path

import made_run
import pytest
from made_episodes import table, weights_digest
from made_run import MadeRun
from typer.testing import CliRunner

from flows.cli import app
from flows.resume import config_from
from forge_core.actors.messages import ScoreReply
from forge_core.config import RunConfig
from forge_core.placement.roles import mesh_names, roles_of
from forge_core.settings import load_config
from storage import facts, layout
from storage.deleting import children
from storage.objects import LocalStore
from storage.records import PartRef
from tasks.evaluation import told


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return LocalStore(tmp_path)


def judged(
    store: LocalStore, *, version: int | None = 2, also: Callable[[MadeRun], object] = bool
) -> MadeRun:
    """An evaluation of step 2 of a finished run."""
    parent = made_run.finished(store)
    run = MadeRun(store, "judged", parent_run_id=parent.run_id, parent_step=2, evaluate_only=True)
    run.log.append(
        facts.Forked(
            parent_run_id=parent.run_id,
            parent_step=2,
            step=2,
            checkpoint=layout.checkpoint_folder(parent.run_id, 2),
            weights_digest=weights_digest(2),
        )
    )
    also(run)
    if version is not None:
        run.evaluate("final", version)
    run.end()
    return run


def test_it_needs_no_checkpoint_of_its_own_and_holds_no_other_run(store: LocalStore) -> None:
    assert judged(store).problems() == []
    assert children(store) == {}


def test_an_evaluation_of_other_weights_is_found(store: LocalStore) -> None:
    run = judged(store, version=1)
    assert ("evaluation", "final") in run.problems()
    assert "evaluation final is of version 1, and the run of 2" in run.told("evaluation")


def test_one_that_evaluated_nothing_is_found(store: LocalStore) -> None:
    run = judged(store, version=None)
    assert run.told("evaluation") == "the run only evaluates, and finished without doing so"


def test_what_it_drew_and_trained_is_found(store: LocalStore) -> None:
    def train(run: MadeRun) -> None:
        run.round(0, [0, 1], table([0, 1], [2, 2], run_id=run.run_id))
        run.train(3, [0, 1])

    told = judged(store, also=train).told("evaluation")
    assert "step 3 was trained by a run that evaluates" in told
    assert "group judged-00000000 was drawn by a run that evaluates" in told


def test_nothing_is_opened_that_only_training_needs() -> None:
    chosen = ["algorithm.kl.coefficient=0.1", "parent_run_id=r", "parent_step=2"]
    trains = load_config(preset="tiny", file=None, overrides=chosen)
    judges = load_config(preset="tiny", file=None, overrides=[*chosen, "evaluate_only=true"])
    assert roles_of(trains) - roles_of(judges) == {"reference"}
    assert "reference" not in mesh_names(judges)
    assert judges.trains is False


def test_it_needs_a_parent_and_is_of_one_kind() -> None:
    with pytest.raises(ValueError, match="evaluate_only needs a run whose weights it evaluates"):
        RunConfig.model_validate({"evaluate_only": True})
    kinds = {"regime": "hybrid", "train_rounds": True, "evaluate_only": True}
    with pytest.raises(ValueError, match="train_rounds and evaluate_only exclude each other"):
        RunConfig.model_validate(kinds)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run@7"], "'run' has no checkpoint of step 7"),
        (["run@last"], "'run@last' names no step: write RUN@STEP, such as run@10"),
        (["run", "--set", "parent_step=0"], "parent_run_id and parent_step follow from 'run'"),
        (["run", "--run-id", "run"], "--run-id 'run' exists"),
        (["other"], "other"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    store: LocalStore, arguments: list[str], told: str
) -> None:
    run = made_run.finished(store)
    config = load_config(preset="tiny", file=None, overrides=[])
    store.replace(layout.config_key(run.run_id), config.model_dump_json().encode())
    done = CliRunner().invoke(app, ["evaluate", *arguments, "--store", store.uri])
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.output.split())


def test_what_a_run_evaluates_may_be_changed_and_its_weights_not(store: LocalStore) -> None:
    run = made_run.finished(store)
    config = load_config(preset="tiny", file=None, overrides=["regime=async"])
    store.replace(layout.config_key(run.run_id), config.model_dump_json().encode())
    given = {"evaluate_only": True}
    chosen = config_from(
        "run", file=None, overrides=["evaluation.num_prompts=7"], store=store.uri, given=given
    )
    assert (chosen.parent_run_id, chosen.parent_step, chosen.evaluate_only) == ("run", 2, True)
    assert chosen.evaluation.num_prompts == 7
    with pytest.raises(ValueError, match="model differs from that of run 'run'"):
        config_from(
            "run", file=None, overrides=["model.tiny.num_layers=1"], store=store.uri, given=given
        )


def test_an_evaluation_tells_means_and_pass_at_k() -> None:
    """Two replicas with one prompt each; of four samples one, and then three, are right."""
    part = PartRef(key="p", sha256="0" * 64, bytes=1, rows=5)
    replies = [
        ScoreReply(
            commit=None, part=part, group_ids=("g",), num_episodes=5, intervals=(), rewards=(row,)
        )
        for row in ((0.0, 1.0, 0.0, 0.2, 1.0), (1.0, 0.9, 0.0, 0.7, 0.5))
    ]  # fmt: skip
    fact = told("final", 3, replies, 4)
    assert (fact.num_prompts, fact.num_samples, len(fact.parts)) == (2, 4, 2)
    assert fact.sampled == pytest.approx(3.8 / 8) and fact.greedy == 0.75
    found = {each.k: each.probability for each in fact.pass_at}
    # Of six pairs, three hold the one that is right; of the other prompt's, all hold one of three.
    assert found == {1: pytest.approx(0.5), 2: pytest.approx((3 / 6 + 1) / 2), 4: 1.0}
