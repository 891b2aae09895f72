"""What can be told of a Hugging Face model directory without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from forge_core.config import HUB_PREFIX

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """A directory that has a config, safetensors weights and a tokenizer."""

    path: Path
    """The directory."""
    context_length: int | None
    """Longest sequence, in tokens; None where the model's config does not say."""

    @classmethod
    def open(cls, path: str) -> Self:
        """Look at the directory. Raises ValueError that names it and what it lacks."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"model.path {path!r} is no directory: name one in Hugging Face layout, or "
                f"{HUB_PREFIX}owner/name to download a model"
            )
        config = _read_config(path, folder / "config.json")
        _check_weights(path, folder)
        _check_tokenizer(path, folder)
        text_config = config.get("text_config")
        for section in (config, text_config if isinstance(text_config, dict) else {}):
            for key in _CONTEXT_KEYS:
                if isinstance(section.get(key), int):
                    return cls(path=folder, context_length=section[key])
        return cls(path=folder, context_length=None)

    def count_tokens(self, texts: list[str]) -> int:
        """Tokens of the longest text; 0 where there is no tokenizer.json to count with."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            return 0
        # Deferred: only runs that start from a directory need it.
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            # The library raises nothing narrower for a file that it cannot parse.
            raise ValueError(
                f"model.path {str(self.path)!r} has a tokenizer.json that cannot be read: {error}"
            ) from None
        # A file may tell how training data were cut to length, which prompts are not.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))


def _read_config(path: str, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"model.path {path!r} has no config.json: name a directory in Hugging Face layout"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"model.path {path!r} has a config.json that is no JSON: {error}"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"model.path {path!r} has a config.json that is no table of keys")
    return config


def _check_weights(path: str, folder: Path) -> None:
    present = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(_shards(path, index) - present)
        if missing:
            raise ValueError(
                f"model.path {path!r} lacks {missing[0]}, one of {len(missing)} missing files of "
                "weights: complete the download"
            )
    if present:
        return
    if list(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"model.path {path!r} has its weights as a pickle (.bin), which can run code: convert "
            "them to safetensors"
        )
    raise ValueError(
        f"model.path {path!r} has no weights: name a directory that holds *.safetensors"
    )


def _shards(path: str, index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"model.path {path!r} has a {index.name} that cannot be read: complete the download"
        ) from None


def _check_tokenizer(path: str, folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    slow = any((folder / name).is_file() for name in _VOCABULARIES)
    if not ((folder / "tokenizer_config.json").is_file() and slow):
        raise ValueError(
            f"model.path {path!r} has no tokenizer: add tokenizer.json beside the weights"
        )
