"""The command `warm-start`: supervised training alone, for other runs to go on from."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.preflight import check_input, check_machine
from flows.terminal import (
    DEFAULT_STORE,
    Json,
    Store,
    Verbose,
    refuse,
    refusing_input,
    set_up_logging,
)
from forge_core.settings import list_presets, load_config


def warm_start(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Config that comes with the package.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML, JSON or YAML over the preset.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One dotted key over preset and file."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the run; made up if not given.")
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train on right answers alone; `run --from ID@0` then trains on from the checkpoint."""
    set_up_logging(verbose)
    with refusing_input():
        if preset is None and config is None:
            refuse(
                f"warm-start needs --preset or --config: the presets are {', '.join(list_presets())}"
            )
        chosen = [*(overrides or []), "warm_start_only=true"]
        resolved = load_config(preset=preset, file=config, overrides=chosen)
        check_machine(resolved, store, check_input(resolved, store, run_id=run_id))
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave

    launch_and_leave(
        resolved, store_uri=store, run_id=run_id, json_output=json_output, verbose=verbose
    )
