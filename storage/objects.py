"""Object stores: immutable objects under '/'-separated keys, created at most once.

`open_store(uri)` gives the store of a URI. The one backend is a local directory. What the rest of
the package relies on is `put_if_absent`: of any number of writers of one key, in any number of
processes, exactly one is told True, and the object is never seen half written.
"""

import os
import re
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_TEMPORARY = ".tmp-"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class ObjectNotFound(LookupError):
    """The store holds no object under the key that was asked for."""


class ObjectStore(Protocol):
    """What every backend promises. Calls block; errors of the medium are raised as OSError."""

    @property
    def uri(self) -> str:
        """Where the store is; `open_store` of it gives an equal store."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object; False if the key already exists.

        Either way the key's object is durable on return.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Write the object, atomically in place of an older one.

        Only for views that can be derived again, and for files that count for nothing until the log names them.
        """

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises ObjectNotFound."""

    def exists(self, key: str) -> bool:
        """Whether an object stands under the key."""

    def keys(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted. Unfinished writes are never among them."""

    def folders(self, prefix: str) -> list[str]:
        """Sorted names of the folders directly under `prefix`, which is empty or ends in '/'."""

    def local_path(self, key: str) -> Path:
        """The path of an object or, with a trailing '/', of a folder.

        For libraries that read and write files themselves, such as those of checkpoints.
        """


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A store in a local directory, which is made by the first write.

    An object is written to a hidden file beside its place and linked there: `link`, unlike
    `rename`, fails if the place is taken. A process that is killed leaves at most a hidden file,
    which no method shows.
    """

    root: Path
    """Directory that holds the objects."""

    @property
    def uri(self) -> str:
        return str(self.root)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        created = False
        if not path.exists():
            temporary = _write_temporary(path.parent, data)
            try:
                os.link(temporary, path)
                created = True
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        # For the loser, too, who may now rely on an object that the winner has not synced yet.
        _sync_directory(path.parent)
        return created

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        os.replace(_write_temporary(path.parent, data), path)
        _sync_directory(path.parent)

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectNotFound(f"store {self.uri} holds no object {key!r}") from None

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def keys(self, prefix: str) -> list[str]:
        keys = []
        for folder, _, names in os.walk(self._folder(prefix)):
            relative = Path(folder).relative_to(self.root)
            keys += [
                (relative / name).as_posix() for name in names if not name.startswith(_TEMPORARY)
            ]
        return sorted(key for key in keys if key.startswith(prefix))

    def folders(self, prefix: str) -> list[str]:
        folder = self._folder(prefix)
        if not folder.is_dir():
            return []
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    def local_path(self, key: str) -> Path:
        return self._path(key.removesuffix("/"))

    def _path(self, key: str) -> Path:
        _check_key(key)
        return self.root / key

    def _folder(self, prefix: str) -> Path:
        """The directory in which every key with this prefix lies."""
        folder = prefix.rpartition("/")[0]
        return self._path(folder) if folder else self.root


def open_store(uri: str) -> LocalStore:
    """The store at a local path, relative or absolute.

    Touches nothing. Raises ValueError for any other URI.
    """
    if not uri or "\0" in uri or _SCHEME.match(uri):
        raise ValueError(
            f"store {uri!r} is not a local path: name a directory, such as ./forge-store"
        )
    return LocalStore(Path(uri).expanduser().absolute())


def check_writable(uri: str) -> None:
    """Try what a store does, next to where it would be, and leave nothing behind.

    The store itself is not created: if it does not exist, its nearest existing parent is tried.
    What counts is what the system does, not mode bits, which root ignores. Raises ValueError that
    names the store and the reason.
    """
    place = _nearest_existing(open_store(uri).root)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=_TEMPORARY) as folder:
            LocalStore(Path(folder)).put_if_absent("probe", b"probe")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"store {uri!r} cannot be written ({reason} at {place}): name a directory that can be"
        ) from error


def _nearest_existing(path: Path) -> Path:
    """The path itself or the nearest parent that is there, whatever it is."""
    for candidate in (path, *path.parents):
        try:
            candidate.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return candidate
    return path


def _check_key(key: str) -> None:
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") or part.startswith(_TEMPORARY) for part in parts):
        raise ValueError(
            f"{key!r} is not a key: use names joined by '/', none of them empty, '.' or '..'"
        )


def _write_temporary(folder: Path, data: bytes) -> Path:
    """A new hidden file in the folder that holds the data durably."""
    _make_directory(folder)
    path = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def _make_directory(folder: Path) -> None:
    """Like `mkdir -p`, but durable: each new directory is synced into its parent."""
    if folder.is_dir():
        return
    _make_directory(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_directory(folder.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
