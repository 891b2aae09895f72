"""One engine on several processes, which share its model by attention heads.

    leader (rank 0)                                    followers (ranks 1 …)
    LLMEngine: requests, scheduler                     ── none ──
    LeadingExecutor ── method, arguments ─────────────▶ Follower.serve()
    worker ◀═════════ the model's collectives ════════▶ worker

Only the leader has requests and decides what is computed next, so that nothing has to be the same by luck: clocks, the
order in which tools answer, a user's own code. An endpoint is called on all processes at once. While the leader works,
the followers serve it, until it says that it is done; between two calls they wait for nobody.

A method that fails in one process may leave the others in a collective for ever. Whoever has failed waits a moment for
the others to fail as well, as they do of the same cause; if they do not, it ends its process, and with it the replica.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from forge_core.actors.membership import Membership

logger = logging.getLogger(__name__)

_AGREE_TIMEOUT = timedelta(seconds=20)
# Followers wait for as long as an episode waits for its tools; who gives up on the leader is the controller.
_IDLE_TIMEOUT = timedelta(days=30)
_SHARED_MEMORY = Path("/dev/shm")
_LEADER = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """A method that every worker is to run."""

    method: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gathers: bool = False
    """Whether the leader wants what each of them gave."""


class Channel:
    """By which the leader tells the followers what to run. Made by all of them, once their workers have met."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._commands = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        self._failures = dist.new_group(backend="gloo", timeout=_AGREE_TIMEOUT)
        self._unlink_shared_memory()

    def send(self, command: _Command | None) -> None:
        """Tell the followers; None ends their `serve`."""
        dist.broadcast_object_list([command], src=_LEADER, group=self._commands)

    def receive(self) -> _Command | None:
        """What the leader sends next."""
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=_LEADER, group=self._commands)
        return received[0]

    def gather(self, result: Any) -> list[Any]:
        """What each process gave, by rank; collective."""
        results = [None] * self._membership.num_ranks
        dist.all_gather_object(results, result, group=self._commands)
        return results

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if any has an error: its own, or OSError; collective."""
        failed = self.gather(error is not None)
        if any(failed):
            raise error or OSError("another process of the replica failed")

    def fail(self, error: Exception) -> None:
        """Return if the others fail as well, and end this process if they do not."""
        try:
            dist.barrier(group=self._failures)
        except RuntimeError:
            logger.critical(
                "rank %d failed alone, and its replica with it",
                self._membership.rank,
                exc_info=error,
            )
            os._exit(1)

    def _unlink_shared_memory(self) -> None:
        """Take the names from the memory that vLLM's collectives share, so that none outlives a killed process."""
        name = Path(self._membership.rendezvous).name
        for file in _SHARED_MEMORY.glob(f"{name}-*_{self._membership.rank}"):
            file.unlink(missing_ok=True)


class LeadingExecutor(UniProcExecutor):
    """Runs a method in the worker of this process and in those of all followers."""

    membership: Membership
    """Set by `leading`."""
    channel: Channel | None = None
    """Of the class that `leading` gave: who has that may end what the followers serve even if there is no engine."""

    def _init_executor(self) -> None:
        super()._init_executor()
        type(self).channel = Channel(self.membership)

    def _distributed_args(self) -> tuple[str, int, int]:
        return self.membership.init_method, _LEADER, _LEADER

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """See vLLM's Executor."""
        assert isinstance(method, str), "followers know methods by name"
        assert self.channel is not None
        gathers = not single_value
        assert not (gathers and non_block), "what is gathered is waited for"
        self.channel.send(_Command(method=method, args=args, kwargs=kwargs or {}, gathers=gathers))
        try:
            result = super().collective_rpc(
                method, timeout, args, kwargs, non_block=False, single_value=True
            )
        except Exception as error:
            self.channel.fail(error)
            raise
        if gathers:
            return self.channel.gather(result)
        return _done(result) if non_block else result


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def leading(membership: Membership) -> type[LeadingExecutor]:
    """The executor of the engine that this process leads."""
    return type("Leading", (LeadingExecutor,), {"membership": membership})


class Follower:
    """A worker of the engine that another process leads."""

    def __init__(self, arguments: dict[str, Any], membership: Membership) -> None:
        """Start the worker, load its share of the model, and serve the leader until its engine stands."""
        config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
        self._worker = WorkerWrapperBase(rpc_rank=0, global_rank=membership.rank)
        self._worker.init_worker(
            [
                {
                    "vllm_config": config,
                    "local_rank": membership.rank,
                    "rank": membership.rank,
                    "distributed_init_method": membership.init_method,
                    "is_driver_worker": False,
                    "shared_worker_lock": get_context("fork").Lock(),
                }
            ]
        )
        self._worker.init_device()
        self._worker.load_model()
        current_platform.update_block_size_for_backend(config)
        self.channel = Channel(membership)
        self.serve()

    def serve(self) -> None:
        """Run what the leader sends, until it is done. Raises what a method raised, if it did so everywhere."""
        while (command := self.channel.receive()) is not None:
            try:
                result = run_method(
                    self._worker, command.method, tuple(command.args), dict(command.kwargs)
                )
            except Exception as error:
                self.channel.fail(error)
                self._skip()
                raise
            if command.gathers:
                self.channel.gather(result)

    def _skip(self) -> None:
        """The leader has failed of the same; what it still sends, until it is done, is for nobody."""
        while self.channel.receive() is not None:
            pass
