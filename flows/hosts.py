"""What can be known of a run's hosts before it attaches to them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket

from forge_core.config import HostsConfig

_CONNECT_SECONDS = 3.0
_TCP = re.compile(r"tcp://\[?(?P<address>[^\]]+)\]?:(?P<port>\d+)$")
_SLURM_COMMANDS = ("sbatch", "squeue", "scancel")


def check_hosts(hosts: HostsConfig) -> None:
    """Refuse workers that do not answer, and a scheduler that cannot be asked from here. Raises ValueError."""
    match hosts.source:
        case "workers":
            for worker in hosts.workers:
                _check_answers(worker)
        case "slurm":
            for command in _SLURM_COMMANDS:
                if shutil.which(command) is None:
                    raise ValueError(
                        f"hosts.source 'slurm' needs Slurm's {command}, which is not on the PATH: start the run on a "
                        "machine that submits jobs"
                    )
        case "kubernetes":
            if importlib.util.find_spec("kubernetes") is None:
                raise ValueError(
                    "hosts.source 'kubernetes' needs the Python package kubernetes, which is not installed: "
                    "pip install 'forgeflow[kubernetes]'"
                )


def describe_hosts(hosts: HostsConfig) -> list[str]:
    """A line for each host, or for all that a scheduler will give."""
    match hosts.source:
        case "workers":
            return list(hosts.workers)
        case "slurm":
            return [f"{hosts.number} nodes of Slurm, at most {hosts.slurm.time_limit}"]
        case "kubernetes":
            return [
                f"{hosts.number} pods of {hosts.kubernetes.image} in {hosts.kubernetes.namespace}"
            ]
    return []


def _check_answers(worker: str) -> None:
    address = _TCP.search(worker)
    if address is None:  # a socket of this machine
        return
    try:
        socket.create_connection(
            (address["address"], int(address["port"])), _CONNECT_SECONDS
        ).close()
    except OSError as error:
        raise ValueError(
            f"hosts.workers {worker} does not answer ({error.strerror or error}): start it there with "
            f"`python -m forge_core.placement.worker {worker}`"
        ) from None
