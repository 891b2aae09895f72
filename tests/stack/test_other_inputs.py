"""What is not the preset: another task, another model, and stages that fail once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Finished, Start, command, task_runs
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL = ["--set", "evaluation.num_prompts=20", "--set", "groups_per_step=8"]


def _llama_directory(folder: Path) -> Path:
    """A small Llama with untied embeddings, a byte-level tokenizer of its own, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["Spell this word backward (example: sun -> nus): question"] * 10,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|end|>",
        chat_template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] ",
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_runs(
    start_run: Start, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Callable[[], Finished]]:
    """Both started at once: most of a start is waiting for imports."""
    llama = _llama_directory(tmp_path_factory.mktemp("llama"))
    other_task = start_run(
        "task", "--preset", "tiny", "--set", "environment.name=spell_backward", "--set", "steps=2",
        "--set", "warm_start.steps=8", "--set", "warm_start.batch_size=32",
        "--set", "trainer.ranks=1", *SMALL,
    )  # fmt: skip
    other_model = start_run(
        "llama", "--preset", "tiny", "--set", f"model.path={llama}", "--set", "steps=3",
        "--set", "environment.name=spell_backward", "--set", "warm_start.steps=10", "--set", "warm_start.batch_size=64",
        "--set", "generators.replicas=2", "--set", "generators.threads=1", *SMALL,
        program=[sys.executable, str(Path(__file__).with_name("faulty_run.py"))],
    )  # fmt: skip
    return {"task": other_task, "llama": other_model}


@pytest.fixture(scope="module")
def other_task(two_runs: dict[str, Callable[[], Finished]]) -> Finished:
    return two_runs["task"]()


@pytest.fixture(scope="module")
def faulty_llama(two_runs: dict[str, Callable[[], Finished]]) -> Finished:
    return two_runs["llama"]()


def test_another_task_by_its_name_alone(other_task: Finished) -> None:
    assert other_task.code == 0, other_task.errors
    groups = other_task.summary["groups"]
    assert groups["trained"] > groups["admitted"] / 2
    assert {row["environment"] for row in _draws(other_task)} == {"spell_backward"}


def test_another_architecture_with_its_own_tokenizer(faulty_llama: Finished) -> None:
    assert faulty_llama.code == 0, faulty_llama.errors
    assert faulty_llama.summary["groups"]["trained"] > 0
    assert faulty_llama.summary["parity"]["max"] <= 1e-2
    assert faulty_llama.summary["seconds"]["meshes"].keys() >= {"generator-0", "generator-1"}


def test_stages_that_fail_once_are_retried(faulty_llama: Finished, prefect_server: str) -> None:
    """No retry repeats what the first attempt made true: each group counts once, each step is trained once."""
    retries = faulty_llama.facts("retry")
    assert Counter(fact["stage"] for fact in retries) == {
        "generate": 1,
        "score": 1,
        "buffer": 1,
        "train": 1,
    }
    assert all("planted" in fact["cause"] and fact["seconds"] > 0 for fact in retries)
    assert faulty_llama.summary["retries"] == 4
    runs = task_runs(prefect_server, faulty_llama.run_id, at_least=5 * 3 + 7)
    twice = Counter(run["name"].rsplit("-", 1)[0] for run in runs if run["run_count"] == 2)
    assert twice == {"generate": 1, "score": 1, "buffer": 1, "train": 1}
    assert [fact["step"] for fact in faulty_llama.facts("step")] == [1, 2, 3]
    drawn = [draw["group_id"] for draw in _draws(faulty_llama)]
    assert len(drawn) == len(set(drawn)) == 3 * 8


def test_verify_finds_both_in_order(other_task: Finished, faulty_llama: Finished) -> None:
    import subprocess

    for run in (other_task, faulty_llama):
        result = subprocess.run(
            command("verify", run.run_id, "--store", str(run.store)),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout


def _draws(run: Finished) -> list[dict[str, str]]:
    return [draw for fact in run.facts("admitted") for draw in fact["draws"]]
