"""Monarch's jobs, as a config asks for them. Submitting, waiting and cancelling is Monarch's."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from forge_core.config import HostsConfig


def make_job(hosts: HostsConfig, name: str) -> Any:
    """The Monarch job of a source that starts its hosts, all of them in a mesh of this name, which nobody else uses.

    Monarch and the scheduler's client are imported here. Raises RuntimeError if the latter is missing.
    """
    return {"slurm": _slurm_job, "kubernetes": _kubernetes_job}[hosts.source](hosts, name)


def _slurm_job(hosts: HostsConfig, name: str) -> Any:
    from monarch.job import SlurmJob

    slurm = hosts.slurm
    return SlurmJob(
        {name: hosts.number},
        python_exe=sys.executable,
        slurm_args=slurm.arguments,
        monarch_port=hosts.port,
        job_name=name,
        time_limit=slurm.time_limit,
        partition=slurm.partition,
        log_dir=str(Path(slurm.log_folder).absolute()),
        exclusive=slurm.exclusive,
        gpus_per_node=slurm.gpus_per_node,
        cpus_per_task=slurm.cpus_per_task,
        mem=slurm.memory,
        job_start_timeout=math.ceil(hosts.start_seconds),
        account=slurm.account,
        qos=slurm.qos,
    )


def _kubernetes_job(hosts: HostsConfig, name: str) -> Any:
    from monarch.job.kubernetes import ImageSpec, KubeConfig, KubernetesJob

    pods = hosts.kubernetes
    assert pods.image is not None, "the config has seen to it"
    resources: dict[str, str | int] = {"cpu": pods.cores_per_pod, "memory": pods.memory}
    if pods.gpus_per_pod:
        resources["nvidia.com/gpu"] = pods.gpus_per_pod
    job = KubernetesJob(
        pods.namespace,
        timeout=math.ceil(hosts.start_seconds),
        kubeconfig=KubeConfig.from_path(pods.kubeconfig) if pods.kubeconfig else None,
    )
    job.add_mesh(
        name,
        hosts.number,
        image_spec=ImageSpec(
            pods.image, resources=resources, shared_memory_size=pods.shared_memory
        ),
        port=hosts.port,
    )
    return job
