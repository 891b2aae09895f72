"""What is about to be deployed, checked for all that Prefect would find out when a run starts, or never."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect import Flow
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.events import AutomationCore, DeploymentTriggerTypes
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import TypeAdapter, ValidationError

from flows.deploy_file import (
    DeploymentSpec,
    PrefectFile,
    ScheduleSpec,
    ServerFile,
    first_reason,
    lost_keys,
)

POOL_TEMPLATE = ProcessWorker.get_default_base_job_template()
"""What a job of the work pool has."""
_VARIABLE = re.compile(r"\{\{\s*\$(\w+)\s*\}\}")
_TRIGGERS: TypeAdapter[Any] = TypeAdapter(DeploymentTriggerTypes)
_LABELS = {"prefect.resource.id", "prefect.resource.name", "prefect.resource.role"}
"""Labels of resources that triggers may match by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A deployment that was checked."""

    spec: DeploymentSpec
    """Its entry of the file, with variables filled in."""
    flow: Flow[..., Any]
    """What it runs."""
    schema: dict[str, Any]
    """JSON schema of the flow's parameters, of which Prefect's pages make a form."""
    triggers: list[Any]
    """Prefect's, whose deployment is not set yet."""

    @property
    def name(self) -> str:
        """Flow and deployment, as Prefect names it."""
        return f"{self.flow.name}/{self.spec.name}"

    @classmethod
    def of(cls, spec: DeploymentSpec, server: ServerFile, variables: Mapping[str, str]) -> Plan:
        """Check all that Prefect would find out when a run starts, or never. Raises ValueError."""
        where = f"deployment {spec.name!r} ({spec.entrypoint})"
        pool = spec.work_pool
        if pool.name != server.work_pool:
            raise ValueError(f"{where}: work_pool.name {pool.name!r} is not {server.work_pool!r}")
        if pool.work_queue_name not in server.queues:
            known = ", ".join(server.queues)
            raise ValueError(
                f"{where}: work_queue_name {pool.work_queue_name!r} is none of {known}"
            )
        _check_job_variables(pool.job_variables, where)
        flow, schema = _load(spec.entrypoint)
        spec = spec.model_copy(
            update={
                "parameters": _fill(spec.parameters, variables, where),
                "work_pool": pool.model_copy(
                    update={"job_variables": _fill(pool.job_variables, variables, where)}
                ),
            }
        )
        _check_parameters(spec.entrypoint, spec.parameters, f"{where}: parameters")
        for schedule in spec.schedules:
            _check_parameters(
                spec.entrypoint, schedule.parameters, f"{where}: schedule {schedule.slug!r}"
            )
            make_schedule(schedule, where)
        return cls(
            spec=spec,
            flow=flow,
            schema=schema,
            triggers=[_make_trigger(given, spec.entrypoint, where) for given in spec.triggers],
        )


def make_plans(file: PrefectFile, server: ServerFile, variables: Mapping[str, str]) -> list[Plan]:
    """The checked deployments of a file, `variables` being what `{{ $NAME }}` stands for. Raises ValueError."""
    plans = [Plan.of(spec, server, variables) for spec in file.deployments]
    names = [plan.name for plan in plans]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"deployment {min(twice)} is there twice: give one another name")
    return plans


@functools.cache
def _load(entrypoint: str) -> tuple[Flow[..., Any], dict[str, Any]]:
    """The flow, and the schema of its parameters. Raises ValueError."""
    try:
        flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except Exception as error:
        raise ValueError(f"entrypoint {entrypoint!r} cannot be loaded: {error}") from error
    return flow, plain(parameter_schema(flow).model_dump(exclude_unset=True))


@functools.cache
def _adapter(entrypoint: str, parameter: str) -> TypeAdapter[Any]:
    flow, _ = _load(entrypoint)
    return TypeAdapter(inspect.signature(flow.fn).parameters[parameter].annotation)


@functools.cache
def _settings() -> frozenset[str]:
    """Names of the environment variables that Prefect reads."""
    return frozenset(get_current_settings().to_environment_variables())


def _check_job_variables(given: dict[str, Any], where: str) -> None:
    """Refuse what the work pool's jobs do not have, and settings that Prefect would not read."""
    known = POOL_TEMPLATE["variables"]["properties"]
    for key in given.keys() - known.keys():
        raise ValueError(f"{where}: job_variables.{key} is none of {', '.join(sorted(known))}")
    for name in given.get("env", {}):
        if name.startswith("PREFECT_") and name not in _settings():
            raise ValueError(f"{where}: job_variables.env.{name} is no setting of Prefect's")


def _fill(value: Any, variables: Mapping[str, str], where: str) -> Any:
    """Put variables in for `{{ $NAME }}`."""
    if isinstance(value, dict):
        return {key: _fill(below, variables, where) for key, below in value.items()}
    if isinstance(value, list):
        return [_fill(below, variables, where) for below in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in variables:
            raise ValueError(f"{where}: ${name} is none of {', '.join(sorted(variables))}")
    return _VARIABLE.sub(lambda found: variables[found[1]], value)


def _check_parameters(entrypoint: str, given: dict[str, Any], where: str) -> None:
    """Refuse values that a flow would not take; those that it needs may be left to whoever starts it."""
    known_names = _load(entrypoint)[1]["properties"]
    for name, value in given.items():
        if name not in known_names:
            known = ", ".join(known_names)
            raise ValueError(f"{where}: {name} is no parameter of the flow: it has {known}")
        try:
            _adapter(entrypoint, name).validate_python(value)
        except ValidationError as error:
            if error.errors()[0]["type"] != "missing":
                raise ValueError(f"{where}: {name}: {first_reason(error)}") from None


def make_schedule(spec: ScheduleSpec, where: str, *, active: bool | None = None) -> Any:
    """Prefect's schedule. Raises ValueError if it never comes due."""
    try:
        schedule: CronSchedule | IntervalSchedule | RRuleSchedule
        if spec.cron is not None:
            schedule = CronSchedule(cron=spec.cron, timezone=spec.timezone)
        elif spec.interval is not None:
            anchor = {} if spec.anchor_date is None else {"anchor_date": spec.anchor_date}
            schedule = IntervalSchedule.model_validate({"interval": spec.interval, **anchor})
        else:
            assert spec.rrule is not None
            schedule = RRuleSchedule(rrule=spec.rrule, timezone=spec.timezone)
        return DeploymentScheduleCreate(
            schedule=schedule,
            active=spec.active if active is None else active,
            parameters=spec.parameters,
            slug=spec.slug,
        )
    except ValidationError as error:
        raise ValueError(f"{where}: schedule {spec.slug!r}: {first_reason(error)}") from None


def _make_trigger(given: dict[str, Any], entrypoint: str, where: str) -> Any:
    """A trigger that starts the flow. Raises ValueError."""
    where = f"{where}: trigger {given['name']!r}"
    try:
        trigger = _TRIGGERS.validate_python(given)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_reason(error)}") from None
    _refuse_lost(given, trigger.model_dump(mode="json"), where)
    _check_parameters(entrypoint, given.get("parameters", {}), f"{where}: parameters")
    return trigger


def make_automation(given: dict[str, Any], notification: dict[str, Any] | None) -> AutomationCore:
    """An automation of the file, its notifications by a block or left out. Raises ValueError."""
    where = f"automation {given.get('name')!r}"
    actions = []
    for action in given.get("actions", []):
        if action.get("type") == "notify":
            if action.keys() != {"type", "subject", "body"}:
                raise ValueError(f"{where}: notify has subject and body, not {sorted(action)}")
            texts = {"subject": action["subject"], "body": action["body"]}
            action = {"type": "do-nothing"} if notification is None else {**notification, **texts}
        actions.append(action)
    try:
        automation = AutomationCore.model_validate({**given, "actions": actions})
    except ValidationError as error:
        raise ValueError(f"{where}: {first_reason(error)}") from None
    _refuse_lost({**given, "actions": actions}, automation.model_dump(mode="json"), where)
    return automation


def _refuse_lost(given: dict[str, Any], kept: dict[str, Any], where: str) -> None:
    """Refuse keys that Prefect's models have dropped, and labels that no resource has."""
    if lost := lost_keys(given, kept):
        raise ValueError(f"{where}: {lost[0]} is no key that is known there: mend its name")
    trigger = given.get("trigger", given)
    for key in ("match", "match_related"):
        for label in trigger.get(key, {}).keys() - _LABELS:
            raise ValueError(f"{where}: {key}.{label} is none of {', '.join(sorted(_LABELS))}")


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
