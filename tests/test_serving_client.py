"""The inference service as a client: a real one on the CPU, and servers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import PROJECT_ROOT
from held_client import HeldClient
from recorded_rows import read_plain

from workloads.common import client
from workloads.common.errors import GpuUnavailableError, JobFailedError, OutOfGpuMemoryError
from workloads.inference import api_key, inference_server, load_test, serving_client
from workloads.inference.load_generator import RECORD_FIELDS, Measured, Report
from workloads.inference.serving_client import HeldServer

SCRIPT = "workloads/inference/serving_client.py"
KEY = "0123456789abcdef.serving"
SMALLEST = ("--model", "resnet18", "--weights", "none", "--device", "cpu", "--max-batch", "2")
# Events as a server writes them; `%s` is what it does after the commands.
PRETENDED = """
import json, os, sys, time
path = sys.argv[sys.argv.index("--events") + 1]
def tell(event, **fields):
    with open(path, "a") as file:
        file.write(json.dumps({"event": event, **fields}) + "\\n")
tell("loaded", startup_seconds=0.1)
sys.stdin.readline()
tell("ready", identity={"pid": os.getpid(), "port": 1})
%s
"""


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_service_is_one_client_with_the_servers_identity_and_a_load_without_pauses(
    tmp_path: Path,
) -> None:
    flags = (*SMALLEST, "--rate", "20", "--duration", "1.5")
    with HeldClient(tmp_path, SCRIPT, *flags) as client:
        identity = client.start_working()
        server = identity["pid"]
        assert parent_of(server) == client.process.pid
        assert (identity["device"], identity["model"]) == ("cpu", "resnet18")
        jobs = client.wait_for("job", 2)
        client.say("stop")
        assert client.exit_code() == 0
        assert not is_running(server)
        units = client.events("units")
        assert {unit["kind"] for unit in units if unit["latency"]} == {"request"}
        assert client.events("done")[0]["host_cpu_seconds"] > 1
    starts = sorted(start for unit in units for start in unit["start_seconds"])
    first = [s for s in starts if s < jobs[0]["end_seconds"]]
    second = [s for s in starts if jobs[1]["start_seconds"] <= s < jobs[1]["end_seconds"]]
    assert len(first) == pytest.approx(30, abs=18)
    assert len(second) == pytest.approx(30, abs=18)
    # Twenty a second come on average; a pause for the answers would begin the draw anew.
    assert second != pytest.approx([s + jobs[1]["start_seconds"] - starts[0] for s in first])
    assert jobs[1]["figures"]["request_rate"] == 20


def test_with_a_key_in_the_environment_the_server_wants_it_and_the_job_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(api_key.VARIABLE, KEY)
    with HeldClient(tmp_path, SCRIPT, *SMALLEST, "--rate", "20", "--duration", "1") as client:
        url = f"http://127.0.0.1:{client.start_working()['port']}"
        assert requests.get(f"{url}/stats", timeout=10).status_code == 401
        (job,) = client.wait_for("job", 1)[:1]
        client.say("stop")
        assert client.exit_code() == 0
    assert job["figures"]["successful_requests"] > 0
    assert job["figures"]["failed_requests"] == 0  # as one without the key is
    assert all(KEY.encode() not in file.read_bytes() for file in files_below(tmp_path))


def run_alone(folder: Path, **environment: str) -> None:
    """Run the suite with the service alone, into ``folder``/alone."""
    plan = folder / "service.toml"
    arguments = json.dumps([*SMALLEST[:4], "--max-batch", "2", "--duration", "1"])
    plan.write_text(f'[[client]]\nworkload = "serving"\narguments = {arguments}\n')
    done = subprocess.run(
        (sys.executable, str(PROJECT_ROOT / "benchmarking" / "benchmark_suite.py"), "--mode",
         "exclusive", "--device", "cpu", "--plan", str(plan), "--results-dir", str(folder),
         "--run-id", "alone"),
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "terminal.txt").write_text(done.stdout + done.stderr)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_suites_runs_never_hold_the_key_that_their_server_wants(tmp_path: Path) -> None:
    run_alone(tmp_path, **{api_key.VARIABLE: KEY})
    names = {path.name for path in files_below(tmp_path)}
    assert {"manifest.json", "records.jsonl", "terminal.txt"} <= names
    assert all(KEY.encode() not in file.read_bytes() for file in files_below(tmp_path))
    (record,) = read_plain(tmp_path / "alone").client_records
    assert record["units"]["request"]["count"] > 0
    assert record["status"] == "ok"


def test_alone_the_suite_measures_the_capacity_and_offers_half_of_it(tmp_path: Path) -> None:
    run_alone(tmp_path)
    (record,) = read_plain(tmp_path / "alone").client_records
    figures = record["figures"]
    assert figures["request_rate"] == pytest.approx(figures["closed_loop_capacity"] / 2, rel=0.01)
    assert figures["slo_ms"] == 100
    assert len(record["latency_ms"]) == record["units"]["request"]["count"] > 0


def flags_of(monkeypatch: pytest.MonkeyPatch, *arguments: str, cores: int = 16):
    monkeypatch.setattr(sys, "argv", ["serving_client.py", *arguments])
    monkeypatch.setattr(inference_server, "usable_cores", lambda: cores)
    return serving_client.parse_arguments()


@pytest.mark.parametrize(
    ("arguments", "cores", "workers"),
    [((), 16, 4), ((), 12, 3), ((), 2, 2), ((), 64, 4), (("--workers", "7"), 16, 7),
     (("--frontends", "3"), 16, 3), (("--frontends", "0"), 16, 1)],
)  # fmt: skip
def test_the_server_gets_a_worker_for_every_four_cores_or_as_many_as_asked(
    arguments, cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags_of(monkeypatch, *arguments, cores=cores)
    assert f"--workers={workers}" in serving_client.ServingClient(args)._server_arguments()


def test_each_client_of_one_seed_has_arrivals_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for index in ("0", "1", "0"):
        job = serving_client.ServingClient(flags_of(monkeypatch, "--client-index", index))
        job._identity, job._rate = {"port": 1}, 50.0
        users = job._make_users()
        assert users.args.upload == "raw"
        drawn.append(users.intended_offsets())
    assert (drawn[0] == drawn[2]).all()
    assert not np.isin(drawn[0], drawn[1]).any()


class Stopped:
    """Stands for a recorder that is told to stop, and keeps the units."""

    stop_requested = True

    def __init__(self) -> None:
        self.units: list[tuple[str, float, float]] = []

    def unit(self, kind: str, start: float, end: float, *, latency: bool = False) -> None:
        self.units.append((kind, start, end))

    def check_stop(self) -> None:
        raise client.StopRequested


class Answering:
    """Stands for a load generator that has these answers when it is stopped."""

    def __init__(self, answers: np.ndarray) -> None:
        self._answers = answers

    def stop(self) -> list[Report]:
        return [Report(0, self._answers, 0.0, 0)]

    def measured(self) -> Measured:
        return Measured(self._answers, [0.0], 0)


def test_a_stop_counts_what_is_past_its_bound_without_an_answer_as_missed() -> None:
    begin = time.monotonic() - 10
    users = load_test.LoadTest(load_test.parse_arguments(["--rate", "1", "--slo-ms", "2000"]))
    # Due after 1, 5, 7 and 9.5 s: answered, failed, and not yet answered, which the last may be.
    users._start_seconds, users._offsets = begin, np.array([1.0, 5.0, 7.0, 9.5])
    rows = [
        (begin + due, begin, begin + due, begin + due + 0.1, failure)
        for due, failure in ((1, ""), (5, "timeout"))
    ]
    users._generator = Answering(np.array(rows, dtype=RECORD_FIELDS))
    recorder = Stopped()
    with pytest.raises(client.StopRequested):
        users.collect(recorder)
    kinds = [(kind, round(start - begin, 3)) for kind, start, _ in recorder.units]
    assert kinds == [("request", 1), ("missed_request", 5), ("missed_request", 7)]
    assert recorder.units[2][1] == recorder.units[2][2]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let a few lines of Python stand for the server from its readiness on."""

    def start(then: str) -> tuple[HeldServer, int]:
        script = tmp_path / "server.py"
        script.write_text(PRETENDED % then)
        monkeypatch.setattr(serving_client, "SERVER", script)
        server = HeldServer([])
        server.wait_until_loaded()
        return server, server.start_serving()["pid"]

    return start


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, JobFailedError), (3, GpuUnavailableError), (12, OutOfGpuMemoryError)],
)
def test_a_server_that_ends_by_itself_is_told_by_its_kind(pretend, code: int, kind: type) -> None:
    server, _ = pretend(
        f"sys.stdin.readline(); tell('error', status='x', message='the card is gone')\n"
        f"sys.exit({code})"
    )
    deadline = time.monotonic() + 10
    with pytest.raises(kind, match="the card is gone"):
        while time.monotonic() < deadline:
            server.require_alive()
            time.sleep(0.02)
    server.stop()


def test_a_server_is_asked_to_stop_before_it_is_told(pretend) -> None:
    server, _ = pretend("assert sys.stdin.read() == 'go\\n'; tell('done', peak_memory_mib=7)")
    server.stop()
    server.stop()
    assert server.peak_memory_mib == 7


def test_a_server_that_does_not_stop_is_terminated_and_at_last_killed(
    pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_client, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(serving_client, "TERMINATE_SECONDS", 0.3)
    server, pid = pretend(
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: tell('done', peak_memory_mib=3))\n"
        "while True: time.sleep(0.05)"
    )
    server.stop()
    assert server.peak_memory_mib == 3
    assert not is_running(pid)
