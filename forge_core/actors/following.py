"""The generator's endpoints in a process that does not lead its engine: serve the one that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from forge_core.actors.membership import Membership
from forge_core.actors.messages import AdvanceRequest
from forge_core.config import RunConfig
from forge_core.weights import store
from forge_core.weights.manifest import Manifest

if TYPE_CHECKING:
    from forge_core.actors.tensor_parallel import Follower


async def fetch_together(
    manifest: Manifest, agree: Callable[[Exception | None], None], *, timeout_seconds: float
) -> dict[str, torch.Tensor]:
    """A version's tensors, once every process of the replica has them; `agree` raises in all of them if one has not.

    Raises what `store.get_tensors` raises.
    """
    tensors, error = None, None
    try:
        tensors = await store.get_tensors(manifest, timeout_seconds=timeout_seconds)
    except Exception as caught:
        error = caught
    agree(error)
    assert tensors is not None
    return tensors


class Following:
    """What a process other than the first of a replica does while the first is called."""

    def __init__(self, config: RunConfig, membership: Membership) -> None:
        self._config = config
        self._membership = membership
        self._follower: Follower
        self._policy_version = -1

    def load(self, model_dir: str) -> None:
        """Start the worker; harmless to repeat."""
        # Deferred: they bring vLLM.
        from forge_core.actors.engine_arguments import engine_arguments
        from forge_core.actors.tensor_parallel import Follower

        if not hasattr(self, "_follower"):
            self._follower = Follower(engine_arguments(model_dir, self._config), self._membership)

    def serve(self) -> None:
        """Compute what the leader tells, until it is done; nothing before anything is loaded."""
        if hasattr(self, "_follower"):
            self._follower.serve()

    async def load_version(self, manifest: Manifest) -> None:
        """Fetch a version's weights, for this process's share of the model. Raises as the leader does."""
        from forge_core.weights import transfer

        try:
            tensors = await fetch_together(
                manifest,
                self._follower.channel.agree,
                timeout_seconds=self._config.timeouts.call_seconds,
            )
            transfer.stage(manifest.policy_version, tensors)
            self._policy_version = manifest.policy_version
        finally:
            self.serve()

    async def advance(self, request: AdvanceRequest) -> None:
        """As `serve`, with new weights first where the leader fetches them."""
        manifest = request.manifest
        if manifest is not None and manifest.policy_version != self._policy_version:
            await self.load_version(manifest)
        else:
            self.serve()
