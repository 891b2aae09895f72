"""The records that are stored as JSON objects, and how they are read back."""

import gc
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from storage.objects import ObjectStore


class Record(BaseModel):
    """Base of all of them: immutable, closed, finite numbers, equal bytes for equal content."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no blanks."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


RecordType = TypeVar("RecordType", bound=Record)


def read_record(store: ObjectStore, key: str, record_type: type[RecordType]) -> RecordType:
    """The record under the key.

    Raises ObjectNotFound, and ValueError naming the key if it is no such record, or one that a newer Forgeflow wrote.
    """
    return parse_record(key, store.read(key), record_type)


def read_records(
    store: ObjectStore, keys: Sequence[str], record_type: type[RecordType]
) -> list[RecordType]:
    """The records under the keys, in order, fetched at once where the store can. Raises as `read_record` does."""
    contents = store.read_many(keys)
    with _without_collection():
        return [
            parse_record(key, data, record_type) for key, data in zip(keys, contents, strict=True)
        ]


@contextmanager
def _without_collection() -> Iterator[None]:
    """Look for no garbage in cycles meanwhile.

    Parsed records are many, live on and form none, so that every search among them is in vain: those for a long log
    took longer than its parsing. Threads may overlap here: it is on again at the latest when the last has left.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parse_record(key: str, data: bytes, record_type: type[RecordType]) -> RecordType:
    """The record that these bytes, which lie under the key, are. Raises ValueError as `read_record` does."""
    try:
        return record_type.model_validate_json(data, strict=True)
    except ValidationError as error:
        _refuse_newer(key, data, record_type)
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the object"
        raise ValueError(
            f"{key} is no valid {record_type.__name__}: {where}: {fault['msg']}"
        ) from error


def _refuse_newer(key: str, data: bytes, record_type: type[Record]) -> None:
    """Raise ValueError if the record states a version of its form above all that this code knows.

    What such a record says besides cannot be judged, so that nothing else is held against it.
    """
    field = record_type.model_fields.get("schema_version")
    try:
        stated = json.loads(data)["schema_version"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    known = max(get_args(field.annotation)) if field is not None else None
    if known is None or type(stated) is not int or stated <= known:
        return
    form = "log" if record_type.__name__ == "Entry" else record_type.__name__.lower()
    raise ValueError(
        f"{key} was written by a newer Forgeflow ({form} version {stated}; this one reads up to {known}): "
        "upgrade, or use the one that wrote it"
    ) from None


class FileRef(Record):
    """An immutable object and what its bytes must be."""

    key: str
    """Key in the store."""
    sha256: str
    """Hex digest of the bytes."""
    bytes: NonNegativeInt
    """Size in bytes."""


class PartRef(FileRef):
    """An immutable Parquet file of episodes."""

    rows: NonNegativeInt
    """Number of episodes."""


class Commit(Record):
    """The record that makes a part of scored episodes count.

    Its figures are recomputed by `verify`.
    """

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    key: str
    """Name of the commit: the logical place of the work in its run, the same for every attempt."""
    run_id: str
    """Run that wrote the episodes."""
    part: PartRef
    """The episodes."""
    group_ids: tuple[str, ...]
    """Groups in the part, in order of first appearance."""
    rows: NonNegativeInt
    """Number of episodes."""
    policy_version_min: int
    """Oldest policy version of any token that the policy wrote."""
    policy_version_max: int
    """Newest policy version of any token that the policy wrote."""
    environments: tuple[str, ...]
    """Names of the environments, sorted."""
    reward_min: float
    """Smallest reward of an episode."""
    reward_max: float
    """Largest reward of an episode."""
    reward_mean: float
    """Mean reward of the episodes."""
    created_at: float
    """Unix seconds."""


class Controller(Record):
    """Who claims a run."""

    host: str
    """Host name."""
    pid: int
    """Process id on the host.

    A process that began after `claimed_at` is another one with the same id.
    """
    versions: dict[str, str]
    """Version of each thing that results depend on: packages, Python, CPU type."""
    git_commit: str | None
    """Commit of the code; None outside a repository."""
    claimed_at: float
    """Unix seconds."""

    @classmethod
    def this_process(cls, *, versions: dict[str, str], git_commit: str | None) -> Self:
        """This process, now."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=versions,
            git_commit=git_commit,
            claimed_at=time.time(),
        )


class EntryPosition(Record):
    """The place of an entry in a run's log."""

    incarnation: NonNegativeInt
    """Incarnation that wrote it."""
    seq: NonNegativeInt
    """Its number within the incarnation, from 0."""


class Incarnation(Record):
    """One controller's hold on a run."""

    schema_version: Literal[1] = 1
    """Version of this record's form."""
    run_id: str
    """The run."""
    incarnation: NonNegativeInt
    """Its number, from 0 without gaps."""
    previous_last: EntryPosition | None
    """Last entry that counts of the incarnation before; None if there is none."""
    controller: Controller
    """Who holds the run."""
