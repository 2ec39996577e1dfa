"""The inference service as a client: by hand, held, and under the suite."""

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
from server_process import STUB

from workloads.common import client
from workloads.inference import api_key, inference_server, load_test, serving_client
from workloads.inference.load_generator import RECORD_FIELDS, Measured

SCRIPT = "workloads/inference/serving_client.py"
KEY = "0123456789abcdef.serving"
SMALLEST = ("--model", "resnet18", "--weights", "none", "--device", "cpu", "--max-batch", "2")


def service(folder: Path, *flags: str) -> HeldClient:
    """Return the service with a stub model, held."""
    return HeldClient(folder, "tests/stub_server.py", "serving", *SMALLEST, *flags)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_service_is_one_client_that_holds_its_key_and_whose_load_never_pauses(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(api_key.VARIABLE, KEY)
    with service(tmp_path, "--rate", "20", "--duration", "1.5") as held:
        identity = held.start_working()
        assert identity["pid"] == held.process.pid
        assert (identity["device"], identity["model"]) == ("cpu", "resnet18")
        url = f"http://127.0.0.1:{identity['port']}"
        assert requests.get(f"{url}/stats", timeout=10).status_code == 401
        jobs = held.wait_for("job", 2)
        held.say("stop")
        assert held.exit_code() == 0
        units = held.events("units")
        assert held.events("done")[0]["host_cpu_seconds"] > 0.5
    assert {(unit["kind"], unit["latency"]) for unit in units} == {("request", True)}
    starts = sorted(start for unit in units for start in unit["start_seconds"])
    first = [s for s in starts if s < jobs[0]["end_seconds"]]
    second = [s for s in starts if jobs[1]["start_seconds"] <= s < jobs[1]["end_seconds"]]
    assert len(first) == pytest.approx(30, abs=18) and len(second) == pytest.approx(30, abs=18)
    # Twenty a second come on average; a pause for the answers would begin the draw anew.
    assert second != pytest.approx([s + jobs[1]["start_seconds"] - starts[0] for s in first])
    figures = jobs[1]["figures"]
    assert figures["request_rate"] == 20 and figures["offered_rate"] == pytest.approx(20, abs=12)
    assert figures["successful_requests"] > 0 == figures["failed_requests"]
    assert all(KEY.encode() not in file.read_bytes() for file in files_below(tmp_path))


def test_under_the_suite_the_capacity_is_measured_half_is_offered_and_no_key_is_kept(tmp_path):
    plan = tmp_path / "service.toml"
    arguments = json.dumps([*SMALLEST[:4], "--max-batch", "2", "--duration", "2"])
    plan.write_text(f'[[client]]\nworkload = "serving"\narguments = {arguments}\n')
    done = subprocess.run(
        (sys.executable, str(PROJECT_ROOT / "benchmarking" / "benchmark_suite.py"), "--mode",
         "exclusive", "--device", "cpu", "--plan", str(plan), "--results-dir", str(tmp_path),
         "--run-id", "alone"),
        env={**os.environ, api_key.VARIABLE: KEY}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert {"manifest.json", "records.jsonl"} <= {path.name for path in files_below(tmp_path)}
    assert all(KEY.encode() not in file.read_bytes() for file in files_below(tmp_path))
    (record,) = read_plain(tmp_path / "alone").client_records
    figures = record["figures"]
    assert (record["status"], figures["slo_ms"]) == ("ok", 100)
    assert figures["request_rate"] == pytest.approx(figures["closed_loop_capacity"] / 2, rel=0.01)
    assert len(record["latency_ms"]) == record["units"]["request"]["count"] > 0


def test_by_hand_the_summary_has_the_capacity_and_only_the_result_is_written(tmp_path):
    done = subprocess.run(
        (sys.executable, str(STUB), "serving", *SMALLEST, "--duration", "1", "--results-dir",
         str(tmp_path)), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "half of the capacity of" in done.stdout and "Within 100 ms" in done.stdout
    assert [path.suffix for path in files_below(tmp_path)] == [".json"]


def flags_of(monkeypatch, *arguments: str, cores: int = 16):
    monkeypatch.setattr(sys, "argv", ["serving_client.py", *arguments])
    monkeypatch.setattr(inference_server, "usable_cores", lambda: cores)
    return serving_client.parse_arguments()


@pytest.mark.parametrize(
    ("arguments", "cores", "workers"),
    [((), 12, 3), ((), 2, 2), ((), 64, 4), (("--workers", "7"), 16, 7),
     (("--frontends", "0"), 16, 1)],
)  # fmt: skip
def test_the_server_gets_a_worker_for_every_four_cores_or_as_many_as_asked(
    arguments, cores, workers, monkeypatch
):
    assert flags_of(monkeypatch, *arguments, cores=cores).workers == workers


def test_each_client_of_one_seed_has_arrivals_of_its_own(monkeypatch):
    drawn = []
    for index in ("0", "1", "0"):
        job = serving_client.ServingClient(flags_of(monkeypatch, "--client-index", index))
        job._port, job._rate = 1, 50.0
        users = job._make_users()
        assert users.args.upload == "raw"
        drawn.append(users.draw_offsets(30.0))
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
        self.reports = [Measured(answers, [0.0], 0)]

    def stop(self) -> list[Measured]:
        return self.reports


def test_a_stop_counts_what_is_past_its_bound_without_an_answer_as_missed():
    begin = time.monotonic() - 10
    users = load_test.LoadTest(load_test.parse_arguments(["--rate", "1", "--slo-ms", "2000"]))
    # Due after 1, 5, 7 and 9.5 s: answered, failed, and not yet answered, which the last may be.
    users._start_seconds, users.offsets = begin, np.array([1.0, 5.0, 7.0, 9.5])
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
