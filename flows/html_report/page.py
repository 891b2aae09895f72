"""The page: what was asked, what came out, charts, samples, and the whole config."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flows.accounting_rows import HEADINGS, accounting_rows
from flows.html_report.charts import charts
from flows.html_report.data import RunData, read_run
from flows.result_rows import result_rows
from forge_core.config import RunConfig
from storage import layout
from storage.objects import ObjectStore


def write_report(store: ObjectStore, run_id: str) -> str:
    """Write a run's `report.html` beside its run.json; its key.

    Raises ValueError if the run does not exist or its log is unreadable.
    """
    return keep_report(store, read_run(store, run_id))


def keep_report(store: ObjectStore, run: RunData) -> str:
    """As `write_report`, of a run that is read already."""
    key = layout.report_key(run.run_id)
    store.replace(key, render([run]).encode())
    return key


def render(runs: Sequence[RunData]) -> str:
    """One self-contained HTML document about one run or several side by side."""
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((resources.files("flows.html_report") / "page.html.j2").read_text("utf-8"))
    return template.render(
        title=", ".join(run.run_id for run in runs),
        runs=[_shown(run) for run in runs],
        outcomes=_side_by_side([result_rows(run.summary) for run in runs]),
        asked=_asked(runs),
        accounting_headings=HEADINGS,
        charts=[
            {"title": c.title, "html": Markup(c.html), "is_wide": c.is_wide} for c in charts(runs)
        ],
        plotly=Markup(get_plotlyjs()),
    )


def _shown(run: RunData) -> dict[str, Any]:
    summary, ledger = run.summary, run.ledger
    return {
        "run_id": run.run_id,
        "status": summary["status"],
        "regime": summary["regime"],
        "started_at": (summary["started_at"] or "-")[:19].replace("T", " "),
        "reason": ledger.end.reason if ledger.end else None,
        "signs": run.signs,
        "drops": run.quality.drops,
        "stood_out": run.quality.samples,
        "unreadable": run.quality.unreadable,
        "retries": ledger.retries,
        "failures": ledger.failures,
        "accounting": accounting_rows(summary),
        "replicas": [ledger.replicas[mesh] for mesh in sorted(ledger.replicas)],
        "samples": run.samples,
        "sources": summary["sources"],
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
        # Relative to the report, which lies in the run's folder.
        "profiles": [key.removeprefix(layout.run_folder(run.run_id)) for key in run.profiles],
        "config": yaml.safe_dump(summary["config"], sort_keys=False),
    }


def _side_by_side(of_runs: list[list[tuple[str, str, str]]]) -> list[tuple[str, list[str]]]:
    """By what it is, before and after of each run in turn."""
    return [
        (rows[0][0], [cell for _, before, after in rows for cell in (before, after)])
        for rows in zip(*of_runs, strict=True)
    ]


def _asked(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """Every key of the config in which a run differs from the defaults, each run's value, and whether those differ."""
    defaults = _flat(RunConfig().model_dump(mode="json"))
    configs = [_flat(run.summary["config"]) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    chosen = [
        key for key in keys if any(config.get(key) != defaults.get(key) for config in configs)
    ]
    rows = [(key, [_text(config.get(key)) for config in configs]) for key in chosen]
    return [(key, values, len(set(values)) > 1) for key, values in rows]


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
