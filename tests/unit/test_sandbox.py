"""Programs that mean harm: each is stopped, told apart, and leaves no process and no file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from forge_core.sandbox import Limits, SandboxRefused, check_sandbox, run_program
from forge_core.sandbox import runner as runner_module

SMALL = Limits(
    seconds=60.0, cpu_seconds=5.0, memory_bytes=128 * 2**20, processes=8, folder_bytes=2**20,
    folder_files=20, output_bytes=2**16,
)  # fmt: skip


def _left_behind() -> list[str]:
    """Descendants of this process."""
    return [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = sorted(os.listdir(tempfile.gettempdir()))
    yield
    assert not _left_behind()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("sandboxed")]
    new = set(os.listdir(tempfile.gettempdir())) - set(before)
    assert not [name for name in new if name.startswith(("sandboxed", "program"))]


def _source(text: str) -> str:
    return textwrap.dedent(text)


def test_a_program_reads_its_input_writes_its_output_and_knows_nothing_else() -> None:
    os.environ["A_SECRET"] = "of ours"
    outcome = run_program(
        _source("""
            import json, os, sys
            print(json.dumps([
                input(), sorted(os.environ), os.getcwd(), os.listdir("."), os.path.exists("/etc/passwd"),
                os.path.exists("/home"), os.listdir("/proc"), hash("fixed"),
            ]))
            print("complaint", file=sys.stderr)
        """),
        stdin="line ü\n",
    )
    assert outcome.verdict == "ok" and outcome.exit_code == 0 and not outcome.reason
    assert outcome.stderr == b"complaint\n"
    text = outcome.stdout.decode()
    assert (
        '["line \\u00fc"' in text and "A_SECRET" not in text and '"/tmp", [], false, false' in text
    )
    again = run_program("print(hash('fixed'))").stdout.decode().strip()
    assert text.strip().endswith(f"{again}]")


@pytest.mark.parametrize(
    ("program", "verdict", "reason"),
    [
        ("raise SystemExit(3)", "exit", "ended with exit code 3"),
        ("1 / 0", "exit", "ended with exit code 1"),
        ("import os; os.abort()", "signal", "was ended by SIGABRT"),
        ("import time; time.sleep(60)", "timeout", "ran for more than 1 s"),
        ("while True: pass", "cpu", "used more than 0.5 s of processor time"),
        ("print('x' * 100_000)", "output", "wrote more than 65536 bytes"),
        ("import sys\nwhile True: print('x' * 999, file=sys.stderr)", "output", "wrote more"),
        ("x = bytearray(2**30)", "memory", "was refused more than"),
        (
            # Each within its own bound, and touched only once all are there.
            """
            import os, time
            for _ in range(4):
                if os.fork() == 0:
                    x = bytearray(60 * 2**20)
                    for i in range(0, len(x), 4096): x[i] = 1
                    time.sleep(60)
            time.sleep(60)
            """,
            "memory",
            "used more than 134217728 bytes of memory",
        ),
    ],
)  # fmt: skip
def test_each_end_is_told_apart(program: str, verdict: str, reason: str) -> None:
    limits = Limits(
        seconds=1.0 if verdict == "timeout" else 60.0, cpu_seconds=0.5 if verdict == "cpu" else 10.0,
        memory_bytes=SMALL.memory_bytes, output_bytes=SMALL.output_bytes,
    )  # fmt: skip
    outcome = run_program(_source(program), limits=limits)
    assert (outcome.verdict, outcome.reason[: len(reason)]) == (verdict, reason), outcome
    assert len(outcome.stdout) + len(outcome.stderr) <= limits.output_bytes
    assert (outcome.exit_code is None) == (verdict not in ("exit", "signal"))


def test_a_fork_bomb_stays_small_and_ends() -> None:
    """Its processes leave the session, ignore every signal that they may, and fork on."""
    bomb = """
        import os, signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True:
            try:
                if os.fork() == 0: os.setsid()
            except OSError: print("full", flush=True)
    """
    most, is_over = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not is_over.wait(0.05):
            most = max(most, len(_left_behind()))

    watching = threading.Thread(target=count)
    watching.start()
    try:
        limits = Limits(cpu_seconds=1.0, processes=8, output_bytes=2**30)
        outcome = run_program(_source(bomb), limits=limits)
    finally:
        is_over.set()
        watching.join()
    assert outcome.verdict == "cpu" and b"full" in outcome.stdout
    assert most <= 8 + 2  # with launcher and init


def test_there_is_no_network() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server:
        outcome = run_program(
            _source(f"""
                import socket
                for address in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53)):
                    try:
                        socket.create_connection(address, timeout=2)
                        print("connected")
                    except OSError as error:
                        print("refused", error.errno)
                print(sorted(name for _, name in socket.if_nameindex()))
            """)
        )
    assert outcome.stdout.count(b"refused") == 2 and b"['lo']" in outcome.stdout, outcome


def test_only_its_folder_can_be_written_and_only_so_far() -> None:
    outcome = run_program(
        _source("""
            import os, sys
            for path in ("/x", "/program.py", "/stdin", "/usr/x", sys.prefix + "/x", os.__file__, "/dev/x", "/proc/x"):
                try:
                    open(path, "a")
                    print("wrote", path)
                except OSError: pass
            for path in ("/usr", sys.prefix):
                try:
                    os.chmod(path, 0o777)
                    print("changed", path)
                except OSError: pass
            open("sandboxed", "w").write("mine")
            try:
                for n in range(100): open(f"sandboxed-{n}", "w")
                print("too many")
            except OSError: print("files end")
            try:
                open("sandboxed", "wb").write(bytes(2**21))
                print("too much")
            except OSError: print("bytes end")
        """),
        limits=SMALL,
    )
    assert outcome.stdout.decode().split("\n") == ["files end", "bytes end", ""], outcome


def test_signals_reach_nobody() -> None:
    """Neither the parent, nor this process, nor all that there are."""
    outcome = run_program(
        _source(f"""
            import os, signal
            for pid in (os.getppid(), {os.getpid()}, -1):
                for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
                    try: os.kill(pid, number)
                    except (ProcessLookupError, PermissionError): pass
            print("done")
        """)
    )
    assert (outcome.verdict, outcome.stdout) == ("ok", b"done\n"), outcome


def test_rights_cannot_be_had_again_nor_memory_that_nobody_counts() -> None:
    outcome = run_program(
        _source("""
            import ctypes, os
            libc = ctypes.CDLL(None, use_errno=True)
            NEWUSER, SIGCHLD, CLONE = 0x10000000, 17, {"x86_64": 56, "aarch64": 220}[os.uname().machine]
            print(libc.unshare(NEWUSER), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
            print(libc.syscall(CLONE, NEWUSER | SIGCHLD, 0, 0, 0, 0))
            print(libc.shmget(0, 2**20, 0o1600), libc.memfd_create(b"sandboxed", 0))
            print(libc.ptrace(16, os.getppid(), 0, 0))
            with open("/proc/self/status") as file:
                print([line.split()[1] for line in file if line.startswith(("CapEff", "CapPrm", "NoNewPrivs"))])
        """)
    )
    assert outcome.stdout.decode().split("\n") == [
        "-1 -1", "-1", "-1 -1", "-1", "['0000000000000000', '0000000000000000', '1']", "",
    ], outcome  # fmt: skip


def test_packages_only_where_they_are_asked_for() -> None:
    assert run_program("import numpy").exit_code == 1
    outcome = run_program("import numpy; print(numpy.arange(3).sum())", packages=True)
    assert outcome.stdout == b"3\n", outcome


def test_many_programs_in_a_row_leave_nothing() -> None:
    """Four at a time, of every kind. (A proof runs a thousand.)"""
    kinds = ["print({n})", "raise SystemExit({n} % 3)", "import os; os.fork(); print({n})"]
    programs = [kinds[n % 3].format(n=n) for n in range(24)]
    open_files = psutil.Process().num_fds()
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda text: run_program(text, limits=SMALL), programs))
    for n, outcome in enumerate(outcomes):
        if n % 3 == 1:
            assert (outcome.verdict, outcome.exit_code) == (("exit", n % 3) if n % 3 else ("ok", 0))
        else:
            assert outcome.verdict == "ok" and str(n).encode() in outcome.stdout, outcome
    assert psutil.Process().num_fds() == open_files


def test_it_dies_with_the_process_that_asked() -> None:
    """Killed with SIGKILL in the midst of a program, as a verifier may be."""
    program = "from forge_core.sandbox import run_program; run_program('while True: pass')"
    asker = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 30
        running: list[psutil.Process] = []
        while len(running) < 3:
            assert time.monotonic() < deadline
            running = psutil.Process(asker.pid).children(recursive=True)
    finally:
        asker.kill()
        asker.wait(10)
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive


def test_one_whose_launcher_is_killed_has_no_outcome() -> None:
    def kill() -> None:
        # Once there are three: launcher, init and program.
        while len(started := psutil.Process().children(recursive=True)) < 3:
            time.sleep(0.01)
        psutil.Process().children()[0].kill()
        killed.extend(started)

    killed: list[psutil.Process] = []
    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(SandboxRefused, match="ended before it told"):
        run_program("import time; time.sleep(60)")
    killing.join()
    _, alive = psutil.wait_procs(killed, timeout=10)
    assert not alive


def test_it_runs_for_a_user_without_rights() -> None:
    """With a copy of the code and a Python that such a user can read: root's may lie where nobody else looks."""
    if os.geteuid() != 0:
        return  # every other test has just shown it
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = Path(folder) / "forge_core" / "sandbox"
        shutil.copytree(Path(runner_module.__file__).parent, copy)
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        need = (
            "import dataclasses, os, selectors, sys\n"
            "assert sys.version_info >= (3, 11) and os.access(sys.executable, os.X_OK)"
        )
        pythons = [sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"]
        python = next(
            each
            for each in pythons
            if os.path.exists(each)
            and subprocess.run([*as_nobody, each, "-c", need], capture_output=True).returncode == 0
        )
        program = _source("""
            from forge_core.sandbox import run_program, Limits
            bomb = '''
            import os
            for n in range(100):
                if os.fork() == 0: os.read(os.pipe()[0], 1)
                print(n, flush=True)
            '''.replace(" " * 12, "")
            print(run_program("import os; print(os.getuid())").stdout)
            print(run_program(bomb, limits=Limits(processes=5)).stdout)
        """)
        done = subprocess.run(
            [*as_nobody, python, "-c", program], cwd=folder, capture_output=True, text=True
        )
    assert done.stdout.splitlines() == [r"b'65534\n'", r"b'0\n1\n2\n3\n'"], done


def test_other_machines_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    system, node, _, *rest = os.uname()
    older = os.uname_result((system, node, "5.4.0-generic", *rest))
    other = os.uname_result((system, node, "6.1.0", rest[0], "riscv64"))
    for told, words in (
        (older, r"Linux 5\.4\.0.*take Linux 5\.14 or newer"),
        (other, "x86_64 and aarch64, and this is riscv64"),
    ):
        with monkeypatch.context() as patched, pytest.raises(SandboxRefused, match=words):
            patched.setattr(os, "uname", lambda told=told: told)
            check_sandbox()


def test_what_is_refused_is_one_sentence_and_no_outcome(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner_module, "_LAUNCHER", tmp_path / "missing.py")
    with pytest.raises(SandboxRefused, match="can't open file"):
        check_sandbox()
    monkeypatch.undo()
    # A kernel that makes no more namespaces; then root in a namespace of its own.
    for prepare, words in (
        (
            "open('/proc/sys/user/max_user_namespaces', 'w').write('0')",
            "makes no namespaces for this user (No space left on device): allow user namespaces",
        ),
        ("pass", "this is root within a user namespace of its own"),
    ):
        inner = tmp_path / "inner.py"
        inner.write_text(
            "from forge_core.sandbox import check_sandbox, SandboxRefused, runner\n"
            f"{prepare}\n"
            f"{'runner._is_root = lambda: False' if prepare != 'pass' else ''}\n"
            "try: check_sandbox()\n"
            "except SandboxRefused as error: print(error)\n"
        )
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", sys.executable, str(inner)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if os.geteuid() != 0 and prepare == "pass":
            continue  # somebody else is counted there
        assert words in done.stdout and len(done.stdout.splitlines()) == 1, (words, done)
