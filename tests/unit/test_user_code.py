"""References to code of the user's: found without running it, refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import run
from forge_core.user_code import check_reference, load_object, reference_to


def a_function() -> None:
    """Something that other processes can find."""


def test_a_reference_is_checked_without_running_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from json import loads as parse\nraise SystemExit\ndef f(): ...\ng = f\n")
    for name in ("f", "g", "parse"):
        assert check_reference("reward", f"{file}:{name}") == file
    with pytest.raises(ValueError, match=r"reward .* has no 'h' at its top level"):
        check_reference("reward", f"{file}:h")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("mine", "is no reference"),
        ("mine.py:", "is no reference"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no_such_module:f", "there is no Python module"),
        ("no_such.module:f", "does not resolve"),
        ("sys:exit", "there is no Python module"),
    ],
)
def test_what_does_not_resolve_names_the_field_and_the_form(reference: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_reference("loss", reference)
    assert str(caught.value).startswith(f"loss {reference!r}")


def test_a_function_is_found_again_by_its_reference() -> None:
    found = load_object("reward", reference_to("reward", a_function))
    assert found.__doc__ == a_function.__doc__
    for hidden in (lambda: None, len, type(a_function)):
        with pytest.raises(ValueError, match=r"reward .* cannot be found by other processes"):
            reference_to("reward", hidden)


def test_what_stands_beside_a_file_is_found(tmp_path: Path) -> None:
    """In a script's folder, and in a package, by relative imports as well."""
    (tmp_path / "beside_it.py").write_text("VALUE = 3\n")
    (tmp_path / "script.py").write_text("from beside_it import VALUE\ndef f(): return VALUE\n")
    assert load_object("reward", f"{tmp_path / 'script.py'}:f")() == 3
    package = tmp_path / "own_package_of_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "numbers.py").write_text("VALUE = 4\n")
    (package / "rewards.py").write_text("from .numbers import VALUE\ndef f(): return VALUE\n")
    assert load_object("reward", f"{package / 'rewards.py'}:f")() == 4


def test_the_python_call_refuses_before_anything_starts(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with pytest.raises(ValueError, match=r"loss 'nowhere.py:f' does not resolve"):
        run(preset="tiny", loss="nowhere.py:f", store=store)
    with pytest.raises(ValueError, match=r"regime 'async' has a loop of its own"):
        run(preset="tiny", regime="async", loop=a_function, store=store)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward .* cannot be found"):
        run(preset="tiny", reward=lambda **columns: [], store=store)
    assert not (tmp_path / "store").exists()
