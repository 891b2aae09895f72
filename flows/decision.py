"""An experiment's decision, for people."""

from __future__ import annotations

from storage.promotions import Decision


def decision_sentence(decision: Decision) -> str:
    """What became of the experiment, and why."""
    verdict = "promoted" if decision.promoted else "declined"
    return f"{decision.checkpoint.reference} {verdict}: {decision.reason}"


def decision_markdown(decision: Decision) -> str:
    """The same as a page of Prefect's."""
    verdict = "Promoted" if decision.promoted else "Declined"
    lines = [
        f"# {verdict}: {decision.checkpoint.reference}",
        "",
        f"{decision.reason[:1].upper()}{decision.reason[1:]}.",
        "",
        f"Decision {decision.number} of line `{decision.line}`.",
    ]
    if (compared := decision.comparison) is not None:
        lines += [
            "",
            "| | candidate | promoted before | gain | interval |",
            "|---|---|---|---|---|",
            f"| score, {compared.score} | {compared.candidate:.4f} | {compared.baseline:.4f} | {compared.gain:+.4f} "
            f"| {compared.low:+.4f} to {compared.high:+.4f} |",
        ]
    return "\n".join(lines)
