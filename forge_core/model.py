"""The tiny model: a small Qwen3 made from a seed, with a tokenizer over printable ASCII and bytes.

It is written as an ordinary Hugging Face directory, so that everything downstream treats it like any other
model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forge_core.attention import implementation
from forge_core.config import Attention, TinyModelConfig

PAD, EOS = "<pad>", "<eos>"


def build_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; every other character as its UTF-8 bytes."""
    characters = [chr(code) for code in range(32, 127)]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters, *byte_tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(config: TinyModelConfig, seed: int, directory: Path) -> None:
    """Write model and tokenizer to `directory`, whole or not at all; one that is there is left as it is.

    The same config and seed write the same bytes.
    """
    if (directory / "config.json").exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tmp-model-") as folder:
        made = Path(folder) / "model"
        _write_tiny_model(config, seed, made)
        try:
            made.rename(directory)
        except OSError:
            # Another controller of the run was faster, and has made the same.
            if not (directory / "config.json").exists():
                raise


def _write_tiny_model(config: TinyModelConfig, seed: int, directory: Path) -> None:
    tokenizer = build_tokenizer(config.context_length)
    model_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(model_config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_causal_lm(directory: str, attention: Attention = "sdpa") -> torch.nn.Module:
    """The float32 model in a Hugging Face directory, on CPU; weights are read from safetensors only."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation=implementation(attention),
    )
    assert isinstance(model, torch.nn.Module)
    return model
