"""Collecting and training apart: `collect` samples one round, `train-rounds` trains on those that are there.

Each is a run of its own, so that they can be started on schedules and machines of their own.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flows.preflight import check_config, check_input, check_machine
from flows.resume import go_on
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Run,
    Store,
    Verbose,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)
from forge_core.config import RunConfig
from forge_core.rounds import NotYet, claim_round, round_config, trainer_config
from forge_core.settings import list_presets, load_config
from storage import layout
from storage.objects import check_writable, open_store
from storage.summary import run_summary

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One dotted key over preset and file."),
]


def collect(
    run: Run,
    run_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Name of the new run; after the round if not given."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Collect the next round of RUN, with its newest weights, as a run of its own."""
    set_up_logging(verbose)
    with refusing_input():
        check_writable(store)
        opened = open_store(store)
        trainer = trainer_config(opened, run)
        # Before anything is claimed: what cannot run here must not hold a round. Any round needs what the first does.
        if trainer.first_step <= trainer.steps:
            first = round_config(trainer, run, 1, trainer.parent_step or 0)
            check_machine(first, store, check_config(first, store))
        try:
            claimed = claim_round(opened, run, run_id)
        except NotYet as reason:
            typer.echo(f"Nothing was collected: {reason}.", err=True)
            raise typer.Exit(FAILED) from reason
    if claimed is None:
        if json_output:
            print_json(run_summary(opened, run))
        else:
            typer.echo(f"All rounds of run {run} are collected, or being collected.")
        return
    name, config = claimed
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave

    launch_and_leave(config, store_uri=store, run_id=name, json_output=json_output, verbose=verbose)


def train_rounds(
    run: Run,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Config that comes with the package.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML, JSON or YAML over the preset.")
    ] = None,
    overrides: Overrides = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train RUN on all rounds that are collected by now; begin it if it is new."""
    set_up_logging(verbose)
    with refusing_input():
        opened = open_store(store)
        chosen = preset is not None or config is not None or bool(overrides)
        begins = _config(preset, config, overrides or []) if chosen else None
        if opened.exists(layout.config_key(run)):
            if begins not in (None, trainer_config(opened, run)):
                refuse(
                    f"run {run!r} exists with another config, which stands for good: leave out --preset, --config and "
                    "--set, or name a new run"
                )
            begins = None
        elif begins is None or (preset is None and config is None):
            refuse(
                f"run {run!r} is new and needs --preset or --config: the presets are {', '.join(list_presets())}"
            )
        else:
            check_machine(begins, store, check_input(begins, store, run_id=run))
    if begins is not None:
        # Deferred: it brings Prefect, which takes seconds to import.
        from flows.launch import launch_and_leave

        launch_and_leave(
            begins, store_uri=store, run_id=run, json_output=json_output, verbose=verbose
        )
    go_on(run, store, json_output, verbose, code_while_waiting=0)


def _config(preset: str | None, file: str | None, overrides: list[str]) -> RunConfig:
    chosen = ["regime=hybrid", "train_rounds=true", *overrides]
    config = load_config(preset=preset, file=file, overrides=chosen)
    if not config.train_rounds:
        raise ValueError("train_rounds follows from the command: leave it out")
    return config
