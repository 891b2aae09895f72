"""What becomes of a fault that Monarch reports to this process.

Every dead process is reported once for each mesh of actors on it, after its callers were told. Without a hook the first
report would end this process. With it,

    a mesh that a run or service watches  its policy decides; the report is only logged
    Monarch's own mesh for logs           goes with its process, whose other meshes are reported as well
    any other mesh                        nobody handles it: `dying_loudly` ends with UnhandledFault
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

logger = logging.getLogger(__name__)

_LOGS = "logger"


class UnhandledFault(RuntimeError):
    """A process died that no service watches, and whose mesh nobody declared to handle."""


class _Handled:
    """Names of the meshes whose faults a policy handles; read by Monarch's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def add(self, *names: str) -> None:
        with self._lock:
            self._names.update(name.lower() for name in names)

    def __contains__(self, mesh_name: str) -> bool:
        # Monarch puts the name that the mesh was spawned with in lower case and adds an id, TorchStore one before.
        whole = mesh_name.lower()
        name = whole.rpartition("-")[0] or whole
        with self._lock:
            return not self._names.isdisjoint((whole, name, name.rpartition("_")[0]))


_handled = _Handled()


def handle_faults_of(*names: str) -> None:
    """Say that faults of actor meshes spawned with these names are somebody's to handle.

    For good: a mesh that was stopped may be reported seconds later.
    """
    _handled.add(*names)


def install_fault_hook() -> None:
    """Have Monarch report faults here, outside `dying_loudly` for the log only. Harmless if repeated."""
    import monarch.actor

    if getattr(monarch.actor.unhandled_fault_hook, "__module__", None) != __name__:
        monarch.actor.unhandled_fault_hook = _log_fault


@asynccontextmanager
async def dying_loudly() -> AsyncIterator[None]:
    """Cancel the body at the first fault that nobody handles, and raise UnhandledFault in its stead.

    Whatever the body opened is closed in order on the way out, so that no process is left.
    """
    import monarch.actor

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    report: list[str] = []
    is_inside = True

    def cancel(told: str) -> None:
        if is_inside and not report:
            report.append(told)
            task.cancel()

    def hook(fault: Any) -> None:
        # On a thread of Monarch's.
        if not _is_handled(fault):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(cancel, _told(fault))

    before = monarch.actor.unhandled_fault_hook
    monarch.actor.unhandled_fault_hook = hook
    try:
        yield
    except asyncio.CancelledError:
        if not report or task.uncancel() > 0:
            raise
        raise UnhandledFault(report[0]) from None
    finally:
        is_inside = False
        monarch.actor.unhandled_fault_hook = before


def _log_fault(fault: Any) -> None:
    if not _is_handled(fault):
        logger.error("a fault that nobody handles: %s", _told(fault))


def _is_handled(fault: Any) -> bool:
    is_handled = fault.mesh_name in _handled
    if is_handled:
        logger.info("a fault that is handled: %s", _told(fault))
    return is_handled or fault.mesh_name.startswith(f"{_LOGS}-")


def _told(fault: Any) -> str:
    return f"mesh {fault.mesh_name}: {' '.join(fault.report().split())[:500]}"
