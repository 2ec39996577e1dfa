"""The load test as a program: against a null server, a real one and nobody."""

from __future__ import annotations

import contextlib
import http.server
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PROJECT_ROOT
from held_client import HeldClient
from load_runner import SCRIPT, load_test, null_server, only_result
from server_process import children, running
from waiting import is_running, wait_until

from workloads.common import client
from workloads.inference import load_test as load_test_script

GUIDE_FIGURES = (
    "total_requests", "successful_requests", "failed_requests", "success_rate_percent",
    "mean_latency_ms", "median_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "max_latency_ms", "qps", "requests_per_minute",
)  # fmt: skip
SHORT = ("--duration", "0.3", "--no-charts")


@pytest.fixture
def server():
    with null_server() as server:
        yield server


def measure(folder: Path, server, *flags: str, code: int = 0, **how: object) -> tuple[dict, str]:
    """Run the load test; return its figures and what it said."""
    done = load_test(folder, getattr(server, "url", server), *flags, **how)
    assert done.returncode == code, done.stderr
    return only_result(folder)["figures"], done.stdout + done.stderr


class EndlessAnswer(http.server.BaseHTTPRequestHandler):
    """Is healthy, and answers every picture with what has no end."""

    protocol_version = "HTTP/1.1"
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent_mib = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody waits any more
            while True:
                self.wfile.write(self.chunk)
                EndlessAnswer.sent_mib += 1

    def log_message(self, *_: object) -> None:
        pass


def test_an_answer_without_end_fills_no_memory(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessAnswer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    flags = ("--clients", "1", "--warm-up-requests", "0", "--results-dir", str(tmp_path))
    process = subprocess.Popen((sys.executable, SCRIPT, "--server", url, *flags))
    try:
        wait_until(lambda: EndlessAnswer.sent_mib > 512, "half a gibibyte sent")
        (generator,) = psutil.Process(process.pid).children()
        assert generator.memory_info().rss < 256 << 20
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()


# --- what is sent, and the figures of the guide ---------------------------------------------------


def test_every_figure_of_the_guide_is_in_the_result_and_adds_up(server, tmp_path, record_property):
    flags = ("--clients", "20", "--processes", "1", "--duration", "1.5", "--no-charts")
    figures, said = measure(tmp_path, server, *flags)
    # Figures to look at, not floors: what else runs on the machine decides them.
    record_property("requests_per_second", round(figures["qps"]))
    record_property("generator_cpu_cores", round(figures["generator_cpu_cores"], 2))
    assert all(figures[name] is not None for name in GUIDE_FIGURES)
    # The server saw the counted requests and two for warming up from each client, all of them
    # JPEGs in a multipart body, over one connection a client.
    sent = figures["total_requests"] + 20 * 2
    assert server.counts() == {
        "/predict": sent, "multipart/form-data": sent, "jpeg": sent, "connections": 20,
    }  # fmt: skip
    assert figures["successful_requests"] == figures["total_requests"] > 20
    assert (figures["failed_requests"], figures["success_rate_percent"]) == (0, 100)
    assert (figures["errors"], figures["connections_opened"]) == ({}, 0)
    assert 1.5 <= figures["elapsed_seconds"] < 4
    # What each client has in hand at the end counts in part.
    assert sent - 3 * 20 <= 1.5 * figures["qps"] <= sent - 2 * 20
    assert figures["requests_per_minute"] == pytest.approx(60 * figures["qps"])
    assert figures["median_latency_ms"] == figures["p50_latency_ms"]
    assert (
        0 < figures["p50_latency_ms"] <= figures["p95_latency_ms"]
        <= figures["p99_latency_ms"] <= figures["max_latency_ms"]
    )  # fmt: skip
    for label in ("Total requests", "Success rate", "Queries per second", "P95 / P99",
                  " 1 process, "):  # fmt: skip
        assert label in said
    assert "waiting for" not in said


def test_raw_uploads_are_the_jpeg_itself_and_nothing_around_a_run_is_used(server, tmp_path):
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in ("multiprocessing.py", "aiohttp.py", "asyncio.py"):
        (planted / name).write_text("raise SystemExit('imported from the working directory')")
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **proxies}
    figures, _ = measure(
        tmp_path, server, *SHORT, "--upload", "raw", env=environment, cwd=planted
    )  # fmt: skip
    assert figures["success_rate_percent"] == 100
    counts = server.counts()
    assert counts["image/jpeg"] == counts["jpeg"] == counts["/predict"] > 0


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/a é/al%20ready", "/a%20%C3%A9/al%20ready/predict"), ("/?q#f", "/predict")],
)
def test_an_address_outside_ascii_is_percent_encoded(path, asked, server, tmp_path):
    measure(tmp_path, server.url + path, *SHORT)
    assert server.counts()[asked] > 0


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ("200,503", "HTTP 503"), ("200,0", "ServerDisconnectedError"),
        ("200," * 40 + "-1", "timeout"),
    ],
)  # fmt: skip
def test_failures_are_counted_by_kind_and_are_infinitely_late(statuses, kind, tmp_path):
    with null_server("--statuses", statuses) as server:
        flags = ("--clients", "3", "--duration", "0.5", "--timeout", "2", "--warm-up-requests", "0")
        figures, said = measure(tmp_path, server, *flags)
    # The rate is of the half second, not of the time in which an answer is waited for in vain.
    assert figures["qps"] * 0.5 >= figures["successful_requests"] - 3
    assert figures["errors"] == {kind: figures["failed_requests"]}
    assert figures["failed_requests"] > 0 and figures["successful_requests"] > 0
    assert figures["success_rate_percent"] == pytest.approx(
        100 * figures["successful_requests"] / figures["total_requests"]
    )
    assert figures["p99_latency_ms"] is None and figures["max_latency_ms"] > 0
    assert "p99" in figures["infinite_latency_percentiles"]
    assert figures["latency_percentile_requests"] == figures["total_requests"]
    assert f"Failed: {kind}" in said
    assert f"infinite (few), n = {figures['total_requests']}" in said


def test_no_success_at_all_is_exit_code_1_and_timeouts_are_failures(tmp_path):
    flags = ("--clients", "2", "--duration", "0.3", "--timeout", "0.2", "--warm-up-requests", "0")
    with null_server("--statuses", "-1") as server:
        figures, said = measure(tmp_path, server, *flags, code=1)
    assert figures["errors"] == {"timeout": figures["total_requests"]}
    assert figures["success_rate_percent"] == 0
    assert figures["mean_latency_ms"] is None
    assert "Median (P50) latency  infinite (few), n = " in said
    assert "Mean latency          none (of the answered)" in said


def test_the_real_server_answers_the_load_and_counts_the_same(tmp_path):
    with running(tmp_path, "--max-batch", "4") as server:
        figures, _ = measure(tmp_path, server, "--clients", "4", "--duration", "2")
        assert figures["success_rate_percent"] == 100
        stats = server.stats()
    assert stats["successful_requests"] == figures["successful_requests"] + 4 * 2
    # The client's latency is the server's and the way there and back.
    assert figures["p50_latency_ms"] >= 0.8 * stats["p50_ms"] > 0


def test_what_ends_while_the_load_test_is_slow_to_read_is_counted(tmp_path, server):
    flags = ("--duration", "3", "--clients", "32", "--processes", "1", "--no-charts")
    process = subprocess.Popen(
        (sys.executable, SCRIPT, "--server", server.url, "--results-dir", tmp_path, *flags)
    )
    wait_until(lambda: server.counts().get("/predict", 0) > 32 * 2, "more than the warm-up")
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)  # past the end, with more to report than a pipe holds
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    figures = only_result(tmp_path)["figures"]
    assert figures["successful_requests"] + 32 * 2 == server.counts()["/predict"]


# --- the open loop --------------------------------------------------------------------------------


def test_a_stall_shows_in_latency_from_the_intended_send_and_not_in_service_time(tmp_path):
    # The server stands still for one of three seconds. Four connections can wait for it; the other
    # requests of that second wait for a connection, which service time does not see.
    with null_server("--stall-after", "1", "--stall-seconds", "1") as server:
        figures, said = measure(
            tmp_path, server, "--rate", "200", "--arrival", "constant", "--duration", "3",
            "--clients", "4", "--max-connections", "4", "--slo-ms", "300", "--no-charts",
        )  # fmt: skip
    assert figures["total_requests"] == figures["successful_requests"] == 600
    # 200 requests were due in the stall, the last ones near its end: 10 % waited 0.7 s or more.
    assert figures["p95_latency_ms"] > 500
    assert 900 < figures["max_latency_ms"] < 2000
    # Only the four in flight felt it as service time, 0.7 % of all.
    assert figures["p95_service_ms"] < 200 < 900 < figures["max_service_ms"]
    assert figures["late_for_connection"] > 150
    # Within 300 ms: what was due outside the stall or in its last 0.3 s, about 460 of 600.
    assert 60 < figures["slo_attainment_percent"] < 85
    raw = np.load(tmp_path / figures["raw_file"])
    assert len(raw) == 600 and raw["ok"].all()
    assert np.percentile(raw["latency_ms"], 99) == pytest.approx(figures["p99_latency_ms"])
    assert raw["intended_seconds"].tolist() == pytest.approx([n / 200 for n in range(600)])
    assert only_result(tmp_path)["settings"]["loop"] == "open"
    assert "Late sends" in said and "Within 300 ms" in said


def test_requests_that_find_no_connection_in_time_fail_and_are_counted(tmp_path):
    with null_server("--stall-after", "0", "--stall-seconds", "1.5") as server:
        figures, _ = measure(
            tmp_path, server, "--rate", "50", "--arrival", "constant", "--duration", "1",
            "--clients", "1", "--max-connections", "1", "--timeout", "0.4", "--no-charts",
            "--warm-up-requests", "0", "--processes", "1",
        )  # fmt: skip
    assert figures["total_requests"] == 50
    assert figures["errors"]["not sent in time"] > 0
    assert sum(figures["errors"].values()) == figures["failed_requests"]


# --- before the load: the server, this machine, flags ---------------------------------------------


def test_a_server_that_is_still_loading_is_waited_for_visibly_and_not_called_start_up(tmp_path):
    with null_server("--health-statuses", ",".join(["503"] * 8 + ["200"])) as server:
        figures, said = measure(tmp_path, server, *SHORT)
        assert f"waiting for the server at {server.url}" in said
    assert 0 < figures["startup_seconds"] < 1.9  # eight probes are two seconds


def test_a_server_that_ends_while_it_is_asked_for_is_one_sentence(tmp_path):
    with null_server("--health-statuses", "200,0") as server:
        done = load_test(tmp_path, server.url, "--connect-seconds", "0.3")
    assert done.returncode == 2
    assert "does not answer (Server disconnected)" in done.stderr and "Trace" not in done.stderr


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("url", "flags", "said"),
    [(NOBODY, (), "does not answer"), ("localhost:5000", (), "is no address"),
     ("http://localhost:port", (), "is no address"), ("http://me:secret@here", (), "no user name"),
     ("http://a..b", (), "is no address"), (NOBODY, ("--rate", "1e300"), "at most"),
     (NOBODY, ("--rate", "0"), "'0' is not"), (NOBODY, ("--arrival", "poisson"), "its --rate")],
)  # fmt: skip
def test_what_cannot_be_done_is_exit_code_2_and_one_sentence(url, flags, said, tmp_path):
    done = load_test(tmp_path, url, "--connect-seconds", "0.3", *flags)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if "waiting for" not in line]
    assert said in error and "secret" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_soft_limit_of_open_files_is_raised_and_a_hard_one_is_named(server, tmp_path):
    def limit(hard: int) -> dict:
        return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))}

    flags = ("--clients", "100", "--processes", "1", *SHORT)
    done = load_test(tmp_path, server.url, *flags, **limit(64))
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "needs 132 open files a process" in said and "ulimit -Hn" in said
    assert list(tmp_path.iterdir()) == []
    figures, _ = measure(tmp_path, server, *flags, **limit(4096))
    assert figures["success_rate_percent"] == 100
    assert server.counts()["connections"] == 100


@pytest.mark.parametrize(
    ("program", "heavy"),
    [("import workloads.inference.load_test", ["torch", "matplotlib", "aiohttp", "numpy"]),
     ("import workloads.inference.load_generator", ["torch", "matplotlib", "numpy", "PIL"]),
     ("import workloads.inference.load_test as it; it.main()", ["torch", "matplotlib", "pandas"])],
)  # fmt: skip
def test_nothing_heavy_is_imported_by_the_load_test_its_processes_or_a_run_without_charts(
    program, heavy, server, tmp_path
):
    flags = ["--server", server.url, *SHORT, "--rate", "50"]
    program = (
        f"import sys; sys.argv = ['x', *{flags!r}]; sys.path.insert(0, {str(PROJECT_ROOT)!r})\n"
        f"{program}\nprint([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"


# --- held by the suite, and ended -----------------------------------------------------------------


def test_held_by_the_suite_jobs_follow_each_other_and_a_stop_loses_no_finished_request(
    server, tmp_path
):
    with HeldClient(
        tmp_path, "workloads/inference/load_test.py", "--server", server.url,
        "--clients", "2", "--processes", "2", "--duration", "0.5",
    ) as held:  # fmt: skip
        assert held.start_working()["device"] is None
        jobs = held.wait_for("job", count=2)
        processes = children(held.process.pid)
        held.say("stop")
        assert held.exit_code(10) == 0
        assert held.events("done")[0]["jobs"] >= 2
        units = held.events("units")
    assert len(processes) == 2 and not any(map(is_running, processes))
    assert {(event["kind"], event["latency"]) for event in units} == {("request", True)}
    # The server had every request; but for those in flight, each is a unit.
    counted = server.counts()["/predict"] - 2 * 2
    told = sum(len(event["start_seconds"]) for event in units)
    assert counted - 2 <= told <= counted
    assert 0 < sum(job["figures"]["successful_requests"] for job in jobs) <= told
    assert list(tmp_path.glob("load_test_*")) == []


def test_a_job_that_is_as_long_as_the_generators_run_is_followed_by_another(server, monkeypatch):
    monkeypatch.setattr(load_test_script, "STEADY_SECONDS", 0.0)
    flags = ("--server", server.url, "--hold", "--clients", "2", "--processes", "1")
    for seconds in ("0.6", "0.8"):
        arguments = load_test_script.parse_arguments([*flags, "--duration", seconds])
        workload = load_test_script.LoadTest(arguments)
        workload.load()
        try:
            workload.warm_up()
            for _ in range(4):
                figures = workload.run_job(client.Recorder())
                assert figures["successful_requests"] > 0
        finally:
            workload.close()


@pytest.mark.parametrize(
    ("victim", "number", "code", "said"),
    [("all", signal.SIGKILL, -9, ""), ("all", signal.SIGTERM, 130, ""),
     ("all", signal.SIGINT, 130, ""),
     ("one", signal.SIGKILL, 1, "process 0 of the load generator ended with code -9")],
)  # fmt: skip
def test_no_process_outlives_a_load_test_that_is_ended_or_has_lost_one(
    victim, number, code, said, server, tmp_path
):
    process = subprocess.Popen(
        (sys.executable, str(SCRIPT), "--server", server.url, "--clients", "2",
         "--processes", "2", "--duration", "60", "--results-dir", str(tmp_path)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: server.counts().get("/predict", 0) >= 100, "100 requests")
    processes = children(process.pid)
    assert len(processes) == 2
    os.kill(process.pid if victim == "all" else processes[0], number)
    _, told = process.communicate(timeout=20)
    assert process.returncode == code
    assert said in told and "Traceback" not in told
    wait_until(lambda: not any(map(is_running, processes)), "the end of all", seconds=10)


# --- charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inherited",
    [{"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MPLCONFIGDIR": "/proc/nowhere"},
     {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": "{folder}/damaged"}],
    ids=["a notebook's", "nonsense"],
)  # fmt: skip
def test_charts_are_drawn_whatever_is_inherited_and_told_where_they_are(
    inherited, server, tmp_path
):
    (tmp_path / "damaged").write_bytes(b"\xff\xfe: 1\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 70\n")
    inherited = {name: text.format(folder=tmp_path) for name, text in inherited.items()}
    figures, said = measure(
        tmp_path, server, "--rate", "300", "--duration", "0.5",
        env={**os.environ, **inherited}, cwd=tmp_path,
    )  # fmt: skip
    (result,) = tmp_path.glob("load_test_*.json")
    assert figures["raw_file"] == f"{result.stem}_requests.npy"
    for chart in ("latency_chart", "qps_chart"):
        assert figures[chart].startswith(result.stem)
        assert (tmp_path / figures[chart]).read_bytes().startswith(b"\x89PNG")
        assert f"{chart.replace('_', ' ')}: {tmp_path / figures[chart]}" in said
    assert "could not be drawn" not in said


def test_who_does_not_wait_for_the_charts_has_all_figures(server, tmp_path):
    # A pipe as matplotlib's settings file holds its import at one known place. Elsewhere an
    # extension module that is being loaded may pass the interrupt on as an error of its own.
    os.mkfifo(tmp_path / "matplotlibrc")
    command = (sys.executable, str(SCRIPT), "--server", server.url, "--duration", "0.3",
               "--results-dir", str(tmp_path))  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
        writer = open_pipe_once_it_is_read(tmp_path / "matplotlibrc")
        process.send_signal(signal.SIGINT)
        os.close(writer)  # A read that begins after the signal's handler ran would not end.
    assert process.returncode == 0
    result = only_result(tmp_path)
    assert result["figures"]["successful_requests"] > 0
    assert "the charts could not be drawn (KeyboardInterrupt)" in " ".join(result["warnings"])


def open_pipe_once_it_is_read(path: Path) -> int:
    """Return the write end of a named pipe as soon as somebody reads it."""
    ends = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # ENXIO: nobody yet
            ends.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    wait_until(is_read, f"somebody reads {path.name}")
    return ends[0]


def test_charts_that_cannot_be_drawn_cost_nothing_but_themselves(server, tmp_path):
    # A damaged settings file in the working directory is read by the import itself.
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe: 1\n")
    figures, _ = measure(tmp_path, server, "--duration", "0.3", cwd=tmp_path)
    assert "the charts could not be drawn" in " ".join(only_result(tmp_path)["warnings"])
    assert "latency_chart" not in figures
    assert list(tmp_path.glob("*.png")) == []
