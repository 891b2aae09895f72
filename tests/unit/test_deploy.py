"""Deploying to Prefect's own application, in this process and over a database of its own."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.server.api.server import create_app
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_HOME,
    temporary_settings,
)

from flows.deploy import Deployed, deploy
from flows.deploy_command import FOLDER, read_files
from flows.deploy_file import PrefectFile, ServerFile, check_content
from flows.deploy_plan import make_automation, make_plans
from flows.ephemeral import take_empty_database

VARIABLES = {"FORGEFLOW_STORE": "/stores/one", "FORGEFLOW_DIRECTORY": "/somewhere"}

OnServer = Callable[[Callable[[PrefectClient], Awaitable[None]]], None]


pytestmark = pytest.mark.filterwarnings("ignore:Type object")


@pytest.fixture(scope="module")
def on_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnServer]:
    """Calls a function with the client of a server; one for all, for Prefect takes the first database for all."""
    tmp_path = tmp_path_factory.mktemp("prefect")
    database = tmp_path / "prefect.db"
    take_empty_database(database)
    changed = {
        PREFECT_HOME: str(tmp_path),
        PREFECT_API_URL: None,
        PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}",
    }

    def call(function: Callable[[PrefectClient], Awaitable[None]]) -> None:
        async def main() -> None:
            application = create_app(ephemeral=True, ignore_cache=True)
            async with PrefectClient(application) as client:
                await function(client)

        asyncio.run(main())

    with temporary_settings(changed):
        yield call


async def _deploy(client: PrefectClient, folder: Path = FOLDER) -> list[Deployed]:
    return await deploy(client, *read_files(folder), variables=VARIABLES)


def _changed(done: list[Deployed]) -> list[str]:
    return [f"{each.kind} {each.name}" for each in done if each.change != "unchanged"]


def test_deploying_twice_changes_nothing_the_second_time_and_switches_stay_as_people_set_them(
    on_server: OnServer, tmp_path: Path
) -> None:
    async def check(client: PrefectClient) -> None:
        assert {each.change for each in await _deploy(client)} == {"created"}
        assert _changed(await _deploy(client)) == []

        collect = await client.read_deployment_by_name("collect/rounds")
        assert collect.parameters == {"run": "rounds", "store": "/stores/one"}
        assert collect.work_queue_name == "cpu"
        (schedule,) = collect.schedules
        assert (schedule.slug, schedule.active) == ("hourly", False)
        await client.update_deployment_schedule(collect.id, schedule.id, active=True)
        (stalls,) = await client.read_automations_by_name("forgeflow-stalls")
        assert stalls.enabled
        await client.pause_automation(stalls.id)
        assert _changed(await _deploy(client)) == []
        assert await _is_active(client, "collect/rounds")

        folder = _copy(tmp_path / "changed")
        _write(folder, "prefect.yaml", lambda file: _of(file, "collect").update(description="New."))
        _write(folder, "server.yaml", lambda file: file["queues"]["cpu"].update(limit=2))
        _write(
            folder, "server.yaml", lambda file: file["automations"][3].update(description="New.")
        )
        assert _changed(await _deploy(client, folder)) == [
            "queue cpu",
            "deployment collect/rounds",
            "automation forgeflow-stalls",
        ]
        assert await _is_active(client, "collect/rounds")
        (stalls,) = await client.read_automations_by_name("forgeflow-stalls")
        assert (stalls.enabled, stalls.description) == (False, "New.")
        assert (await client.read_work_queue_by_name("cpu", "forgeflow")).concurrency_limit == 2

        _write(folder, "prefect.yaml", lambda file: _of(file, "collect").update(schedules=[]))
        assert _changed(await _deploy(client, folder)) == ["deployment collect/rounds"]
        assert (await client.read_deployment_by_name("collect/rounds")).schedules == []

    on_server(check)


def test_what_the_server_does_not_keep_is_told(
    on_server: OnServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _copy(tmp_path / "changed")
    _write(folder, "prefect.yaml", lambda file: _of(file, "collect").update(tags=["a", "b"]))

    create = PrefectClient.create_deployment

    async def forgetful(self: PrefectClient, *args: Any, **keys: Any) -> Any:
        keys["tags"] = keys["tags"][:-1]
        return await create(self, *args, **keys)

    async def check(client: PrefectClient) -> None:
        monkeypatch.setattr(PrefectClient, "create_deployment", forgetful)
        with pytest.raises(RuntimeError, match=r"collect/rounds: the server keeps .* as tags"):
            await _deploy(client, folder)

    on_server(check)


def test_a_typo_in_any_key_is_refused() -> None:
    files = {
        name: yaml.safe_load((FOLDER / name).read_text())
        for name in ("prefect.yaml", "server.yaml")
    }
    files["prefect.yaml"].pop("definitions")
    _check(files)
    for name, content in files.items():
        paths = list(_keys(content))
        assert len(paths) > 40
        for path in paths:
            with pytest.raises(ValueError, match=r"\w"):
                _check(files | {name: _misspelt(content, path)})
                pytest.fail(f"{path} misspelt is let through")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"entrypoint": "flows.deployed.no_such"}, "'flows.deployed.no_such' cannot be loaded"),
        ({"parameters": {"store": "{{ $HOME }}"}}, r"\$HOME is none of FORGEFLOW_DIRECTORY"),
        ({"parameters": {"run": ""}}, "parameters: run: the whole = '': String should have at least"),
        ({"schedules": [{"slug": "a", "cron": "never"}]}, "schedule 'a': cron = 'never': Invalid cron"),
        ({"schedules": [{"slug": "a"}]}, "none of cron, interval and rrule"),
        ({"schedules": [{"slug": "a", "cron": "* * * * *"}] * 2}, "not all different"),
        ({"name": "rounds", "entrypoint": "flows.deployed.train_rounds", "parameters": {}, "schedules": []}, "twice"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused(change: dict[str, Any], sentence: str) -> None:
    files = {
        name: yaml.safe_load((FOLDER / name).read_text())
        for name in ("prefect.yaml", "server.yaml")
    }
    _of(files["prefect.yaml"], "collect").update(change)
    with pytest.raises(ValueError, match=sentence):
        _check(files)


def test_notifications_go_by_the_block_that_is_named() -> None:
    _, server = read_files(FOLDER)
    nightly = next(each for each in server.automations if each["name"].endswith("nightly"))
    block = {"type": "send-notification", "block_document_id": "0" * 32}
    (action,) = make_automation(nightly, block).actions
    assert action.type == "send-notification"
    (action,) = make_automation(nightly, None).actions
    assert action.type == "do-nothing"


def _check(files: dict[str, Any]) -> None:
    file = check_content(files["prefect.yaml"], PrefectFile, "prefect.yaml")
    server = check_content(files["server.yaml"], ServerFile, "server.yaml")
    for given in server.automations:
        make_automation(given, None)
    make_plans(file, server, VARIABLES)


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for name in ("prefect.yaml", "server.yaml"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    return folder


def _write(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = yaml.safe_load((folder / name).read_text())
    change(content)
    (folder / name).write_text(yaml.safe_dump(content))


def _of(file: dict[str, Any], flow: str) -> dict[str, Any]:
    """The entry of a flow that has one deployment."""
    (entry,) = [
        each for each in file["deployments"] if each["entrypoint"] == f"flows.deployed.{flow}"
    ]
    return entry


async def _is_active(client: PrefectClient, name: str) -> bool | None:
    schedules: list[DeploymentSchedule] = (await client.read_deployment_by_name(name)).schedules
    return schedules[0].active


def _keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        if isinstance(value, dict):
            yield (*path, key)
        if isinstance(below, dict | list):
            yield from _keys(below, (*path, key))


def _misspelt(content: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(content)
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[f"{path[-1]}x"] = section.pop(path[-1])
    return changed
