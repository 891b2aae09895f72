"""What `forgeflow doctor DATA` does: the checks of a dataset, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from flows.model_directory import ModelDirectory
from flows.terminal import FAILED, console, print_json, refusing_input
from forge_core.data_checks.columns import Columns
from forge_core.data_checks.findings import DataReport
from forge_core.data_checks.report import check_dataset
from forge_core.data_checks.tokens import Limits


def examine_data(
    data: str,
    *,
    question: str,
    answer: str,
    test_fraction: float,
    model: str | None,
    max_tokens: int | None,
    json_output: bool,
) -> None:
    """Check a dataset, print what is found, and exit with 1 if any of it would ruin a run."""
    with refusing_input():
        report = check_dataset(
            data,
            columns=Columns(question=question, answer=answer),
            test_fraction=test_fraction,
            limits=_limits(model, max_tokens),
        )
    if json_output:
        print_json(_document(data, report))
    else:
        _print_report(report)
    if report.blocking:
        raise typer.Exit(FAILED)


def _limits(model: str | None, max_tokens: int | None) -> Limits | None:
    """What rows must fit into. Raises ValueError for a model that cannot be used."""
    if model is None:
        if max_tokens is not None:
            raise ValueError(
                f"--max-tokens {max_tokens} counts tokens as a model does: name one by --model"
            )
        return None
    directory = ModelDirectory.open(model)
    tokenizer = directory.path / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"--model {model!r} has no tokenizer.json to count tokens with: add it")
    return Limits(
        tokenizer=Path(tokenizer),
        context=directory.context_length,
        context_name=f"the context of {model}",
        max_response=max_tokens,
        response_name="--max-tokens",
    )


def _document(data: str, report: DataReport) -> dict[str, Any]:
    return {
        "data": data,
        "figures": report.figures,
        "findings": [
            {
                "check": each.check,
                "blocks": each.blocks,
                "says": each.says,
                "rows": [{"file": row.file, "row": row.number} for row in each.rows],
            }
            for each in report.findings
        ],
    }


def _print_report(report: DataReport) -> None:
    out = console()
    table = Table("figure", "")
    for name, value in report.figures.items():
        told = (
            ", ".join(f"{key} {each}" for key, each in value.items())
            if isinstance(value, dict)
            else str(value)
        )
        table.add_row(name.replace("_", " "), told)
    out.print(table, markup=False)
    for finding in report.blocking:
        out.print(f"stops a run: {finding.says}", markup=False, soft_wrap=True)
    for finding in report.warnings:
        out.print(f"look at: {finding.says}", markup=False, soft_wrap=True)
    if not report.findings:
        out.print("Nothing is wrong with it.")
