"""A worker: makes the machine that it runs on a host that runs can attach to, until it is ended.

    python -m forge_core.placement.worker tcp://10.0.0.7:22222

It has no authentication: whoever reaches the address runs code here. What is hidden from it (`CUDA_VISIBLE_DEVICES`,
`taskset`) is hidden from the runs.
"""

from __future__ import annotations

import sys

from forge_core.process_environment import prepare_for_monarch


def main() -> None:
    """Serve at the address that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("name the address to listen on, such as tcp://10.0.0.7:22222")
    prepare_for_monarch()
    # Deferred: it reads the environment when it is imported.
    from monarch.actor import run_worker_loop_forever

    run_worker_loop_forever(address=sys.argv[1], ca="trust_all_connections")


if __name__ == "__main__":
    main()
