"""Rewards that differ within a group whatever the model can do, so that runs without much of a warm start train."""

from __future__ import annotations

import hashlib
from typing import Any


def by_hash(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for half of all possible completions of each prompt, 0 for the others."""
    texts = (f"{prompt}\n{text}" for prompt, text in zip(prompts, completions, strict=True))
    return [float(hashlib.sha256(text.encode()).digest()[0] % 2) for text in texts]
