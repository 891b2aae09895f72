"""The project as others install it: a wheel in an environment that has nothing else of it.

What the project stands on is large (torch, vLLM) and takes minutes to install, so the environment borrows these
packages from the one that the tests run in; the project itself comes from the wheel alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "forge_core", "storage")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("wheel")
    _call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
          "--wheel-dir", str(folder), str(copy))  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel in it."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    _call(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps",
          "--no-index", str(wheel))  # fmt: skip
    (packages,) = environment.glob("lib/python*/site-packages")
    lenders = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(lenders) + "\n")
    return environment / "bin"


def _call(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        # Without what this process was given to find the project by.
        env={"PATH": "/usr/bin:/bin", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files
    assert "forge_core/presets/tiny.toml" in files
    assert "flows/html_report/page.html.j2" in files


def test_what_the_wheel_needs_is_what_the_tests_run_with(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needed = re.findall(r"^Requires-Dist: (.+)$", archive.read(name).decode(), re.MULTILINE)
    for line in needed:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version), f"{line}: {version} is installed"


def test_the_installed_program_runs(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "forgeflow")
    assert "post-train" in _call(program, "--help", folder=tmp_path).lower()
    project = _call(program, "--version", folder=tmp_path).split()
    assert project == ["forgeflow", importlib.metadata.version("forgeflow")]
    plan = _call(program, "run", "--preset", "tiny", "--dry-run", "--json", folder=tmp_path)
    assert json.loads(plan)["config"]["environment"]["name"] == "number_sorting"
    where = _call(
        str(installed / "python"), "-c", "import flows; print(flows.__file__)", folder=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
