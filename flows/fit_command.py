"""The command `fit-verifiers`: one probability from the scores of verifiers that err."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

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
    refuse,
    refusing_input,
    set_up_logging,
)
from storage.objects import check_writable, open_store

if TYPE_CHECKING:
    from forge_core.ensembles.stored import FitRequest
    from storage.ensembles import Ensemble, Rates

Names = Annotated[
    list[str],
    typer.Option(metavar="NAME", help="Scores that `rescore` wrote; once for each verifier."),
]


def fit_verifiers(
    run: Run,
    scores: Names,
    name: Annotated[str, typer.Option(metavar="NAME", help="What the ensemble is called.")],
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Scores that are the truth, above 0.5 for right, or 'run': the run's own; for the report.",
        ),
    ] = None,
    labelled_prompts: Annotated[
        int, typer.Option(metavar="N", help="Prompts whose labels the fit may know; 0: none.")
    ] = 0,
    class_balance: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of right samples; estimated if not given."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make one verifier of many weak ones, from their scores of a past run's episodes."""
    set_up_logging(verbose)
    # Deferred: it brings pyarrow, which other commands do without.
    from forge_core.ensembles.stored import FitRequest, check_request

    request = FitRequest(
        run_id=run,
        scores=tuple(scores),
        name=name,
        labels=labels,
        labelled_prompts=labelled_prompts,
        class_balance=class_balance,
    )
    with refusing_input():
        check_writable(store)
        check_request(open_store(store), request)
    try:
        fitted = _fit(store, request)
    except ValueError as error:
        # The scores are what is wrong: nothing was stored.
        refuse(str(error))
    except Exception as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        leave(FAILED)
    if json_output:
        print_json(fitted.model_dump(mode="json"))
    else:
        _print_ensemble(fitted, store)
    leave(0)


def _fit(store: str, request: FitRequest) -> Ensemble:
    """Run the flow with all that it needs around it."""
    # Deferred: Prefect takes seconds to import.
    from flows.ephemeral import surroundings, wait_for_server

    with surroundings() as workdir:
        wait_for_server(workdir)
        # Deferred: Prefect reads its settings from the environment when it is imported.
        from flows.fit_verifiers import fit_run_verifiers

        return asyncio.run(
            fit_run_verifiers(
                store,
                request.run_id,
                list(request.scores),
                request.name,
                request.labels,
                request.labelled_prompts,
                request.class_balance,
            )
        )


def _print_ensemble(fitted: Ensemble, store: str) -> None:
    out = console()
    table = Table(
        "verifier", "use", "accuracy", "true positive", "true negative", "errors shared with"
    )
    table.title, table.title_justify = f"{fitted.reference}, estimated (by labels)", "left"
    partners = {name: unit.verifiers for unit in fitted.units for name in unit.verifiers}
    for each in fitted.verifiers:
        table.add_row(
            each.name,
            each.use,
            *(_both(each.estimated, each.labelled, field) for field in _RATES),
            ", ".join(other for other in partners.get(each.name, ()) if other != each.name),
        )
    out.print(table)
    for each in fitted.verifiers:
        if each.why_dropped is not None:
            out.print(f"dropped: {each.name}: {each.why_dropped}", markup=False)
    for warning in fitted.warnings:
        out.print(f"warning: {warning}", markup=False)
    how = "given" if fitted.is_balance_given else "estimated"
    out.print(
        f"{fitted.num_samples:,} samples of {fitted.num_prompts:,} prompts; share of right ones "
        f"{fitted.class_balance:.3f} ({how}); "
        f"expected to pick a right one of {fitted.expected_pick_rate:.1%} of groups."
    )
    if fitted.report is not None:
        rates = fitted.report.pick_rates
        picks = Table("right sample picked by", "of groups", "gain of the ensemble")
        for label, rate in (
            ("the ensemble", rates.ensemble),
            (f"{rates.best_single_name}, the best single one", rates.best_single),
            ("majority vote", rates.majority),
            ("mean of normalised scores", rates.mean),
            ("chance", rates.chance),
        ):
            gain = "" if label == "the ensemble" else f"{100 * (rates.ensemble - rate):+.1f} points"
            picks.add_row(label, f"{rate:.1%}", gain)
        picks.add_row("at most possible", f"{rates.possible:.1%}", "")
        out.print(picks)
        curve = Table("probability", "samples", "mean probability", "share right")
        for tenth in fitted.report.calibration:
            shares = (tenth.predicted, tenth.right)
            told = ("" if share is None else f"{share:.3f}" for share in shares)
            curve.add_row(f"{tenth.low:.1f} to {tenth.high:.1f}", f"{tenth.samples:,}", *told)
        out.print(curve)
        out.print(f"calibration error {fitted.report.calibration_error:.3f}")
    out.print(
        f"next: forgeflow rescore {fitted.run_id} --verifier {fitted.reference} --name {fitted.name} --store {store}"
    )


_RATES = ("accuracy", "true_positive_rate", "true_negative_rate")


def _both(estimated: Rates | None, labelled: Rates | None, field: str) -> str:
    text = "" if estimated is None else f"{getattr(estimated, field):.3f}"
    return text if labelled is None else f"{text} ({getattr(labelled, field):.3f})".strip()
