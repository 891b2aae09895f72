"""What a row of supervised data has to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from forge_core.supervised.files import Row, read_rows

ROLES = ("system", "user", "assistant", "tool")
"""Of messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What is learned from: an answer in its context. Either messages, or prompt and completion."""

    row: Row
    """Where it stands."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and text of each; at least one is the assistant's."""
    prompt: str = ""
    """Text before the completion."""
    completion: str = ""
    """What is to be learned, where there are no messages."""

    @property
    def asked(self) -> str:
        """What it is known by in the split: all that comes before the assistant first writes."""
        if not self.messages:
            return json.dumps(["prompt", self.prompt])
        roles = [role for role, _ in self.messages]
        return json.dumps(["messages", *self.messages[: roles.index("assistant")]])

    def is_validation(self, fraction: float) -> bool:
        """Whether a hash of what is asked puts it aside: whatever the seed, the order and the other examples."""
        bits = int.from_bytes(hashlib.sha256(self.asked.encode()).digest()[:8], "big")
        return bits < fraction * 2**64


def read_examples(path: str, split: str) -> Iterator[Example]:
    """The examples of a file or folder. Raises ValueError naming file, row and mend for a row that is none."""
    for row in read_rows(path, split):
        yield _example(row)


def _example(row: Row) -> Example:
    values = {name: value for name, value in row.values.items() if value is not None}
    if "messages" in values:
        return Example(row=row, messages=_messages(row, values["messages"], "messages"))
    prompt, completion = values.get("prompt"), values.get("completion")
    if prompt is None or completion is None:
        has = ", ".join(sorted(values)) or "nothing"
        raise ValueError(
            f"{row} has {has}: it needs messages, or prompt and completion; rename its columns"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(row, prompt, "prompt", needs_assistant=False)
        after = _messages(row, completion, "completion")
        return Example(row=row, messages=(*before, *after))
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise ValueError(
                f"{row} has a {name} that is a {type(text).__name__}: make prompt and completion both text, or both "
                "lists of messages"
            )
    if not completion:
        raise ValueError(f"{row} has an empty completion: leave the row out")
    return Example(row=row, prompt=prompt, completion=completion)


def _messages(
    row: Row, given: object, column: str, *, needs_assistant: bool = True
) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{row} has {column} that are no list of messages: make it one")
    messages = []
    for place, each in enumerate(given):
        role = each.get("role") if isinstance(each, dict) else None
        content = each.get("content") if isinstance(each, dict) else None
        if role not in ROLES:
            raise ValueError(
                f"{row} has {column}[{place}] of role {role!r}: it must be {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"{row} has {column}[{place}] whose content is a {type(content).__name__}: make it text"
            )
        messages.append((str(role), content))
    if needs_assistant and all(role != "assistant" for role, _ in messages):
        raise ValueError(
            f"{row} has {column} of which none is the assistant's, so nothing to learn: leave the row out"
        )
    return tuple(messages)
