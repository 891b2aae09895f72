"""What every object store promises: immutable objects under '/'-separated keys, created at most once.

What the rest of the package relies on is `put_if_absent`: of any number of writers of one key, in any
number of processes, exactly one is told True, and the object is never seen half written.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TEMPORARY = ".tmp-"
"""How the name of an unfinished write begins; no key has a part that does."""


hurry = threading.Event()
"""Set once this process is told to end: a store then waits no longer for a server that fails."""


class ObjectNotFound(LookupError):
    """The store holds no object under the key that was asked for."""


class StoreError(OSError):
    """The store failed, and trying again did not help. The message is one sentence that says how to mend it.

    A write that ended so may have been done all the same.
    """

    def __init__(self, sentence: str, errno: int | None = None) -> None:
        super().__init__(sentence)
        self.errno = errno

    def __reduce__(self) -> tuple[type["StoreError"], tuple[str, int | None]]:
        return type(self), (str(self), self.errno)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing tells of an object."""

    key: str
    """Key in the store."""
    bytes: int
    """Size in bytes."""
    modified_at: float
    """When it was written, in unix seconds by the store's clock."""


class ObjectStore(Protocol):
    """What every backend promises.

    Calls block, and threads and processes may share a store. What fails for good is raised as StoreError, an OSError;
    it is never taken for an object that is not there. Every call with a key raises ValueError if it is none.
    """

    @property
    def uri(self) -> str:
        """Where the store is; `open_store` of it gives an equal store."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object; False if the key already exists.

        Either way the key's object is durable on return. False may come of this very call, whose answer was lost: who
        must know compares the contents.
        """

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """The same with the content of a local file, which is never in memory as a whole.

        Later changes of the file do not touch the object.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Write the object, atomically in place of an older one.

        Only for views that can be derived again, and for files that count for nothing until the log names them.
        """

    def delete(self, key: str) -> None:
        """Remove the object, durably; it need not be there."""

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises ObjectNotFound."""

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        """The bytes of each, in order, at once where that is faster.

        Raises ObjectNotFound that names the first that is missing.
        """

    def exists(self, key: str) -> bool:
        """Whether an object stands under the key."""

    def listing(self, prefix: str) -> list[ObjectInfo]:
        """What is under all keys that start with `prefix`, sorted by key, without unfinished writes."""

    def keys(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted. Unfinished writes are never among them."""

    def folders(self, prefix: str) -> list[str]:
        """Sorted names of the folders directly under `prefix`, which is empty or ends in '/'."""

    def local_path(self, key: str) -> Path | None:
        """The path of an object or, with a trailing '/', of a folder; None if the store has no local files.

        For libraries that read and write files themselves, such as those of checkpoints.
        """

    def probe(self) -> None:
        """Try what a store must be able to do, and leave nothing behind.

        Raises ValueError that names the store, the reason and the mend.
        """


def check_key(key: str) -> None:
    """Refuse what is no key, or would lead out of the store. Raises ValueError."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts):
        raise ValueError(
            f"{key!r} is not a key: use names joined by '/', none of them empty, '.' or '..'"
        )


def check_prefix(prefix: str) -> str:
    """Refuse a prefix that could lead out of the store; the folder in which every key with it lies.

    That is empty for the store itself. Raises ValueError.
    """
    folder = prefix.rpartition("/")[0]
    if folder:
        check_key(folder)
    return folder
