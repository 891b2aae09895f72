"""Templates of prompts and answers: Python format strings over an item and its metadata's fields.

A list takes a format spec of its own, the text that joins it: `{numbers:, }` of [3, 1] is `3, 1`.
A prompt is made of the question, never of the answer, though a task may tell it in its metadata.
"""

from __future__ import annotations

from typing import Any

_PLAIN = {"prompt_template": "question", "answer_template": "answer"}
"""The field that holds what stands where there is no template."""


class _Joinable(list[Any]):
    """A list whose format spec is what joins its items."""

    def __format__(self, spec: str) -> str:
        return spec.join(str(item) for item in self) if spec else str(list(self))


def render(option: str, template: str | None, plain: str, metadata: dict[str, Any]) -> str:
    """What the template of `environment.<option>` makes of an item; `plain` where there is none.

    Raises ValueError that names the template and, where a field is missing, those that there are.
    """
    if template is None:
        return plain
    fields = {key: _joinable(value) for key, value in metadata.items()}
    known = {**fields, _PLAIN[option]: plain, "metadata": fields}
    try:
        return template.format(**known)
    except (LookupError, AttributeError) as error:
        raise ValueError(
            f"environment.{option} {template!r} names a missing field ({error}): the fields "
            f"are {', '.join(known)}"
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"environment.{option} {template!r} cannot be rendered: {error}") from None


def _joinable(value: Any) -> Any:
    return _Joinable(value) if isinstance(value, list | tuple) else value
