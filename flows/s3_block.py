"""Credentials of S3 from a Prefect block: read once in a process, and put where AWS's own tools look for them.

`FORGEFLOW_S3_BLOCK` names the block; its fields become environment variables of this process, which those that it
starts inherit. So they are neither parameters of a flow, nor in a config, a log or a file of a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from storage.contract import StoreError

VARIABLE = "FORGEFLOW_S3_BLOCK"
_READ_SECONDS = 90
"""Time in which a block must have been read; importing Prefect alone takes several."""
_used: str | None = None
"""The block whose fields this process's environment has."""


class _Fields(BaseModel):
    """Base: closed, for a field that nobody reads would be ignored in silence; errors do not repeat what they found."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class _ClientParameters(_Fields):
    """What an `aws-credentials` block says of the server."""

    endpoint_url: str | None = None
    use_ssl: Literal[True] = True
    verify: Literal[True] = True


class _Credentials(_Fields):
    """The fields of an `s3-credentials` or an `aws-credentials` block, empty ones left out."""

    aws_access_key_id: SecretStr
    aws_secret_access_key: SecretStr
    aws_session_token: SecretStr | None = None
    region_name: str | None = None
    endpoint_url: str | None = None
    aws_client_parameters: _ClientParameters = Field(default_factory=_ClientParameters)


def use_s3_block(store_uri: str) -> None:
    """Take the credentials of a store on S3 from the block that the environment names, if it names one.

    Raises ValueError if there is no such block or its fields do not do, and StoreError if it cannot be read.
    """
    global _used
    reference = os.environ.get(VARIABLE)
    if not reference or reference == _used or not store_uri.lower().startswith("s3://"):
        return
    variables = environment_of(reference, _read(reference))
    # One of another set of keys: requests with it would be refused.
    os.environ.pop("AWS_SESSION_TOKEN", None)
    os.environ.update(variables)
    _used = reference


def environment_of(reference: str, fields: dict[str, Any]) -> dict[str, str]:
    """AWS's environment variables for a block's fields. Raises ValueError that names the fields and no value."""
    try:
        found = _Credentials.model_validate(_without_empty(fields))
    except ValidationError as error:
        raise ValueError(f"{VARIABLE} {reference!r}: {_sentence(error)}") from None
    token = found.aws_session_token
    variables = {
        "AWS_ACCESS_KEY_ID": found.aws_access_key_id.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": found.aws_secret_access_key.get_secret_value(),
        "AWS_SESSION_TOKEN": None if token is None else token.get_secret_value(),
        "AWS_REGION": found.region_name,
        "AWS_ENDPOINT_URL_S3": found.endpoint_url or found.aws_client_parameters.endpoint_url,
    }
    return {name: value for name, value in variables.items() if value is not None}


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    """Prefect's pages store what was left out as null, as an empty text, or as a group of such."""
    kept = {
        name: _without_empty(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return {name: value for name, value in kept.items() if value not in (None, "", {})}


def _sentence(error: ValidationError) -> str:
    by_kind: dict[str, list[str]] = {}
    for each in error.errors(include_input=False, include_url=False):
        by_kind.setdefault(each["type"], []).append(".".join(map(str, each["loc"])))
    if missing := by_kind.pop("missing", None):
        them = "it" if len(missing) == 1 else "them"
        return f"the block lacks {' and '.join(missing)}: fill {them} in on the Prefect server's page of blocks"
    names = [name for names in by_kind.values() for name in names]
    return (
        f"the block sets {' and '.join(names)} to what a store makes no use of: clear them, or leave {VARIABLE} out "
        "and say it by AWS's environment variables and profiles"
    )


def _read(reference: str) -> dict[str, Any]:
    """A block's fields, read by a process of its own: this one may have to import Prefect with other settings."""
    block_type, slash, name = reference.partition("/")
    if not (block_type and slash and name) or "/" in name:
        raise ValueError(f"{VARIABLE} {reference!r} is no TYPE/NAME: write s3-credentials/NAME")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flows.s3_credentials", block_type, name],
            capture_output=True,
            text=True,
            timeout=_READ_SECONDS,
            # The server is the one that keeps blocks, never one that is started for the question.
            env={**os.environ, "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
        )
    except subprocess.TimeoutExpired:
        raise StoreError(
            f"{VARIABLE} {reference!r} was not read within {_READ_SECONDS} s: see that the Prefect server answers"
        ) from None
    # What else the process said is not repeated: it may hold what the block holds.
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise StoreError(
            f"{VARIABLE} {reference!r} could not be read: the process that did ended with exit code {done.returncode}"
        ) from None
    if (refused := told.get("refused")) is not None:
        raise ValueError(f"{VARIABLE} {reference!r}: {refused}")
    if (failed := told.get("failed")) is not None:
        raise StoreError(f"{VARIABLE} {reference!r} could not be read: {failed}")
    fields: dict[str, Any] = told["fields"]
    return fields
