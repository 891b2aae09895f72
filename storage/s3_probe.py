"""What is tried on S3 before a run relies on it."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from storage.contract import ObjectNotFound, StoreError

if TYPE_CHECKING:
    from storage.s3 import S3Store

_PREFIX = "probe-"
_SECONDS = 10.0
_FIRST, _SECOND = b"first", b"second"


def probe(store: S3Store) -> None:
    """Write, read, list and delete objects of a new name, and see that none is written over.

    Raises ValueError that names the store, the reason and the mend.
    """
    # Soon, for someone waits who may have mistyped something.
    patience = replace(
        store.patience, deadline_seconds=min(_SECONDS, store.patience.deadline_seconds)
    )
    store = replace(store, patience=patience)
    key = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        # If this fails there is nothing to remove, or no way to.
        created = store.put_if_absent(key, _FIRST)
        try:
            _try_all(store, key, created)
        except (ValueError, StoreError):
            with contextlib.suppress(StoreError):
                store.delete(key)
            raise
    except StoreError as error:
        raise ValueError(str(error)) from error


def _try_all(store: S3Store, key: str, created: bool) -> None:
    # False, too, if the answer was lost, and then the object is ours: another's it cannot be.
    if not created:
        _require(store, store.read(key) == _FIRST, "says that an object of a new name exists")
    refused = not store.put_if_absent(key, _SECOND)
    _require(store, refused, "ignores If-None-Match, so that two writers could both succeed")
    refused = not store.put_in_parts_if_absent(key, _SECOND)
    _require(store, refused, "ignores If-None-Match at the end of an upload in parts")
    try:
        content = store.read(key)
    except ObjectNotFound:
        content = None
    _require(store, content == _FIRST, "does not give back what was just written")
    _require(store, key in store.keys(_PREFIX), "does not list what was just written")
    store.delete(key)
    _require(store, not store.exists(key), "still has an object that was just deleted")


def _require(store: S3Store, is_so: bool, fault: str) -> None:
    if not is_so:
        raise ValueError(f"store {store.uri!r} {fault}: use a server that docs/s3.md names")
