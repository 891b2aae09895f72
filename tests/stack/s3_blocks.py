"""Credentials of the S3 server in a block of the Prefect server, and environments that have them in no other way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3_server import REGION, WRITER, S3Server

from flows.ephemeral import wait_for_server
from flows.s3_block import VARIABLE
from flows.s3_credentials import S3Credentials


def save_writer(api: str, s3_server: S3Server, work: Path) -> str:
    """Save who may write as a block on the server at an address, once that answers; the reference to it."""
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: api}):
        patch.setenv("PREFECT_API_URL", api)
        wait_for_server(work)
        S3Credentials(
            aws_access_key_id=WRITER[0],
            aws_secret_access_key=WRITER[1],
            region_name=REGION,
            endpoint_url=s3_server.endpoint,
        ).save("writer", overwrite=True)
    return "s3-credentials/writer"


def environment_with(block: str, api: str) -> dict[str, str]:
    """This process's environment with a block, and without AWS's variables."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**plain, "PREFECT_API_URL": api, VARIABLE: block}
