"""A page as a browser sees it: console, requests, width, picture. Needs Chromium, which no package of Python brings."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=10000", "--enable-logging=stderr",
)  # fmt: skip
_FRAME = """<!DOCTYPE html>
<body style="margin:0">
<iframe id="f" src="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<script>
document.getElementById("f").onload = event => {{
  const page = event.target.contentDocument;
  const charts = [...page.querySelectorAll(".plotly-graph-div")];
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    charts: charts.length,
    drawn: charts.filter(chart => chart.querySelector(".main-svg")).length,
    requests: event.target.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
  }});
}};
</script>"""


def find_browser() -> str:
    """Path of Chromium. Raises RuntimeError if there is none."""
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise RuntimeError(f"none of {', '.join(_NAMES)} is on the PATH: install Chromium")


def look_at(
    page: Path, width: int, picture: Path | None = None, height: int = 900
) -> dict[str, Any]:
    """What a page does at a width in pixels: lines on the console, addresses asked for, its own width, its charts."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(page=page.absolute().as_uri(), width=width))
        seen = _browse(
            folder,
            "--allow-file-access-from-files", "--dump-dom", f"--window-size={width},{height}",
            frame.as_uri(),
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", seen.stdout, re.DOTALL)
        if title is None:
            raise RuntimeError(f"{page} was not loaded: {seen.stderr[-2000:]}")
        told = json.loads(html.unescape(title.group(1)))
        if picture is not None:
            _browse(
                folder, f"--screenshot={picture}", f"--window-size={width},{height}",
                page.absolute().as_uri(),
            )  # fmt: skip
    console = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    return {"console": console, **told}


def _browse(profile: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_browser(), *_QUIET, f"--user-data-dir={profile}/profile", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
