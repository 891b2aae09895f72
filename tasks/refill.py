"""Draws beyond those that are planned for a step: for groups that have no signal, or whose loss was not finite.

    planned draws of the step ──▶ batch, or too few with a signal ──▶ spare draws ──▶ batch, or too few ──▶ …
                                    └──▶ loss not finite: all dropped ──▶ spare draws ──▶ batch

Planned draws have the ordinals below steps x groups_per_step; spare ones those from there on, as they are needed, so
that no step's planned prompts depend on what became of another's. All of it follows from the log, so a run that goes on
draws the same.
"""

from __future__ import annotations

from storage import layout
from storage.groups import GroupState
from tasks.references import Round
from tasks.run import ActiveRun

_UNFINISHED = (GroupState.ADMITTED, GroupState.GENERATED)


def drawn_for(run: ActiveRun, step: int) -> list[str]:
    """Committed groups of a step's draws, planned and spare, in their order; dropped ones among them."""
    size = run.config.groups_per_step
    planned = [layout.group_id(run.run_id, o) for o in range((step - 1) * size, step * size)]
    spare = [draw.group_id for fact in run.ledger.spare.get(step, ()) for draw in fact.draws]
    groups = run.ledger.groups
    return [g for g in [*planned, *spare] if g in groups and groups[g].commit is not None]


def may_fill_up(run: ActiveRun, step: int) -> bool:
    """Whether spare draws are due for a step that has too few groups: not too often, but after each batch given up."""
    most = run.config.algorithm.dynamic_sampling_attempts * (1 + run.ledger.nonfinite[step])
    return len(run.ledger.spare.get(step, ())) < most + run.ledger.nonfinite[step]


def spare_round(run: ActiveRun, step: int) -> Round:
    """The next round of spare draws for a step, as many as it lacks; one that broke off is gone on with."""
    rounds, groups = run.ledger.spare.get(step, []), run.ledger.groups
    if rounds and any(groups[draw.group_id].state in _UNFINISHED for draw in rounds[-1].draws):
        return _round(step, rounds[-1].draws[0].draw, len(rounds[-1].draws))
    left = sum(groups[group_id].reason is None for group_id in drawn_for(run, step))
    return _round(step, _next_spare(run), max(1, run.config.groups_per_step - left))


def spare_round_to_batch(run: ActiveRun, step: int) -> Round:
    """The round of spare draws for a step whose batch was given up: one that is in no batch yet, or the next."""
    rounds, groups = run.ledger.spare.get(step, []), run.ledger.groups
    if rounds and any(groups[draw.group_id].reason is None for draw in rounds[-1].draws):
        return _round(step, rounds[-1].draws[0].draw, len(rounds[-1].draws))
    return spare_round(run, step)


def _round(step: int, first: int, number: int) -> Round:
    # Of a number that no other round has: planned ones are not above the number of steps.
    return Round(number=first + 1, first_step=step, last_step=step, spare_draws=(first, number))


def _next_spare(run: ActiveRun) -> int:
    spare = [
        draw.draw for facts in run.ledger.spare.values() for fact in facts for draw in fact.draws
    ]
    return max(spare, default=run.config.steps * run.config.groups_per_step - 1) + 1
