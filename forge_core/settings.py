"""How a run's config comes about: preset, then file, then `--set`, each over the one before.

Presets are the TOML files in `forge_core/presets`. A layer that names another environment than the
one below it starts the environment's section afresh: the parameters and templates of one task mean
nothing to another. So it is with a loss and its numbers. A layer's table `regimes.NAME` counts in
that regime only. Everything that is wrong is one ValueError of at most two lines.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from forge_core.config import RunConfig
from forge_core.config.algorithm import OF_ONE_LOSS
from forge_core.regime import OF_ONE_REGIME, Regime
from storage import layout
from storage.objects import ObjectStore
from storage.runs import read_config

_MISSING = object()
_CHOICES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("environment", "name"): ("params", "prompt_template", "answer_template"),
    ("algorithm", "loss"): tuple(OF_ONE_LOSS["dapo"]),
    ("algorithm", "correction", "anchor"): ("weights", "low", "high"),
    ("algorithm", "correction", "weights"): ("low", "high"),
}
"""By path of a key, keys beside it that mean something else, or nothing, with another value of it."""
_NOUNS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a table of keys and values",
    "model_type": "a table of keys and values",
}


def list_presets() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    folder = resources.files("forge_core") / "presets"
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_config(
    *,
    preset: str | None,
    file: str | None,
    overrides: list[str],
    base: dict[str, Any] | None = None,
) -> RunConfig:
    """The config of a preset, a file and `dotted.key=value` overrides, the later ones winning.

    Below all of them lies `base`, the stored config of another run; what its regime alone has is left out where the
    regime is another. Raises ValueError, with one or two lines that name field, value and mend.
    """
    of_file = {} if file is None else read_config_file(file)
    layers = [_read_preset(preset), of_file, _read_overrides(overrides)]
    stored = copy.deepcopy(base or {})
    layers.insert(0, stored)
    regime = next((layer["regime"] for layer in reversed(layers) if "regime" in layer), "sync")
    if stored and stored.get("regime") != regime:
        for key in OF_ONE_REGIME:
            stored.pop(key, None)
    merged: dict[str, Any] = {}
    for layer in layers:
        of_regime = _of_regime(layer.pop("regimes", {}), regime)
        _overlay(merged, layer)
        _overlay(merged, of_regime)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ValueError(_explain(error.errors(include_url=False))) from None


def stored_config(store: ObjectStore, run_id: str) -> RunConfig:
    """The config that a run was started with.

    Raises ValueError if there is no such run, or another version of this code has begun it whose config this one does
    not understand.
    """
    try:
        return RunConfig.model_validate(read_config(store, run_id))
    except ValidationError as error:
        keys = sorted(".".join(map(str, each["loc"])) or each["msg"] for each in error.errors())
        raise ValueError(
            f"run {run_id!r} was begun by a version of Forgeflow whose config this one does not understand "
            f"({', '.join(keys)}): go on with that version, which {layout.incarnation_key(run_id, 0)} names"
        ) from None


def _read_preset(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    presets = list_presets()
    if name not in presets:
        raise ValueError(f"--preset {name!r} is unknown: take one of {', '.join(presets)}")
    text = (resources.files("forge_core") / "presets" / f"{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def read_config_file(file: str, *, field: str = "--config") -> dict[str, Any]:
    """What a TOML, JSON or YAML file holds. Raises ValueError, naming the field, if it holds no table of keys."""
    path = Path(file)
    parsers = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    if path.suffix not in parsers:
        raise ValueError(f"{field} {file!r} has an unknown suffix: name a .toml, .json or .yaml")
    try:
        content = parsers[path.suffix](path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{field} {file!r} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{field} {file!r} is no valid {path.suffix[1:]}: {_one_line(str(error))}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{field} {file!r} holds a {type(content).__name__} where a table of keys is due"
        )
    return content


def _read_overrides(overrides: list[str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"--set {override!r} is not of the form dotted.key=value")
        section = layer
        for key in keys[:-1]:
            below = section.get(key)
            section[key] = section = below if isinstance(below, dict) else {}
        section[keys[-1]] = _parse_value(keys, text)
    return layer


def _parse_value(keys: list[str], text: str) -> Any:
    """The value of an override: JSON or YAML, but the bare text where the field holds text.

    YAML alone will not do: to it `1e-4` is text, `no` a boolean and a prompt template a mapping.
    """
    if _holds_text(keys):
        return None if text in ("null", "none", "~", "") else text
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _holds_text(keys: list[str]) -> bool:
    annotation: Any = RunConfig
    for key in keys:
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return False
        field = annotation.model_fields.get(key)
        if field is None:
            return False
        annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return True
    if isinstance(annotation, types.UnionType):
        return str in typing.get_args(annotation)
    return annotation is str


def _of_regime(tables: Any, regime: Any) -> dict[str, Any]:
    """What a layer says for the regime alone."""
    known = typing.get_args(Regime)
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ValueError(f"regimes = {_show(tables)}: it must be tables of keys and values")
    for name in tables:
        if name not in known:
            raise ValueError(f"regimes.{name}: no such regime; take one of {', '.join(known)}")
    return dict(tables.get(regime, {}))


def _overlay(base: dict[str, Any], layer: dict[str, Any]) -> None:
    """Put `layer` over `base`, section by section; whole values and `params` keys replace those below."""
    for *path, key in _CHOICES:
        old, new = _section_at(base, path), _section_at(layer, path)
        if key in new and new[key] != old.get(key, _default_of((*path, key))):
            for name in _CHOICES[(*path, key)]:
                old.pop(name, None)
    _merge(base, layer)


def _section_at(layer: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The section of a layer, to be changed in place; an empty one if it has none."""
    for key in path:
        below = layer.get(key)
        layer = below if isinstance(below, dict) else {}
    return layer


def _merge(base: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            base[key] = value


def _explain(errors: list[ErrorDetails]) -> str:
    lines = [_sentence(error) for error in errors[:2]]
    if len(errors) > 2:
        lines[1] += f" (and {len(errors) - 2} more)"
    return "\n".join(lines)


def _sentence(error: ErrorDetails) -> str:
    """One line about one thing that pydantic refused."""
    field = ".".join(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    kind = error["type"]
    if kind == "extra_forbidden":
        near = _nearest_key(field)
        mend = f"did you mean {near}?" if near else "leave it out"
        return _one_line(f"{field} = {_show(error['input'])}: no such key in the config; {mend}")
    if kind == "value_error":
        # The validators' sentences begin with the name of a field of their section.
        return _one_line(".".join([*map(str, error["loc"]), str(context["error"])]))
    if kind == "literal_error":
        reason = f"it must be {context['expected']}"
    elif kind == "finite_number":
        reason = "it must be a finite number"
    elif kind in _NOUNS:
        reason = f"it must be {_NOUNS[kind]}, not {type(error['input']).__name__}"
    else:
        reason = error["msg"].replace("Input should be", "it must be")
    default = _default_of(error["loc"])
    shown = "" if default is _MISSING else f"; the default is {json.dumps(default)}"
    return _one_line(f"{field} = {_show(error['input'])}: {reason}{shown}")


def _default_of(location: tuple[int | str, ...]) -> Any:
    value: Any = RunConfig()
    for part in location:
        if not isinstance(value, BaseModel) or not hasattr(value, str(part)):
            return _MISSING
        value = getattr(value, str(part))
    return _MISSING if isinstance(value, BaseModel | dict) else value


def _nearest_key(field: str) -> str | None:
    """The known key that is spelled most like an unknown one, also if it lies in another section."""
    keys = sorted(_dotted_keys(RunConfig))
    close = difflib.get_close_matches(field, keys, n=1, cutoff=0.6)
    if close:
        return close[0]
    ends = {key.rpartition(".")[2]: key for key in keys}
    near = difflib.get_close_matches(field.rpartition(".")[2], sorted(ends), n=1, cutoff=0.7)
    return ends[near[0]] if near else None


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
