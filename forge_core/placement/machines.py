"""The hosts of a run, opened: this machine and, where the config says so, others that Monarch attaches to.

    workers that run already ──┐
    a Slurm job ───────────────┼──▶ attached ──▶ each tells what it has ──▶ … ──▶ released
    pods of Kubernetes ────────┘

What the run itself asked a scheduler for ends with it; workers that ran before go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_core.config import HostsConfig
from forge_core.placement.hosts import Host, this_machine
from forge_core.placement.jobs import make_job

logger = logging.getLogger(__name__)

_RELEASE_SECONDS = 10.0


class HostsUnfit(ValueError):
    """The hosts are not what the run needs; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Where processes may be started."""

    hosts: tuple[Host, ...]
    """What each has; this machine is the first."""
    meshes: dict[str, Any]
    """By the name of a host, its Monarch host mesh; this machine has none here."""
    folder: Path | None
    """On each of the others, a folder of the run's own; None without any."""


@asynccontextmanager
async def open_machines(config: HostsConfig, paths: Sequence[str]) -> AsyncIterator[Machines]:
    """Attach to a run's hosts, and let go of them on leaving, come what may.

    Call it before anything else of Monarch's. `paths` must exist on every host, as they do here. Raises HostsUnfit, and
    OSError if the hosts do not answer within `start_seconds`.
    """
    if not config.are_elsewhere:
        yield Machines(hosts=(this_machine(),), meshes={}, folder=None)
        return
    # Deferred: it is an actor.
    from forge_core.actors.host import HostAgent

    folder = Path(config.folder) / f"forgeflow-{secrets.token_hex(8)}"
    names = tuple(_name(config, index) for index in range(config.count))
    async with _attached(config) as mesh:
        processes = mesh.spawn_procs(per_host={"procs": 1}, name="hosts")
        agents = processes.spawn("hosts", HostAgent, names, str(folder))
        try:
            yield Machines(
                hosts=(this_machine(), *await _look(config, agents, names, paths)),
                meshes={name: mesh.slice(hosts=i) for i, name in enumerate(names)},
                folder=folder,
            )
        finally:
            with _bearing("remove their folders"):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await agents.leave.call()
            with _bearing("stop"):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await processes.stop("run ended")


@asynccontextmanager
async def _attached(config: HostsConfig) -> AsyncIterator[Any]:
    """The Monarch mesh of all hosts."""
    from monarch.actor import attach_to_workers, enable_transport

    if config.source == "workers":
        # What is not loopback is of the user's choice; an address by itself listens nowhere else.
        enable_transport(f"tcp://{config.address}:0")
        yield attach_to_workers(
            ca="trust_all_connections", workers=config.workers, name="forgeflow"
        )
        return
    name = f"forgeflow{secrets.token_hex(4)}"
    job = make_job(config, name)
    submitted = _in_thread(job.apply)
    try:
        try:
            await asyncio.shield(submitted)
            # Its cache would be a pickle.
            state = await _in_thread(functools.partial(job.state, cached_path=None))
        except RuntimeError as error:
            raise OSError(f"hosts.source {config.source!r}: {error}") from error
        yield getattr(state, name)
    finally:
        with _bearing("go back to their scheduler"):
            async with asyncio.timeout(_RELEASE_SECONDS):
                # What is being submitted has no number yet by which it could be cancelled.
                await asyncio.wait({submitted})
                await _in_thread(job.kill)


def _in_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """What a function will return that may block for as long as a queue takes; the program can end meanwhile."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def tell(result: Any, error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(result)

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=work, daemon=True).start()
    return done


async def _look(
    config: HostsConfig, agents: Any, names: Sequence[str], paths: Sequence[str]
) -> list[Host]:
    """What each host has. Raises HostsUnfit and TimeoutError."""
    try:
        async with asyncio.timeout(config.start_seconds):
            reports = list((await agents.look.call(tuple(paths))).values())
    except TimeoutError:
        raise TimeoutError(
            f"the hosts {', '.join(names)} did not all answer within hosts.start_seconds {config.start_seconds:g}"
        ) from None
    for report in reports:
        if report.missing:
            raise HostsUnfit(
                f"{report.host.name} does not see {report.missing[0]}: keep it on a file system that all hosts share, "
                "and the store there or on S3"
            )
    return [report.host for report in reports]


def _name(config: HostsConfig, index: int) -> str:
    if config.source == "workers":
        return f"host {config.workers[index]}"
    return f"{config.source} host {index}"


@contextmanager
def _bearing(doing: str) -> Iterator[None]:
    """One thing of the end, whose failure must not keep the others."""
    try:
        yield
    except Exception as error:
        logger.warning("the hosts did not %s in order: %r", doing, error)
