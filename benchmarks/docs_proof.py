"""Running the shell blocks of README and docs in a folder that has what they name; the proof of the long ones.

Blocks name a run `RUN`, its step `STEP`, and files such as `questions.jsonl`: `setting` makes all of them, so that a
block runs as it stands. The blocks of one page run in order in one folder, for a later one may need an earlier one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shell_blocks import ROOT, Block, documents, shell_blocks

LAST_STEP = 8
"""What `STEP` stands for: the last step of the run `RUN`."""
_LONGEST_SECONDS = 3600
_JUDGES = """\
def by_length(prompts, completions, **columns):
    return [float(len(text) == 9) for text in completions]


def by_unit(prompts, completions, **columns):
    return [float(text.startswith("[") and text.endswith("]")) for text in completions]


def by_model(prompts, completions, answer, **columns):
    return [float(text[1:2] == right[1:2]) for text, right in zip(completions, answer)]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a block ended."""

    block: Block
    exit_code: int
    output: str
    """Both streams."""
    seconds: float


def setting(folder: Path) -> None:
    """Fill an empty folder with what a clone has once it is set up, and with the files that blocks name."""
    for name in ("Makefile", "pyproject.toml", "deployments", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    environment = folder / ".venv"
    _write_programs(environment / "bin")
    shutil.copy(ROOT / "deployments" / "requirements-cpu.txt", environment / "installed-lock.txt")
    shutil.copy(ROOT / "pyproject.toml", environment / "installed-project.toml")

    shutil.copy(ROOT / "examples" / "own_reward_and_loss.py", folder / "rewards.py")
    (folder / "judges.py").write_text(_JUDGES)
    rows = [(f"{a}+{b}=", str(a + b)) for a in range(20, 70) for b in range(10, 50)]
    for name, keys in (
        ("questions.jsonl", ("question", "answer")),
        ("gsm8k.jsonl", ("question", "answer")),
        ("pairs.jsonl", ("prompt", "response")),
    ):
        lines = (json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
        (folder / name).write_text("\n".join(lines) + "\n")
    table = "".join(f"{question},{answer}\n" for question, answer in rows)
    (folder / "data.csv").write_text("problem,solution\n" + table)


def _write_programs(folder: Path) -> None:
    """The programs of an environment, which run this checkout in the environment of this process."""
    folder.mkdir(parents=True)
    for name, words in (("python", ""), ("forgeflow", " -m flows.cli")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        program.chmod(0o755)
    (folder / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')


def run_blocks(document: Path, folder: Path, where: Collection[str]) -> Iterator[Ran]:
    """Run the blocks of a page that belong there, in order, in a folder that `setting` has filled."""
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for block in shell_blocks(document):
        if block.where not in where:
            continue
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text.replace("@STEP", f"@{LAST_STEP}")],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LONGEST_SECONDS,
        )
        seconds = time.monotonic() - started
        yield Ran(block=block, exit_code=done.returncode, output=done.stdout, seconds=seconds)


def prove_docs(pages: Collection[str] = ()) -> tuple[bool, dict[str, Any]]:
    """All blocks of the pages (of every one unless some are named) but those of CI and those that run elsewhere."""
    chosen = [page for page in documents() if not pages or str(page.relative_to(ROOT)) in pages]
    blocks = [block for page in chosen for block in shell_blocks(page)]
    ran: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "made"
        for page in chosen:
            if not any(block.where == "long" for block in shell_blocks(page)):
                continue
            if not model.exists():
                model.mkdir()
                setting(model)
                _make_run(model)
            folder = Path(temporary) / page.stem
            shutil.copytree(model, folder, symlinks=True)
            for result in run_blocks(page, folder, ("short", "long")):
                ran[result.block.name] = {
                    "exit_code": result.exit_code,
                    "seconds": round(result.seconds, 1),
                    "shell": result.block.text,
                    **({"output": result.output[-2000:]} if result.exit_code else {}),
                }
                print(result.block.name, result.exit_code, f"{result.seconds:.0f} s", flush=True)
            shutil.rmtree(folder)
    figures = {
        "counted": dict(Counter(block.where for block in blocks)),
        "elsewhere": {block.name: block.reason for block in blocks if block.where == "elsewhere"},
        "ran": ran,
    }
    return bool(ran) and not any(block["exit_code"] for block in ran.values()), figures


def _make_run(folder: Path) -> None:
    command = [
        sys.executable, "-m", "flows.cli", "run", "--preset", "tiny", "--run-id", "RUN",
        "--set", f"steps={LAST_STEP}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=1200)


PROOFS: dict[str, Callable[[], tuple[bool, dict[str, Any]]]] = {
    "docs": prove_docs,
    "docs-readme": lambda: prove_docs(["README.md"]),
    "docs-tutorial": lambda: prove_docs(["docs/tutorial.md"]),
}
