"""What makes a function a stage: a Prefect task with the run's retries, each retry a log entry."""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import Task

from forge_core.mesh import MeshCall
from storage import facts
from tasks.recovery import Held
from tasks.run import current
from tasks.stage_names import task_run_name

P = ParamSpec("P")
R = TypeVar("R")

TRANSIENT = (MeshCall, OSError, TimeoutError)
"""What a retry can mend: infrastructure, not the user's input or a violated bound."""

_LONGEST_DELAY_SECONDS = 60.0


class _Budget:
    """How often one call of a stage may be tried again.

    A failed mesh is brought back before the next attempt, which has a limit of its own; what else is transient may
    fail as often as the config's `retry` says.
    """

    def __init__(self, run: Held) -> None:
        self._run = run
        self._attempts = 0
        self._lost = 0
        """Attempts that were lost to something else than a failed mesh."""

    def spend(self) -> None:
        """An attempt was lost to something transient."""
        self._attempts += 1
        if not any(mesh.has_failed() for mesh in self._run.meshes.watched):
            self._lost += 1

    @property
    def has_left(self) -> bool:
        """Whether the stage may be tried again."""
        return self._lost <= self._run.config.retry.attempts and self._attempts <= self.most

    @property
    def most(self) -> int:
        """Most attempts after the first."""
        return self._run.config.retry.attempts + self._run.config.faults.most_restarts

    def delays(self) -> list[float]:
        """Exponential back-off with jitter, in seconds; Prefect's own jitter has no effect on tasks."""
        first = self._run.config.retry.delay_seconds
        return [
            min(_LONGEST_DELAY_SECONDS, first * 2**lost) * random.uniform(0.5, 1.5)
            for lost in range(self.most)
        ]


_budget: ContextVar[_Budget] = ContextVar("forgeflow_budget")


def _is_tried_again(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's question after a failed attempt; a function, for it takes a bound method for no condition at all."""
    return isinstance(state.data, TRANSIENT) and _budget.get().has_left


def stage_of(
    held: Callable[[], Held], function: Callable[P, Awaitable[R]], name: str
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make an async function a stage of what `held` gives when it is called.

    Every call is a Prefect task run, tried again as the run's config says when it fails of something transient; meshes
    that have failed are brought back first. Await it directly: mesh handles belong to the flow's event loop.
    """

    @functools.wraps(function)
    async def body(*args: P.args, **kwargs: P.kwargs) -> R:
        run = held()
        started = time.monotonic()
        try:
            run.settle()
            if attempt() > 1 and run.recovery is not None:
                await run.recovery.revive_all()
            return await function(*args, **kwargs)
        except TRANSIENT as error:
            if run.recovery is not None:
                run.recovery.refuse_any()
            budget = _budget.get()
            budget.spend()
            if budget.has_left:
                run.append(
                    facts.Retry(
                        stage=name,
                        attempt=attempt(),
                        cause=f"{type(error).__name__}: {error}"[:2000],
                        seconds=time.monotonic() - started,
                    )
                )
            raise

    signature = inspect.signature(function)
    # Without tags: for a task that has any, Prefect asks its server for a concurrency slot, which can take seconds.
    prefect_task: Any = Task(
        body,
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=_is_tried_again,
    )

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        budget = _Budget(held())
        token = _budget.set(budget)
        try:
            arguments = signature.bind(*args, **kwargs).arguments
            configured = prefect_task.with_options(
                task_run_name=task_run_name(name, arguments),
                retries=budget.most,
                retry_delay_seconds=budget.delays(),
            )
            result: R = await configured(*args, **kwargs)
            return result
        finally:
            _budget.reset(token)

    return call


def stage(function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make an async function a stage of the flow's run, as `stage_of` does, named after the function."""
    return stage_of(current, function, function.__name__.replace("_", "-"))


def attempt() -> int:
    """Which attempt of the current stage this is, from 1."""
    context = TaskRunContext.get()
    return context.task_run.run_count if context else 1
