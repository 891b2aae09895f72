"""Code of the user's: named `path/file.py:name` or `package.module:name`, checked without running it, and kept.

Reading a reference's source (`source_file`, `check_reference`) runs none of it; `load_object` runs its module.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FORM = "write path/file.py:name or package.module:name"


def source_file(field: str, reference: str) -> Path:
    """The file in which a reference's object is defined. Raises ValueError, naming the field, if there is none."""
    location, colon, name = reference.rpartition(":")
    if not colon or not location or not name.isidentifier():
        raise ValueError(f"{field} {reference!r} is no reference: {_FORM}")
    if location.endswith(".py"):
        path = Path(location).absolute()
        if not path.is_file():
            raise ValueError(f"{field} {reference!r} does not resolve: there is no file {location}")
        return path
    try:
        spec = importlib.util.find_spec(location)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{field} {reference!r} does not resolve ({error}): {_FORM}") from None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(
            f"{field} {reference!r} does not resolve: there is no Python module {location!r}; {_FORM}"
        )
    return Path(spec.origin)


def check_reference(field: str, reference: str) -> Path:
    """As `source_file`, and the file parses and binds the name at its top level."""
    path = source_file(field, reference)
    name = reference.rpartition(":")[2]
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{field} {reference!r} does not parse: {error}; mend {path}") from None
    if name not in _bound_names(tree):
        raise ValueError(
            f"{field} {reference!r} does not resolve: {path} has no {name!r} at its top level"
        )
    return path


def _bound_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.alias():
                names.add(node.asname or node.name.partition(".")[0])
    return names


def load_object(field: str, reference: str) -> Any:
    """The class or function that a reference names; its module is run.

    Raises ValueError that names the field and what does not resolve, or what the module raised.
    """
    source_file(field, reference)
    location, _, name = reference.rpartition(":")
    try:
        module = (
            _load_file(Path(location).absolute())
            if location.endswith(".py")
            else importlib.import_module(location)
        )
    except Exception as error:  # The module is the user's: it may raise anything.
        raise ValueError(
            f"{field} {reference!r} does not resolve ({type(error).__name__}: {error}); {_FORM}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            f"{field} {reference!r} does not resolve: {location} has no callable {name!r}"
        )
    return found


def _load_file(path: Path) -> ModuleType:
    root, package = _package_of(path)
    # Last: what stands beside the file is found, and hides nothing that this process relies on.
    if str(root) not in sys.path:
        sys.path.append(str(root))
    if package:
        return importlib.import_module(f"{package}.{path.stem}")
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


def _package_of(path: Path) -> tuple[Path, str]:
    """The folder from which a file is imported, and the dotted package that it is in; empty for none."""
    names: list[str] = []
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def reference_to(field: str, thing: Any) -> str:
    """The reference that finds a function or class again, in another process.

    Raises ValueError for what none can find: a lambda, or something defined inside a function or typed at a prompt.
    """
    name = getattr(thing, "__qualname__", "")
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:
        path = None
    if not name.isidentifier() or path is None or not Path(path).is_file():
        raise ValueError(
            f"{field} {thing!r} cannot be found by other processes: define it by a name at the top level of a file"
        )
    return f"{Path(path).absolute()}:{name}"
