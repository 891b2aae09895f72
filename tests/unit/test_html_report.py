"""The report: one page that needs nothing but itself, whatever stands in prompts, and says what the log says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import finished

from flows.html_report.charts import _smoothed
from flows.html_report.data import read_run
from flows.html_report.page import render
from forge_core.settings import load_config
from storage import facts, layout
from storage.log import RunLog
from storage.objects import LocalStore
from storage.records import Controller
from storage.runs import store_config

FORGEFLOW = str(Path(sys.executable).parent / "forgeflow")
EVIL = "</script><script>alert(1)</script>"


def _made_run(store: LocalStore, run_id: str, *overrides: str) -> None:
    config = load_config(preset="tiny", file=None, overrides=[*overrides])
    store_config(store, run_id, config.model_dump(mode="json"))
    log = RunLog.claim(store, run_id, Controller.this_process(versions={}, git_commit=None))
    began = log.incarnation.controller.claimed_at
    log.append(facts.Started(run_id=run_id, meshes=("generator-0", "trainer")))
    for step in range(1, 6):
        log.append(
            facts.Step(
                step=step, group_ids=(), score_set="run", weights_digest=f"d{step}",
                policy_version=step, optimizer_updates=1, age_max=1, age_mean=0.5,
                metrics={"reward": step / 10, "entropy": 0.5, "sampling/kl": 0.01},
                checkpoint=None,
            ),
            facts.Intervals(
                mesh="trainer",
                intervals=(
                    facts.Interval(kind="train", start=began + step, end=began + step + 0.5),
                    facts.Interval(kind="wait_batch", start=began + step + 0.5, end=began + step + 1),
                ),
            ),
        )  # fmt: skip
    log.append(facts.Retry(stage="score", attempt=1, cause=EVIL, seconds=2.5))
    log.append(facts.End(status="finished", reason=None))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    _made_run(store, "left")
    _made_run(store, "right", "steps=7", "optimizer.learning_rate=0.001")
    return store


def test_the_page_asks_for_nothing_and_runs_nothing_of_the_runs(store: LocalStore) -> None:
    page = render([read_run(store, "left")])
    own = page.replace(re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1], "")  # type: ignore[index]
    assert "default-src 'none'" in own
    assert not re.search(r'(?:src|href)="(?!data:)', own)
    assert EVIL not in page and "&lt;/script&gt;" in page
    assert own.count("Plotly.newPlot") == own.count('class="plotly-graph-div"') >= 6


def test_charts_hold_what_the_log_says(store: LocalStore) -> None:
    page = render([read_run(store, "left")])
    (data,) = [
        json.loads(found)
        for found in re.findall(r'"chart-0",\s*(\[.*?\]),\s*\{"template"', page, re.DOTALL)
    ]
    raw, smoothed = data
    assert raw["x"] == [1, 2, 3, 4, 5] and raw["y"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert smoothed["y"] == pytest.approx(_smoothed(raw["y"]))
    assert "2.5" in page and ">score<" in page


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    assert _smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert _smoothed([1.0, 0.0]) == pytest.approx([1.0, 0.8 * 0.2 / (1 - 0.8**2)])


def test_touching_intervals_of_one_kind_are_one(store: LocalStore) -> None:
    kinds = [each.kind for each in read_run(store, "left").intervals()["trainer"]]
    assert kinds == ["train", "wait_batch"] * 5


def test_what_stands_out_is_shown_with_samples(tmp_path: Path) -> None:
    run = finished(LocalStore(tmp_path / "made"))
    page = render([read_run(run.store, "run")])
    assert "Nothing stands out" in page and "highest reward" in page
    assert '<td>trained</td><td class="number">4</td>' in page
    assert '<td>no_signal</td><td class="number">1</td><td class="number">2</td>' in page
    assert "(pass@k)" in page and "Distinct 1- and 2-grams" in page
    run.store.replace(run.commit_key(0), b"nothing")
    assert "cannot be read: " + run.commit_key(0) in render([read_run(run.store, "run")])


def test_two_runs_stand_side_by_side_and_differences_in_bold(store: LocalStore) -> None:
    page = render([read_run(store, "left"), read_run(store, "right")])
    bold = re.findall(r'<tr class="differs"><td><code class="key">(.*?)</code>', page)
    assert [key.replace("<wbr>", "") for key in bold] == ["optimizer.learning_rate", "steps"]
    assert "left reward" in page and "right reward" in page


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    store: LocalStore, tmp_path: Path
) -> None:
    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [FORGEFLOW, "report", *arguments, "--store", str(store.root)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    done = report("left", "--json")
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["report"]) == store.local_path(layout.report_key("left"))
    assert store.exists(layout.report_key("left"))
    assert report("left", "right").returncode == 0
    assert (tmp_path / "report-left-right.html").exists()
    refused = report("nobody")
    assert refused.returncode == 2 and "'nobody'" in refused.stderr
    refused = report("left", "--output", "nowhere/page.html")
    assert refused.returncode == 2 and "nowhere/page.html" in refused.stderr
