"""The command `evaluate`: how good a checkpoint is on held-out prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.preflight import check_input, check_machine
from flows.resume import config_from
from flows.terminal import DEFAULT_STORE, Json, Store, Verbose, refusing_input, set_up_logging


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]",
            help="Run and step of its checkpoint; the newest one without a step.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="One dotted key over that run's config, such as evaluation.num_prompts.",
        ),
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Name of the new run; made from the time if not given."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer held-out prompts with a checkpoint's weights and score them, as a run of its own."""
    set_up_logging(verbose)
    with refusing_input():
        config = config_from(
            checkpoint,
            file=None,
            overrides=overrides or [],
            store=store,
            given={"evaluate_only": True},
        )
        check_machine(config, store, check_input(config, store, run_id=run_id))
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave

    launch_and_leave(
        config, store_uri=store, run_id=run_id, json_output=json_output, verbose=verbose
    )
