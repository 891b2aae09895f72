"""A store in a local directory."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.contract import (
    TEMPORARY,
    ObjectInfo,
    ObjectNotFound,
    StoreError,
    check_key,
    check_prefix,
)

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MENDS = {
    errno.ENOSPC: "free space there, or name a directory on another disk",
    errno.EDQUOT: "free space there or raise the quota, or name a directory on another disk",
    errno.EFBIG: "raise the limit on the size of files, or name a directory on another disk",
    errno.EROFS: "mount it for writing, or name a directory that can be written",
    errno.EACCES: "change the rights of the directory, or name one that can be written",
    errno.EPERM: "change the rights of the directory, or name one that can be written",
}


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
        return self._create(key, lambda temporary: temporary.write_bytes(data))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        # A copy, not a link: whoever writes to the file again must not reach the object.
        return self._create(key, lambda temporary: shutil.copyfile(path, temporary))

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._saying("write", key):
            with _temporary(path.parent, lambda temporary: temporary.write_bytes(data)) as written:
                os.replace(written, path)
            _sync_directory(path.parent)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._saying("delete", key):
            try:
                path.unlink()
            except _NOT_THERE:
                pass
            # Another process may have removed it and not synced that yet.
            if path.parent.is_dir():
                _sync_directory(path.parent)

    def read(self, key: str) -> bytes:
        check_key(key)
        with self._saying("read", key):
            try:
                # Neither a `Path` nor a buffer: opening a long log reads thousands of small objects.
                with open(f"{self.root}/{key}", "rb", buffering=0) as file:
                    return file.readall()
            except _NOT_THERE:
                raise ObjectNotFound(f"store {self.uri} holds no object {key!r}") from None

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        return [self.read(key) for key in keys]

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._saying("look up", key):
            return path.is_file()

    def listing(self, prefix: str) -> list[ObjectInfo]:
        infos = []
        for key in self.keys(prefix):
            with self._saying("look up", key):
                try:
                    status = self._path(key).stat()
                except _NOT_THERE:
                    continue  # Deleted since.
                infos.append(ObjectInfo(key, status.st_size, status.st_mtime))
        return infos

    def keys(self, prefix: str) -> list[str]:
        keys = []
        with self._saying("list", prefix):
            for path, folders, names in os.walk(self._folder(prefix), onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
                relative = Path(path).relative_to(self.root).as_posix()
                folder = "" if relative == "." else f"{relative}/"
                keys += [f"{folder}{name}" for name in names if not name.startswith(TEMPORARY)]
        return sorted(key for key in keys if key.startswith(prefix))

    def folders(self, prefix: str) -> list[str]:
        folder = self._folder(prefix)
        with self._saying("list", prefix):
            if not folder.is_dir():
                return []
            paths = [path for path in folder.iterdir() if path.is_dir()]
        return sorted(path.name for path in paths if not path.name.startswith(TEMPORARY))

    def local_path(self, key: str) -> Path:
        return self._path(key.removesuffix("/"))

    def probe(self) -> None:
        """Try to write next to where the store would be.

        The store itself is not created: if it does not exist, its nearest existing parent is tried.
        What counts is what the system does, not mode bits, which root ignores.
        """
        place = _nearest_existing(self.root)
        try:
            with tempfile.TemporaryDirectory(dir=place, prefix=TEMPORARY) as folder:
                LocalStore(Path(folder)).put_if_absent("probe", b"probe")
        except OSError as error:
            number = error.errno
            reason = os.strerror(number) if number is not None else str(error)
            raise ValueError(
                f"store {self.uri!r} cannot be written ({reason} at {place}): name a directory that can be"
            ) from error

    def _create(self, key: str, write: Callable[[Path], object]) -> bool:
        path = self._path(key)
        created = False
        with self._saying("write", key):
            if not path.exists():
                with _temporary(path.parent, write) as temporary:
                    try:
                        os.link(temporary, path)
                        created = True
                    except FileExistsError:
                        pass
            # For the loser, too, who may now rely on an object that the winner has not synced yet.
            _sync_directory(path.parent)
        return created

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _folder(self, prefix: str) -> Path:
        """The directory in which every key with this prefix lies."""
        return self.root / check_prefix(prefix)

    @contextmanager
    def _saying(self, verb: str, key: str) -> Iterator[None]:
        """Raise what the system refuses as one sentence that keeps its number."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            mend = _MENDS.get(error.errno or 0, "see that the directory and its disk are sound")
            sentence = f"store {self.uri!r} could not {verb} {key!r} ({reason}): {mend}"
            raise StoreError(sentence, error.errno) from error


def _nearest_existing(path: Path) -> Path:
    """The path itself or the nearest parent that is there, whatever it is."""
    for candidate in (path, *path.parents):
        try:
            candidate.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return candidate
    return path


@contextmanager
def _temporary(folder: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A hidden file in the folder that holds durably what `write` wrote, and is gone in the end.

    Also if there was no room for it: half a file on a full disk would only keep it full.
    """
    _make_directory(folder)
    path = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        write(path)
        _sync(path, os.O_RDONLY)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _make_directory(folder: Path) -> None:
    """Like `mkdir -p`, but durable: each new directory is synced into its parent."""
    if folder.is_dir():
        return
    _make_directory(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_directory(folder.parent)


def _sync_directory(folder: Path) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, _NOT_THERE):
        raise error
