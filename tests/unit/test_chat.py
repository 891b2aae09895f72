"""Text to tokens, with and without a chat template."""

from typing import Any

import pytest

from forge_core.chat import encode_answer, encode_prompt
from forge_core.model import EOS, build_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """The tiny model's, which has no chat template."""
    return build_tokenizer(128)


@pytest.fixture
def chatty() -> Any:
    """The same with a chat template."""
    tokenizer = build_tokenizer(128)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_is_taken_as_it_is_where_there_is_no_template(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, " a\nb ")
    assert all(type(token) is int for token in ids)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == " a\nb "


def test_a_prompt_is_a_user_message_before_the_answer_where_there_is_one(chatty: Any) -> None:
    ids = encode_prompt(chatty, "1+1?")
    assert type(ids) is list and all(type(token) is int for token in ids)
    assert chatty.decode(ids) == "[user]1+1?[assistant]"
    assert ids == chatty("[user]1+1?[assistant]").input_ids


def test_an_answer_ends_in_one_end_of_sequence_token(tokenizer: Any, chatty: Any) -> None:
    for each in (tokenizer, chatty):
        ids = encode_answer(each, "1, 2")
        assert ids[-1] == each.eos_token_id
        assert ids.count(each.eos_token_id) == 1
        assert each.decode(ids) == f"1, 2{EOS}"
        assert encode_answer(each, "") == [each.eos_token_id]


def test_an_answer_gets_no_special_tokens_in_front(tokenizer: Any) -> None:
    """A tokenizer that begins every text with one must not begin the answer, amid a sequence, so."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    assert encode_prompt(tokenizer, "1")[0] == tokenizer.pad_token_id
    assert tokenizer.decode(encode_answer(tokenizer, "1")) == f"1{EOS}"
