"""What Prefect's pages show of a run: tables and pages of the current flow run, one version of a key after another.

| key | shows |
|---|---|
| `forgeflow-progress` | how many of its steps are trained, while it goes on |
| `forgeflow-results` | what changed from before to after |
| `forgeflow-samples` | held-out prompts and how they were answered before and after |
| `forgeflow-time` | where the time of each mesh went |
| `forgeflow-accounting` | what each stage held and moved |
| `forgeflow-report` | where the report lies |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    acreate_link_artifact,
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)

from flows.accounting_rows import HEADINGS, accounting_rows
from flows.html_report.data import RunData, Sample
from flows.result_rows import result_rows
from storage import facts, layout
from storage.objects import ObjectStore
from storage.workspace import locate

logger = logging.getLogger(__name__)

_UPDATE_SECONDS = 2.0
"""Shortest time between two updates of the progress: each is a request to the server."""
_ANSWER_SECONDS = 5.0
"""Time in which an update must have been made."""
_LONGEST = 2000
"""Characters of a text that are shown."""


class Progress:
    """A listener that counts the steps of a run."""

    def __init__(self, first_step: int, steps: int) -> None:
        self._before = first_step - 1
        self._number = max(1, steps - self._before)
        self.percent = 0.0
        """How much of the run is trained, of 100."""
        self.changed = asyncio.Event()
        """Set when it has changed since somebody cleared it."""

    def __call__(self, fact: facts.Fact) -> None:
        """Take a step into account."""
        if isinstance(fact, facts.Step):
            done = 100.0 * (fact.step - self._before) / self._number
            self.percent = min(100.0, max(self.percent, done))
            self.changed.set()
        elif isinstance(fact, facts.End) and fact.status == "finished":
            # What it was for may have been no step.
            self.percent = 100.0


@asynccontextmanager
async def shown_progress(run_id: str, first_step: int, steps: int) -> AsyncIterator[Progress]:
    """A listener whose count is shown as an artifact of the flow run, now and then and once more when it is done.

    A server that fails costs a warning, and no step waits for it.
    """
    progress = Progress(first_step, steps)
    try:
        artifact = await acreate_progress_artifact(
            0.0, key="forgeflow-progress", description=f"Steps of run {run_id}"
        )
    except Exception as error:
        logger.warning("the progress of run %s is not shown: %s", run_id, error)
        yield progress
        return
    showing = asyncio.create_task(_show(progress, artifact))
    try:
        yield progress
    finally:
        showing.cancel()
    await _update(artifact, progress.percent)


async def _show(progress: Progress, artifact: UUID) -> None:
    while True:
        await progress.changed.wait()
        progress.changed.clear()
        await _update(artifact, progress.percent)
        await asyncio.sleep(_UPDATE_SECONDS)


async def _update(artifact: UUID, percent: float) -> None:
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await aupdate_progress_artifact(artifact, percent)
    except Exception as error:
        logger.warning("progress of %.0f %% is not shown: %s", percent, error)


async def show_results(store: ObjectStore, run: RunData) -> None:
    """Artifacts of the current flow run that tell what came of the run. Raises what Prefect raises."""
    of_run = f"Run {run.run_id} in {store.uri}"
    summary = run.summary
    await acreate_table_artifact(
        key="forgeflow-results",
        table=[
            {"": what, "before": before, "after": after}
            for what, before, after in result_rows(summary)
        ],
        description=of_run,
    )
    if run.samples:
        await acreate_markdown_artifact(
            key="forgeflow-samples", markdown=samples_markdown(run.samples), description=of_run
        )
    await acreate_table_artifact(
        key="forgeflow-time", table=time_shares(summary), description=of_run
    )
    await acreate_table_artifact(
        key="forgeflow-accounting",
        table=[
            dict(zip(("stage", *HEADINGS), row, strict=True)) for row in accounting_rows(summary)
        ],
        description=of_run,
    )
    where = locate(store, layout.report_key(run.run_id))
    await acreate_link_artifact(
        key="forgeflow-report",
        link=Path(where).as_uri() if where.startswith("/") else where,
        link_text=f"Report of run {run.run_id}",
        description=of_run,
    )


def time_shares(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Row by row, what a mesh did, and its share of the time in which somebody held the run."""
    seconds = summary["seconds"]
    up = max(seconds["total"] - seconds["down"], 1e-9)
    return [
        {"mesh": mesh, "doing": kind, "seconds": f"{value:.1f}", "share": f"{value / up:.1%}"}
        for mesh, kinds in seconds["meshes"].items()
        for kind, value in kinds.items()
    ]


def samples_markdown(samples: list[Sample]) -> str:
    """The samples, each text in a block of its own, in which nothing is taken for Markdown."""
    lines = []
    for sample in samples:
        lines += [
            *("**prompt**", "", *_block(sample.prompt)),
            *("", f"**before**, reward {sample.before_reward:.3g}", "", *_block(sample.before)),
            *("", f"**after**, reward {sample.after_reward:.3g}", "", *_block(sample.after)),
            *("", f"reference: `{' '.join(str(sample.answer).split())}`", "", "---", ""),
        ]
    return "\n".join(lines)


def _block(text: str) -> list[str]:
    """Indented, so that no fence within it could end it; cut to what a page can show."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return [f"    {line}" for line in shown.splitlines() or [""]]
