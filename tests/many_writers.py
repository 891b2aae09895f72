"""What the processes of a test do that write to one store at the same time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pyarrow as pa
from made_episodes import episode

from storage.episodes import SCHEMA
from storage.objects import open_store
from storage.parts import commit_part
from storage.records import Commit

RUN_ID = "run"

_start: Barrier


@contextmanager
def writers(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many new processes, which begin each piece of work together."""
    context = multiprocessing.get_context("spawn")
    start: Any = context.Barrier(count)
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_take, initargs=(start,)
    ) as pool:
        yield pool


def _take(start: Barrier) -> None:
    global _start
    _start = start


def put(uri: str, environment: dict[str, str], key: str, data: bytes) -> bool:
    """`put_if_absent`, by all writers at once."""
    os.environ.update(environment)
    _start.wait()
    return open_store(uri).put_if_absent(key, data)


def names(writer: int, num_commits: int) -> Iterator[str]:
    """Names of a writer's commits: every fourth is one that all writers use."""
    for number in range(num_commits):
        yield f"shared-{number:04d}" if number % 4 == 0 else f"writer{writer}-{number:04d}"


def commit_all(
    uri: str, environment: dict[str, str], writer: int, num_commits: int
) -> list[Commit]:
    """Commit episodes that no other writer has under each of the names; what each call gave back."""
    os.environ.update(environment)
    store = open_store(uri)
    table = episodes(seed=writer)
    _start.wait()
    return [commit_part(store, RUN_ID, name, table) for name in names(writer, num_commits)]


def episodes(*, seed: int) -> pa.Table:
    """One group of two scored episodes."""
    rows = [episode(0, sample, RUN_ID, seed=seed) for sample in (0, 1)]
    return pa.Table.from_pylist(rows, SCHEMA)
