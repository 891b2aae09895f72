"""The files of `deployments/` as closed models: Prefect ignores keys that it does not know, so that typos are lost."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScheduleSpec(_Closed):
    """When a deployment starts by itself: one of `cron`, `interval` and `rrule`."""

    slug: str
    """Its name within the deployment, by which it is found again."""
    cron: str | None = None
    """Cron line of five fields."""
    interval: timedelta | None = Field(None, gt=timedelta(0))
    """Time between two runs: seconds or ISO 8601."""
    rrule: str | None = None
    """Rule of RFC 5545."""
    timezone: str = "UTC"
    """Whose clock cron and rrule go by."""
    anchor_date: str | None = None
    """Moment that intervals are counted from."""
    active: bool = False
    """Whether it is switched on when it is deployed first; later the server's switch stands."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Over those of the deployment."""

    @model_validator(mode="after")
    def _is_one(self) -> ScheduleSpec:
        given = [key for key in ("cron", "interval", "rrule") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"schedule {self.slug!r} has {' and '.join(given) or 'none'} of cron, interval and rrule: give one"
            )
        if self.anchor_date is not None and self.interval is None:
            raise ValueError(
                f"anchor_date of schedule {self.slug!r} belongs to an interval: leave it out"
            )
        return self


class LimitSpec(_Closed):
    """How many runs of a deployment there may be at once."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"
    grace_period_seconds: int | None = Field(None, ge=60, le=86_400)


class WorkPoolSpec(_Closed):
    """Where its runs wait for a worker."""

    name: str
    work_queue_name: str
    job_variables: dict[str, Any] = Field(default_factory=dict)


class DeploymentSpec(_Closed):
    """One deployment, with Prefect's keys."""

    name: str
    entrypoint: str
    """Dotted path of the flow, so that it is found wherever the package is installed."""
    description: str | None = None
    tags: list[str] = Field(default_factory=list)
    version: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    schedules: list[ScheduleSpec] = Field(default_factory=list)
    concurrency_limit: LimitSpec | None = None
    enforce_parameter_schema: bool = True
    work_pool: WorkPoolSpec
    triggers: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_names_once(self) -> DeploymentSpec:
        slugs = [schedule.slug for schedule in self.schedules]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"slugs {slugs} of deployment {self.name!r} are not all different")
        for trigger in self.triggers:
            if not trigger.get("name"):
                raise ValueError(f"a trigger of deployment {self.name!r} has no name: give one")
        return self


class PrefectFile(_Closed):
    """The deployments; `prefect deploy` reads the same file."""

    name: str
    prefect_version: str | None = Field(None, alias="prefect-version")
    definitions: Any = None
    """What YAML anchors are set on."""
    deployments: list[DeploymentSpec] = Field(min_length=1)


class QueueSpec(_Closed):
    """A pool of devices, as a queue of the work pool."""

    limit: int = Field(ge=1)
    """Runs that may hold the devices at once."""
    priority: int = Field(ge=1)
    """1 is served first."""
    description: str = ""


class ServerFile(_Closed):
    """What a server has besides deployments."""

    work_pool: str
    """Name of the pool of type process."""
    queues: dict[str, QueueSpec] = Field(min_length=1)
    automations: list[dict[str, Any]] = Field(default_factory=list)
    """Prefect's automations. An action of type `notify` becomes send-notification by the block that is named on the
    command line, or do-nothing."""


_File = TypeVar("_File", bound=BaseModel)


def read_file(path: Path, model: type[_File]) -> _File:
    """Read one of the files. Raises ValueError, a sentence that names file, key and mend."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return check_content(content, model, str(path))


def check_content(content: Any, model: type[_File], where: str) -> _File:
    """What a file holds, as its model. Raises ValueError, a sentence that names `where`, key and mend."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_reason(error)}") from None


def first_reason(error: ValidationError) -> str:
    """The first thing that a model refused, in a sentence."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] == "extra_forbidden":
        return f"{key} is no key that is known there: mend its name"
    return f"{key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"


def lost_keys(given: Any, kept: Any, at: str = "") -> list[str]:
    """Dotted names of the keys of `given` that a model which ignores what it does not know has not `kept`."""
    if isinstance(given, dict):
        if not isinstance(kept, dict):
            return []
        lost = [f"{at}.{key}".lstrip(".") for key in given if key not in kept]
        for key, value in given.items():
            lost += lost_keys(value, kept.get(key), f"{at}.{key}")
        return lost
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            key
            for number, pair in enumerate(zip(given, kept, strict=True))
            for key in lost_keys(*pair, f"{at}.{number}")
        ]
    return []
