"""A reward function that misbehaves gives one error, which names it and the prompt, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forge_core.environments.base import Prompt
from forge_core.rewards import RewardError, RewardProcess

FUNCTIONS = """
import os, re, sys, time
import numpy

def lengths(prompts, completions, answer, completion_ids, **columns):
    print("a reward may print")
    assert len(prompts) == len(answer) == len(columns["difficulty"]) == len(completions)
    return [len(c) + len(ids) + int(a) for c, ids, a in zip(completions, completion_ids, answer)]

async def asynchronous(prompts, completions, **columns):
    return numpy.ones(len(completions))

def raises(prompts, completions, **columns):
    return [1 / 0]

def hangs(prompts, completions, **columns):
    re.match(r"(a+)+$", "a" * 64 + "b")

def short(prompts, completions, **columns):
    return [1.0]

def nan(prompts, completions, **columns):
    return [0.5, float("nan")]

def string(prompts, completions, **columns):
    return ["1.0", "0.0"]

def none(prompts, completions, **columns):
    return None

def crashes(prompts, completions, **columns):
    os._exit(3)

def exits(prompts, completions, **columns):
    sys.exit(4)

def starts_something(prompts, completions, **columns):
    import subprocess
    subprocess.run([sys.executable, "-c", "import time; time.sleep(300)", __file__])

lock = None

async def keeps_a_lock(prompts, completions, **columns):
    # As a client does, which belongs to the event loop that it was first used in.
    import asyncio
    global lock
    lock = lock or asyncio.Lock()
    async def holds():
        async with lock:
            await asyncio.sleep(0.01)
    await asyncio.gather(holds(), holds())
    return [1.0] * len(completions)

def wants_more(prompts, completions, secret):
    return [1.0, 1.0]
"""
PROMPT = Prompt(
    prompt_id="p", text="What is 3 + 4?", answer="7", target="7", index=0, environment="sums",
    metadata={"difficulty": 2},
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def _reward(file: Path, name: str, seconds: float = 20) -> list[float]:
    with RewardProcess(f"{file}:{name}", timeout_seconds=seconds) as reward:
        return reward(PROMPT, ["seven", ""], [[1, 2], []])


def test_columns_come_as_lists_of_one_value_per_completion(file: Path) -> None:
    assert _reward(file, "lengths") == [5 + 2 + 7, 7]
    assert _reward(file, "asynchronous") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("hangs", "gave no answer within 1 s"),
        ("short", r"returned 1 values for 2 completions: \[1.0\]"),
        ("nan", "returned nan, which is no finite number, for the completion ''"),
        ("string", "returned '1.0', which is no finite number, for the completion 'seven'"),
        ("none", "returned None where a list of 2 numbers is due"),
        ("crashes", "ended its process with exit code 3"),
        ("exits", "raised SystemExit: 4"),
        ("wants_more", "raised TypeError: .* unexpected keyword|raised TypeError: .*secret"),
        ("missing", "raised ValueError: reward .* has no callable 'missing'"),
    ],
)
def test_one_error_names_the_function_and_the_prompt(file: Path, name: str, words: str) -> None:
    with pytest.raises(RewardError, match=words) as caught:
        _reward(file, name, seconds=1 if name == "hangs" else 20)
    message = str(caught.value)
    assert f"{file}:{name}" in message and "'What is 3 + 4?'" in message
    assert len(message.splitlines()) == 1
    started = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in started if f"{file}:{name}" in command]


def test_what_a_function_started_ends_with_it(file: Path) -> None:
    with pytest.raises(RewardError, match="no answer within 3 s"):
        _reward(file, "starts_something", seconds=3)
    started = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in started if str(file) in command]


def test_one_event_loop_serves_all_requests(file: Path) -> None:
    with RewardProcess(f"{file}:keeps_a_lock", timeout_seconds=20) as reward:
        for _ in range(2):
            assert reward(PROMPT, ["a", "b"], [[1], [2]]) == [1.0, 1.0]


def test_a_function_is_imported_before_it_is_needed(file: Path) -> None:
    with RewardProcess(f"{file}:lengths", timeout_seconds=20) as reward:
        reward.load()
    file.write_text("import no_such_module\n")
    with RewardProcess(f"{file}:lengths", timeout_seconds=20) as reward:
        with pytest.raises(RewardError, match=r"no_such_module.*when it was imported"):
            reward.load()


def test_a_hanging_function_dies_with_the_process_that_asks(file: Path) -> None:
    """Killed with SIGKILL in the midst of it, as a verifier may be."""
    program = """
import sys
from forge_core.environments.base import Prompt
from forge_core.rewards import RewardProcess
prompt = Prompt(prompt_id="", text="", answer="", target="", index=0, environment="", metadata={})
RewardProcess(sys.argv[1], timeout_seconds=60)(prompt, [""], [[]])
"""
    asker = subprocess.Popen([sys.executable, "-c", program, f"{file}:hangs"])
    try:
        deadline = time.monotonic() + 20
        while not (children := psutil.Process(asker.pid).children()):
            assert time.monotonic() < deadline
        (worker,) = children
        while worker.cpu_times().user < 0.5:
            assert time.monotonic() < deadline
    finally:
        os.kill(asker.pid, signal.SIGKILL)
        asker.wait(10)
    _, alive = psutil.wait_procs([worker], timeout=10)
    assert not alive
