"""From a checked config to an exit code: surroundings, signals, progress, and the last table."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from flows.ephemeral import surroundings, wait_for_server
from flows.terminal import FAILED, leave
from forge_core.config import RunConfig
from forge_core.meshes import preload
from forge_core.user_code import check_reference, load_object, reference_to
from storage import layout
from storage.contract import hurry
from storage.log import Fenced
from storage.objects import ObjectStore, open_store
from storage.resume import read_ledger
from storage.workspace import keep_folder, locate, open_folder

if TYPE_CHECKING:
    from flows.loop import LoopFunction

_DONE = 0
_PATIENCE_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    code: int
    """Exit code: 0 finished or paused, 1 anything else."""
    summary: dict[str, Any]
    """What run.json holds, or why there is none."""
    failure: BaseException | None
    """What ended it early."""


def launch(
    config: RunConfig,
    *,
    store_uri: str,
    run_id: str | None,
    json_output: bool,
    verbose: bool,
    loop: LoopFunction | None = None,
) -> Outcome:
    """Run a config to its end and say what came of it, with `loop` in its regime's place if there is one.

    A run that has begun goes on where its log ends. What the run's processes print goes to `output.log` in the run's
    folder; where the store is not on this machine, that is a local one until the run ends.
    """
    store = open_store(store_uri)
    run_id = run_id or new_run_id()
    folder, output = open_folder(store, run_id)
    with output_to(output, aside=verbose) as (out, err):
        # Lines are left whole: paths are there to be copied.
        console = Console(file=err if json_output else out, highlight=False, soft_wrap=True)
        with surroundings() as workdir:
            begun = store.exists(layout.incarnation_key(run_id, 0))
            what = "going on" if begun else "starting"
            console.print(f"run {run_id}: {what}; its files lie in {folder}")
            failure = _run(config, store_uri, run_id, console, workdir, loop)
        if failure is not None:
            go_on = f"resume {run_id}"
            explain(failure, f"run {run_id}", go_on, store_uri, folder, console)
        # Deferred, like all that needs Prefect: it is imported once the server has been started.
        from flows.results import result_table
        from storage.summary import run_summary

        summary: dict[str, Any] = (
            run_summary(store, run_id)
            if store.exists(layout.config_key(run_id))
            else {"run_id": run_id, "status": "failed", "reason": str(failure)}
        )
        if json_output:
            json.dump(summary, out, indent=2, ensure_ascii=False)
            out.write("\n")
        elif failure is None:
            console.print(result_table(summary))
            _point_at(store, run_id, summary, console)
    keep_folder(store, run_id, folder)
    return Outcome(code=_DONE if failure is None else FAILED, summary=summary, failure=failure)


def launch_and_leave(
    config: RunConfig,
    *,
    store_uri: str,
    run_id: str | None,
    json_output: bool,
    verbose: bool,
    loop: LoopFunction | None = None,
) -> NoReturn:
    """The end of a command that runs a config: launch it, and end the process with its exit code."""
    outcome = launch(
        config,
        store_uri=store_uri,
        run_id=run_id,
        json_output=json_output,
        verbose=verbose,
        loop=loop,
    )
    leave(outcome.code)


def own_loop_of(store: ObjectStore, run_id: str) -> LoopFunction | None:
    """The loop of the user's that drives a run that has begun, if one does, loaded from where it was found then.

    Raises ValueError if it is not there any more.
    """
    for source in reversed(read_ledger(store, run_id).sources):
        if source.field == "loop":
            check_reference("loop", source.reference)
            loop: LoopFunction = load_object("loop", source.reference)
            return loop
    return None


def new_run_id() -> str:
    """An id that tells when a run began."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _point_at(store: ObjectStore, run_id: str, summary: dict[str, Any], console: Console) -> None:
    """Say where the results lie."""
    ledger = read_ledger(store, run_id)
    boards = f"{layout.run_folder(run_id)}tensorboard/"
    if (kept := ledger.checkpoints.get(summary["steps"])) is not None:
        console.print(f"checkpoint:  {locate(store, kept.key)}")
    console.print(f"report:      {locate(store, layout.report_key(run_id))}")
    console.print(f"TensorBoard: tensorboard --logdir {locate(store, boards)}")
    following = f"forgeflow show {run_id} --store {store.uri}"
    if summary["config"].get("collect"):
        parent = summary["config"]["parent_run_id"]
        following = f"forgeflow train-rounds {parent} --store {store.uri}"
    if summary["config"].get("warm_start_only"):
        following = f"forgeflow run --from {run_id}@0 --store {store.uri}"
    if summary["config"].get("evaluate_only"):
        following = f"forgeflow episodes {run_id} --store {store.uri}"
    console.print(f"next:        {following}")
    if ledger.end is not None and ledger.end.status == "paused":
        console.print(f"paused:      {ledger.end.reason}", markup=False)


def _run(
    config: RunConfig,
    store_uri: str,
    run_id: str,
    console: Console,
    workdir: Path,
    loop: LoopFunction | None,
) -> BaseException | None:
    """What the flow raised, if anything."""

    async def main() -> None:
        # Deferred: Prefect reads its settings from the environment when it is imported.
        from flows.chosen import flow_of
        from flows.loop import own_loop
        from tasks.run import relying_on

        with relying_on({} if loop is None else {"loop": reference_to("loop", loop)}):
            own_loop.set(loop)
            await flow_of(config)(config, store_uri, run_id)

    return drive(main, config.steps, console, workdir)


def drive(
    main: Callable[[], Awaitable[None]], steps: int, console: Console, workdir: Path
) -> BaseException | None:
    """Have a flow run to its end, its progress shown and signals heard; what it raised, if anything.

    Args:
        main: calls the flow.
        steps: how many the run has in all.
        console: where progress is shown.
        workdir: the surroundings' work folder.
    """

    async def watched() -> None:
        # Deferred: Prefect reads its settings from the environment when it is imported.
        from flows.progress import LiveProgress
        from tasks.run import listening

        task = asyncio.current_task()
        assert task is not None
        with (
            signals_end(task),
            LiveProgress(console, steps) as progress,
            listening(progress),
        ):
            await main()

    try:
        # While the server starts, and before the loop: imports take seconds in which the loop would hear no signal.
        preload()
        wait_for_server(workdir)
        asyncio.run(watched())
    except BaseException as error:  # Prefect's answer to SIGTERM is one of its own
        return error
    return None


@contextmanager
def signals_end(task: asyncio.Task[None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM cancel the task, the way out in which every context is left in order.

    Who insists on Ctrl-C kills. SIGTERM is not counted: Prefect sends the process the one that it was sent once more.
    """
    events = asyncio.get_running_loop()
    interrupts: list[float] = []

    def cancel() -> None:
        if not task.cancelling():
            task.cancel()

    def handler(number: int, frame: FrameType | None) -> None:
        # Not on the loop, which a store may hold up that waits for its server.
        hurry.set()
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
            if interrupts[-1] - interrupts[0] > _PATIENCE_SECONDS:
                os.kill(os.getpid(), signal.SIGKILL)
        events.call_soon_threadsafe(cancel)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def explain(
    failure: BaseException,
    what: str,
    go_on: str,
    store_uri: str,
    folder: Path,
    console: Console,
) -> None:
    """Say why something ended early, and by which command it goes on."""
    traceback.print_exception(failure)
    if not isinstance(failure, Exception):
        console.print(f"{what} was cancelled")
    else:
        console.print(f"{what} failed: {type(failure).__name__}: {failure}", markup=False)
    console.print(f"details: {folder / 'output.log'}", markup=False)
    if not isinstance(failure, Fenced):
        console.print(f"go on:   forgeflow {go_on} --store {store_uri}", markup=False)


@contextmanager
def output_to(path: Path, *, aside: bool) -> Iterator[tuple[IO[str], IO[str]]]:
    """Send what this process and its children print to a file; yields the true stdout and stderr.

    With `aside`, errors stay on the true stderr. File descriptors are redirected, not `sys.stdout`: the run's
    processes inherit those.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        os.fdopen(os.dup(1), "w") as out,
        os.fdopen(os.dup(2), "w") as err,
        path.open("ab", buffering=0) as log,
    ):
        os.dup2(log.fileno(), 1)
        if not aside:
            os.dup2(log.fileno(), 2)
        try:
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
