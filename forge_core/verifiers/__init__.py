"""Verifiers: what scores responses, made from the config.

`make_panel` gives what a run's config says: its `verifiers`, its `reward`, or its environment's own scorer;
`make_evaluating_panel` what scores held-out answers, if that is something else.
"""

from __future__ import annotations

from forge_core.verifiers.base import Response, Verifier
from forge_core.verifiers.ensemble import EnsembleVerifier
from forge_core.verifiers.making import make_evaluating_panel, make_panel
from forge_core.verifiers.panel import Panel, Score, Scored

__all__ = [
    "EnsembleVerifier",
    "Panel",
    "Response",
    "Score",
    "Scored",
    "Verifier",
    "make_evaluating_panel",
    "make_panel",
]
