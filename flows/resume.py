"""Going on from what a store has: the command `resume`, and the config of a fork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NoReturn

import typer

from flows.liveness import true_status
from flows.preflight import check_config, check_machine
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Run,
    Store,
    Verbose,
    print_json,
    refusing_input,
    set_up_logging,
)
from forge_core.config import RunConfig
from forge_core.settings import load_config, stored_config
from storage.objects import ObjectStore, check_writable, open_store
from storage.resume import find_checkpoint, read_ledger
from storage.rounds import waits_for
from storage.runs import read_config
from storage.summary import run_summary


def resume(
    run: Run,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also from a process that still holds the run.")
    ] = False,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a run that was interrupted, cancelled or failed, where its log ends."""
    # A run that waits for something has steps left, and none of them is trained.
    go_on(run, store, json_output, verbose, take_over=take_over, code_while_waiting=FAILED)


def go_on(
    run: str,
    store: str,
    json_output: bool,
    verbose: bool,
    *,
    take_over: bool = False,
    code_while_waiting: int,
) -> None:
    """What `resume` does; exit with `code_while_waiting` where the run waits and nothing is to be done for it."""
    set_up_logging(verbose)
    with refusing_input():
        opened = open_store(store)
        config = stored_config(opened, run)
        ledger = read_ledger(opened, run)
        status = true_status(ledger.status, ledger.incarnations)
        waiting = _waiting(opened, run, config, status, ledger.last_step)
        if status != "finished" and waiting is None:
            check_writable(store)
            check_machine(config, store, check_config(config, store))
    if status == "finished" or waiting is not None:
        summary = run_summary(opened, run)
        if json_output:
            print_json(summary)
        else:
            typer.echo(_nothing_to_do(run, config, summary["steps"], waiting))
        raise typer.Exit(0 if waiting is None else code_while_waiting)
    if status == "running" and ledger.incarnations and not take_over:
        holder = ledger.incarnations[-1].controller
        typer.echo(
            f"run {run} is held by process {holder.pid} on {holder.host}: wait for its end, cancel it, or take it "
            "over with --take-over",
            err=True,
        )
        raise typer.Exit(FAILED)
    _launch(config, opened, run, json_output=json_output, verbose=verbose)


def _launch(
    config: RunConfig, store: ObjectStore, run_id: str, *, json_output: bool, verbose: bool
) -> NoReturn:
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave, own_loop_of

    with refusing_input():
        loop = own_loop_of(store, run_id)
    launch_and_leave(
        config,
        store_uri=store.uri,
        run_id=run_id,
        json_output=json_output,
        verbose=verbose,
        loop=loop,
    )


def _nothing_to_do(run_id: str, config: RunConfig, steps: int, waiting: str | None) -> str:
    """Why a run does not go on, in a line: it waits for something, or is finished."""
    if waiting is not None:
        return f"Run {run_id} has nothing to train: {waiting}."
    if config.collect is not None:
        round = f"round {config.collect.round} of run {config.parent_run_id}"
        return f"Run {run_id} is finished: {round} is collected."
    if config.evaluate_only:
        weights = f"step {config.parent_step} of run {config.parent_run_id}"
        return f"Run {run_id} is finished: {weights} is evaluated."
    if config.warm_start_only:
        return f"Run {run_id} is finished: forgeflow run --from {run_id}@0 trains on from it."
    more = f"forgeflow run --from {run_id}@{steps} --set steps=N trains on from it"
    return f"Run {run_id} is finished: {steps} of {config.steps} steps are trained. {more}."


def _waiting(
    store: ObjectStore, run_id: str, config: RunConfig, status: str, last_step: int
) -> str | None:
    """What a paused run still waits for, in a sentence; None if it can go on."""
    if status != "paused":
        return None
    trained = last_step - (config.parent_step or 0)
    return waits_for(store, run_id, trained // config.steps_per_round + 1)


def fork_config(origin: str, *, file: str | None, overrides: list[str], store: str) -> RunConfig:
    """The config of a run that goes on from `RUN@STEP`, or from the newest checkpoint of `RUN`.

    It is the other run's config with file and overrides over it. Raises ValueError if there is no such checkpoint, it
    is of another model, or nothing would be left to train.
    """
    config = config_from(origin, file=file, overrides=overrides, store=store)
    if config.steps <= (step := config.parent_step or 0):
        raise ValueError(
            f"steps {config.steps} leaves nothing to train after step {step} of run {config.parent_run_id!r}: --set "
            "steps to a larger number, which counts from that run's first step"
        )
    return config


def config_from(
    origin: str,
    *,
    file: str | None,
    overrides: list[str],
    store: str,
    given: Mapping[str, object] | None = None,
) -> RunConfig:
    """The config of a run that begins with the weights of `RUN@STEP`, or of the newest checkpoint of `RUN`.

    It is the other run's config with what is `given` by the command, file and overrides over it. Raises ValueError if
    there is no such checkpoint, or it is of another model.
    """
    parent, _, step_text = origin.partition("@")
    if step_text and not step_text.isdigit():
        raise ValueError(f"{origin!r} names no step: write RUN@STEP, such as {parent}@10")
    opened = open_store(store)
    stored = read_config(opened, parent)
    kept = find_checkpoint(opened, parent, int(step_text) if step_text else None)
    base = {**stored, "parent_run_id": parent, "parent_step": kept.step, "replay": None}
    base |= {"train_rounds": False, "collect": None, "evaluate_only": False}
    base |= {"warm_start_only": False, **(given or {})}
    config = load_config(preset=None, file=file, overrides=overrides, base=base)
    if (config.parent_run_id, config.parent_step) != (parent, kept.step):
        raise ValueError(f"parent_run_id and parent_step follow from {origin!r}: leave them out")
    if config.model.model_dump(mode="json", exclude={"shape"}) != _model_of(stored):
        raise ValueError(
            f"model differs from that of run {parent!r}, whose weights it gets: leave it as it is"
        )
    return config


def _model_of(stored: dict[str, object]) -> dict[str, object]:
    model = RunConfig.model_validate(stored).model
    return model.model_dump(mode="json", exclude={"shape"})
