"""Whether the process that holds a run still lives, which the run's log cannot know."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import psutil

from storage.records import Controller, Incarnation

_CLOCK_SECONDS = 1.0
"""How far a process's start time, counted in ticks since boot, may be off."""


def true_status(status: str, incarnations: Sequence[Incarnation]) -> str:
    """The status of a run; 'interrupted' where the log says 'running' and its controller is gone.

    Of a controller on another host nothing can be told, and the log is believed.
    """
    if status != "running" or not incarnations:
        return status
    controller = incarnations[-1].controller
    if controller.host != socket.gethostname() or _is_alive(controller):
        return status
    return "interrupted"


def _is_alive(controller: Controller) -> bool:
    try:
        process = psutil.Process(controller.pid)
        # A process that began later has only inherited the number.
        began_before = process.create_time() <= controller.claimed_at + _CLOCK_SECONDS
        return began_before and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
