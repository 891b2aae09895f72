"""The real stack, shared as far as tests allow: one Prefect server, and one whole run of the tiny preset."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Finished, Start, command

pytest_plugins = ["s3_server"]

STACK = Path(__file__).parent / "stack"
ON_THE_STACK = {STACK, STACK.with_name("long")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first; of those on the stack, what waits for the whole run that is under way meanwhile comes after
    the others; last what wants quiet."""
    for item in items:
        if item.path.parent in ON_THE_STACK:
            item.add_marker(pytest.mark.stack)
    items.sort(
        key=lambda item: (
            item.path.parent in ON_THE_STACK,
            item.path.name == "test_kills.py",
            _waits_for_tiny_run(item),
        )
    )


def _waits_for_tiny_run(item: pytest.Item) -> bool:
    return "tiny_run" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _early_start(request: pytest.FixtureRequest) -> None:
    if any(_waits_for_tiny_run(item) for item in request.session.items):
        request.getfixturevalue("tiny_started")


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a real server that `forgeflow server` started."""
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    }
    process = subprocess.Popen(
        command("server", "--no-worker", "--json"),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    document = ""
    while not document.endswith("}\n"):
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        document += line
    try:
        yield json.loads(document)["api_url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.fixture(scope="session")
def start_run(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start `forgeflow run` in the background; the result waits for its end."""
    started: list[subprocess.Popen[str]] = []

    def start(
        run_id: str, *arguments: str, program: list[str] | None = None, timeout: float = 280
    ) -> Callable[[], Finished]:
        store = tmp_path_factory.mktemp(run_id)
        options = ["run", "--store", str(store), "--run-id", run_id, "--json", *arguments]
        process = subprocess.Popen(
            [*program, *options] if program else command(*options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PREFECT_API_URL": prefect_server},
        )
        started.append(process)

        @functools.cache
        def finish() -> Finished:
            out, errors = process.communicate(timeout=timeout)
            summary = json.loads(out) if out else {}
            log = store / "runs" / run_id / "output.log"
            if process.returncode and log.exists():
                errors += "\n" + log.read_text(errors="replace")[-4000:]
            return Finished(process.returncode, summary, errors, store, run_id)

        return finish

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture(scope="session")
def tiny_started(start_run: Start) -> Callable[[], Finished]:
    """The tiny preset, seed 0, in half its steps, under way. `make prove BAR=learning` takes all of them."""
    return start_run("tiny", "--preset", "tiny", "--set", "steps=24")


@pytest.fixture(scope="session")
def tiny_run(tiny_started: Callable[[], Finished]) -> Finished:
    """The tiny preset, seed 0, in half its steps."""
    run = tiny_started()
    assert run.code == 0, run.errors
    return run


def _llama_directory(folder: Path) -> Path:
    """A small Llama with untied embeddings, a byte-level tokenizer of its own, and a chat template."""
    # Deferred: unit tests need none of them.
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture(scope="session")
def llama_started(
    start_run: Start, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Finished]:
    """A run of another model, in which every stage fails once, under way."""
    folder = _llama_directory(tmp_path_factory.mktemp("model"))
    return start_run(
        "llama", "--preset", "tiny", "--set", f"model.path={folder}", "--set", "steps=3",
        "--set", "environment.name=spell_backward", "--set", "warm_start.steps=10",
        "--set", "warm_start.batch_size=64", "--set", "evaluation.num_prompts=20",
        "--set", "groups_per_step=8", "--set", "generators.replicas=2",
        "--set", "generators.threads=1",
        program=[sys.executable, str(STACK / "faulty_run.py")],
    )  # fmt: skip


@pytest.fixture(scope="session")
def faulty_llama(llama_started: Callable[[], Finished]) -> Finished:
    """The same, ended."""
    return llama_started()
