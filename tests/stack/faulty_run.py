"""`forgeflow`, with one failure planted in each of four stages: every one fails once, in a step of its own."""

from __future__ import annotations

from typing import Any

import tasks.batches
from flows.cli import main
from forge_core.mesh import Mesh, MeshCall

FAILS_AT_CALL = {"generate": 1, "advance": 4, "score": 4, "train": 2}
"""Which call of an endpoint fails, from 1. The verifier scores once per replica and evaluation, and once per part."""
BUFFER_FAILS_AT = 3


def main_with_faults() -> None:
    """Fail after the work is done for generate, advance and train, before it for score and buffer."""
    calls: dict[str, int] = {}
    true_call, true_read = Mesh.call, tasks.batches.read_committed

    async def call(self: Mesh, endpoint: str, *args: Any, **how: Any) -> list[Any]:
        calls[endpoint] = calls.get(endpoint, 0) + 1
        fails = calls[endpoint] == FAILS_AT_CALL.get(endpoint)
        if fails and endpoint == "score":
            raise MeshCall("planted: the verifier is gone")
        answers = await true_call(self, endpoint, *args, **how)
        if fails:
            raise MeshCall(f"planted: the answer of {endpoint} was lost")
        return answers

    def read_committed(*args: Any, **kwargs: Any) -> Any:
        calls["buffer"] = calls.get("buffer", 0) + 1
        if calls["buffer"] == BUFFER_FAILS_AT:
            raise OSError("planted: the store did not answer")
        return true_read(*args, **kwargs)

    Mesh.call = call  # type: ignore[method-assign]
    tasks.batches.read_committed = read_committed
    main()


if __name__ == "__main__":
    main_with_faults()
