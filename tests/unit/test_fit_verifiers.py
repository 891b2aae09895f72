"""Ensembles of a run's stored scores: fitted, kept, and used as a verifier of stored and of new episodes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.fit_command import _print_ensemble
from flows.preflight import check_ensembles
from forge_core.actors.verifier import Verifier
from forge_core.ensembles.reference import find_ensemble
from forge_core.ensembles.reward import EnsembleReward
from forge_core.ensembles.stored import FitRequest, check_request, fit_stored, read_scored
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError
from forge_core.scorers import begin_set, counted_commits
from storage import layout
from storage.annotations import complete_set, find_scores, read_scores, write_scores
from storage.ensembles import Ensemble, store_ensemble
from storage.parts import read_commit
from storage.records import Controller

MakeRun = Callable[..., Any]
ME = Controller.this_process(versions={}, git_commit=None)
NAMES = ("a", "b", "c", "d")
WEAK = """
import random

def _errs(prompt, text, seed, share):
    return random.Random(f"{prompt}{text}{seed}").random() < share

def _vote(prompts, completions, seed, share):
    # The longer of the two answers is right.
    return [float((len(t) == 2) != _errs(p, t, seed, share)) for p, t in zip(prompts, completions)]

def a(prompts, completions, **columns):
    return _vote(prompts, completions, "a", 0.1)

def b(prompts, completions, **columns):
    return _vote(prompts, completions, "b", 0.2)

def c(prompts, completions, **columns):
    return _vote(prompts, completions, "c", 0.25)

def d(prompts, completions, **columns):
    return [1.0 - vote for vote in _vote(prompts, completions, "d", 0.2)]
"""


@pytest.fixture
def weak(tmp_path: Path) -> Path:
    file = tmp_path / "weak.py"
    file.write_text(WEAK)
    return file


def rescore(run: Any, name: str, verifier: str) -> None:
    """What a flow does, in this process."""
    _, config = begin_set(run.store, run.run_id, name, verifier, ME)
    actor = Verifier(config, run.store.uri, 0.0)
    endpoint = vars(Verifier)["rescore"]._method
    commits = counted_commits(run.store, run.run_id)
    try:
        for commit in commits:
            asyncio.run(endpoint(actor, layout.commit_key(commit.run_id, commit.key), name))
    finally:
        actor._panel.close()
    complete_set(run.store, run.run_id, name, commits)


def score(run: Any, name: str, weak: Path) -> None:
    """The same for one of the weak functions, without a process of its own."""
    namespace: dict[str, Any] = {}
    exec(weak.read_text(), namespace)
    begin_set(run.store, run.run_id, name, f"{weak}:{name}", ME)
    commits = counted_commits(run.store, run.run_id)
    for commit in commits:
        rows = read_commit(run.store, commit, ["episode_id", "prompt", "response"]).to_pydict()
        scores = namespace[name](rows["prompt"], rows["response"])
        details = [{name: each} for each in scores]
        write_scores(run.store, commit, name, rows["episode_id"], scores, details, reward_mean=0.5)
    complete_set(run.store, run.run_id, name, commits)


def fit(run: Any, **more: Any) -> Ensemble:
    request = FitRequest(run_id=run.run_id, scores=NAMES, name="weaver", **more)
    check_request(run.store, request)
    return store_ensemble(run.store, fit_stored(request, read_scored(run.store, request), ME))


@pytest.fixture
def scored(past_run: MakeRun, weak: Path) -> Any:
    run = past_run("r1")
    run.step(1, range(60))
    run.step(2, range(60, 120))
    for name in NAMES:
        score(run, name, weak)
    return run


def test_an_ensemble_is_fitted_kept_and_scores(scored: Any, weak: Path) -> None:
    fitted = fit(scored, labels="run")
    assert fitted.reference == "ensemble:weaver@1"
    assert [each.use for each in fitted.verifiers] == ["kept", "kept", "kept", "inverted"]
    assert fitted.report is not None and fitted.labels is not None
    assert (fitted.labels.prompts_fitted, fitted.labels.prompts_reported) == (0, 120)
    assert fitted.report.pick_rates.ensemble >= fitted.report.pick_rates.best_single - 0.02
    for each in fitted.verifiers:
        assert each.estimated is not None and each.labelled is not None
        assert abs(each.estimated.accuracy - each.labelled.accuracy) < 0.1
        assert each.source is not None and scored.store.read(each.source.key).decode() == WEAK
    assert find_ensemble("reward", "ensemble:weaver@1", scored.store) == fitted
    # By the scores that are there, and by asking the verifiers again, it says the same.
    rescore(scored, "mine", "ensemble:weaver@1")
    commit = counted_commits(scored.store, "r1")[0]
    stored = read_scores(scored.store, commit, "mine")
    assert all(0 < probability < 1 for probability in stored.values())
    prompt = Prompt(
        prompt_id="p", text="3+1=", answer="4", target="4", index=3, environment="sums", metadata={}
    )
    with EnsembleReward(fitted, seed=0, timeout_seconds=60) as reward:
        reward.load()
        asked = reward(prompt, ["1", "11"], [[7], [7, 8]])
    assert asked == [stored["r1-00000003-000"], stored["r1-00000003-001"]]


def _details(run: Any, commit: Any, name: str) -> list[dict[str, float]]:
    found = find_scores(run.store, commit, name)
    assert found is not None
    table = pq.read_table(pa.BufferReader(run.store.read(found.part.key)))
    return [json.loads(details) for details in table["details"].to_pylist()]


def test_the_command_shows_estimates_gain_and_calibration(
    scored: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = fit(scored, labels="run")
    assert fitted.report is not None
    _print_ensemble(fitted, "store")
    told = capsys.readouterr().out
    estimated, labelled = fitted.verifiers[0].estimated, fitted.verifiers[0].labelled
    assert estimated is not None and labelled is not None
    assert f"{estimated.accuracy:.3f} ({labelled.accuracy:.3f})" in told
    for words in ("the best single one", "majority vote", "mean of normalised scores", "points"):
        assert words in told
    highest = fitted.report.calibration[-1]
    assert re.search(rf"0\.9 to 1\.0\W+{highest.samples}\W+{highest.predicted:.3f}", told)
    assert f"calibration error {fitted.report.calibration_error:.3f}" in told


def test_an_ensemble_is_one_verifier_of_several(scored: Any, weak: Path, tmp_path: Path) -> None:
    """A gate before it, and a set that several have made is nothing to fit to."""
    fitted = fit(scored)
    rescore(scored, "alone", fitted.reference)
    file = tmp_path / "scoring.toml"
    file.write_text(
        "[verifiers.long]\nkind = 'regex'\nparams.pattern = '11'\ngate = 1.0\n"
        f"[verifiers.weak]\nkind = 'ensemble'\nparams.reference = '{fitted.reference}'\nweight = 2.0\n"
    )
    rescore(scored, "both", str(file))
    commit = counted_commits(scored.store, "r1")[0]
    alone = read_scores(scored.store, commit, "alone")
    both = read_scores(scored.store, commit, "both")
    assert [both[f"r1-{draw:08d}-001"] for draw in range(9)] == [
        2.0 * alone[f"r1-{draw:08d}-001"] for draw in range(9)
    ]
    assert both["r1-00000000-000"] == 0.0
    # What the probability is made of is kept, of stored scores as of those that were asked for.
    parts = [f"weak/{name}" for name in NAMES]
    assert _details(scored, commit, "both")[1].keys() == {"long", "weak", *parts}
    told = _details(scored, commit, "alone")[1]
    assert told.keys() == {"weaver@1", *(f"weaver@1/{name}" for name in NAMES)}
    scores = {name: read_scores(scored.store, commit, name) for name in NAMES}
    assert [told[f"weaver@1/{name}"] for name in NAMES] == [
        scores[name]["r1-00000000-001"] for name in NAMES
    ]
    request = FitRequest(run_id="r1", scores=("a", "b", "both"), name="other")
    with pytest.raises(ValueError, match="'both' are made up of long, weak: an ensemble weighs"):
        check_request(scored.store, request)


def test_the_same_fit_is_one_version_and_another_the_next(scored: Any) -> None:
    first = fit(scored)
    assert fit(scored) == first
    assert first.report is None
    second = fit(scored, labels="run", labelled_prompts=20, class_balance=0.5)
    assert (second.version, second.is_balance_given) == (2, True)
    assert second.labels is not None
    assert (second.labels.prompts_fitted, second.labels.prompts_reported) == (20, 100)
    keys = scored.store.keys(layout.ensemble_versions("weaver"))
    assert [json.loads(scored.store.read(key))["version"] for key in keys] == [1, 2]


@pytest.mark.parametrize(
    ("request_with", "words"),
    [
        ({"scores": ("a", "a")}, "--scores 'a' is named twice"),
        ({"scores": ("a", "run")}, "'run' are the run's own rewards"),
        ({"scores": ("a", "e")}, "has no scores 'e'"),
        ({"labels": "a"}, "--labels 'a' are also among --scores"),
        ({"labelled_prompts": 3}, "needs --labels"),
        ({"class_balance": 1.5}, "--class-balance 1.5 is the share"),
        ({"name": "a/b"}, "'a/b' of an ensemble is not usable"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    past_run: MakeRun, weak: Path, request_with: dict[str, Any], words: str
) -> None:
    run = past_run("r1")
    run.step(1, [0])
    score(run, "a", weak)
    request = {"run_id": "r1", "scores": ("a",), "name": "weaver", **request_with}
    with pytest.raises(ValueError, match=words):
        check_request(run.store, FitRequest(**request))


def test_an_ensemble_is_named_with_its_version_and_its_verifiers_stay_as_they_were(
    scored: Any, weak: Path
) -> None:
    fitted = fit(scored)
    for reference, words in {
        "ensemble:weaver": r"names no version.*write ensemble:weaver@1 for the newest",
        "ensemble:weaver@2": r"has no version 2.*newest is 1",
        "ensemble:other@1": r"there is no ensemble 'other'.*\(there are: weaver\)",
        "ensemble:weaver@x": r"is no ensemble: write ensemble:NAME@VERSION",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_ensemble("reward", reference, scored.store)
    config = scored.config.model_copy(update={"reward": fitted.reference})
    assert config.user_code() == {}
    check_ensembles(config, scored.store.uri)
    weak.write_text(WEAK + "\n# changed\n")
    with pytest.raises(ValueError, match=r"has changed since it was fitted.*kept at ensembles/"):
        check_ensembles(config, scored.store.uri)
    with pytest.raises(ValueError, match="has changed since it was fitted"):
        begin_set(scored.store, "r1", "mine", fitted.reference, ME)
    with EnsembleReward(fitted, seed=0, timeout_seconds=60) as reward:
        with pytest.raises(RewardError, match="has changed since it was fitted"):
            reward.load()


def test_a_verifier_that_fails_is_named_and_gives_no_score(scored: Any, weak: Path) -> None:
    fitted = fit(scored)
    weak.write_text(WEAK.replace('_vote(prompts, completions, "b", 0.2)', "[1 / 0]"))
    prompt = Prompt(
        prompt_id="p", text="3+1=", answer="4", target="4", index=3, environment="sums", metadata={}
    )
    with EnsembleReward(fitted, seed=0, timeout_seconds=60) as reward:
        with pytest.raises(RewardError, match=r"weak.py:b' raised ZeroDivisionError"):
            reward(prompt, ["1", "11"], [[7], [7, 8]])
