"""The load tester against a null server, against the real one, and against nobody."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from held_client import HeldClient
from server_process import running
from waiting import is_running, wait_until

from workloads.inference.load_requests import encode_images

SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "load_test.py"
GUIDE_FIGURES = (
    "total_requests", "successful_requests", "failed_requests", "success_rate_percent",
    "mean_latency_ms", "median_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "max_latency_ms", "qps", "requests_per_minute",
)  # fmt: skip


class NullServer:
    """Answers every picture at once (or as told) and counts what it was sent."""

    def __init__(self) -> None:
        self.statuses = [200]
        self.health_statuses = [200]
        self.received: Counter[str] = Counter()
        self.connections = 0
        null = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                null.connections += 1

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                self.reply(null.health_statuses[0])
                if len(null.health_statuses) > 1:
                    null.health_statuses.pop(0)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                null.received[self.path] += 1
                null.received[self.headers["Content-Type"].partition(";")[0]] += 1
                null.received["jpeg"] += b"\xff\xd8\xff" in body[:200]
                self.reply(null.statuses[null.received[self.path] % len(null.statuses)])

            def reply(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def null_server():
    server = NullServer()
    yield server
    server.close()


def load_test(folder: Path, url: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        (sys.executable, str(SCRIPT), "--server", url, "--results-dir", str(folder), *arguments),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def only_result(folder: Path) -> dict:
    (path,) = folder.glob("load_test_*.json")
    return json.loads(path.read_text())


def test_every_figure_of_the_guide_is_in_the_result_and_adds_up(null_server, tmp_path):
    done = load_test(tmp_path, null_server.url, "--clients", "4", "--duration", "1.5")
    assert done.returncode == 0, done.stderr
    figures = only_result(tmp_path)["figures"]
    assert all(figures[name] is not None for name in GUIDE_FIGURES)
    # The server saw the counted requests and two for warming up from each client.
    assert null_server.received["/predict"] == figures["total_requests"] + 4 * 2
    assert figures["successful_requests"] == figures["total_requests"] > 20
    assert (figures["failed_requests"], figures["success_rate_percent"]) == (0, 100)
    assert figures["errors"] == {}
    assert 1.5 <= figures["elapsed_seconds"] < 4
    assert figures["qps"] == pytest.approx(
        figures["successful_requests"] / figures["elapsed_seconds"]
    )
    assert figures["requests_per_minute"] == pytest.approx(60 * figures["qps"])
    assert figures["median_latency_ms"] == figures["p50_latency_ms"]
    assert (
        0 < figures["p50_latency_ms"] <= figures["p95_latency_ms"]
        <= figures["p99_latency_ms"] <= figures["max_latency_ms"]
    )  # fmt: skip
    # A closed loop of n clients: their waiting fills n seconds a second, and no more.
    assert figures["qps"] * figures["mean_latency_ms"] / 1e3 <= 4.0
    for label in ("Total requests", "Success rate", "Queries per second", "P95 / P99"):
        assert label in done.stdout


def test_each_client_keeps_one_connection_and_sends_jpegs_as_multipart(null_server, tmp_path):
    assert load_test(
        tmp_path, null_server.url, "--clients", "20", "--duration", "0.5"
    ).returncode == 0  # fmt: skip
    sent = null_server.received["/predict"]
    assert null_server.received["multipart/form-data"] == null_server.received["jpeg"] == sent
    assert null_server.connections == 20 + 1  # one more asked for the server's health


def test_raw_uploads_are_the_jpeg_itself(null_server, tmp_path):
    done = load_test(
        tmp_path, null_server.url, "--clients", "2", "--duration", "0.5", "--upload", "raw"
    )
    assert done.returncode == 0
    assert null_server.received["image/jpeg"] == null_server.received["/predict"] > 0


def test_failures_are_counted_by_kind_and_leave_the_latencies_alone(null_server, tmp_path):
    null_server.statuses = [200, 503]
    done = load_test(tmp_path, null_server.url, "--clients", "3", "--duration", "1")
    assert done.returncode == 0
    figures = only_result(tmp_path)["figures"]
    assert figures["errors"] == {"HTTP 503": figures["failed_requests"]}
    assert figures["failed_requests"] > 0 and figures["successful_requests"] > 0
    assert figures["success_rate_percent"] == pytest.approx(
        100 * figures["successful_requests"] / figures["total_requests"]
    )
    assert "HTTP 503" in done.stdout


def test_no_success_at_all_is_exit_code_1(null_server, tmp_path):
    null_server.statuses = [500]
    done = load_test(tmp_path, null_server.url, "--clients", "2", "--duration", "0.5")
    assert done.returncode == 1
    figures = only_result(tmp_path)["figures"]
    assert figures["success_rate_percent"] == 0
    assert figures["mean_latency_ms"] is None


def test_a_server_that_is_still_loading_is_waited_for(null_server, tmp_path):
    null_server.health_statuses = [503, 503, 503, 200]
    done = load_test(tmp_path, null_server.url, "--clients", "1", "--duration", "0.3")
    assert done.returncode == 0
    assert null_server.health_statuses == [200]


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://127.0.0.1:9", "does not answer"), ("localhost:5000", "is no address"),
     ("ftp://localhost", "is no address"), ("http://", "is no address")],
)  # fmt: skip
def test_an_unreachable_server_is_exit_code_2_and_one_sentence(url, said, tmp_path):
    done = load_test(tmp_path, url, "--connect-seconds", "0.3")
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["load_test", "load_worker"])
def test_neither_the_tester_nor_its_workers_import_anything_heavy(module):
    heavy = ("torch", "torchvision", "matplotlib")
    if module == "load_worker":
        heavy += ("numpy", "PIL", "urllib3")
    program = (
        "import sys; sys.argv = ['x']; "
        f"sys.path.insert(0, {str(PROJECT_ROOT)!r}); "
        f"import workloads.inference.{module}; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_run_without_charts_imports_neither_torch_nor_matplotlib(null_server, tmp_path):
    program = (
        "import runpy, sys; "
        f"sys.argv = ['load_test.py', '--server', {null_server.url!r}, '--duration', '0.3', "
        f"'--no-charts', '--rate', '50', '--results-dir', {str(tmp_path)!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_pictures_are_real_and_follow_the_seed():
    first = encode_images(2, seed=1)
    assert first == encode_images(2, seed=1)
    assert first[0] != first[1]
    assert all(image.startswith(b"\xff\xd8\xff") for image in first)


def test_on_the_leash_jobs_repeat_and_each_request_is_a_latency_unit(null_server, tmp_path):
    with HeldClient(
        tmp_path, "workloads/inference/load_test.py", "--server", null_server.url,
        "--clients", "2", "--duration", "0.5",
    ) as client:  # fmt: skip
        assert client.start_working()["device"] is None
        jobs = client.wait_for("job", count=2)
        client.say("stop")
        assert client.exit_code() == 0
        done = client.events("done")[0]
        assert done["jobs"] >= 2
        units = client.events("units")
    assert {(event["kind"], event["latency"]) for event in units} == {("request", True)}
    starts = [start for event in units for start in event["start_seconds"]]
    counted = [
        sum(job["start_seconds"] <= start <= job["end_seconds"] for start in starts) for job in jobs
    ]
    assert counted == [job["figures"]["successful_requests"] for job in jobs]


def test_a_stop_ends_all_at_once_and_loses_no_finished_request(null_server, tmp_path):
    with HeldClient(
        tmp_path, "workloads/inference/load_test.py", "--server", null_server.url,
        "--clients", "2", "--processes", "2", "--duration", "60",
    ) as client:  # fmt: skip
        client.start_working()
        client.wait_for("units")
        workers = worker_pids(client.process.pid)
        asked_seconds = time.monotonic()
        client.say("stop")
        assert client.exit_code(10) == 0
        ends = [
            start + duration
            for event in client.events("units")
            for start, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True
            )
        ]
    assert not any(map(is_running, workers))
    # The server had every request; but for those in flight, each is a unit.
    counted = null_server.received["/predict"] - 2 * 2
    assert counted - 2 <= len(ends) <= counted
    assert max(ends) > asked_seconds - 0.2
    assert list(tmp_path.glob("load_test_*")) == []


def worker_pids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_process_outlives_a_tester_that_is_ended(signal_number, null_server, tmp_path):
    process = subprocess.Popen(
        (sys.executable, str(SCRIPT), "--server", null_server.url, "--clients", "2",
         "--processes", "2", "--duration", "60", "--results-dir", str(tmp_path)),
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: null_server.received["/predict"] >= 100, "100 requests")
    workers = worker_pids(process.pid)
    assert len(workers) == 2
    process.send_signal(signal_number)
    assert process.wait(10) == (-9 if signal_number == signal.SIGKILL else 130)
    wait_until(lambda: not any(map(is_running, workers)), "the end of the workers", seconds=10)


def test_a_worker_that_dies_fails_the_test_in_one_sentence(null_server, tmp_path):
    process = subprocess.Popen(
        (sys.executable, str(SCRIPT), "--server", null_server.url, "--clients", "2",
         "--duration", "60", "--results-dir", str(tmp_path)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: null_server.received["/predict"] >= 100, "100 requests")
    os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "process 0 of the load generator ended with code -9" in said
    assert "Traceback" not in said


def test_the_real_server_answers_the_load_and_counts_the_same(tmp_path):
    with running(tmp_path, "--max-batch", "4") as server:
        done = load_test(tmp_path, server.url, "--clients", "4", "--duration", "2")
        assert done.returncode == 0, done.stderr
        figures = only_result(tmp_path)["figures"]
        assert figures["success_rate_percent"] == 100
        stats = server.stats()
    assert stats["successful_requests"] == figures["successful_requests"] + 4 * 2
    # The client's latency is the server's and the way there and back.
    assert figures["p50_latency_ms"] >= 0.8 * stats["p50_ms"] > 0
