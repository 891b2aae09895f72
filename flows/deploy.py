"""Deploying: what a server lacks of the files is brought to it, and read back.

The files are the truth but for three switches, which are the server's once a thing is there: whether a schedule is
active, whether a trigger or an automation is enabled, and whether a deployment is paused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import AutomationCore
from prefect.exceptions import ObjectNotFound

from flows.deploy_file import PrefectFile, ServerFile
from flows.deploy_plan import (
    POOL_TEMPLATE,
    Plan,
    make_automation,
    make_plans,
    make_schedule,
    plain,
)

POOL_TYPE = "process"

Change = Literal["created", "changed", "unchanged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """One thing on the server."""

    kind: str
    """Work pool, queue, deployment or automation."""
    name: str
    """Its name."""
    change: Change
    """What was done to it."""


async def deploy(
    client: PrefectClient,
    file: PrefectFile,
    server: ServerFile,
    *,
    variables: Mapping[str, str],
    notify_block: str | None = None,
) -> list[Deployed]:
    """Bring a server to what the files say.

    Args:
        client: of the server.
        file: deployments.
        server: queues and automations.
        variables: what `{{ $NAME }}` stands for.
        notify_block: TYPE/NAME of the block that notifies; none: notifications are left out.

    Returns:
        All there is, in the order of the files.

    Raises:
        ValueError: a file names what there is not; nothing was changed.
        RuntimeError: the server has kept something else than it was told.
    """
    plans = make_plans(file, server, variables)
    notification = await _notification(client, notify_block)
    automations = [make_automation(given, notification) for given in server.automations]
    done = [await _pool(client, server.work_pool)]
    done += [await _queue(client, server, name) for name in server.queues]
    for plan in plans:
        done += await _deployment(client, plan)
    done += [await _standalone(client, automation) for automation in automations]
    return done


async def _notification(client: PrefectClient, block: str | None) -> dict[str, Any] | None:
    if block is None:
        return None
    block_type, slash, name = block.partition("/")
    if not (block_type and slash and name):
        raise ValueError(f"--notify {block!r} is no TYPE/NAME: write such as slack-webhook/ops")
    try:
        found = await client.read_block_document_by_name(name, block_type)
    except ObjectNotFound:
        raise ValueError(
            f"--notify {block!r}: the server has no such block: make it on its page of blocks"
        ) from None
    return {"type": "send-notification", "block_document_id": str(found.id)}


async def _pool(client: PrefectClient, name: str) -> Deployed:
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(
            WorkPoolCreate(
                name=name,
                type=POOL_TYPE,
                base_job_template=POOL_TEMPLATE,
            )
        )
        return Deployed(kind="work pool", name=name, change="created")
    if pool.type != POOL_TYPE:
        raise ValueError(
            f"work pool {name!r} is there and of type {pool.type}, not {POOL_TYPE}: name another"
        )
    return Deployed(kind="work pool", name=name, change="unchanged")


async def _queue(client: PrefectClient, server: ServerFile, name: str) -> Deployed:
    spec = server.queues[name]
    wanted = {
        "concurrency_limit": spec.limit,
        "priority": spec.priority,
        "description": spec.description,
    }
    try:
        queue = await client.read_work_queue_by_name(name, server.work_pool)
    except ObjectNotFound:
        await client.create_work_queue(name, work_pool_name=server.work_pool, **wanted)  # type: ignore[arg-type]
        change: Change = "created"
    else:
        if all(getattr(queue, key) == value for key, value in wanted.items()):
            return Deployed(kind="queue", name=name, change="unchanged")
        await client.update_work_queue(queue.id, **wanted)
        change = "changed"
    kept = await client.read_work_queue_by_name(name, server.work_pool)
    _hold_against(wanted, {key: getattr(kept, key) for key in wanted}, f"queue {name}")
    return Deployed(kind="queue", name=name, change=change)


async def _deployment(client: PrefectClient, plan: Plan) -> list[Deployed]:
    """Deploy one, and the automations of its triggers."""
    change: Change = "changed"
    try:
        stands: DeploymentResponse | None = await client.read_deployment_by_name(plan.name)
    except ObjectNotFound:
        stands, change = None, "created"
    active = {} if stands is None else {each.slug: each.active for each in stands.schedules}
    paused = False if stands is None else stands.paused
    where = f"deployment {plan.name}"
    wanted = _wanted(plan, where, active=active, paused=paused)
    if stands is not None and _kept(stands) == wanted:
        change = "unchanged"
    else:
        await _create(client, plan, where, active=active, paused=paused)
        stands = await client.read_deployment_by_name(plan.name)
        _hold_against(wanted, _kept(stands), where)
    done = [Deployed(kind="deployment", name=plan.name, change=change)]
    for trigger in plan.triggers:
        trigger.set_deployment_id(stands.id)
        done.append(await _standalone(client, trigger.as_automation()))
    return done


def _wanted(
    plan: Plan, where: str, *, active: Mapping[str | None, bool | None], paused: bool
) -> dict[str, Any]:
    """What is deployed, in the form of `_kept`."""
    spec, limit = plan.spec, plan.spec.concurrency_limit
    schedules = [
        make_schedule(each, where, active=active.get(each.slug)) for each in plan.spec.schedules
    ]
    return {
        "entrypoint": spec.entrypoint,
        "description": spec.description,
        "tags": spec.tags,
        "version": spec.version or version("forgeflow"),
        "parameters": spec.parameters,
        "enforce_parameter_schema": spec.enforce_parameter_schema,
        "work_pool": spec.work_pool.model_dump(),
        "concurrency_limit": None
        if limit is None
        else [limit.limit, limit.collision_strategy, limit.grace_period_seconds],
        "paused": paused,
        "parameter_schema": plan.schema,
        "schedules": {each.slug: _plain_schedule(each) for each in schedules},
    }


def _kept(stands: DeploymentResponse) -> dict[str, Any]:
    """What a server says that it has."""
    limit, options = stands.global_concurrency_limit, stands.concurrency_options
    return {
        "entrypoint": stands.entrypoint,
        "description": stands.description,
        "tags": stands.tags,
        "version": stands.version,
        "parameters": stands.parameters,
        "enforce_parameter_schema": stands.enforce_parameter_schema,
        "work_pool": {
            "name": stands.work_pool_name,
            "work_queue_name": stands.work_queue_name,
            "job_variables": stands.job_variables,
        },
        "concurrency_limit": None
        if limit is None
        else [
            limit.limit,
            None if options is None else options.collision_strategy.value,
            None if options is None else options.grace_period_seconds,
        ],
        "paused": stands.paused,
        "parameter_schema": stands.parameter_openapi_schema,
        "schedules": {each.slug: _plain_schedule(each) for each in stands.schedules},
    }


def _plain_schedule(schedule: Any) -> dict[str, Any]:
    kept = plain(
        schedule.model_dump(mode="json", include={"schedule", "active", "parameters", "slug"})
    )
    # Unless given it is the moment of the deployment.
    if "interval" in kept["schedule"]:
        kept["schedule"].pop("anchor_date", None)
    return kept


async def _create(
    client: PrefectClient,
    plan: Plan,
    where: str,
    *,
    active: Mapping[str | None, bool | None],
    paused: bool,
) -> None:
    """Create a deployment, or put this one in the place of what stands under its name."""
    spec, limit = plan.spec, plan.spec.concurrency_limit
    options = None
    if limit is not None:
        strategy = ConcurrencyLimitStrategy(limit.collision_strategy)
        options = ConcurrencyOptions(
            collision_strategy=strategy, grace_period_seconds=limit.grace_period_seconds
        )
    await client.create_deployment(
        flow_id=await client.create_flow_from_name(plan.flow.name),
        name=spec.name,
        version=spec.version or version("forgeflow"),
        schedules=[
            make_schedule(each, where, active=active.get(each.slug)) for each in spec.schedules
        ],
        concurrency_limit=None if limit is None else limit.limit,
        concurrency_options=options,
        parameters=spec.parameters,
        description=spec.description,
        work_queue_name=spec.work_pool.work_queue_name,
        work_pool_name=spec.work_pool.name,
        tags=spec.tags,
        entrypoint=spec.entrypoint,
        parameter_openapi_schema=plan.schema,
        paused=paused,
        enforce_parameter_schema=spec.enforce_parameter_schema,
        job_variables=spec.work_pool.job_variables,
    )


async def _standalone(client: PrefectClient, wanted: AutomationCore) -> Deployed:
    """See to an automation, found by its name."""
    # Prefect's free server keeps no owner, and refuses one in an update.
    wanted = AutomationCore.model_validate(wanted.model_dump(exclude={"owner_resource"}))
    found = await client.read_automations_by_name(wanted.name)
    if not found:
        await client.create_automation(wanted)
        change: Change = "created"
    else:
        stands = found[0]
        wanted = wanted.model_copy(update={"enabled": stands.enabled})
        if _plain_automation(stands) == _plain_automation(wanted):
            return Deployed(kind="automation", name=wanted.name, change="unchanged")
        await client.update_automation(stands.id, wanted)
        change = "changed"
    kept = await client.read_automations_by_name(wanted.name)
    where = f"automation {wanted.name}"
    _hold_against(_plain_automation(wanted), _plain_automation(kept[0]), where)
    return Deployed(kind="automation", name=wanted.name, change=change)


def _plain_automation(automation: AutomationCore) -> dict[str, Any]:
    """An automation, without what the server gives it."""
    kept = plain(
        automation.model_dump(mode="json", exclude={"id", "created", "updated", "owner_resource"})
    )
    kept["trigger"].pop("id", None)
    for key in ("expect", "after", "for_each"):
        kept["trigger"][key] = sorted(kept["trigger"][key])
    return kept


def _hold_against(wanted: dict[str, Any], kept: dict[str, Any], where: str) -> None:
    """Raise RuntimeError that names what a server has not kept as it was told."""
    for key, value in wanted.items():
        if kept.get(key) != value:
            raise RuntimeError(
                f"{where}: the server keeps {kept.get(key)!r} as {key}, not {value!r}"
            )
