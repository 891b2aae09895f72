"""The machines that generators and trainer lie on, where that is not the one that runs the controller."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from forge_core.config.base import Section

_WORD = re.compile(r"[\w.,:+@%/-]+")
_DURATION = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_SIZE = re.compile(r"\d+([KMGT]|[KMGT]i)?")
_OPTION = re.compile(r"--[a-z-]+(=[\w.,:+@%/-]+)?")
_WORKER = re.compile(r"([\w<>-]+@)?(tcp://(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+|ipc://[\w./-]+)")


def _checked(
    pattern: re.Pattern[str], example: str, value: str | None, info: ValidationInfo
) -> str | None:
    # They become lines of a script that a shell runs.
    if value is not None and not pattern.fullmatch(value):
        raise ValueError(f"{info.field_name} {value!r} is not of the form {example}")
    return value


class SlurmConfig(Section):
    """A Slurm job whose nodes are the hosts, with `hosts.source = "slurm"`; submitted by the run and cancelled at its
    end."""

    time_limit: str = "24:00:00"
    """Longest time that the job may take, as Slurm writes it: it also ends what a killed controller leaves."""
    partition: str | None = None
    """Partition; none: the cluster's default, here and below."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of each node."""
    cpus_per_task: int | None = Field(None, ge=1)
    """Cores of each node."""
    memory: str | None = None
    """Memory of each node, such as `64G`."""
    exclusive: bool = True
    """Whether no other job may share the nodes."""
    arguments: list[str] = Field([])
    """Further options of `sbatch`, such as `--constraint=a100`."""
    log_folder: str = "."
    """Where the job's output goes, on a file system that the nodes share."""

    @field_validator("partition", "account", "qos", "log_folder")
    @classmethod
    def _is_a_word(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked(_WORD, "a single word", value, info)

    @field_validator("time_limit")
    @classmethod
    def _is_a_duration(cls, value: str, info: ValidationInfo) -> str | None:
        return _checked(_DURATION, "hours:minutes:seconds", value, info)

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked(_SIZE, "64G", value, info)

    @field_validator("arguments")
    @classmethod
    def _are_options(cls, value: list[str], info: ValidationInfo) -> list[str]:
        for option in value:
            _checked(_OPTION, "--name=value", option, info)
        return value


class KubernetesConfig(Section):
    """Pods that are the hosts, with `hosts.source = "kubernetes"`: a MonarchMesh of Monarch's operator, made by the run
    and deleted at its end."""

    namespace: str = "default"
    """Namespace of the pods."""
    image: str | None = None
    """Image that holds this program, installed as on this machine."""
    gpus_per_pod: int = Field(0, ge=0)
    """GPUs of each pod."""
    cores_per_pod: int = Field(8, ge=1)
    """Cores of each pod."""
    memory: str = "64Gi"
    """Memory of each pod."""
    shared_memory: str = "8Gi"
    """Size of `/dev/shm` in each pod, through which the processes of a mesh speak to each other."""
    kubeconfig: str | None = None
    """File that says how the cluster is reached from outside; none: the run itself is in a pod of it."""

    @field_validator("namespace", "image")
    @classmethod
    def _is_a_word(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _checked(_WORD, "a single word", value, info)

    @field_validator("memory", "shared_memory")
    @classmethod
    def _is_a_size(cls, value: str, info: ValidationInfo) -> str | None:
        return _checked(_SIZE, "64Gi", value, info)


class HostsConfig(Section):
    """The machines that generators and trainer lie on; controller, verifier and weight store stay on this one."""

    source: Literal["this_machine", "workers", "slurm", "kubernetes"] = "this_machine"
    """Where they come from: `this_machine` has everything; `workers` run already and are attached to; `slurm` and
    `kubernetes` give them for the time of the run."""
    workers: list[str] = Field([])
    """Addresses of the workers that run already, such as `tcp://10.0.0.7:22222`."""
    number: int = Field(1, ge=1, le=4096)
    """Nodes or pods that are asked for."""
    port: int = Field(22222, ge=1, le=65535)
    """Port of the workers that Slurm or Kubernetes start."""
    address: str = "127.0.0.1"
    """Address of this machine at which attached workers reach it; everything that listens on it runs what it is sent,
    so let it be one of a private network."""
    folder: str = "/tmp"
    """Folder of each host, for files by which its processes meet; a folder of the run's own is made in it and removed
    at the end."""
    start_seconds: float = Field(600.0, gt=0.0)
    """Until the hosts are there and have answered; a queue may take long."""
    slurm: SlurmConfig = SlurmConfig()
    """A job."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Pods."""

    @property
    def are_elsewhere(self) -> bool:
        """Whether generators and trainer do not lie on this machine by themselves."""
        return self.source != "this_machine"

    @property
    def count(self) -> int:
        """How many there are."""
        return {"this_machine": 1, "workers": len(self.workers)}.get(self.source, self.number)

    @field_validator("workers")
    @classmethod
    def _are_addresses(cls, value: list[str], info: ValidationInfo) -> list[str]:
        for worker in value:
            _checked(_WORKER, "tcp://address:port", worker, info)
        if len(set(value)) < len(value):
            raise ValueError("workers names one twice: name each once")
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.source == "workers" and not self.workers:
            raise ValueError('source "workers" attaches to none: list their addresses in workers')
        if self.source != "workers" and self.workers:
            raise ValueError(
                f'workers are listed and source {self.source!r} does not attach to them: set source to "workers"'
            )
        if self.source == "kubernetes" and self.kubernetes.image is None:
            raise ValueError(
                'source "kubernetes" needs an image for its pods: set kubernetes.image'
            )
        return self
