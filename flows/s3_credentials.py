"""A Prefect block for endpoint, region and credentials of a store on S3.

prefect block register -m flows.s3_credentials    then fill one in on the server's page of blocks

python -m flows.s3_credentials TYPE NAME          print a block's fields as JSON, secrets too: for `flows.s3_block`
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from pydantic import Field, SecretStr


class S3Credentials(Block):
    """Endpoint, region and credentials of a store on S3, for runs whose environment names it as FORGEFLOW_S3_BLOCK."""

    _block_type_name = "S3 Credentials"
    _block_type_slug = "s3-credentials"

    aws_access_key_id: str = Field(title="Access key id")
    """Id of the key."""
    aws_secret_access_key: SecretStr = Field(title="Secret access key")
    """The key."""
    aws_session_token: SecretStr | None = Field(None, title="Session token")
    """Of temporary credentials."""
    region_name: str | None = Field(None, title="Region")
    """Region of the bucket; what the environment says if not given."""
    endpoint_url: str | None = Field(None, title="Endpoint URL")
    """Address of a server that is not AWS's."""


async def read_fields(block_type: str, name: str) -> dict[str, Any]:
    """What there is to say of a block: its `fields`, or why it is `refused` or reading it `failed`."""
    url = get_current_settings().api.url
    if not url:
        return {"refused": "no server is named: set PREFECT_API_URL to the one that keeps it"}
    try:
        async with get_client() as client:
            document = await client.read_block_document_by_name(name, block_type)
    except ObjectNotFound:
        return {
            "refused": f"the Prefect server at {url} has no such block: make it, or correct the name"
        }
    except httpx.HTTPStatusError as error:
        return {"failed": f"the Prefect server at {url} answered {error.response.status_code}"}
    except httpx.HTTPError as error:
        return {"failed": f"the Prefect server at {url} did not answer ({type(error).__name__})"}
    return {"fields": document.data}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read_fields(*sys.argv[1:3]))))
