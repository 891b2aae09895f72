"""The policy: its directory, its shape, its type."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge_core.config.base import Section

HUB_PREFIX = "hf://"
"""What a `model.path` starts with that names a model of the hub."""


class TinyModelConfig(Section):
    """Shape of the model that is made from the seed when `model.path` is not given (Qwen3 layout)."""

    hidden_size: int = Field(128, ge=16, le=4096)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1, le=64)
    """Number of decoder layers."""
    num_heads: int = Field(4, ge=1, le=64)
    """Number of query heads; head size is `hidden_size / num_heads`."""
    num_kv_heads: int = Field(2, ge=1, le=64)
    """Number of key and value heads; must divide `num_heads`."""
    context_length: int = Field(2048, ge=128)
    """Longest sequence, in tokens."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> TinyModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}"
            )
        return self


class ModelShape(Section):
    """Shape of a dense decoder of the Llama and Qwen families, from which memory is estimated."""

    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """Key and value heads."""
    head_size: int = Field(ge=1)
    """Width of a head."""
    intermediate_size: int = Field(ge=1)
    """Width of the gated feed-forward layer."""
    vocabulary_size: int = Field(ge=1)
    """Rows of the embedding."""
    ties_embeddings: bool
    """Whether the output layer is the embedding."""

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases left aside."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_size * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, norms and biases left aside."""
        embeddings = (1 if self.ties_embeddings else 2) * self.vocabulary_size * self.hidden_size
        return embeddings + self.num_layers * self.num_layer_parameters


class ModelConfig(Section):
    """The policy that is trained."""

    path: str | None = None
    """Directory of a Hugging Face causal language model, or `hf://owner/name` to download one; none: the tiny model."""
    tiny: TinyModelConfig = TinyModelConfig()
    """Shape of the tiny model; ignored when `path` is given."""
    shape: ModelShape | None = None
    """Shape of a model of the hub, for estimates of memory before it is downloaded; of no other effect."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that generate and of the forward pass that trains; float32 on CPU."""
