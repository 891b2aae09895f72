"""The local folder of a run: what libraries write themselves, such as event files, output and the tiny model."""

import logging
import os
import shutil
from pathlib import Path

from storage import layout
from storage.objects import ObjectStore

_logger = logging.getLogger(__name__)

_OUTPUT = "output.log"
_KEPT = (_OUTPUT, "tensorboard/")
"""What is worth keeping of it: names of files, and of folders with a slash."""


def local_folder(store: ObjectStore, run_id: str) -> Path:
    """The run's folder in a local store, else one of the user's state on this machine."""
    if (folder := store.local_path(layout.run_folder(run_id))) is not None:
        return folder
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "forgeflow" / run_id


def open_folder(store: ObjectStore, run_id: str) -> tuple[Path, Path]:
    """The run's local folder, which is made, and the file in it that takes what processes print.

    What a run that goes on printed before is brought from a store that is not on this machine, so that it stays.
    """
    folder = local_folder(store, run_id)
    folder.mkdir(parents=True, exist_ok=True)
    output, key = folder / _OUTPUT, f"{layout.run_folder(run_id)}{_OUTPUT}"
    if store.local_path(key) is None and not output.exists() and store.exists(key):
        output.write_bytes(store.read(key))
    return folder, output


def keep_folder(store: ObjectStore, run_id: str, folder: Path) -> None:
    """Bring what is worth keeping into a store that is not on this machine, and remove the folder.

    Does nothing for a local store. A store that fails leaves the folder where it is.
    """
    if store.local_path(layout.run_folder(run_id)) is not None:
        return
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name.startswith(_KEPT):
                store.replace(f"{layout.run_folder(run_id)}{name}", path.read_bytes())
    except OSError as error:
        _logger.warning("%s was not brought into the store and stays: %s", folder, error)
        return
    shutil.rmtree(folder, ignore_errors=True)


def locate(store: ObjectStore, key: str) -> str:
    """Where a person finds an object or, with a trailing slash, a folder: a path, or a URI."""
    path = store.local_path(key)
    return f"{store.uri}/{key}" if path is None else str(path)
