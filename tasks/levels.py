"""Curricula: which level a new draw is of, by what the log has when it is drawn.

By steps, it follows from the draw's ordinal, or from the step that is due where the draw is a spare one. By success, it
is the fold of all commits in the order of the log: once the newest groups of a task's level have the mean reward that
is asked for, its next level begins. The draw's entry keeps the level, so that a run that goes on draws the same prompts
again and goes on where it stood.
"""

from __future__ import annotations

import bisect

from forge_core.environments.base import Leveled, Prompt
from forge_core.levels import Level
from storage import layout
from tasks.batches import mean_rewards
from tasks.run import ActiveRun


def drawn_prompt(run: ActiveRun, ordinal: int) -> Prompt:
    """The training prompt of a draw: at the level that the log has for it, or at that which is due now."""
    environment = run.environment
    if not isinstance(environment, Leveled) or not environment.curricula:
        return environment.train_prompt(ordinal)
    group = run.ledger.groups.get(layout.group_id(run.run_id, ordinal))
    if group is not None and group.draw is not None:
        return environment.train_prompt(ordinal, group.draw.level)
    task = environment.task_of(ordinal)
    curriculum = environment.curricula.get(task)
    if curriculum is None:
        return environment.train_prompt(ordinal)
    if curriculum.steps:
        level = bisect.bisect(curriculum.steps, _step_of(run, ordinal))
        return environment.train_prompt(ordinal, level)
    return environment.train_prompt(ordinal, level_by_success(run, environment, task))


def level_by_success(run: ActiveRun, environment: Leveled, task: str) -> int:
    """The level that a task has reached by the commits of the log."""
    levels, curricula = run.levels, environment.curricula
    for fact in run.ledger.committed[levels.num_commits :]:
        for group_id, reward in mean_rewards(run, fact).items():
            draw = run.ledger.groups[group_id].draw
            curriculum = None if draw is None else curricula.get(draw.environment)
            if draw is not None and curriculum is not None and curriculum.success is not None:
                level = levels.by_task.setdefault(draw.environment, Level())
                level.add(curriculum, draw.level, reward)
        levels.num_commits += 1
    return levels.by_task.setdefault(task, Level()).number


def _step_of(run: ActiveRun, ordinal: int) -> int:
    """The step that a draw is planned for; a spare one is for the step that is due."""
    size = run.config.groups_per_step
    if ordinal >= run.config.steps * size:
        return run.ledger.last_step + 1
    return ordinal // size + 1
