"""The sandbox from within: `python -I -S launcher.py FD`, with requests and answers on the socket FD.

A script of its own that imports only the standard library, so that it starts at once. It runs as three processes: the
launcher, which makes the namespaces and waits; init, process 1 in them, which builds the file system and watches; and
the program, which starts with no rights. Whatever fails before the program starts is one line on the error stream.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time

# Not imported from `typing`, which takes longer than the rest of this to start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 19,
)  # fmt: skip
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SYS_MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = 442, 0x8000, -100
ATTR_RDONLY, ATTR_NOSUID = 1, 2
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
LOOK_SECONDS = 0.02
DEVICES = ("null", "zero", "full", "random", "urandom")
FOLDER = "/tmp"
ENVIRONMENT = {
    "HOME": FOLDER,
    "TMPDIR": FOLDER,
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    # What it does is to follow from what it is, so that its score does.
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel refuses something that the isolation is made of."""


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    try:
        with control.makefile("rb") as lines:
            request = json.loads(lines.readline())
        if request["drops_to_nobody"]:
            os.setgroups([])
        _unshare()
        _die_with(request["parent"])
        control.sendall(b"u")
        if control.recv(1) != b"m":
            return
        _launch(control, request)
    except (Refused, OSError) as error:
        sys.exit(str(error))


def _unshare() -> None:
    if libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS):
        error = os.strerror(ctypes.get_errno())
        raise Refused(
            f"the kernel makes no namespaces for this user ({error}): allow user namespaces, on which the settings "
            "kernel.unprivileged_userns_clone and user.max_user_namespaces, AppArmor, or a container's seccomp profile "
            "decide"
        )


def _launch(control: socket.socket, request: dict[str, Any]) -> None:
    """Start init, end it when the asker says so or is gone, and pass on what it told when all is over."""
    reading, writing = os.pipe()
    launcher = os.getpid()
    init = os.fork()
    if init == 0:
        code = 1
        try:
            os.close(reading)
            _init(control, writing, request, launcher)
            code = 0
        except (Refused, OSError) as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writing)
    for stream in (1, 2):
        os.close(stream)
    ended = os.pidfd_open(init)
    ready, _, _ = select.select([ended, control.fileno()], [], [])
    is_ended = ended in ready
    if not is_ended:
        os.kill(init, signal.SIGKILL)
    # Returns once every process in the namespace is gone: the kernel ends them before their init.
    os.waitpid(init, 0)
    with os.fdopen(reading, "rb") as told:
        answer = told.read()
    if not answer and not is_ended:
        answer = _answer("output", "was ended", None, 0.0, 0.0, 0)
    control.sendall(answer)


def _init(control: socket.socket, telling: int, request: dict[str, Any], launcher: int) -> None:
    _die_with(0)  # the launcher lies in a namespace in which init cannot see it
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    _isolate(request)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    reading, writing = os.pipe()
    program = os.fork()
    if program == 0:
        _become_program(request, writing)
    os.close(writing)
    with os.fdopen(reading) as failing:
        # Closed by its start: what is read is why there was none.
        if failure := failing.read():
            raise Refused(f"the program cannot be started: {failure}")
    control.sendall(b"s")
    control.close()
    os.write(telling, _watch(program, request["limits"], time.monotonic()))


def _watch(program: int, limits: dict[str, Any], started: float) -> bytes:
    """Wait for the program's end, or for it to use too much; how it ended."""
    most = 0
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_SECONDS)
        code = None
        memory, cpu = _used()
        most = max(most, memory)
        while code is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == program:
                code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        used = (seconds, max(cpu, _used()[1]), most)
        if code is not None:
            if code == 0:
                return _answer("ok", "", 0, *used)
            if code > 0:
                return _answer("exit", f"ended with exit code {code}", code, *used)
            return _answer("signal", f"was ended by {signal.Signals(-code).name}", code, *used)
        if memory > limits["memory_bytes"]:
            return _answer(
                "memory", f"used more than {limits['memory_bytes']} bytes of memory", None, *used
            )
        if used[1] > limits["cpu_seconds"]:
            return _answer(
                "cpu", f"used more than {limits['cpu_seconds']:g} s of processor time", None, *used
            )
        if seconds > limits["seconds"]:
            return _answer("timeout", f"ran for more than {limits['seconds']:g} s", None, *used)


def _used() -> tuple[int, float]:
    """Resident memory in bytes and processor time in seconds of all processes but init, those that ended included."""
    page, ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    memory, cpu = 0, ended.ru_utime + ended.ru_stime
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            with open(f"/proc/{name}/statm", "rb") as file:
                _, resident, shared = map(int, file.read().split()[:3])
        except OSError:  # it ended meanwhile
            continue
        memory += (resident - shared) * page
        # Its own, and its children's that it has waited for.
        cpu += sum(map(int, fields[11:15])) / ticks
    return memory, cpu


def _answer(
    verdict: str, reason: str, code: int | None, seconds: float, cpu: float, memory: int
) -> bytes:
    return json.dumps(
        {
            "verdict": verdict,
            "reason": reason,
            "exit_code": code,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "memory_bytes": memory,
        }
    ).encode()


def _isolate(request: dict[str, Any]) -> None:
    """Leave of the file system what a Python program reads, and one folder that it may write."""
    limits = request["limits"]
    _mount(None, "/", None, MS_REC | MS_SLAVE)
    _mount("tmpfs", FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.chdir(FOLDER)
    os.mkdir("old")
    if libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"old"):
        raise Refused(f"the kernel does not change the root: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")
    # No user namespace within, in which it would have rights again.
    with open("/old/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    shown = [*request["prefixes"], "/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"]
    shown = [os.path.normpath(path) for path in shown]
    os.mkdir(FOLDER)
    # Before what is shown: an environment may lie below the folder, and would be hidden by it.
    taken = sum(path.count("/") - 1 for path in shown if path.startswith(FOLDER + "/"))
    room = f"size={limits['folder_bytes']},nr_inodes={limits['folder_files'] + 1 + taken},mode=1777"
    _mount("tmpfs", FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, room)
    for path in shown:
        _show(path)
    os.mkdir("/dev")
    for device in DEVICES:
        _bind(f"/old/dev/{device}", f"/dev/{device}", 0)
    os.symlink(FOLDER, "/dev/shm")
    os.mkdir("/proc")
    _mount(
        "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid,hidepid=invisible"
    )
    for name in ("program", "stdin"):
        path = "/program.py" if name == "program" else "/stdin"
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(request[name])
    if libc.umount2(b"/old", MNT_DETACH):
        raise Refused(f"the kernel keeps the old root: {os.strerror(ctypes.get_errno())}")
    os.rmdir("/old")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show(path: str) -> None:
    """Have a path of the old file system in the new one, read-only; links as links."""
    old = "/old" + path
    if os.path.lexists(path) or not os.path.lexists(old):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
    else:
        _bind(old, path, ATTR_RDONLY | ATTR_NOSUID)


def _bind(source: str, target: str, attributes: int) -> None:
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, None, MS_BIND | MS_REC)
    if attributes:
        given = struct.pack("QQQQ", attributes, 0, 0, 0)
        if libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, given, len(given)
        ):
            raise Refused(
                f"the kernel does not make {target} read-only: {os.strerror(ctypes.get_errno())}"
            )


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    if libc.mount(*given, ctypes.c_ulong(flags), options.encode()):
        error = os.strerror(ctypes.get_errno())
        raise Refused(f"the kernel does not mount {kind or source or 'anew'} at {target}: {error}")


def _become_program(request: dict[str, Any], failing: int) -> None:
    """Give up every right, and be the program; or write why not."""
    try:
        limits = request["limits"]
        os.chdir(FOLDER)
        os.setsid()
        os.dup2(os.open("/stdin", os.O_RDONLY), 0)
        supervisors = 0
        if request["drops_to_nobody"]:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        else:
            supervisors = 2  # launcher and init are of the same user
        _limit(limits, supervisors)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _deny_calls(bytes.fromhex(request["filter"]))
        flags = ["-s", "-P", "-B"] + ([] if request["packages"] else ["-S"])
        os.execve(
            request["interpreter"],
            [request["interpreter"], *flags, "/program.py"],
            ENVIRONMENT,
        )
    except BaseException as error:
        os.write(failing, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(127)


def _limit(limits: dict[str, Any], supervisors: int) -> None:
    cpu = int(limits["cpu_seconds"]) + 1
    for which, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NPROC, limits["processes"] + supervisors),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_FSIZE, limits["folder_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(which, (value, value))


def _deny_calls(code: bytes) -> None:
    """Refuse some system calls from here on, by a filter of classic BPF (seccomp(2))."""
    buffer = ctypes.create_string_buffer(code)
    # struct sock_fprog: how many lines of eight bytes, padded, and where.
    filters = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _call("prctl", PR_SET_SECCOMP, 2, ctypes.c_char_p(filters), 0, 0)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, `parent`."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the asker is gone")


def _call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments):
        raise Refused(f"the kernel refuses {name}{arguments}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
