"""Commands about episodes that are there already: `rescore` scores them again, `replay` trains on them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Run,
    Store,
    Verbose,
    console,
    leave,
    print_json,
    refusing_input,
    set_up_logging,
)
from storage.layout import RUN_SCORES
from storage.objects import check_writable, open_store
from storage.records import Controller
from tasks.provenance import git_commit, versions

if TYPE_CHECKING:
    from flows.rescore import Rescored
    from storage.annotations import Covered

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One dotted key over the first run's config."),
]
Origin = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN@STEP",
        help="Checkpoint whose weights are trained; the first run's first one if not given.",
    ),
]
Scores = Annotated[
    str,
    typer.Option(metavar="NAME", help="Scores that `rescore` wrote, or 'run': the old ones."),
]
Verifier = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="What scores: 'environment', a task, path/file.py:name of a reward function or an environment, "
        "ensemble:NAME@VERSION, a file.toml of [verifiers] and [scoring], or 'run': what the run was scored with.",
    ),
]


def replay(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of past runs.")],
    origin: Origin = None,
    scores: Scores = RUN_SCORES,
    epochs: Annotated[int, typer.Option(min=1, help="How often each group is trained on.")] = 1,
    overrides: Overrides = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the new run; made up if not given.")
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a new run on the episodes of past runs; nothing is generated."""
    set_up_logging(verbose)
    # Deferred: it brings pyarrow, which other commands do without.
    from flows.replay_config import check_replay, replay_config

    with refusing_input():
        config = replay_config(
            runs,
            store=store,
            origin=origin,
            scores=scores,
            epochs=epochs,
            overrides=overrides or [],
        )
        check_replay(config, store, run_id)
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave

    launch_and_leave(
        config, store_uri=store, run_id=run_id, json_output=json_output, verbose=verbose
    )


def rescore(
    run: Run,
    verifier: Verifier,
    name: Annotated[str, typer.Option(metavar="NAME", help="What the set of scores is called.")],
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score the episodes of a past run again; the new scores stand beside the old."""
    set_up_logging(verbose)
    # Deferred: it brings pyarrow, which other commands do without.
    from forge_core.scorers import begin_set, counted_commits
    from storage.annotations import read_covered

    with refusing_input():
        check_writable(store)
        opened = open_store(store)
        this_process = Controller.this_process(versions=versions(), git_commit=git_commit())
        begin_set(opened, run, name, verifier, this_process)
        num_commits = len(counted_commits(opened, run))
    done = read_covered(opened, run, name)
    mended: tuple[str, ...] = ()
    try:
        if done is not None and done.num_commits >= num_commits:
            covered, num_new = done, 0
        else:
            with _output_aside(verbose):
                made = _rescore(store, run, name, verifier)
            covered, num_new, mended = made.covered, made.num_new, made.mended
    except BaseException as error:
        _explain(error, verbose)
        leave(FAILED)
    if json_output:
        print_json(_document(covered, verifier, num_new, mended))
    else:
        _print_scores(covered, verifier, num_new, mended, store)
    leave(0)


def _rescore(store: str, run: str, name: str, verifier: str) -> Rescored:
    """Run the flow with all that it needs around it."""
    # Deferred: monarch and Prefect take seconds to import.
    from flows.ephemeral import surroundings, wait_for_server
    from forge_core.meshes import preload

    async def main() -> Rescored:
        # Deferred: Prefect reads its settings from the environment when it is imported.
        from flows.rescore import rescore_run

        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await rescore_run(store, run, name, verifier)

    with surroundings() as workdir:
        preload()
        wait_for_server(workdir)
        return asyncio.run(main())


@contextmanager
def _output_aside(verbose: bool) -> Iterator[None]:
    """Keep what processes and reward functions print from the command's own output; `verbose` shows it as errors."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(2 if verbose else nowhere.fileno(), 1)
        if not verbose:
            os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _explain(error: BaseException, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, Exception):
        typer.echo(f"{type(error).__name__}: {error}", err=True)
    else:
        typer.echo("Cancelled; the same command goes on where it stopped.", err=True)


def _document(
    covered: Covered, verifier: str, num_new: int, mended: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "run_id": covered.run_id,
        "name": covered.name,
        "verifier": verifier,
        "commits": covered.num_commits,
        "episodes": covered.num_episodes,
        "newly_scored": num_new,
        "mended": mended,
        "mean": {"run": covered.reward_mean, covered.name: covered.score_mean},
    }


def _print_scores(
    covered: Covered, verifier: str, num_new: int, mended: tuple[str, ...], store: str
) -> None:
    table = Table("scores", "by", "mean", title=f"run {covered.run_id}", title_justify="left")
    table.add_row("run", "the run's own verifiers", f"{covered.reward_mean:.3f}")
    table.add_row(covered.name, verifier, f"{covered.score_mean:.3f}")
    out = console()
    out.print(table)
    out.print(f"{covered.num_episodes:,} episodes, {num_new:,} of them scored now.")
    for each in mended:
        out.print(f"mended: {each}")
    out.print(f"next: forgeflow replay {covered.run_id} --scores {covered.name} --store {store}")
