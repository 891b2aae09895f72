"""Which of an engine's processes this one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Which of an engine's processes this one is."""

    rank: int
    """Number of the process."""
    num_ranks: int
    """How many there are."""
    rendezvous: str
    """File at which they meet, with a name that no other engine of the machine has."""

    @property
    def init_method(self) -> str:
        """As torch.distributed wants it. By file: a TCP store would listen on every address of the machine."""
        return f"file://{self.rendezvous}"
