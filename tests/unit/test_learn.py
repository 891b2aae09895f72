"""The stages of a step stop a run whose two sides disagree, and count a repeated step once.

Prefect is left out (`__wrapped__` is the stage's own function), and the meshes are written by hand; the log and the
store are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from forge_core.actors.messages import LoadReply, PublishReply, TrainReply
from forge_core.config import RunConfig
from forge_core.meshes import Mesh, Meshes
from forge_core.timeline import Interval
from forge_core.weights.manifest import Manifest
from storage import facts, layout
from storage.ledger import Ledger
from storage.log import RunLog, read_entries, read_incarnations
from storage.objects import LocalStore
from storage.records import Controller
from tasks import run as run_module
from tasks.learn import BoundExceeded, check_parity, publish, train
from tasks.references import StepBatch
from tasks.run import ActiveRun

NUM_TOKENS = 40
PROBE = (tuple(range(NUM_TOKENS + 1)),)
AGREED = ((-0.5,) * NUM_TOKENS,)
MANIFEST = Manifest(policy_version=1, slots=(), bucket_bytes=(64,), digest="d1")
WEIGHTS = (Interval(kind="weights", start=1.0, end=1.5),)
PUT = PublishReply(
    manifest=MANIFEST, probe_logprobs=AGREED, probe_entropy=0.6, seconds=0.5, intervals=WEIGHTS
)
LOADED = LoadReply(
    policy_version=1, digest="d1", probe_logprobs=AGREED, seconds=0.25, intervals=WEIGHTS
)
TRAINED = TrainReply(
    step=1,
    weights_digest="d1",
    optimizer_updates=1,
    age_max=0,
    age_mean=0.0,
    metrics={"loss": 0.1, "sampling/sampling_logp_difference/max": 1e-5},
    seconds=0.1,
    intervals=(Interval(kind="train", start=0.1, end=0.2),),
)


class FakeMesh:
    """Answers each endpoint with what it was given."""

    def __init__(self, name: str, answers: dict[str, Any]) -> None:
        self.name = name
        self.answers = answers
        self.openings = 1

    def has_failed(self) -> bool:
        return False

    async def call(self, endpoint: str, *arguments: Any, timeout_seconds: float) -> list[Any]:
        assert timeout_seconds > 0
        return [self.answers[endpoint]]


@contextmanager
def holding(
    folder: Path, trainer: dict[str, Any], *generators: dict[str, Any]
) -> Iterator[ActiveRun]:
    """A run with fake meshes, as `current()` finds it."""
    store = LocalStore(folder)
    log = RunLog.claim(store, "r", Controller.this_process(versions={}, git_commit=None))
    meshes = Meshes(
        generators=tuple(
            cast(Mesh, FakeMesh(f"generator-{i}", answers)) for i, answers in enumerate(generators)
        ),
        opened_trainer=cast(Mesh, FakeMesh("trainer", trainer)),
        opened_verifier=cast(Mesh, FakeMesh("verifier", {})),
        opened_weights=cast(Mesh, FakeMesh("weights", {})),
    )
    run = ActiveRun(
        run_id="r",
        config=RunConfig(),
        store_uri=store.uri,
        store=store,
        folder=store.root,
        log=log,
        ledger=Ledger.fold([], read_incarnations(store, "r")),
        meshes=meshes,
        environment=cast(Any, None),
        probe=PROBE,
    )
    token = run_module._current.set(run)
    try:
        yield run
    finally:
        run_module._current.reset(token)


def bare(stage: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The stage's own function, run to its end."""
    function = cast(Any, stage).__wrapped__
    return lambda *arguments: asyncio.run(function(*arguments))


def shifted(by: float, num_tokens: int) -> LoadReply:
    """A generator that is off by so much on the first tokens."""
    row = [value + by if i < num_tokens else value for i, value in enumerate(AGREED[0])]
    return dataclasses.replace(LOADED, probe_logprobs=(tuple(row),))


def test_agreement_is_published(tmp_path: Path) -> None:
    with holding(tmp_path, {"publish": PUT}, {"load_version": LOADED}) as run:
        bare(publish)(1)
        (published,) = run.ledger.published
    assert published.policy_version == 1
    assert published.bytes == 64
    assert published.seconds == 0.75
    assert published.parity is not None and published.parity.max == 0.0
    assert run.ledger.meshes.keys() == {"trainer", "generator-0"}


@pytest.mark.parametrize(
    ("put", "loaded", "words"),
    [
        (PUT, shifted(0.02, 1), "0.0005 .* 0.02 "),
        (PUT, shifted(-0.0015, NUM_TOKENS), "0.0015 .* 0.0015 "),
        (PUT, shifted(float("nan"), 1), "not finite"),
        (
            dataclasses.replace(PUT, manifest=dataclasses.replace(MANIFEST, policy_version=0)),
            LOADED,
            "instead of 1",
        ),
    ],
)
def test_a_publish_beyond_a_bound_stops_the_run(
    tmp_path: Path, put: PublishReply, loaded: LoadReply, words: str
) -> None:
    """Also when only the second replica is off."""
    generators = [{"load_version": LOADED}, {"load_version": loaded}]
    with holding(tmp_path, {"publish": put}, *generators):
        with pytest.raises(BoundExceeded, match=words):
            bare(publish)(1)


def test_a_policy_that_is_certain_is_warned_of_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certain = dataclasses.replace(PUT, probe_entropy=0.09)
    with holding(tmp_path, {"publish": certain}, {"load_version": LOADED}) as run:
        bare(publish)(1)
        (published,) = run.ledger.published
        check_parity(run, published.model_copy(update={"policy_version": 2}))
    assert sum("too certain" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("gap", [0.02, float("nan"), float("inf")])
def test_recorded_logprobs_of_another_policy_stop_the_run(tmp_path: Path, gap: float) -> None:
    metrics = {**TRAINED.metrics, "sampling/sampling_logp_difference/max": gap}
    reply = dataclasses.replace(TRAINED, metrics=metrics)
    with holding(tmp_path, {"train": reply}) as run:
        with pytest.raises(BoundExceeded, match="do not agree"):
            bare(train)((_batch(),))
        assert not run.ledger.steps


def test_a_step_asked_twice_is_logged_once(tmp_path: Path) -> None:
    """Metrics that are no numbers are left out, for the log refuses them."""
    metrics = {**TRAINED.metrics, "entropy": float("nan")}
    with holding(
        tmp_path, {"train": dataclasses.replace(TRAINED, metrics=metrics, intervals=())}
    ) as run:
        bare(train)((_batch(),))
        bare(train)((_batch(),))
        assert len(run.ledger.trained) == 1
        assert run.ledger.steps[1].metrics["loss"] == 0.1
        assert run.ledger.steps[1].metrics["reward"] == 0.5
        assert "entropy" not in run.ledger.steps[1].metrics


NONFINITE = dataclasses.replace(
    TRAINED, weights_digest="d0", metrics={}, nonfinite="the loss is nan", batch_key="k"
)


def _admit(run: ActiveRun, step: int, draws: range) -> StepBatch:
    """A batch of the step that the log knows."""
    groups = tuple(layout.group_id("r", draw) for draw in draws)
    run.append(
        facts.Admitted(
            round=step,
            draws=tuple(
                facts.Draw(draw=d, group_id=g, prompt_id="p", environment="e", index=d)
                for d, g in zip(draws, groups, strict=True)
            ),
        ),
        facts.Batched(step=step, group_ids=groups),
    )
    return StepBatch(step=step, commits=(), group_ids=groups, metrics={})


def test_a_loss_that_is_not_finite_costs_the_batch_and_makes_no_version(tmp_path: Path) -> None:
    with holding(tmp_path, {"train": NONFINITE}) as run:
        batch, later = _admit(run, 1, range(2)), _admit(run, 2, range(2, 4))
        bare(train)((batch, later))
        ledger = run.ledger
        assert (ledger.current_step, ledger.steps, set(ledger.batches)) == (0, {}, {2})
        assert dict(ledger.dropped) == {"nonfinite": 2}
        told = [f for e in read_entries(run.store, "r") for f in e.facts if f.kind == "dropped"]
        assert [(f.step, f.cause, f.batch) for f in told] == [(1, "the loss is nan", "k")]
        # Asked again, as after an entry that was written although its writing failed, nothing is dropped twice.
        bare(train)((batch, later))
        assert ledger.nonfinite == {1: 1} and not ledger.problems
        # Another batch for the step, and all is well.
        cast(Any, run.meshes.trainer).answers["train"] = TRAINED
        bare(train)((_admit(run, 1, range(4, 6)),))
        assert (ledger.current_step, ledger.nonfinite_in_a_row) == (1, 0)
        assert {p.kind for p in ledger.problems} == {"not_committed"}


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with holding(tmp_path, {"train": NONFINITE}) as run:
        most = run.config.algorithm.max_nonfinite
        for attempt in range(most - 1):
            bare(train)((_admit(run, 1, range(attempt, attempt + 1)),))
        with pytest.raises(BoundExceeded, match=f"kept as k; that is .*max_nonfinite {most} in"):
            bare(train)((_admit(run, 1, range(most, most + 1)),))
        assert run.ledger.dropped["nonfinite"] == most


def test_with_a_buffer_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with holding(tmp_path, {"train": NONFINITE}) as run:
        batch = _admit(run, 1, range(2))
        run.append(facts.Batched(step=1, group_ids=batch.group_ids, uses=(), kept=()))
        with pytest.raises(BoundExceeded, match=r"kept as k; with buffer\.policy 'once' the run"):
            bare(train)((batch,))
        assert run.ledger.batches[1] == batch.group_ids and not run.ledger.dropped


def test_a_step_that_was_finite_before_is_not_given_up(tmp_path: Path) -> None:
    with holding(tmp_path, {"train": TRAINED}) as run:
        batch = _admit(run, 1, range(2))
        bare(train)((batch,))
        cast(Any, run.meshes.trainer).answers["train"] = NONFINITE
        run.append(facts.Restored(step=0, weights_digest="d0"))
        with pytest.raises(BoundExceeded, match="trained with the same groups"):
            bare(train)((batch,))
        assert not run.ledger.dropped


def _batch() -> StepBatch:
    return StepBatch(step=1, commits=(), group_ids=(), metrics={"reward": 0.5})
