"""Commands that read a store: `runs`, `show`, `verify` and `episodes`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from flows.accounting_rows import HEADINGS, accounting_rows
from flows.liveness import true_status
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Run,
    Store,
    Verbose,
    console,
    print_json,
    refusing_input,
    set_up_logging,
)
from storage import log, summary
from storage.ledger import Ledger
from storage.objects import ObjectStore, open_store
from storage.records import Commit, read_record
from storage.runs import list_runs, read_config

_COLUMNS = [
    *("episode_id", "group_id", "environment", "prompt", "answer", "response", "reward"),
    *("finish_reason", "token_policy_versions", "created_at"),
]


def runs(store: Store = DEFAULT_STORE, json_output: Json = False, verbose: Verbose = False) -> None:
    """List the runs of a store."""
    set_up_logging(verbose)
    with refusing_input():
        opened = open_store(store)
        documents = [_summarize(opened, run_id) for run_id in list_runs(opened)]
    if json_output:
        print_json(documents)
        return
    if not documents:
        typer.echo(f"The store {store} holds no runs.")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("environment", "steps", "eval", "started"):
        table.add_column(heading, overflow="fold")
    for document in documents:
        table.add_row(
            document["run_id"],
            document["status"],
            document["config"]["environment"]["name"],
            f"{document['policy_version']} of {document['config']['steps']}",
            f"{_number(document['eval']['initial'])} → {_number(document['eval']['final'])}",
            _moment(document["started_at"]),
        )
    console().print(table)


def show(
    run: Run, store: Store = DEFAULT_STORE, json_output: Json = False, verbose: Verbose = False
) -> None:
    """Show what a run did, and where its time went."""
    set_up_logging(verbose)
    with refusing_input():
        document = _summarize(open_store(store), run)
    if json_output:
        print_json(document)
        return
    out = console()
    out.print(_facts(document))
    out.print(_seconds(document))
    out.print(_accounting(document))


def verify(
    run: Run, store: Store = DEFAULT_STORE, json_output: Json = False, verbose: Verbose = False
) -> None:
    """Recount a run from its parts and log, believing no summary; exit 1 if anything is wrong."""
    set_up_logging(verbose)
    # Deferred: it brings pyarrow, which the other commands do without.
    from storage.verify import verify as verify_run

    with refusing_input():
        report = verify_run(open_store(store), run)
    problems = [problem.sentence for problem in report.problems]
    if json_output:
        counted = dict(report.counted)
        print_json({"run_id": run, "ok": report.ok, "counted": counted, "problems": problems})
    else:
        for name, number in report.counted.items():
            typer.echo(f"{number:>10,} {name.replace('_', ' ')}")
        for problem in problems:
            typer.echo(f"Problem: {problem}")
        typer.echo("All of it holds." if report.ok else f"{len(problems)} problems.")
    if not report.ok:
        raise typer.Exit(FAILED)


def episodes(
    run: Run,
    limit: Annotated[int, typer.Option(min=1, help="Most episodes to print.")] = 10,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print the newest episodes of a run that its log counts."""
    set_up_logging(verbose)
    with refusing_input():
        rows = _newest_episodes(open_store(store), run, limit)
    if json_output:
        print_json(rows)
        return
    out = console()
    for row in rows:
        versions = row["token_policy_versions"]
        out.print(Text(f"{row['episode_id']}   reward {row['reward']:g}", style="bold"))
        for name in ("prompt", "response", "answer"):
            out.print(Text(f"  {name:<9}{_as_read(row[name])}"))
        oldest, newest = min(versions), max(versions)
        span = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
        tokens = f"{len(versions)} tokens, {row['finish_reason']}, policy version {span}"
        out.print(Text(f"  {tokens}\n", style="dim"))
    if not rows:
        typer.echo(f"Run {run} has no episodes yet.")


def _summarize(store: ObjectStore, run_id: str) -> dict[str, Any]:
    document = summary.run_summary(store, run_id)
    incarnations = log.read_incarnations(store, run_id)
    return {**document, "status": true_status(document["status"], incarnations)}


def _newest_episodes(store: ObjectStore, run_id: str, limit: int) -> list[dict[str, Any]]:
    # Deferred: it brings pyarrow.
    from storage.parts import read_commit

    read_config(store, run_id)
    ledger = Ledger.fold(log.read_entries(store, run_id), log.read_incarnations(store, run_id))
    rows: list[dict[str, Any]] = []
    for fact in reversed(ledger.committed):
        if len(rows) >= limit:
            break
        commit = read_record(store, fact.commit, Commit)
        part = read_commit(store, commit, _COLUMNS)
        rows += reversed(part.slice(max(0, len(part) - limit + len(rows))).to_pylist())
    return rows


def _facts(document: dict[str, Any]) -> Table:
    """What a run is and came to."""
    config, before, groups = document["config"], document["eval"], document["groups"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in groups["dropped"].items())
    parity, age = document["parity"], document["age"]
    handed_over = f"{groups['handed_over']} handed over, " if "handed_over" in groups else ""
    rows = {
        "status": document["status"],
        "regime": document["regime"],
        "started": _moment(document["started_at"]),
        "finished": _moment(document["finished_at"]),
        "environment": config["environment"]["name"],
        "model": config["model"]["path"] or "tiny",
        "steps": f"{document['policy_version']} of {config['steps']}, "
        f"{document['optimizer_updates']} optimizer updates",
        "eval, sampled": f"{_number(before['initial'])} → {_number(before['final'])}",
        "eval, greedy": f"{_number(before['greedy_initial'])} → {_number(before['greedy_final'])}",
        "eval prompts": str(before["num_prompts"] or "-"),
        "groups": f"{groups['admitted']} admitted, {groups['trained']} trained, "
        f"{handed_over}{groups['pending']} pending, dropped: {dropped or 'none'}",
        "episodes": f"{document['episodes']['generated']} generated, "
        f"{document['episodes']['trained']} trained",
        "tokens": f"{document['tokens']['prompt']:,} prompt, "
        f"{document['tokens']['response']:,} response",
        "age": f"max {_number(age['max'])}, mean {_number(age['mean'])}",
        "parity, nats": f"mean {_number(parity['mean'])}, max {_number(parity['max'])}",
        "retries": str(document["retries"]),
        "failures": str(document["failures"]),
    }
    table = Table(title=f"Run {document['run_id']}", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _seconds(document: dict[str, Any]) -> Table:
    """Where each mesh's time went."""
    seconds = document["seconds"]
    title = f"Seconds: {seconds['total']:.1f} in all, {seconds['down']:.1f} down"
    table = Table("mesh", "doing", "seconds", title=title, title_justify="left")
    for mesh, kinds in seconds["meshes"].items():
        for kind, value in kinds.items():
            table.add_row(mesh, kind, f"{value:.1f}")
            mesh = ""
    return table


def _accounting(document: dict[str, Any]) -> Table:
    """What each stage held and moved."""
    table = Table(title="Held and moved, over all incarnations", title_justify="left")
    table.add_column("stage")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in accounting_rows(document):
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _moment(iso: str | None) -> str:
    return "-" if iso is None else iso[:19].replace("T", " ")


def _as_read(text: str | None) -> str:
    """Text on one line, so that its end can be seen."""
    return "-" if text is None else json.dumps(text, ensure_ascii=False)[1:-1]
