"""Environments and functions that installed packages offer by a name, as Python entry points.

A package's own pyproject.toml says so:

    [project.entry-points."forgeflow.environments"]
    sums = "my_package.sums:SumsEnvironment"

    [project.entry-points."forgeflow.verifiers"]
    is_short = "my_package.rewards:is_short"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

ENVIRONMENTS = "forgeflow.environments"
"""Group of classes of environments."""
VERIFIERS = "forgeflow.verifiers"
"""Group of functions with TRL's signature."""


def registered_names(group: str) -> list[str]:
    """All names of a group, sorted."""
    return sorted(entry_points(group=group).names)


def registered(field: str, group: str, name: str) -> str | None:
    """The reference, `module:name`, that a name stands for; None if no installed package has registered it.

    Raises ValueError, naming the packages, if several have, for different things.
    """
    found = list(entry_points(group=group, name=name))
    references = {each.value for each in found}
    if len(references) > 1:
        told = " and ".join(sorted(f"{each.value} by {_package(each)}" for each in found))
        raise ValueError(
            f"{field} {name!r} is registered twice in {group}, as {told}: name one of them as module:name"
        )
    return found[0].value if found else None


def resolved(field: str, group: str, reference: str) -> str:
    """A reference to code, as it is or by the name under which it is registered. Raises ValueError if none is."""
    if ":" in reference:
        return reference
    found = registered(field, group, reference)
    if found is None:
        names = ", ".join(registered_names(group)) or "nothing"
        raise ValueError(
            f"{field} {reference!r} is neither path/file.py:name nor package.module:name, and installed packages "
            f"register {names} in {group}: name one of these"
        )
    return found


def environment_class(field: str, name: str) -> str | None:
    """The reference to an environment's class; None for a name that no installed package has registered.

    Raises ValueError if several have.
    """
    return name if ":" in name else registered(field, ENVIRONMENTS, name)


def _package(entry: EntryPoint) -> str:
    return "a package without a name" if entry.dist is None else entry.dist.name
