"""Tasks of flows that hold no run: they read a store, compute, and write to it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.tasks import Task

_ATTEMPTS = 3
_DELAYS_SECONDS = [1.0, 4.0, 16.0]


def _is_transient(_task: object, _task_run: object, state: object) -> bool:
    """Prefect's question after a failed attempt: a store that failed may mend itself, wrong input does not."""
    return isinstance(getattr(state, "data", None), OSError)


def store_task(
    function: Callable[..., Coroutine[Any, Any, Any]], name: str, *, retries: int = _ATTEMPTS
) -> Task[..., Any]:
    """Make an async function a task that is tried again when the store fails; it must be safe to repeat."""
    made: Task[..., Any] = Task(
        function,
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=retries,
        retry_delay_seconds=_DELAYS_SECONDS,
        retry_condition_fn=_is_transient,
    )
    return made
