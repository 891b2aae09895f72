"""The commands `experiment`, which trains and decides, and `promoted`, which tells what was decided."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from flows.preflight import check_config, check_input, check_machine
from flows.resume import fork_config
from flows.terminal import (
    DEFAULT_STORE,
    Json,
    Store,
    Verbose,
    console,
    leave,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)
from forge_core.config import RunConfig
from forge_core.config.promotion import PromotionConfig
from forge_core.settings import list_presets, load_config
from storage import layout
from storage.objects import check_writable, open_store
from storage.promotions import (
    ExperimentPlan,
    candidate_run,
    decision_of,
    newest_promotion,
    read_decisions,
    read_plan,
)


def experiment(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Config that comes with the package.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML, JSON or YAML over the preset.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN@STEP", help="Train on from a checkpoint of a run."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One dotted key over preset and file."),
    ] = None,
    experiment_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Name of the experiment, or of one to go on with."),
    ] = None,
    line: Annotated[
        str | None, typer.Option(metavar="NAME", help="Line of promoted checkpoints.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Answers compared: sampled or greedy.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the interval of the gain.")
    ] = None,
    min_gain: Annotated[
        float | None, typer.Option(metavar="GAIN", help="What its lower end must exceed.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(metavar="SCORE", help="Below it nothing is promoted.")
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(metavar="N", help="Draws of the bootstrap.")
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a checkpoint, compare it with the one promoted last, and promote it if it is better."""
    set_up_logging(verbose)
    given = {
        "line": line,
        "score": score,
        "confidence": confidence,
        "min_gain": min_gain,
        "min_score": min_score,
        "resamples": resamples,
    }
    with refusing_input():
        check_writable(store)
        promotion = _promotion(given)
        plan = None if experiment_id is None else read_plan(open_store(store), experiment_id)
        chosen = preset is not None or config is not None or origin is not None
        if plan is not None:
            if chosen or overrides or promotion != PromotionConfig():
                refuse(
                    f"experiment {experiment_id!r} has begun, and goes on with what it was begun with: leave out all "
                    "but --experiment-id and --store, or name a new experiment"
                )
            resolved, promotion = _begun(plan, store)
        elif not chosen:
            refuse(
                "a new experiment needs --preset, --config or --from: the presets are "
                f"{', '.join(list_presets())}"
            )
        else:
            resolved = _config(preset, config, origin, overrides or [], store)
            named = None if experiment_id is None else candidate_run(experiment_id)
            check_machine(resolved, store, check_input(resolved, store, run_id=named))
    # Deferred: it brings Prefect, which takes seconds to import.
    from flows.launch_experiment import launch_experiment

    leave(
        launch_experiment(
            resolved,
            promotion,
            store_uri=store,
            experiment_id=experiment_id,
            json_output=json_output,
            verbose=verbose,
        )
    )


def _promotion(given: dict[str, Any]) -> PromotionConfig:
    """What the options say. Raises ValueError that names the first that is wrong."""
    named = {name: value for name, value in given.items() if value is not None}
    try:
        promotion = PromotionConfig.model_validate(named)
    except ValidationError as error:
        fault = error.errors()[0]
        option = f"--{str(fault['loc'][0]).replace('_', '-')}"
        raise ValueError(f"{option} {fault['input']!r}: {fault['msg']}") from None
    layout.check_line(promotion.line)
    return promotion


def _begun(plan: ExperimentPlan, store: str) -> tuple[RunConfig, PromotionConfig]:
    """What an experiment was begun with, checked anew if its run still has something to do."""
    resolved = RunConfig.model_validate(plan.config)
    promotion = PromotionConfig.model_validate(plan.promotion)
    if decision_of(read_decisions(open_store(store), promotion.line), plan.experiment_id) is None:
        check_machine(resolved, store, check_config(resolved, store))
    return resolved, promotion


def _config(
    preset: str | None, file: str | None, origin: str | None, overrides: list[str], store: str
) -> RunConfig:
    if origin is None:
        config = load_config(preset=preset, file=file, overrides=overrides)
    elif preset is not None:
        raise ValueError(f"--from {origin} brings that run's config: leave out --preset")
    else:
        config = fork_config(origin, file=file, overrides=overrides, store=store)
    if config.kind != "post_train":
        raise ValueError(
            f"{config.kind} makes no checkpoint to compare: leave it out of the config"
        )
    return config


def promoted(
    line: Annotated[
        str, typer.Argument(metavar="[LINE]", help="Line of promoted checkpoints.")
    ] = "default",
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show a line's newest promoted checkpoint, and every decision with its reason."""
    set_up_logging(verbose)
    with refusing_input():
        decisions = read_decisions(open_store(store), line)
    newest = newest_promotion(decisions)
    if json_output:
        documents = [each.model_dump(mode="json") for each in decisions]
        print_json(
            {
                "line": line,
                "promoted": None if newest is None else newest.checkpoint.reference,
                "key": None if newest is None else newest.checkpoint.key,
                "decisions": documents,
            }
        )
        return
    if newest is None:
        typer.echo(f"Line {line} has no promoted checkpoint in the store {store}.")
    else:
        typer.echo(
            f"{newest.checkpoint.reference}   score {newest.score:.4g}   {newest.checkpoint.key}"
        )
    if decisions:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("number", "checkpoint", "decision"):
            table.add_column(heading, no_wrap=True)
        table.add_column("reason", overflow="fold")
        for each in decisions:
            verdict = "promoted" if each.promoted else "declined"
            table.add_row(str(each.number), each.checkpoint.reference, verdict, Text(each.reason))
        console().print(table)
