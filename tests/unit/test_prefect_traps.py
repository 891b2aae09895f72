"""What Prefect does that its users do not expect, each with what keeps it from harming here: as far as it can be seen
without a server. The numbers are those of docs/deploy.md."""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.settings import Settings

import flows
import tasks
from flows.deploy_command import FOLDER, read_files
from flows.deploy_plan import Plan, make_plans
from flows.ephemeral import surroundings
from flows.serving import Serving, server_environment

ROOT = Path(flows.__file__).parent.parent
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is started where one is named."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")


@pytest.fixture(scope="module")
def all_tasks() -> list[Task[Any, Any]]:
    """Every task there is."""
    for package in (tasks, flows):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = [each for each in gc.get_objects() if isinstance(each, Task)]
    ours = [each for each in found if each.fn.__module__.split(".")[0] in ("tasks", "flows")]
    assert {"generate", "train", "decide-promotion"} <= {each.name for each in ours}
    return ours


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """Every deployment, checked."""
    names = {"FORGEFLOW_STORE": "/store", "FORGEFLOW_DIRECTORY": "/"}
    return make_plans(*read_files(FOLDER), names)


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in ("flows", "tasks", "forge_core", "storage"):
        for path in (ROOT / package).rglob("*.py"):
            yield path, ast.parse(path.read_text())


def _automation(name: str) -> dict[str, Any]:
    (found,) = [each for each in read_files(FOLDER)[1].automations if each["name"] == name]
    return found


def test_trap_1_a_cancel_reaches_the_flow_alone_so_what_it_starts_dies_with_it() -> None:
    parent = "import os, subprocess, sys, time; from forge_core.guardian import die_with_parent; "
    parent += "c = subprocess.Popen(['sleep', '100'], preexec_fn=die_with_parent); "
    parent += "print(c.pid, flush=True); time.sleep(100)"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.terminate()
    gone, _ = psutil.wait_procs([child], timeout=5)
    assert gone


def test_trap_2_nothing_runs_after_a_kill_so_no_flow_relies_on_its_own_clean_up() -> None:
    """A guardian and the kernel clean up: `test_guardian`, and the kills of tests/stack/test_kills.py."""
    with surroundings() as workdir:
        keepers = [
            each
            for each in psutil.Process().children()
            if any(part.endswith("guardian.py") for part in each.cmdline())
        ]
        assert any(str(workdir) in each.cmdline() for each in keepers)


def test_trap_3_hooks_are_called_with_these_names(plans: list[Plan]) -> None:
    for plan in plans:
        for hook in _hooks(plan.flow):
            assert list(inspect.signature(hook).parameters) == ["flow", "flow_run", "state"]


def test_trap_4_a_dead_worker_leaves_runs_running_so_an_automation_ends_them(
    plans: list[Plan],
) -> None:
    for name in ("forgeflow-dead-runs", "forgeflow-lost-runs"):
        automation = _automation(name)
        assert automation["actions"][0]["state"] == "CRASHED"
        watched = automation["trigger"]["match_related"]["prefect.resource.name"]
        assert {plan.flow.name for plan in plans} == set(watched)


def test_trap_5_prefects_jitter_does_nothing_so_tasks_make_their_own(
    all_tasks: list[Task[Any, Any]],
) -> None:
    assert [each.name for each in all_tasks if each.retry_jitter_factor is not None] == []
    stages = [each for each in all_tasks if callable(each.retry_delay_seconds)]
    assert stages == [] or all(inspect.isfunction(each.retry_delay_seconds) for each in stages)


def test_trap_6_a_condition_that_is_no_plain_function_never_retries(
    all_tasks: list[Task[Any, Any]],
) -> None:
    conditions = [each.retry_condition_fn for each in all_tasks]
    assert all(inspect.isfunction(condition) for condition in conditions)


def test_trap_7_flows_with_retries_crash_under_a_limit_so_none_has_any(plans: list[Plan]) -> None:
    assert [plan.name for plan in plans if plan.flow.retries] == []


def test_trap_8_leases_survive_a_restart_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = server_environment(tmp_path, "http://127.0.0.1:1/api", keep_days=90)
    for name, value in environment.items():
        if name.startswith("PREFECT_"):
            monkeypatch.setenv(name, value)
    server = Settings().server
    assert server.concurrency.lease_storage.endswith(".filesystem")
    assert hasattr(
        importlib.import_module(server.concurrency.lease_storage), "ConcurrencyLeaseStorage"
    )
    assert server.services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs"}


def test_trap_9_results_do_not_follow_prefects_home_so_they_are_told_where(tmp_path: Path) -> None:
    held = Serving(state=tmp_path, url="http://127.0.0.1:1")
    results = held.client_environment()["PREFECT_RESULTS_LOCAL_STORAGE_PATH"]
    assert Path(results).parent == tmp_path
    with surroundings() as workdir:
        assert os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"].startswith(str(workdir))


def test_trap_10_submitted_tasks_have_another_loop_so_none_is_submitted() -> None:
    """Handles of meshes belong to the loop of the flow; executors of our own take functions, not tasks."""
    for path, tree in _sources():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                is_task_call = call.func.attr in ("submit", "map") and _is_task(call.func.value)
                assert not is_task_call, f"{path}:{call.lineno}"


def _is_task(value: ast.expr) -> bool:
    names = ("generate", "score", "train", "publish", "evaluate", "checkpoint", "restore")
    return isinstance(value, ast.Name) and value.id in names


def test_trap_11_arguments_are_walked_so_stages_get_references(
    all_tasks: list[Task[Any, Any]],
) -> None:
    for each in all_tasks:
        for parameter in inspect.signature(each.fn).parameters.values():
            annotation = str(parameter.annotation)
            assert not any(kind in annotation for kind in ("ndarray", "Tensor", "Episode]")), (
                each.name,
                annotation,
            )


def test_trap_12_and_13_nothing_hangs_on_hooks_of_transactions(
    all_tasks: list[Task[Any, Any]],
) -> None:
    for each in all_tasks:
        assert each.on_commit_hooks == [] and each.on_rollback_hooks == []
        assert each.persist_result is False and each.cache_policy == NO_CACHE


def test_trap_13_a_task_that_fails_does_not_roll_itself_back() -> None:
    """Nobody relies on it: see the test of trap 12. What a failed attempt leaves, no commit names."""
    for path, tree in _sources():
        names = {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
        assert not names & {"on_rollback", "on_commit"}, path


def test_trap_14_heartbeats_come_often_enough_for_the_automation(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = _automation("forgeflow-dead-runs")["trigger"]
    for plan in plans:
        seconds = int(plan.spec.work_pool.job_variables["env"][HEARTBEAT])
        # Prefect has a shortest time of its own.
        assert 30 <= seconds <= trigger["within"] / 4
    monkeypatch.delenv(HEARTBEAT, raising=False)
    with surroundings():
        assert int(os.environ[HEARTBEAT]) <= trigger["within"] / 4


def test_trap_15_what_prefect_lost_the_log_has_so_no_report_asks_prefect() -> None:
    script = "import sys, flows.reports, storage.verify, storage.summary; "
    script += "sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def _hooks(flow: Flow[Any, Any]) -> list[Any]:
    kinds = ("completion", "failure", "cancellation", "crashed", "running")
    return [hook for kind in kinds for hook in getattr(flow, f"on_{kind}_hooks") or []]
