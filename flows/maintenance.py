"""The command that deletes: `gc` takes what nothing refers to, and runs that are named or have expired."""

from __future__ import annotations

import math
import socket
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from flows.liveness import true_status
from flows.terminal import (
    DEFAULT_STORE,
    FAILED,
    Json,
    Store,
    Verbose,
    console,
    print_json,
    refuse,
    refusing_input,
    set_up_logging,
)
from storage import log
from storage.objects import ObjectInfo, ObjectStore, open_store
from storage.records import Commit, Incarnation, read_record

if TYPE_CHECKING:
    from storage.compaction import Plan
    from storage.garbage import Limits

_HOUR_SECONDS = 3600


def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed otherwise.")
    ] = False,
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Leave alone what is younger.")
    ] = 24.0,
    compact: Annotated[
        bool, typer.Option("--compact", help="First write many small parts as few large ones.")
    ] = False,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="Delete this run instead, whole.")
    ] = None,
    expire_days: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Delete runs that ended before that instead."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """List what nothing in a store refers to, and delete it if told so; the only command that deletes."""
    set_up_logging(verbose)
    with refusing_input():
        if sum([compact, run is not None, expire_days is not None]) > 1:
            refuse("--run, --expire-days and --compact are three things to do: give one at a time")
        opened = open_store(store)
        try:
            if run is not None or expire_days is not None:
                document = _runs(opened, run, expire_days, older_than, delete=delete)
            else:
                document = _garbage(opened, older_than, delete=delete, compacting=compact)
        except OSError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(FAILED) from error
    document = {"store": opened.uri, "deleted": delete, **document}
    print_json(document) if json_output else _print(document)


def _garbage(
    store: ObjectStore, older_than: float, *, delete: bool, compacting: bool
) -> dict[str, Any]:
    """Find garbage, or delete it; in a dry run nothing is compacted either."""
    # Deferred, as below: it brings pyarrow.
    from storage.gc import delete_garbage, find_garbage, sizes

    limits = _limits(older_than)
    compacted = _compact(store, limits, write=delete) if compacting else []
    found = delete_garbage(store, limits) if delete else find_garbage(store, limits)
    return {
        "kinds": sizes(found.garbage),
        "objects": [
            {"kind": each.kind, "key": each.key, "bytes": each.bytes} for each in found.garbage
        ],
        "spared": found.spared,
        "compacted": compacted,
    }


def _compact(store: ObjectStore, limits: Limits, *, write: bool) -> list[dict[str, Any]]:
    """Compact every run that is not going on and whose log is sound."""
    from storage.compaction import compact, plan_compaction
    from storage.garbage import read_sound_log
    from storage.runs import list_runs

    done = []
    for run_id in list_runs(store):
        try:
            ledger, _ = read_sound_log(store, run_id)
            if limits.spare(ledger):
                continue
            commits = [read_record(store, key, Commit) for key in ledger.commits]
            plan = plan_compaction(store, run_id, commits, whole=ledger.status != "running")
            if plan.batches and (not write or compact(store, plan) is not None):
                done.append(_compaction(plan))
        except (ValueError, LookupError) as error:
            typer.echo(f"Run {run_id} was not compacted: {error}", err=True)
    return done


def _compaction(plan: Plan) -> dict[str, Any]:
    commits = [commit for batch in plan.batches for commit in batch]
    return {
        "run_id": plan.run_id,
        "commits": len(commits),
        "episodes": sum(commit.rows for commit in commits),
        "parts": len(plan.batches),
    }


def _runs(
    store: ObjectStore,
    run: str | None,
    expire_days: float | None,
    older_than: float,
    *,
    delete: bool,
) -> dict[str, Any]:
    """List all of one run or of those that have expired, or delete it."""
    from storage.deleting import deletable, delete_run, expired
    from storage.tombstones import objects_of

    kept: dict[str, set[str]] = {}
    objects: dict[str, list[ObjectInfo]] = {}
    if run is not None:
        objects[run] = deletable(store, run, _limits_of(store, run, older_than))
    else:
        assert expire_days is not None
        run_ids, kept = expired(store, expire_days)
        objects = {run_id: objects_of(store, run_id) for run_id in run_ids}
    if delete:
        objects = {run_id: delete_run(store, run_id) for run_id in objects}
    return {
        "runs": [
            {"run_id": run_id, "objects": len(infos), "bytes": sum(info.bytes for info in infos)}
            for run_id, infos in objects.items()
        ],
        "spared": {
            run_id: f"{', '.join(sorted(heirs))} came from it" for run_id, heirs in kept.items()
        },
    }


def _limits(older_than: float) -> Limits:
    from storage.garbage import Limits

    return Limits(before=time.time() - older_than * _HOUR_SECONDS, is_alive=_is_alive)


def _limits_of(store: ObjectStore, run_id: str, older_than: float) -> Limits:
    """A run whose controller is known to be gone need not have been quiet for long."""
    from storage.garbage import Limits

    try:
        gone = true_status("running", log.read_incarnations(store, run_id)) == "interrupted"
    except ValueError:
        gone = False
    return Limits(before=math.inf) if gone else _limits(older_than)


def _is_alive(newest: Incarnation) -> bool:
    """Of a controller on another host this cannot be told."""
    here = newest.controller.host == socket.gethostname()
    return here and true_status("running", [newest]) == "running"


def _print(document: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run" if "runs" in document else "what", overflow="fold")
    for heading in ("objects", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = document.get("runs") or [
        {"run_id": kind, **sums} for kind, sums in document.get("kinds", {}).items()
    ]
    for row in rows:
        table.add_row(row["run_id"], f"{row['objects']:,}", f"{row['bytes']:,}")
    for each in document.get("compacted", []):
        verb = "Wrote" if document["deleted"] else "Would write"
        typer.echo(
            f"{verb} {each['episodes']:,} episodes of {each['commits']} commits of run "
            f"{each['run_id']} as {each['parts']} parts."
        )
    if rows:
        console().print(table)
    for run_id, reason in document["spared"].items():
        typer.echo(f"Run {run_id} is left alone: {reason}.")
    num_objects = sum(row["objects"] for row in rows)
    if not num_objects:
        typer.echo("There is nothing to delete.")
    elif document["deleted"]:
        typer.echo(f"Deleted {num_objects:,} objects.")
    else:
        typer.echo(f"Nothing was deleted: --delete deletes these {num_objects:,} objects.")
