"""The shell blocks of README and docs run: the short ones here, the others where benchmarks/shell_blocks.py says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from made_run import finished

from benchmarks.docs_proof import run_blocks, setting
from benchmarks.shell_blocks import ROOT, commands, documents, shell_blocks
from storage.objects import LocalStore

BLOCKS = [block for document in documents() for block in shell_blocks(document)]
PAGES_WITH_SHORT_BLOCKS = sorted({block.document for block in BLOCKS if block.where == "short"})


@pytest.mark.parametrize("page", PAGES_WITH_SHORT_BLOCKS)
def test_the_short_blocks_of_a_page_run(tmp_path: Path, page: str) -> None:
    setting(tmp_path)
    finished(LocalStore(tmp_path / "forge-store"), "RUN")
    for result in run_blocks(ROOT / page, tmp_path, ("short",)):
        assert result.exit_code == 0, f"{result.block.name}\n{result.block.text}\n{result.output}"


def test_blocks_that_do_not_run_here_are_counted() -> None:
    """Each has its reason, they are the exception, and the proof of the others records them by name."""
    counted = Counter(block.where for block in BLOCKS)
    assert all(block.reason for block in BLOCKS if block.where == "elsewhere")
    assert counted["elsewhere"] <= 20
    assert counted["short"] >= 5
    assert counted["long"] >= 25


def test_where_a_block_runs_follows_from_its_commands_or_is_said(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nforgeflow runs\n```\n\n    forgeflow run --preset tiny\n\n"
        "```sh\nforgeflow run --preset tiny --dry-run \\\n  --set steps=3\n```\n\n"
        "    make test\n\n    a = b + c\n\n```python\nforgeflow = 1\n```\n\n"
        "<!-- shell: elsewhere, needs a GPU -->\n\n    forgeflow run --preset gsm8k-8b\n"
        "\nand\n\n```sh\ntimeout 9 forgeflow run --preset tiny\n```\n\nor\n\n    make server   # its address\n"
    )
    blocks = shell_blocks(page)
    wheres = ["short", "long", "short", "ci", "elsewhere", "long", "elsewhere"]
    assert [block.where for block in blocks] == wheres
    assert [block.reason for block in blocks] == [
        *[""] * 4, "needs a GPU", "", "runs until it is stopped",
    ]  # fmt: skip
    assert [block.line for block in blocks] == [2, 5, 8, 12, 22, 27, 32]


@pytest.mark.parametrize("comment", ["elsewhere", "short, why", "sometimes"])
def test_a_comment_that_says_nothing_known_is_an_error(tmp_path: Path, comment: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- shell: {comment} -->\n\n    make demo\n")
    with pytest.raises(ValueError, match=r"page\.md"):
        shell_blocks(page)


def test_here_documents_are_no_commands() -> None:
    text = "cat > a.py <<'EOF'\nforgeflow run\nEOF\nforgeflow runs  # all\n"
    assert commands(text) == [["cat", ">", "a.py", "<<EOF"], ["forgeflow", "runs"]]
