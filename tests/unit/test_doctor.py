"""`forgeflow doctor`: each line is good or says what mends it, and the exit code is 1 if any does."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import prefect
import pytest
from typer.testing import CliRunner

from flows import doctor_checks as checks
from flows.cli import app
from flows.doctor_engine import judge_parity
from forge_core.placement.memory import GIB
from forge_core.settings import load_config

TINY = load_config(preset="tiny", file=None, overrides=[])


class Version(BaseHTTPRequestHandler):
    """A server that says what version it is, or asks who wants to know."""

    said = (200, b'"0.0.1"')

    def do_GET(self) -> None:
        assert self.path == "/api/admin/version"
        code, body = self.said
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Version)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    yield url
    server.shutdown()
    server.server_close()


def server_finding() -> checks.Finding:
    (finding,) = checks.prefect_server()
    return finding


def test_another_version_of_the_server_is_told(address: str) -> None:
    finding = server_finding()
    assert not finding.good and finding.mend == "install the same version of prefect for both"
    assert (
        finding.told == f"{address} is version 0.0.1, and the client here is {prefect.__version__}"
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ((200, f'"{prefect.__version__}"'.encode()), "as the client"),
        ((401, b""), "asks for credentials before it tells its version"),
    ],
)
def test_a_fitting_server_is_good(
    address: str, monkeypatch: pytest.MonkeyPatch, said: tuple[int, bytes], told: str
) -> None:
    monkeypatch.setattr(Version, "said", said)
    finding = server_finding()
    assert finding.good and finding.told.endswith(told)


@pytest.mark.parametrize("said", [(404, b""), (200, b"<html>")])
def test_what_is_no_prefect_server_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch, said: tuple[int, bytes]
) -> None:
    monkeypatch.setattr(Version, "said", said)
    finding = server_finding()
    assert not finding.good and finding.told.startswith(f"{address} does not answer")


def test_no_server_is_good_and_one_that_is_gone_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert server_finding().good
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert "unset PREFECT_API_URL" in str(server_finding().mend)


def test_packages_that_are_missing_old_or_broken_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version, code in (("old", "1.0", ""), ("broken", "2.0", "raise ImportError('no')")):
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    own = tmp_path / "asking-1.0.dist-info"
    own.mkdir()
    asked = "Requires-Dist: old>=2\nRequires-Dist: broken>=2\n"
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: asking\nVersion: 1.0\n{asked}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checks, "_SELF", "asking")
    monkeypatch.setattr(checks, "_PACKAGES", {"old": "old", "broken": "broken", "gone": "gone"})
    old, broken, gone = checks.packages()
    assert not any(each.good for each in (old, broken, gone))
    assert old.told == "1.0, and asking asks for >=2"
    assert broken.told == "2.0 cannot be imported: ImportError: no"
    assert gone.told == "not installed"
    assert all("make setup" in str(each.mend) for each in (old, broken, gone))


def test_too_little_of_anything_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = load_config(preset="gsm8k-8b", file=None, overrides=[])
    store = str(tmp_path)
    (devices,) = checks.devices(large, store)
    assert not devices.good and devices.mend
    assert all(each.good for each in checks.needs(TINY, store) if each.name != "free memory")
    told = {each.name: each for each in checks.needs(large, store)}
    assert told["this machine's memory"].mend or told["the store's disk"].mend

    class Full:
        available, total = GIB // 4, 64 * GIB

    monkeypatch.setattr(checks.psutil, "virtual_memory", Full)
    free = next(each for each in checks.needs(TINY, store) if each.name == "free memory")
    assert not free.good and str(free.mend).startswith("end what else runs")


def test_a_gap_between_engine_and_trainer_is_told() -> None:
    bounds = TINY.parity
    good = {
        "parity": {"max": bounds.max_max / 2, "mean": bounds.max_mean / 2},
        "status": "finished",
    }
    assert judge_parity(good).good
    assert not judge_parity({**good, "status": "failed"}).good
    wide = judge_parity({**good, "parity": {"max": bounds.max_max * 2, "mean": 0.0}})
    assert not wide.good and "are allowed" in wide.told
    failed = judge_parity({"status": "failed", "reason": "no engine", "parity": {"max": None}})
    assert failed.told == "did not serve: no engine"


def test_the_command_says_so_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(checks, "_PACKAGES", {"pyarrow": "pyarrow"})
    file = tmp_path / "file"
    file.write_text("")
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", "--no-engine", "--store", str(file), "--json"])
    document = json.loads(done.output)
    assert done.exit_code == 1 and document["ok"] is False
    store = next(each for each in document["findings"] if each["name"] == "store")
    assert store["good"] is False and store["mend"]
    done = runner.invoke(app, ["doctor", "--store", str(file)])
    assert done.exit_code == 1
    assert "mend  engine: not started, for something before it is wrong" in done.output
    done = runner.invoke(app, ["doctor", "--preset", "nothing"])
    assert done.exit_code == 2
