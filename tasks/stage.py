"""What makes a function a stage: a Prefect task with the run's retries, each retry a log entry."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import Task

from forge_core.meshes import MeshCall
from storage import facts
from tasks.run import ActiveRun, current

P = ParamSpec("P")
R = TypeVar("R")

TRANSIENT = (MeshCall, OSError, TimeoutError)
"""What a retry can mend: infrastructure, not the user's input or a violated bound."""

_LONGEST_DELAY_SECONDS = 60.0


def _is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, TRANSIENT)


def _delays(run: ActiveRun) -> list[float]:
    """Exponential back-off with jitter, in seconds; Prefect's own jitter has no effect on tasks."""
    retry = run.config.retry
    return [
        min(_LONGEST_DELAY_SECONDS, retry.delay_seconds * 2**lost) * random.uniform(0.5, 1.5)
        for lost in range(retry.attempts)
    ]


def stage(function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make an async function a stage, named after it.

    Every call is a Prefect task run, tried again as the run's config says when it fails of something transient. Await
    it directly: mesh handles belong to the flow's event loop.
    """
    name = function.__name__.replace("_", "-")

    @functools.wraps(function)
    async def body(*args: P.args, **kwargs: P.kwargs) -> R:
        run = current()
        started = time.monotonic()
        try:
            run.settle()
            return await function(*args, **kwargs)
        except TRANSIENT as error:
            lost = attempt()
            if lost <= run.config.retry.attempts:
                run.append(
                    facts.Retry(
                        stage=name,
                        attempt=lost,
                        cause=f"{type(error).__name__}: {error}"[:2000],
                        seconds=time.monotonic() - started,
                    )
                )
            raise

    # Without tags: for a task that has any, Prefect asks its server for a concurrency slot, which can take seconds.
    prefect_task: Any = Task(
        body,
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=_is_transient,
    )

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run = current()
        configured = prefect_task.with_options(
            retries=run.config.retry.attempts, retry_delay_seconds=_delays(run)
        )
        result: R = await configured(*args, **kwargs)
        return result

    return call


def attempt() -> int:
    """Which attempt of the current stage this is, from 1."""
    context = TaskRunContext.get()
    return context.task_run.run_count if context else 1
