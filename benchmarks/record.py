"""A dated JSON record of a measurement, with the commit and the machine it was made on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.provenance import git_commit, versions

FOLDER = Path(__file__).parents[1] / "docs" / "records"


def write_record(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write `docs/records/<name>-<date>.json`; a later record of the same day replaces the earlier one."""
    now = datetime.now(UTC)
    record = {
        "name": name,
        "command": command,
        "at": now.isoformat(timespec="seconds"),
        "commit": git_commit(),
        "uncommitted_changes": _uncommitted(),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "versions": versions(),
        },
        "result": result,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path


def _uncommitted() -> bool:
    result = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return result.returncode != 0 or bool(result.stdout.strip())
