"""The documents: the config reference is up to date, and what they name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from flows.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
_SPAN = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _code(document: Path) -> str:
    """Everything in a document that is code: blocks, fenced or indented, and spans."""
    text = document.read_text("utf-8")
    prose = _FENCE.sub("", text)
    found = _FENCE.findall(text) + _INDENTED.findall(prose) + _SPAN.findall(prose)
    return "\n".join(found)


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_config_reference", ROOT / "docs" / "generate_config_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "docs" / "generate_config_reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_stale_config_reference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    monkeypatch.setattr(generator, "REFERENCE", tmp_path / "config.md")
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    (tmp_path / "config.md").write_text(generator.reference().replace("`seed`", "`sead`"), "utf-8")
    assert generator.main(["--check"]) == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text, code = document.read_text("utf-8"), _code(document)
    for target in _LINK.findall(_FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = document.parent / path if path else document
        assert linked.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in _anchors(linked), f"{target} names no heading"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", code)) <= targets
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"\bforgeflow ([a-z-]+)", code)) <= commands
    keys = set(_generator().dotted_keys())
    for key in re.findall(r"--set '?([a-z_.]+)=", code):
        assert (
            key in keys
            or key.startswith(("environment.params.", "tools.", "verifiers."))
            or key == "dotted.key"
        )


def test_the_checks_find_something_to_check() -> None:
    code = "\n".join(map(_code, DOCUMENTS))
    assert {"demo", "test", "server"} <= set(re.findall(r"\bmake ([a-z]+)", code))
    named = set(re.findall(r"\bforgeflow ([a-z-]+)", code))
    assert named == set(typer.main.get_command(app).commands)
    assert "environment.name" in re.findall(r"--set '?([a-z_.]+)=", code)


def _anchors(document: Path) -> set[str]:
    """Names that a forge gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document.read_text("utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}
