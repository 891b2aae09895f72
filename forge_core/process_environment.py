"""What Monarch and the processes of meshes run with."""

from __future__ import annotations

import os
from collections.abc import Sequence

MONARCH_ENVIRONMENT = {
    "HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "500ms",
    # On a busy machine a process may take long to tell how it is; that it hangs is found out by its heartbeats.
    "HYPERACTOR_MESH_GET_ACTOR_STATE_MAX_IDLE": "60s",
    "HYPERACTOR_MESH_GET_PROC_STATE_MAX_IDLE": "60s",
    # How long a process waits before it takes a controller that is silent for dead, and ends: workers on other hosts
    # have nothing else that ends them, and on a busy machine a controller that lives can be silent for seconds.
    "HYPERACTOR_MESH_ORPHAN_TIMEOUT": "30s",
    # Monarch's own log, in a folder of the user's that all its programs share, would grow with every run.
    "MONARCH_FILE_LOG": "error",
    # TorchStore would set it, and say so on stdout.
    "HYPERACTOR_CODEC_MAX_FRAME_LENGTH": "910737418240",
}
"""Read by Monarch once, when it is imported: how soon dead, frozen and lost processes are noticed."""


def prepare_for_monarch() -> None:
    """Give Monarch, where it is not imported yet, what it runs with; what the user set stays."""
    for variable, value in MONARCH_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


PROCESS_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    # glog's warnings on the machine's memory layout are of no use to a reader.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""What every process of a mesh runs with. Waiting threads sleep: a spinning neighbour slows a two-thread step many
times over."""


def process_environment(threads: int, gpus: Sequence[str] = ()) -> dict[str, str]:
    """Variables of a process with so many threads that sees only the GPUs that are named."""
    return {
        **PROCESS_ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
