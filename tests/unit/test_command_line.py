"""Every command, as one finds it by walking the command line: help, JSON, and the exit code for what is refused."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from flows import cli

ROOT = Path(__file__).parents[2]


def _commands() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """The name of each command, with its group's before it, and the command."""
    waiting = [((), typer.main.get_command(cli.app))]
    while waiting:
        words, command = waiting.pop()
        for name, child in getattr(command, "commands", {}).items():
            waiting.append(((*words, name), child))
        if not hasattr(command, "commands"):
            yield " ".join(words), command


COMMANDS = dict(sorted(_commands()))


@pytest.fixture
def forgeflow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[object]:
    """Calls the entry point in this process; gives the exit code and both streams."""

    def call(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["forgeflow", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        return left.value.code, streams.out, streams.err

    yield call


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(forgeflow, name: str) -> None:
    code, out, err = forgeflow(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert f"forgeflow {name}" in " ".join(out.split())
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{parameter.opts} says nothing"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--json", "--store", "--verbose"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused(forgeflow, name: str) -> None:
    code, out, err = forgeflow(*name.split(), "--no-such-option")
    assert (code, out) == (2, "")
    assert "--no-such-option" in err and len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, command in COMMANDS.items()
        if any(p.param_type_name == "argument" and p.required for p in command.params)
    ],
)
def test_a_run_that_does_not_exist_is_refused(forgeflow, tmp_path: Path, name: str) -> None:
    """Also with --json: nothing on standard output, which is for the document alone."""
    store = tmp_path / "store"
    extra = {
        "rescore": ["--verifier", "environment", "--name", "again"],
        "fit-verifiers": ["--scores", "a", "--scores", "b", "--scores", "c", "--name", "all"],
    }.get(name, [])
    code, out, err = forgeflow(
        *name.split(), "no-such-run", *extra, "--store", str(store), "--json"
    )
    assert (code, out) == (2, ""), err
    assert "no-such-run" in err and len(err.splitlines()) <= 2
    assert not store.exists()


@pytest.mark.parametrize("words", [("runs",), ("gc",)])
def test_json_is_one_document_and_nothing_else(
    forgeflow, tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, err = forgeflow(*words, "--store", str(tmp_path / "store"), "--json")
    assert (code, err) == (0, "")
    json.loads(out)


def test_the_version_stands_in_one_place(forgeflow) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert forgeflow("--version") == (0, f"forgeflow {project['version']}\n", "")
    newest = next(
        line
        for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()
        if line.startswith("## [") and "Unreleased" not in line
    )
    assert newest.startswith(f"## [{project['version']}]")
