"""The command `doctor`: is this machine fit for a run, line by line, each good or with what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from flows import doctor_checks as checks
from flows.data_command import examine_data
from flows.doctor_checks import Finding
from flows.doctor_engine import examine_engine
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    console,
    print_json,
    refusing_input,
    set_up_logging,
)
from forge_core.config import RunConfig
from forge_core.settings import load_config


def doctor(
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="File or folder of rows to check instead."),
    ] = None,
    question: Annotated[
        str, typer.Option(metavar="COLUMN", help="Column of DATA that has the questions.")
    ] = "question",
    answer: Annotated[
        str, typer.Option(metavar="COLUMN", help="Column of DATA that has the answers.")
    ] = "answer",
    test_fraction: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of DATA that is held out, by hash."),
    ] = 0.1,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model whose tokens and context DATA is held against."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response, in tokens, that answers must fit.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(metavar="NAME", help="Config whose devices, memory and disk are forecast."),
    ] = "tiny",
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML, JSON or YAML over the preset.")
    ] = None,
    engine: Annotated[
        bool, typer.Option(help="Also start a trainer and an engine, and compare them.")
    ] = True,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check that this machine can run what is installed; or check DATA before a run trains on it."""
    set_up_logging(verbose)
    if data is not None:
        examine_data(
            data,
            question=question,
            answer=answer,
            test_fraction=test_fraction,
            model=model,
            max_tokens=max_tokens,
            json_output=json_output,
        )
        return
    with refusing_input():
        forecast = load_config(preset=preset, file=config, overrides=[])
    found: list[Finding] = []
    for finding in _examine(forecast, store, engine=engine):
        found.append(finding)
        if not json_output:
            _print(finding)
    bad = [each for each in found if not each.good]
    if json_output:
        print_json(_document(found))
    elif bad:
        console().print(f"{len(bad)} of {len(found)} to mend.")
    else:
        console().print("All is well.")
    if bad:
        raise typer.Exit(FAILED)


def _examine(config: RunConfig, store: str, *, engine: bool) -> Iterator[Finding]:
    """What is found, one after another: the engine, which takes longest, last, and only if all else is good."""
    found: list[Finding] = []
    for examine in (
        checks.python,
        checks.packages,
        checks.prefect_server,
        checks.ports,
        lambda: checks.devices(config, store),
        lambda: checks.needs(config, store),
        lambda: checks.writable_store(store),
    ):
        for finding in examine():
            found.append(finding)
            yield finding
    if not engine:
        return
    if any(not each.good for each in found):
        yield Finding(
            name="engine",
            good=False,
            told="not started, for something before it is wrong",
            mend="mend that first",
        )
    else:
        yield examine_engine()


def _print(finding: Finding) -> None:
    out = console()
    mark, style = ("good", "green") if finding.good else ("mend", "bold red")
    text = Text.assemble((f"{mark}  ", style), f"{finding.name}: {finding.told}")
    out.print(text)
    if finding.mend is not None:
        out.print(Text(f"      {finding.mend}"))


def _document(found: list[Finding]) -> dict[str, Any]:
    return {
        "ok": all(each.good for each in found),
        "findings": [
            {"name": each.name, "good": each.good, "told": each.told, "mend": each.mend}
            for each in found
        ],
    }
