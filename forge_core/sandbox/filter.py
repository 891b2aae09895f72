"""System calls that a program in the sandbox may not make, and the filter that refuses them."""

from __future__ import annotations

import os
import struct

from forge_core.sandbox.outcome import SandboxRefused

# They give memory that no limit counts, or reach into the kernel's depths.
_DENIED = {
    "x86_64": {
        "shmget": 29, "ptrace": 101, "syslog": 103, "mount": 165, "swapon": 167, "reboot": 169, "init_module": 175,
        "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256, "mq_open": 240, "unshare": 272,
        "perf_event_open": 298, "fanotify_init": 300, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
        "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
    },
    "aarch64": {
        "shmget": 194, "ptrace": 117, "syslog": 116, "mount": 40, "swapon": 224, "reboot": 142, "init_module": 105,
        "add_key": 217, "request_key": 218, "keyctl": 219, "migrate_pages": 238, "mq_open": 180, "unshare": 97,
        "perf_event_open": 241, "fanotify_init": 262, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
        "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
    },
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _AT_LEAST, _GIVE = 0x20, 0x15, 0x35, 0x06
_KILL, _ALLOW, _NOT_PERMITTED = 0x80000000, 0x7FFF0000, 0x00050000 | 1


def call_filter() -> bytes:
    """Classic BPF over architecture and number of each call, for seccomp(2).

    Raises SandboxRefused on a machine whose calls are not known here.
    """
    machine = os.uname().machine
    if machine not in _DENIED:
        raise SandboxRefused(
            f"the sandbox knows the system calls of {' and '.join(_DENIED)}, and this is {machine}: run it there"
        )
    lines = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_GIVE, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":  # the x32 forms of its calls have numbers of their own
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_GIVE, 0, 0, _KILL)]
    for number in _DENIED[machine].values():
        lines += [(_EQUAL, 0, 1, number), (_GIVE, 0, 0, _NOT_PERMITTED)]
    lines.append((_GIVE, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
