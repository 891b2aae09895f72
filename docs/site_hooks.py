"""What the docs' site adds to the pages: files beside docs/ that pages link to, and a table of the records.

Pages link to source files as a forge shows them (`../examples/own_loop.py`). The site has no such files, so each
one becomes a page of its own, and a folder a page that lists its files. A link to what does not exist stays as it
is, which the strict build refuses.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "records"

_LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
# A forge shows a folder's README.md where a link names the folder.
_FOLDER = re.compile(r"\]\(((?:\.\./)?(?:records|adr|algorithms))/?\)")
_LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".txt": "text", "": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to."""
    for file in list(files.documentation_pages()):
        if file.generated_by is None:
            for match in _LINK.finditer(file.content_string):
                source = _outside(file.src_uri, match["path"])
                page = _page_of(source) if source else ""
                if source and files.get_file_from_path(page) is None:
                    added = File.generated(
                        config, page, content=_content(source), inclusion=InclusionLevel.NOT_IN_NAV
                    )
                    files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at those pages, and list the records on theirs."""

    def pointed(match: re.Match[str]) -> str:
        source = _outside(page.file.src_uri, match["path"])
        if source is None:
            return match[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(_page_of(source), here)})"

    if page.file.src_uri == "records/README.md":
        markdown += "\n" + _records()
    return _FOLDER.sub(r"](\1/README.md)", _LINK.sub(pointed, markdown))


def _outside(page: str, target: str) -> str | None:
    """The path in the repository that a link of a page means; none if it lies in docs/ or does not exist."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    is_outside = not path.startswith(("docs/", "..")) and (ROOT / path).exists()
    return path if is_outside else None


def _page_of(source: str) -> str:
    return f"source/{source.removesuffix('.md')}.md"


def _content(source: str) -> str:
    path = ROOT / source
    if path.is_dir():
        names = sorted(
            child.name for child in path.iterdir() if not child.name.startswith(("_", "."))
        )
        return f"# {source}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return text
    return f"# {source}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def _records() -> str:
    """A table of what was measured, by whom it can be measured again, and the commit that it was measured on."""
    rows = ["| record | made by | commit | promise |", "|---|---|---|---|"]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        met = {True: "met", False: "missed", None: ""}[record["result"].get("met")]
        commit = str(record["commit"])[:8]
        rows.append(f"| [{path.stem}]({path.name}) | `{record['command']}` | {commit} | {met} |")
    return "\n".join(rows) + "\n"
