"""Object stores by their URI: a local directory, or a bucket of S3.

`open_store(uri)` gives the store of a URI, `check_writable(uri)` tries it. What a store promises is in
`storage.contract`.
"""

import re
from pathlib import Path

from storage.contract import ObjectInfo, ObjectNotFound, ObjectStore, StoreError
from storage.local import LocalStore

__all__ = [
    "LocalStore",
    "ObjectInfo",
    "ObjectNotFound",
    "ObjectStore",
    "StoreError",
    "check_writable",
    "open_store",
]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_store(uri: str) -> ObjectStore:
    """The store at a local path, relative or absolute, or at `s3://bucket/prefix`.

    Touches nothing, no network either. Raises ValueError for any other URI.
    """
    if uri.lower().startswith("s3://"):
        # Deferred: who works in a directory need not wait for the import of s3fs.
        from storage.s3 import S3Store

        return S3Store.from_uri(uri)
    if not uri or "\0" in uri or _SCHEME.match(uri):
        raise ValueError(
            f"store {uri!r} is not a local path and not on S3: name a directory, such as ./forge-store,"
            " or s3://BUCKET/PREFIX"
        )
    return LocalStore(Path(uri).expanduser().absolute())


def check_writable(uri: str) -> None:
    """Try what the store must be able to do, and leave nothing behind.

    Raises ValueError that names the store, the reason and the mend.
    """
    open_store(uri).probe()
