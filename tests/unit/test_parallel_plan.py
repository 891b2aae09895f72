"""Models that cannot be shared out by tensor parallelism are refused before anything of them has changed."""

from __future__ import annotations

import pytest
import transformers

from forge_core.config import TrainerConfig
from forge_core.parallel_plan import share_layers

TWO = TrainerConfig(ranks=2, tensor_parallel=2)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _refusal(config: transformers.PretrainedConfig) -> str:
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError) as caught:
        # A mesh that is not there: a refused model never reaches it.
        share_layers(model, None, TWO)  # type: ignore[arg-type]
    assert {name: type(module) for name, module in model.named_modules()} == before
    return str(caught.value)


def test_a_model_without_a_plan_is_refused() -> None:
    shape = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    sentence = _refusal(shape)
    assert "trainer.tensor_parallel 2" in sentence and "GPT2Config" in sentence
    assert sentence.endswith("set it to 1")


def test_a_plan_that_asks_for_more_than_rows_and_columns_is_refused() -> None:
    shape = transformers.MixtralConfig(**SMALL, num_local_experts=2)
    sentence = _refusal(shape)
    assert "MixtralConfig" in sentence and "where colwise, rowwise" in sentence


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 12}, "3 attention"),
        ({"num_key_value_heads": 1}, "1 heads of keys and values"),
        ({"intermediate_size": 33}, "33 hidden units"),
    ],
)
def test_a_shape_that_cannot_be_shared_evenly_is_refused(change: dict[str, int], told: str) -> None:
    sentence = _refusal(transformers.LlamaConfig(**{**SMALL, **change}))
    assert told in sentence and "tensor_parallel" in sentence
