"""`forgeflow`: the command line.

    forgeflow run --preset tiny        post-train a model
    forgeflow show RUN                 what became of it

Input is checked before Prefect or any engine is imported. Exit code 0: done; 2: input refused, with
at most two lines that say what and how to mend it; 1: otherwise.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from flows import maintenance, replay_commands, reports, round_commands
from flows.deploy_command import deploy
from flows.doctor import doctor
from flows.evaluate_command import evaluate
from flows.experiment_command import experiment, promoted
from flows.fit_command import fit_verifiers
from flows.html_report.command import report
from flows.plan import print_plan
from flows.preflight import check_input, check_machine, dry_run_plan
from flows.resume import fork_config, resume
from flows.server_command import server
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)
from flows.warm_start_command import warm_start
from forge_core.settings import list_presets, load_config

app = typer.Typer(
    name="forgeflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"forgeflow {importlib.metadata.version('forgeflow')}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Post-train language models: generate, score, train, publish."""


@app.command()
def run(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Config that comes with the package.")
    ] = None,
    regime: Annotated[
        str | None, typer.Option(metavar="NAME", help="How generation and training are composed.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML, JSON or YAML over the preset.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the run; made up if not given.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN@STEP",
            help="Go on from a checkpoint of another run, as a new run.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One dotted key over preset and file."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the plan, start nothing.")
    ] = False,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Post-train a model as a config says."""
    set_up_logging(verbose)
    with refusing_input():
        chosen = [f"regime={regime}"] if regime is not None else []
        chosen += overrides or []
        if origin is not None:
            if preset is not None:
                refuse(
                    f"--from {origin} brings that run's config with it: leave out --preset {preset}"
                )
            resolved = fork_config(origin, file=config, overrides=chosen, store=store)
        elif preset is None and config is None:
            refuse(f"run needs --preset or --config: the presets are {', '.join(list_presets())}")
        else:
            resolved = load_config(preset=preset, file=config, overrides=chosen)
        model = check_input(resolved, store, run_id=run_id)
        if not dry_run:
            check_machine(resolved, store, model)
    if dry_run:
        plan = dry_run_plan(resolved, store, model, run_id=run_id)
        print_json(plan) if json_output else print_plan(plan)
        if plan["refused"]:
            refuse(plan["refused"])
        return
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch import launch_and_leave

    launch_and_leave(
        resolved, store_uri=store, run_id=run_id, json_output=json_output, verbose=verbose
    )


app.command()(resume)
app.command()(evaluate)
app.command()(warm_start)
app.command()(experiment)
app.command()(promoted)
app.command()(round_commands.collect)
app.command()(round_commands.train_rounds)
app.command()(replay_commands.replay)
app.command()(replay_commands.rescore)
app.command()(fit_verifiers)
app.command()(reports.runs)
app.command()(reports.show)
app.command()(reports.verify)
app.command()(reports.episodes)
app.command()(maintenance.gc)
app.command()(report)
app.command()(deploy)
app.command()(server)
app.command()(doctor)


def main() -> None:
    """Entry point of the console script."""
    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        # An option or argument that does not exist or does not parse.
        typer.echo(" ".join(error.format_message().split()), err=True)
        code = error.exit_code
    except typer.Abort:
        code = FAILED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
