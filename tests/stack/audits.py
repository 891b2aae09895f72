"""The independent audit, on a store wherever it is."""

from __future__ import annotations

import os
from typing import Any

from audit import audit
from s3fs import S3FileSystem


def audit_store(uri: str, run_id: str) -> dict[str, Any]:
    """Audit a run in a local folder or on S3. Raises AssertionError."""
    if not uri.startswith("s3://"):
        return audit(uri, run_id)
    files = S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        key=os.environ["AWS_ACCESS_KEY_ID"],
        secret=os.environ["AWS_SECRET_ACCESS_KEY"],
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    return audit(files, run_id, root=uri.removeprefix("s3://"))
