"""Whether an experiment's checkpoint is promoted: tasks over a store, without a mesh.

plan ─▶ candidate is trained ─▶ standing ─▶ the promoted one is evaluated ─▶ decide ─▶ keep ─┐
                                    ▲                                                        │
                                    └── another experiment has decided meanwhile, or done ◀──┘
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from forge_core.comparison import compare, judge
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from storage import promotions
from storage.evaluations import PromptScores, prompt_scores
from storage.facts import Evaluated
from storage.objects import ObjectStore, open_store
from storage.promotions import Decision, ExperimentPlan, PromotedCheckpoint
from storage.records import Controller
from storage.resume import find_checkpoint, read_ledger
from storage.runs import read_config
from tasks.provenance import git_commit, versions
from tasks.store_task import store_task

_EVALUATION = "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an experiment stands in its line."""

    number: int
    """Number that its decision would have."""
    own: Decision | None
    """Its decision, once it is made."""
    promoted: Decision | None
    """What promoted the line's newest checkpoint; None if nothing did yet."""


def standing_of(store: ObjectStore, experiment_id: str, line: str) -> Standing:
    """How an experiment stands now. Raises ValueError if a decision is unreadable."""
    decisions = promotions.read_decisions(store, line)
    return Standing(
        number=len(decisions) + 1,
        own=promotions.decision_of(decisions, experiment_id),
        promoted=promotions.newest_promotion(decisions),
    )


def against_config(store: ObjectStore, candidate: RunConfig, promoted: Decision) -> RunConfig:
    """The config of a run that evaluates a promoted checkpoint exactly as the candidate was evaluated.

    All but the model is the candidate's: environment, prompts, sampling and what scores. Raises ValueError if the
    promoted run is gone.
    """
    checkpoint = promoted.checkpoint
    parent = read_config(store, checkpoint.run_id)
    return RunConfig.model_validate(
        {
            **candidate.model_dump(mode="json"),
            "model": parent["model"],
            "parent_run_id": checkpoint.run_id,
            "parent_step": checkpoint.step,
            # Steps are counted from the parent's first; none is trained.
            "steps": max(candidate.steps, checkpoint.step),
            "evaluate_only": True,
        }
    )


def decide(
    store: ObjectStore, experiment_id: str, criteria: PromotionConfig, standing: Standing
) -> Decision:
    """What becomes of an experiment whose candidate, and what it is compared with, are evaluated.

    Raises ValueError if the two did not answer the same prompts, or an evaluation is missing.
    """
    candidate = promotions.candidate_run(experiment_id)
    evaluated = _evaluated(store, candidate)
    ours = prompt_scores(store, evaluated, criteria.score)
    score = evaluated.sampled if criteria.score == "sampled" else evaluated.greedy
    compared, against_run_id, promoted = None, None, standing.promoted
    if promoted is not None:
        against_run_id = promotions.against_run(experiment_id, promoted.number)
        theirs = prompt_scores(store, _evaluated(store, against_run_id), criteria.score)
        _check_pairs(ours, theirs, candidate, against_run_id)
        compared = compare(ours.rewards, theirs.rewards, criteria)
    is_promoted, reason = judge(
        score,
        compared,
        criteria,
        against=None if promoted is None else promoted.checkpoint.reference,
    )
    kept = find_checkpoint(store, candidate, evaluated.policy_version)
    return Decision(
        line=criteria.line,
        number=standing.number,
        experiment_id=experiment_id,
        promoted=is_promoted,
        reason=reason,
        checkpoint=PromotedCheckpoint(
            run_id=candidate, step=kept.step, key=kept.key, weights_digest=kept.weights_digest
        ),
        score=score,
        against=None if promoted is None else promoted.number,
        against_run_id=against_run_id,
        comparison=compared,
        controller=Controller.this_process(versions=versions(), git_commit=git_commit()),
        created_at=time.time(),
    )


def _evaluated(store: ObjectStore, run_id: str) -> Evaluated:
    found = read_ledger(store, run_id).evaluated.get(_EVALUATION)
    if found is None:
        raise ValueError(f"run {run_id!r} has no evaluation {_EVALUATION!r}: forgeflow resume it")
    return found


def _check_pairs(ours: PromptScores, theirs: PromptScores, left: str, right: str) -> None:
    if ours.prompt_ids != theirs.prompt_ids:
        raise ValueError(
            f"runs {left!r} and {right!r} did not answer the same prompts: the environment draws others than it did, "
            "so begin a new experiment"
        )


async def _plan(
    store: str, experiment_id: str, config: RunConfig, promotion: PromotionConfig
) -> tuple[RunConfig, PromotionConfig]:
    plan = ExperimentPlan(
        experiment_id=experiment_id,
        config=config.model_dump(mode="json"),
        promotion=promotion.model_dump(mode="json"),
    )
    opened = open_store(store)

    def keep() -> ExperimentPlan:
        try:
            return promotions.keep_plan(opened, plan)
        except ValueError:
            # An older version of this code may have begun it, with fewer keys.
            kept = promotions.read_plan(opened, experiment_id)
            if kept is None or planned(kept) != (config, promotion):
                raise
            return kept

    return planned(await asyncio.to_thread(keep))


def planned(plan: ExperimentPlan) -> tuple[RunConfig, PromotionConfig]:
    """What a plan says, read."""
    return RunConfig.model_validate(plan.config), PromotionConfig.model_validate(plan.promotion)


async def _standing(store: str, experiment_id: str, line: str) -> Standing:
    return await asyncio.to_thread(standing_of, open_store(store), experiment_id, line)


async def _decide(
    store: str, experiment_id: str, criteria: PromotionConfig, standing: Standing
) -> bool:
    opened = open_store(store)

    def make() -> bool:
        return promotions.keep_decision(opened, decide(opened, experiment_id, criteria, standing))

    return await asyncio.to_thread(make)


plan_experiment: Any = store_task(_plan, "plan-experiment")
"""A task that fixes what the experiment does.

Idempotent by experiment. Raises ValueError if it was begun with another plan.
"""
read_standing: Any = store_task(_standing, "read-standing")
"""A task that looks which checkpoint is promoted, and whether the experiment has decided."""
decide_promotion: Any = store_task(_decide, "decide-promotion")
"""A task that compares and decides; False if another experiment of the line has decided since `standing`.

Idempotent by experiment: it makes one decision.
"""
