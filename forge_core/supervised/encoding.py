"""Examples as token ids, with a mask of what the assistant wrote.

A chat template is applied to the messages up to each turn of the assistant's, with what opens the turn, and to those
with the turn. What the second has beyond the first is the assistant's, its end-of-turn token among it. That holds for
any template that only ever appends, without `{% generation %}` marks in it; one that does not is refused.
"""

from __future__ import annotations

from typing import Any

from forge_core.algorithms.batch import Sequence
from forge_core.chat import encode_answer, encode_prompt
from forge_core.supervised.examples import Example


def encode(tokenizer: Any, example: Example, *, max_tokens: int, limit: str) -> Sequence:
    """An example as a sequence of at most `max_tokens`, which `limit` names.

    Raises ValueError naming its row if it does not fit, or the template does not.
    """
    ids, mask = _encoded(tokenizer, example)
    if len(ids) > max_tokens:
        raise ValueError(
            f"{example.row} has {len(ids)} tokens, more than {limit}: raise it, or shorten the row"
        )
    first = mask.index(True)
    if first == 0:
        raise ValueError(f"{example.row} begins with what is to be learned: give it a prompt")
    return Sequence(token_ids=ids, num_prompt_tokens=first, mask=mask[first:])


def _encoded(tokenizer: Any, example: Example) -> tuple[list[int], list[bool]]:
    if not example.messages:
        prompt = encode_prompt(tokenizer, example.prompt)
        answer = encode_answer(tokenizer, example.completion)
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{example.row} has messages, and the tokenizer no chat template: add chat_template to its "
            "tokenizer_config.json, or give prompt and completion"
        )
    messages = [{"role": role, "content": content} for role, content in example.messages]
    ids: list[int] = []
    mask: list[bool] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:turn], opens=True)
        through = _templated(tokenizer, messages[: turn + 1], opens=False)
        if before[: len(ids)] != ids or through[: len(before)] != before:
            raise ValueError(
                f"{example.row}: the chat template changes earlier text at message {turn}, so that it cannot be told "
                "what the assistant wrote: use a template that only appends, or give prompt and completion"
            )
        mask += [False] * (len(before) - len(ids)) + [True] * (len(through) - len(before))
        ids = through
    return ids, mask


def _templated(tokenizer: Any, messages: list[dict[str, str]], *, opens: bool) -> list[int]:
    if not messages:
        return []
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, return_dict=True)
    return list(encoded["input_ids"])
