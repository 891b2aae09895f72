"""Awaiting several things at once, of which one that fails ends the others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run coroutines at the same time; their results in order.

    The first that fails cancels the others, which are waited for; what it raised is raised, and not a group of one.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failures:
        raise first_of(failures) from None
    return [task.result() for task in tasks]


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure in a group, however deep."""
    found = failures.exceptions[0]
    return first_of(found) if isinstance(found, BaseExceptionGroup) else found
