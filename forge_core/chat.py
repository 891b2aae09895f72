"""Text to tokens, the same way for generation and for supervised training."""

from __future__ import annotations

from typing import Any


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message: through the chat template where the tokenizer has one, else as it is."""
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(text).input_ids)


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an answer that follows a prompt, closed by the end-of-sequence token."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
