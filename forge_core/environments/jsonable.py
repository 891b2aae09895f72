"""Python values as JSON values and back, kinds of containers kept.

Scorers compare with `==`, to which a tuple is not the list that JSON would make of it. What JSON
has no form for is a mapping with the one key `__tuple__`, `__set__` or `__pairs__`.
"""

from __future__ import annotations

import numbers
from typing import Any

_TAGS = ("__tuple__", "__set__", "__pairs__")


def to_json(value: Any) -> Any:
    """`value` made of JSON values only. Raises ValueError for a kind of value that has no form."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(value)
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"__tuple__": [to_json(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"__set__": sorted((to_json(item) for item in value), key=repr)}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) for key in value) and not value.keys() & set(_TAGS)
        if plain:
            return {key: to_json(item) for key, item in value.items()}
        return {"__pairs__": [[to_json(key), to_json(item)] for key, item in value.items()]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # A numpy scalar.
        return to_json(value.item())
    raise ValueError(f"a {type(value).__name__} in a prompt's metadata has no JSON form: {value!r}")


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(tag, content)] = value.items()
        if tag == "__tuple__":
            return tuple(from_json(item) for item in content)
        if tag == "__set__":
            return {from_json(item) for item in content}
        if tag == "__pairs__":
            return {from_json(key): from_json(item) for key, item in content}
    return {key: from_json(item) for key, item in value.items()}
