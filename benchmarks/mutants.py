"""Mutants of losses, estimators and admission: small changes of the code, each of which some test should notice.

mutmut makes and runs them, in an environment of its own that pip fills from the package index, on a copy of the code
with the tests that are about it. A mutant that survives needs a reason in `surviving_mutants.toml`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).parent / "surviving_mutants.toml"
MUTMUT = "mutmut==3.8.1"
LEAST_SHARE = 0.9
TIMEOUT_SECONDS = 3600

MUTATED = (
    "forge_core/admission.py",
    "forge_core/algorithms/advantages.py",
    "forge_core/algorithms/divergence.py",
    "forge_core/algorithms/gae.py",
    "forge_core/algorithms/losses/*.py",
    "forge_core/algorithms/metrics.py",
    "forge_core/algorithms/primitives.py",
)
TESTS = ("admission", "advantages", "gae", "losses", "metrics")
DATA = ("numpy_losses.py", "trl_losses.json")

_SETTINGS = """
[tool.pytest.ini_options]
pythonpath = [".", "tests"]
addopts = ["--import-mode=importlib"]

[tool.mutmut]
source_paths = ["forge_core"]
also_copy = ["forge_core", "storage"]
only_mutate = {mutated}
pytest_add_cli_args_test_selection = ["tests/unit"]
use_git_change_detection = false
"""


def prove_mutants() -> tuple[bool, dict[str, Any]]:
    """Nine mutants in ten die, and each that does not is explained."""
    with tempfile.TemporaryDirectory() as folder:
        copy, program = _copy(Path(folder)), _mutmut(Path(folder))
        subprocess.run(
            [program, "run", "--max-children", str(os.cpu_count() or 1)],
            cwd=copy, env=_environment(), stdout=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, check=True,
        )  # fmt: skip
        fates = _fates(program, copy)
        counted = Counter(fates.values())
        reasons = _reasons()
        survivors = []
        for mutant in sorted(name for name, fate in fates.items() if fate == "survived"):
            change = _change(program, copy, mutant)
            why = reasons.get((_function(mutant), change))
            survivors.append({"function": _function(mutant), "change": change, "why": why})
    share = counted["killed"] / max(1, counted.total())
    for each in survivors:
        if each["why"] is None:
            print(f"unexplained: {each['function']}\n{each['change']}", flush=True)
    is_met = share >= LEAST_SHARE and all(each["why"] is not None for each in survivors)
    return is_met, {"share_killed": share, "mutants": dict(counted), "survivors": survivors}


def _copy(folder: Path) -> Path:
    copy = folder / "copy"
    (copy / "tests" / "unit").mkdir(parents=True)
    for package in ("forge_core", "storage"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for name in TESTS:
        shutil.copy(ROOT / "tests" / "unit" / f"test_{name}.py", copy / "tests" / "unit")
    for name in DATA:
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    (copy / "pyproject.toml").write_text(_SETTINGS.format(mutated=list(MUTATED)), "utf-8")
    return copy


def _mutmut(folder: Path) -> str:
    """The program, in an environment that sees this one's packages beside its own."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    python = environment / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    own = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    link = Path(own.stdout.strip()) / "forgeflow-packages.pth"
    link.write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", MUTMUT], check=True, timeout=600
    )
    return str(environment / "bin" / "mutmut")


def _environment() -> dict[str, str]:
    """One thread a process, for mutants are tested in forks; and no path but mutmut's own."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _ask(program: str, copy: Path, *arguments: str) -> str:
    return subprocess.run(
        [program, *arguments], cwd=copy, env=_environment(), check=True, capture_output=True, text=True, timeout=120
    ).stdout  # fmt: skip


def _fates(program: str, copy: Path) -> dict[str, str]:
    """What became of each mutant: killed, survived, timeout, …"""
    lines = _ask(program, copy, "results", "--all", "true").splitlines()
    pairs = (line.strip().partition(": ") for line in lines if ": " in line)
    return {name: fate for name, _, fate in pairs}


def _change(program: str, copy: Path, mutant: str) -> str:
    """The lines that it takes away and adds."""
    lines = _ask(program, copy, "show", mutant).splitlines()
    kept = [line for line in lines if line[:1] in "-+" and not line.startswith(("---", "+++"))]
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in kept)


def _function(mutant: str) -> str:
    """`module.function` or `module.Class.method`, from a name such as `module.x_function__mutmut_3`."""
    module, _, mangled = mutant.rpartition("__mutmut_")[0].rpartition(".")
    if mangled.startswith("xǁ"):
        return f"{module}.{'.'.join(mangled.removeprefix('xǁ').split('ǁ'))}"
    return f"{module}.{mangled.removeprefix('x_')}"


def _reasons() -> dict[tuple[str, str], str]:
    """Why a mutant may survive, by function and change."""
    survivors = tomllib.loads(REASONS.read_text("utf-8"))["survivor"]
    return {(each["function"], each["change"].strip()): each["why"] for each in survivors}
