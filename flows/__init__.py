"""Flows and the command line: what happens, and in which order.

Importing any module here loads neither torch, vllm, transformers nor monarch; what needs them
imports them where it runs. `run` is the Python call; docs/api.md has all of it on one page.
"""

from __future__ import annotations

from flows.api import RunFailed, run

__all__ = ["RunFailed", "run"]
