"""Write `docs/config.md` from the config's own docstrings, bounds and presets.

python docs/generate_config_reference.py           write it
python docs/generate_config_reference.py --check   write nothing; exit 1 if it is out of date
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from forge_core.config import RunConfig
from forge_core.settings import list_presets

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "config.md"

_SIGNS = ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))

_HEAD = """\
<!-- Written by docs/generate_config_reference.py; change forge_core/config or that script instead. -->
# The config of a run

Every key, its type, its default and its bounds, as [`forge_core/config`](../forge_core/config) has them.
`forgeflow run --preset tiny --dry-run` prints the resolved config of a run and starts nothing.

## Which value wins

1. The defaults below.
2. The preset: `--preset NAME`.
3. The file: `--config FILE`, by its suffix `.toml`, `.json`, `.yaml` or `.yml`.
4. `--regime NAME`, which is short for `--set regime=NAME`.
5. `--set dotted.key=value`, any number of times; of two for one key the later one wins.

Sections are merged key by key, the keys of `environment.params` too. A layer that names another `environment.name`
than the layers below it drops their `params`, `prompt_template` and `answer_template`, which belong to the other task.
So does another `algorithm.loss` with `clip_low`, `clip_high` and `scale_advantages`, and another
`algorithm.correction.anchor` or `.weights` with what they decide.
A run needs `--preset` or `--config`. The resolved config is stored as `config.json` in the run's folder.

## How `--set` reads a value

- Where the field holds text or one of a few words, the value is taken as it stands; empty, `null`, `none` or `~` means
  no value.
- Elsewhere it is read as JSON, or else as YAML: `1e-4` is a number, `true` a boolean, `[1, 2]` a list. That goes for
  the values under `environment.params`, too.
- Quote templates for the shell: `--set 'environment.prompt_template={question}'`.

## What is refused

Unknown keys, other types than the table names (a whole number passes for a number), values out of bounds and numbers
that are not finite. Beyond single values:

- `groups_per_step` x `group_size` and, with a warm start, `warm_start.batch_size` must be multiples of
  `trainer.ranks` / `trainer.tensor_parallel`, and `trainer.ranks` one of `trainer.tensor_parallel`.
- `trainer.tensor_parallel` that does not divide the model's heads, key and value heads and hidden units, and
  `trainer.ranks` beside it that do not divide the rows of its layers.
- `sampling.top_p` other than 1.0 and `sampling.top_k` other than 0, which the trainer could not score.
- `max_policy_age` other than 0 in regime sync.
- `algorithm.correction.weights` `plain` or `truncated` with the anchor `sampled`, whose ratio is the weight,
  and bounds where no weights are bounded.
- `algorithm.overlong_tokens` above `sampling.max_tokens`.
- An entropy bonus or a correction beside a `loss` of your own.
- `verifiers` beside a `reward`, that are nothing but gates, or with parameters that their kind does not take
  ([verifiers.md](verifiers.md)).
- `tools` of which two are opened by the same mark, or beside a `generate_episode` ([tools.md](tools.md)).
- A `buffer` that could replay nothing, whose fractions do not sum to 1, or with a source that is `unbounded` and no
  importance weights.
- `model.tiny.hidden_size` must be divisible by `model.tiny.num_heads`, and that by `model.tiny.num_kv_heads`.

And what does not fit the machine, the model or the task: a store that cannot be written, a run id that it has, more
GPUs than there are, a model directory without config, safetensors weights or tokenizer, a task, parameter or template
that does not resolve, a warm start on a task without reference answers, prompt plus `sampling.max_tokens` longer than
the model's context.

A refusal is at most two lines on the error stream, and exit code 2; the store is left as it was.
"""


def reference() -> str:
    """The text of `docs/config.md`."""
    sections = "".join(_section(*each) for each in _sections(RunConfig, ""))
    presets = "".join(_preset(name) for name in list_presets())
    return f"{_HEAD}\n## Keys\n{sections}\n## Presets\n{presets}"


def dotted_keys() -> list[str]:
    """Every key of the config, sections among them."""
    keys = []
    for prefix, section in _sections(RunConfig, ""):
        keys += [prefix.removesuffix(".")] if prefix else []
        keys += [prefix + name for name in section.model_fields]
    return keys


def _sections(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, section
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _sections(typing.cast(type[BaseModel], field.annotation), f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section(prefix: str, section: type[BaseModel]) -> str:
    title = f"`{prefix.removesuffix('.')}`" if prefix else "Top level"
    rows = [
        f"| `{prefix}{name}` | {_type(field.annotation)} | {_default(field)} | {_bounds(field)} "
        f"| {_cell(field.description)} |\n"
        for name, field in section.model_fields.items()
        if not _is_section(field.annotation)
    ]
    head = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|\n"
    return f"\n### {title}\n\n{_one_line(section.__doc__)}\n\n{head}{''.join(rows)}"


def _type(annotation: Any) -> str:
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if annotation in words:
        return words[annotation]
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is dict:
        return "table"
    if typing.get_origin(annotation) is list:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"table of {', '.join(f'`{name}`' for name in annotation.model_fields)}"
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        return " or ".join(_type(each) for each in typing.get_args(annotation))
    raise ValueError(f"a field of type {annotation} has no name here: add one to _type")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{json.dumps(value)}`"


def _bounds(field: FieldInfo) -> str:
    words = []
    for bound in field.metadata:
        [(kind, value)] = [
            (sign, getattr(bound, name)) for each, sign, name in _SIGNS if isinstance(bound, each)
        ]
        words.append(f"{kind} {value}")
    return ", ".join(words)


def _cell(text: str | None) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _preset(name: str) -> str:
    path = f"forge_core/presets/{name}.toml"
    text = (ROOT / path).read_text("utf-8").rstrip()
    return f"\n### `{name}`\n\n[`{path}`](../{path})\n\n```toml\n{text}\n```\n"


def main(arguments: list[str]) -> int:
    """Write or check the reference; the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = reference()
    if not arguments:
        REFERENCE.write_text(text, "utf-8")
        return 0
    if REFERENCE.is_file() and REFERENCE.read_text("utf-8") == text:
        return 0
    print(
        "docs/config.md is out of date: run python docs/generate_config_reference.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
