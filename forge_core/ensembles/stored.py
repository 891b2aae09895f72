"""An ensemble from the scores that a run's stored episodes have.

Legend: n episodes, k verifiers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge_core.ensembles.fit import Fit, FittedUnit, fit_ensemble, rates_of
from forge_core.ensembles.label_model import UNKNOWN
from forge_core.ensembles.report import labelled_report, pick_rate
from forge_core.ensembles.scales import Bools, Floats
from forge_core.scorers import counted_commits
from storage.annotations import ScoreSet, check_covers, read_scores, read_set
from storage.ensembles import Ensemble, FittedVerifier, LabelsUsed, Rates, Unit
from storage.layout import RUN_SCORES, check_ensemble
from storage.objects import ObjectStore
from storage.parts import read_commit
from storage.records import Controller

METHOD = 1
"""Number of the method; a change that makes other figures of the same scores raises it."""
LABEL_THRESHOLD = 0.5
"""A label above it says that the sample is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """What is to be fitted."""

    run_id: str
    """Run whose episodes have the scores."""
    scores: tuple[str, ...]
    """Names of its sets of scores, one a verifier."""
    name: str
    """What the ensemble is called."""
    labels: str | None = None
    """Set of scores that are labels, or `run` for the run's own rewards; None: there are none."""
    labelled_prompts: int = 0
    """Prompts whose labels the fit knows; those of the others are for the report alone."""
    class_balance: float | None = None
    """Share of right samples, where it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredEpisodes:
    """Episodes and their scores."""

    sets: tuple[ScoreSet, ...]
    """What gave the scores, k of them."""
    scores: Floats
    """(n, k)."""
    group_ids: list[str]
    """Group of each episode."""
    prompt_ids: list[str]
    """Prompt of each episode."""
    labels: Floats | None
    """Label of each episode, (n,)."""
    inputs_sha256: str
    """Hex digest over all that a fit depends on."""


def check_request(store: ObjectStore, request: FitRequest) -> None:
    """Refuse what cannot be fitted, before anything is started. Raises ValueError that says how to mend it."""
    check_ensemble(request.name)
    if doubled := sorted({n for n in request.scores if request.scores.count(n) > 1}):
        raise ValueError(f"--scores {doubled[0]!r} is named twice: name each set once")
    if RUN_SCORES in request.scores:
        raise ValueError(
            f"--scores {RUN_SCORES!r} are the run's own rewards, which no verifier is named by: make a set of them by "
            f"`forgeflow rescore {request.run_id} --verifier environment`, or take them as --labels"
        )
    if request.labels in request.scores:
        raise ValueError(
            f"--labels {request.labels!r} are also among --scores: what is the truth is no verifier of it"
        )
    if request.labelled_prompts < 0:
        raise ValueError(
            f"--labelled-prompts {request.labelled_prompts} is below 0: give 0 or more"
        )
    if request.labelled_prompts and request.labels is None:
        raise ValueError(
            f"--labelled-prompts {request.labelled_prompts} needs --labels, which says what the labels are"
        )
    balance = request.class_balance
    if balance is not None and not 0 < balance < 1:
        raise ValueError(
            f"--class-balance {balance:g} is the share of right samples: it must be above 0 and below 1"
        )
    commits = counted_commits(store, request.run_id)
    named = {*request.scores, request.labels} - {None, RUN_SCORES}
    for name in sorted(n for n in named if n is not None):
        check_covers(store, request.run_id, name, commits)
        composed = read_set(store, request.run_id, name).composition
        if composed is not None and name in request.scores:
            raise ValueError(
                f"--scores {name!r} are made up of {', '.join(composed['verifiers'])}: an ensemble weighs them itself; "
                "rescore by each alone and name those sets"
            )


def read_scored(store: ObjectStore, request: FitRequest) -> ScoredEpisodes:
    """The scores that are asked for, of all that the run's log counts. Raises ValueError if any is missing."""
    sets = tuple(read_set(store, request.run_id, name) for name in request.scores)
    commits = counted_commits(store, request.run_id)
    group_ids: list[str] = []
    prompt_ids: list[str] = []
    rows: list[list[float]] = []
    labels: list[float] = []
    for commit in commits:
        table = read_commit(store, commit, ["episode_id", "group_id", "prompt_id", "reward"])
        episode_ids = table["episode_id"].to_pylist()
        group_ids += table["group_id"].to_pylist()
        prompt_ids += table["prompt_id"].to_pylist()
        columns = [read_scores(store, commit, name) for name in request.scores]
        rows += [[column[episode_id] for column in columns] for episode_id in episode_ids]
        if request.labels == RUN_SCORES:
            labels += table["reward"].to_pylist()
        elif request.labels is not None:
            true = read_scores(store, commit, request.labels)
            labels += [true[episode_id] for episode_id in episode_ids]
    digest = {
        "method": METHOD,
        "request": [
            request.run_id,
            request.scores,
            request.labels,
            request.labelled_prompts,
            request.class_balance,
        ],
        "sets": [each.decides for each in sets],
        "labels": None
        if request.labels in (None, RUN_SCORES)
        else read_set(store, request.run_id, str(request.labels)).decides,
        "commits": [(commit.key, commit.part.sha256) for commit in commits],
    }
    return ScoredEpisodes(
        sets=sets,
        scores=np.array(rows, np.float64),
        group_ids=group_ids,
        prompt_ids=prompt_ids,
        labels=np.array(labels, np.float64) if request.labels is not None else None,
        inputs_sha256=hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest(),
    )


def fit_stored(request: FitRequest, scored: ScoredEpisodes, controller: Controller) -> Ensemble:
    """Fit an ensemble, and report on labels that the fit did not know; version 1 until it is stored.

    Raises ValueError as `fit_ensemble` does.
    """
    known = _known(request, scored)
    labels = None
    right = np.zeros(0, bool)
    if scored.labels is not None:
        right = scored.labels > LABEL_THRESHOLD
        labels = np.where(known, right.astype(np.int64), UNKNOWN)
    fit = fit_ensemble(scored.scores, labels=labels, balance=request.class_balance)
    names = [each.name for each in scored.sets]
    report, used, true_rates = None, None, dict.fromkeys(range(len(names)))
    if scored.labels is not None:
        rest = ~known
        used = LabelsUsed(
            name=str(request.labels),
            prompts_fitted=_count(scored.prompt_ids, known),
            prompts_reported=_count(scored.prompt_ids, rest),
        )
        if rest.any():
            groups = [g for g, is_in in zip(scored.group_ids, rest, strict=True) if is_in]
            report = labelled_report(
                fit.posterior[rest], scored.scores[rest], fit.scales, names, right[rest], groups
            )
            true_rates = _true_rates(fit, scored.scores[rest], right[rest])
    return Ensemble(
        name=request.name,
        version=1,
        run_id=request.run_id,
        inputs_sha256=scored.inputs_sha256,
        num_samples=len(scored.scores),
        num_prompts=len(set(scored.prompt_ids)),
        class_balance=fit.balance,
        is_balance_given=request.class_balance is not None,
        expected_pick_rate=pick_rate(fit.posterior, fit.posterior, scored.group_ids),
        verifiers=tuple(
            _verifier(fit, number, each, scored.scores[:, number], true_rates[number])
            for number, each in enumerate(scored.sets)
        ),
        units=tuple(_unit(unit, names) for unit in fit.units),
        labels=used,
        report=report,
        warnings=fit.warnings,
        controller=controller,
        created_at=time.time(),
    )


def _known(request: FitRequest, scored: ScoredEpisodes) -> Bools:
    """Whether the fit knows the label of each episode: whole prompts, chosen by hash, so that more are a superset."""
    by_hash = sorted(set(scored.prompt_ids), key=lambda p: hashlib.sha256(p.encode()).digest())
    chosen = set(by_hash[: request.labelled_prompts])
    return np.array([prompt_id in chosen for prompt_id in scored.prompt_ids], bool)


def _count(prompt_ids: Sequence[str], of: Bools) -> int:
    return len({p for p, is_in in zip(prompt_ids, of, strict=True) if is_in})


def _true_rates(fit: Fit, scores: Floats, right: Bools) -> dict[int, Rates | None]:
    truth = right.astype(np.float64)
    return {
        number: rates_of(scale.votes(scores[:, number]), truth)
        for number, scale in enumerate(fit.scales)
    }


def _verifier(
    fit: Fit, number: int, scored_by: ScoreSet, scores: Floats, labelled: Rates | None
) -> FittedVerifier:
    rates, scale = fit.rates.get(number), fit.scales[number]
    use: Any = "dropped"
    if number not in fit.dropped:
        assert rates is not None
        is_worse = rates.true_positive_rate + rates.true_negative_rate < 1
        use = "inverted" if is_worse else "kept"
    return FittedVerifier(
        name=scored_by.name,
        verifier=scored_by.verifier,
        scorer=scored_by.scorer,
        environment=scored_by.environment,
        source=scored_by.source,
        low=scale.low,
        high=scale.high,
        threshold=scale.threshold,
        vote_share=float(scale.votes(scores).mean()),
        estimated=rates,
        labelled=labelled,
        use=use,
        why_dropped=fit.dropped.get(number),
    )


def _unit(unit: FittedUnit, names: Sequence[str]) -> Unit:
    return Unit(
        verifiers=tuple(names[j] for j in unit.members),
        inverted=unit.inverted,
        given_wrong=tuple(unit.levels[:, 0].tolist()),
        given_right=tuple(unit.levels[:, 1].tolist()),
    )
