"""Classes of the user's, named `path/file.py:name` or `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_class(reference: str) -> Any:
    """The class or function that a config names; its module is run.

    Raises ValueError that names what does not resolve, or what its module raised.
    """
    location, _, name = reference.rpartition(":")
    try:
        module = (
            _load_file(Path(location).absolute())
            if location.endswith(".py")
            else importlib.import_module(location)
        )
    except Exception as error:  # The module is the user's: it may raise anything.
        raise ValueError(
            f"environment.name {reference!r} does not resolve ({type(error).__name__}: {error}); "
            "write path/file.py:class or an importable module:class"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(
            f"environment.name {reference!r} does not resolve: {location} has no class {name!r}"
        )
    return factory


def _load_file(path: Path) -> ModuleType:
    # The path is in the name, so that two files of one name do not answer for each other.
    module_name = f"_forgeflow_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
