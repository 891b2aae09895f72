"""Lengths in tokens against the context, tokens that the model does not know, and marks that are none of the text's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_core.data_checks.balance import distribution
from forge_core.data_checks.columns import Example
from forge_core.data_checks.findings import DataReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What rows must fit into, in tokens; None for what is not known."""

    tokenizer: Path | None = None
    """A tokenizer.json; None: a token a byte, as the tiny model has."""
    context: int | None = None
    """Longest sequence."""
    context_name: str = "the context"
    """What sets it."""
    max_response: int | None = None
    """Longest response that is sampled."""
    response_name: str = "the longest response"
    """What sets it."""
    max_example: int | None = None
    """Longest supervised example."""
    example_name: str = "the longest example"
    """What sets it."""


def check_tokens(examples: list[Example], limits: Limits, report: DataReport) -> None:
    """Note rows that do not fit, and rows with unknown or special tokens. Raises ValueError for no tokenizer."""
    if not examples:
        return
    tokenizer = _load(limits.tokenizer)
    prompts, unknown_prompts = _count(tokenizer, [example.prompt for example in examples])
    answers, unknown_answers = _count(tokenizer, [example.answer for example in examples])
    results, _ = _count(tokenizer, [example.result for example in examples])
    report.figures["prompt_tokens"] = distribution(prompts)
    report.figures["answer_tokens"] = distribution(answers)
    _check_lengths(examples, prompts, answers, results, limits, report)
    report.add(
        "unknown tokens",
        [
            example.place
            for example, *num in zip(examples, unknown_prompts, unknown_answers, strict=True)
            if any(num)
        ],
        "text that the tokenizer has no tokens for",
        "write it in characters that the model knows, or take a model that knows these",
        blocks=False,
    )
    specials = _specials(tokenizer)
    marked = {
        example.place: mark
        for example in examples
        for mark in specials
        if mark in example.prompt or mark in example.answer
    }
    report.add(
        "special tokens",
        marked,
        f"text that is read as special tokens ({', '.join(sorted(set(marked.values())))})",
        "take it out: the model's own template adds what it needs",
        blocks=False,
    )


def _check_lengths(
    examples: list[Example],
    prompts: Sequence[int],
    answers: Sequence[int],
    results: Sequence[int],
    limits: Limits,
    report: DataReport,
) -> None:
    rows = list(zip(examples, prompts, answers, results, strict=True))
    context, response, longest = limits.context, limits.max_response, limits.max_example
    if longest is not None:
        report.add(
            "length",
            [
                e.place
                for e, prompt, answer, _ in rows
                if e.is_supervised and prompt + answer > longest
            ],
            f"more tokens than {limits.example_name} {longest}",
            "shorten them, leave them out, or raise it",
            blocks=True,
        )
    if context is not None:
        report.add(
            "length",
            [e.place for e, prompt, _, _ in rows if prompt >= context],
            f"prompts that fill {limits.context_name}, {context} tokens, and leave none to answer in",
            "shorten them, leave them out, or raise it",
            blocks=True,
        )
        report.add(
            "length",
            [
                e.place
                for e, prompt, answer, result in rows
                if prompt < context < prompt + (answer if e.is_supervised else result)
            ],
            f"answers that do not fit behind their prompts into {limits.context_name}, {context} tokens",
            "shorten them, leave them out, or raise it",
            blocks=True,
        )
    if response is not None:
        report.add(
            "length",
            [e.place for e, _, _, result in rows if not e.is_supervised and result > response],
            f"answers of more tokens than {limits.response_name} {response}, which no response can give",
            "raise it, or leave them out",
            blocks=True,
        )


def _load(file: Path | None) -> Any:
    if file is None:
        return None
    # Deferred: only models from a directory need it.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises nothing narrower for a file that it cannot parse.
        raise ValueError(f"{str(file)!r} cannot be read as a tokenizer: {error}") from None
    # A file may tell how training data were cut to length, which hides what is too long.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(tokenizer: Any, texts: list[str]) -> tuple[list[int], list[int]]:
    """Tokens of each text, and how many of them are the unknown one."""
    if tokenizer is None:
        return [len(text.encode("utf-8", "surrogatepass")) for text in texts], [0] * len(texts)
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = (
        getattr(tokenizer.model, "unk_id", None)
        if unknown is None
        else tokenizer.token_to_id(unknown)
    )
    ids = [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return [len(each) for each in ids], [each.count(unknown_id) for each in ids]


def _specials(tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return []
    added = tokenizer.get_added_tokens_decoder().values()
    return sorted({token.content for token in added if token.special})
