"""The load test as a program: against a null server, against the real one, and against nobody."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT_ROOT
from held_client import HeldClient
from load_runner import SCRIPT, load_test, null_server, only_result
from server_process import running
from waiting import is_running, wait_until

GUIDE_FIGURES = (
    "total_requests", "successful_requests", "failed_requests", "success_rate_percent",
    "mean_latency_ms", "median_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms",
    "max_latency_ms", "qps", "requests_per_minute",
)  # fmt: skip


@pytest.fixture
def server():
    with null_server() as server:
        yield server


def test_every_figure_of_the_guide_is_in_the_result_and_adds_up(server, tmp_path):
    done = load_test(tmp_path, server.url, "--clients", "20", "--duration", "1.5", "--no-charts")
    assert done.returncode == 0, done.stderr
    figures = only_result(tmp_path)["figures"]
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
    assert figures["qps"] * figures["mean_latency_ms"] / 1e3 <= 20.0
    for label in ("Total requests", "Success rate", "Queries per second", "P95 / P99"):
        assert label in done.stdout
    assert "waiting for" not in done.stderr


def test_raw_uploads_are_the_jpeg_itself(server, tmp_path):
    done = load_test(tmp_path, server.url, "--clients", "2", "--duration", "0.3", "--upload", "raw")
    assert done.returncode == 0
    counts = server.counts()
    assert counts["image/jpeg"] == counts["jpeg"] == counts["/predict"] > 0


def test_a_proxy_in_the_environment_is_not_asked(server, tmp_path):
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = load_test(
        tmp_path, server.url, "--duration", "0.3", "--no-charts", env={**os.environ, **proxies}
    )
    assert done.returncode == 0, done.stderr
    assert only_result(tmp_path)["figures"]["success_rate_percent"] == 100


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/préfixe", "/pr%C3%A9fixe/predict"), ("/a b/", "/a%20b/predict"),
     ("/al%20ready", "/al%20ready/predict"), ("/?q=ü#f", "/predict")],
)  # fmt: skip
def test_an_address_outside_ascii_is_percent_encoded(path, asked, server, tmp_path):
    done = load_test(tmp_path, server.url + path, "--duration", "0.2", "--no-charts")
    assert done.returncode == 0, done.stderr
    assert server.counts()[asked] > 0


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [("200,503", "HTTP 503"), ("200,0", "ServerDisconnectedError"), ("200,301", "HTTP 301")],
)
def test_failures_are_counted_by_kind_and_are_infinitely_late(statuses, kind, tmp_path):
    with null_server("--statuses", statuses) as server:
        done = load_test(tmp_path, server.url, "--clients", "3", "--duration", "0.5")
    assert done.returncode == 0
    figures = only_result(tmp_path)["figures"]
    assert figures["errors"] == {kind: figures["failed_requests"]}
    assert figures["failed_requests"] > 0 and figures["successful_requests"] > 0
    assert figures["success_rate_percent"] == pytest.approx(
        100 * figures["successful_requests"] / figures["total_requests"]
    )
    assert f"Failed: {kind}" in done.stdout
    assert figures["p99_latency_ms"] is None and figures["max_latency_ms"] > 0
    assert "p99" in figures["infinite_latency_percentiles"]
    assert figures["latency_percentile_requests"] == figures["total_requests"]
    assert f"infinite (few), n = {figures['total_requests']}" in done.stdout


def test_no_success_at_all_is_exit_code_1_and_timeouts_are_failures(tmp_path):
    with null_server("--statuses", "-1") as server:
        done = load_test(
            tmp_path, server.url, "--clients", "2", "--duration", "0.3", "--timeout", "0.2",
            "--warm-up-requests", "0",
        )  # fmt: skip
    assert done.returncode == 1
    figures = only_result(tmp_path)["figures"]
    assert figures["errors"] == {"timeout": figures["total_requests"]}
    assert figures["success_rate_percent"] == 0
    assert figures["mean_latency_ms"] is None
    assert "Median (P50) latency  infinite (few), n = " in done.stdout
    assert "Mean latency          none (of the answered)" in done.stdout


def test_a_server_that_is_still_loading_is_waited_for_visibly_and_not_called_start_up(tmp_path):
    waits = ",".join(["503"] * 8)
    with null_server("--health-statuses", f"{waits},200") as server:
        done = load_test(tmp_path, server.url, "--duration", "0.3", "--no-charts")
        assert done.returncode == 0
        assert f"waiting for the server at {server.url}" in done.stderr
    # Eight probes are two seconds.
    assert 0 < only_result(tmp_path)["figures"]["startup_seconds"] < 1.9


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://127.0.0.1:9", "does not answer"), ("localhost:5000", "is no address"),
     ("ftp://localhost", "is no address"), ("http://", "is no address"),
     ("http://localhost:port", "is no address"), ("http://me:secret@localhost", "no user name")],
)  # fmt: skip
def test_an_unreachable_server_is_exit_code_2_and_one_sentence(url, said, tmp_path):
    done = load_test(tmp_path, url, "--connect-seconds", "0.3")
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def with_open_files(soft: int, hard: int) -> dict[str, object]:
    limits = (soft, hard)
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)}


def test_a_low_soft_limit_of_open_files_is_raised_as_far_as_the_clients_need(server, tmp_path):
    done = load_test(
        tmp_path, server.url, "--clients", "100", "--duration", "0.5", "--processes", "1",
        "--no-charts", **with_open_files(64, 4096),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert only_result(tmp_path)["figures"]["success_rate_percent"] == 100
    assert server.counts()["connections"] == 100


def test_a_hard_limit_of_open_files_that_is_too_low_is_exit_code_2_with_the_remedy(
    server, tmp_path
):
    done = load_test(
        tmp_path, server.url, "--clients", "100", "--processes", "1", **with_open_files(64, 64)
    )
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "needs 132 open files a process" in said and "ulimit -Hn" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["load_test", "load_generator"])
def test_neither_the_load_test_nor_its_processes_import_anything_heavy(module):
    heavy = ["torch", "torchvision", "matplotlib"]
    heavy += ["numpy", "PIL"] if module == "load_generator" else ["aiohttp"]
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


def test_a_run_without_charts_imports_neither_torch_nor_matplotlib(server, tmp_path):
    program = (
        "import runpy, sys; "
        f"sys.argv = ['load_test.py', '--server', {server.url!r}, '--duration', '0.3', "
        f"'--no-charts', '--rate', '50', '--results-dir', {str(tmp_path)!r}]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_lies_where_it_is_started_is_not_imported(server, tmp_path):
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in ("multiprocessing.py", "aiohttp.py", "asyncio.py"):
        (planted / name).write_text("raise SystemExit('imported from the working directory')")
    done = load_test(
        tmp_path, server.url, "--duration", "0.2", "--processes", "1", "--no-charts", cwd=planted
    )
    assert done.returncode == 0, done.stderr


def test_held_by_the_suite_jobs_repeat_and_each_request_is_a_latency_unit(server, tmp_path):
    with HeldClient(
        tmp_path, "workloads/inference/load_test.py", "--server", server.url,
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


def test_a_stop_ends_all_at_once_and_loses_no_finished_request(server, tmp_path):
    with HeldClient(
        tmp_path, "workloads/inference/load_test.py", "--server", server.url,
        "--clients", "2", "--processes", "2", "--duration", "60",
    ) as client:  # fmt: skip
        client.start_working()
        client.wait_for("units")
        processes = child_pids(client.process.pid)
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
    assert len(processes) == 2
    assert not any(map(is_running, processes))
    # The server had every request; but for those in flight, each is a unit.
    counted = server.counts()["/predict"] - 2 * 2
    assert counted - 2 <= len(ends) <= counted
    assert max(ends) > asked_seconds - 0.2
    assert list(tmp_path.glob("load_test_*")) == []


def child_pids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children]


def started_load_test(server, folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        (sys.executable, str(SCRIPT), "--server", server.url, "--clients", "2",
         "--processes", "2", "--duration", "60", "--results-dir", str(folder)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: server.counts().get("/predict", 0) >= 100, "100 requests")
    return process


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_load_test_that_is_ended(signal_number, server, tmp_path):
    process = started_load_test(server, tmp_path)
    processes = child_pids(process.pid)
    assert len(processes) == 2
    process.send_signal(signal_number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    wait_until(lambda: not any(map(is_running, processes)), "the end of all", seconds=10)


def test_a_process_that_dies_fails_the_test_in_one_sentence(server, tmp_path):
    process = started_load_test(server, tmp_path)
    os.kill(child_pids(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "process 0 of the load generator ended with code -9" in said
    assert "Traceback" not in said


INHERITED = {
    "a notebook's backend": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "no such backend": {"MPLBACKEND": "nonsense"},
    "a settings file that is none": {"MATPLOTLIBRC": "{folder}/damaged"},
    "no folder for its settings": {"MPLCONFIGDIR": "/proc/nowhere"},
}


@pytest.mark.parametrize("inherited", INHERITED.values(), ids=INHERITED)
def test_charts_are_drawn_whatever_is_inherited_and_told_where_they_are(
    inherited, server, tmp_path
):
    (tmp_path / "damaged").write_bytes(b"\xff\xfe: 1\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 70\n")
    inherited = {name: text.format(folder=tmp_path) for name, text in inherited.items()}
    done = load_test(
        tmp_path, server.url, "--rate", "300", "--duration", "0.5",
        env={**os.environ, **inherited}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = only_result(tmp_path)["figures"]
    for chart in ("latency_chart", "qps_chart"):
        assert (tmp_path / figures[chart]).read_bytes().startswith(b"\x89PNG")
        assert f"{chart.replace('_', ' ')}: {tmp_path / figures[chart]}" in done.stdout
    assert "could not be drawn" not in done.stderr


def test_charts_that_cannot_be_drawn_cost_nothing_but_themselves(server, tmp_path):
    # A damaged settings file in the working directory is read by the import itself.
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe: 1\n")
    done = load_test(tmp_path, server.url, "--duration", "0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = only_result(tmp_path)
    assert "the charts could not be drawn" in " ".join(result["warnings"])
    assert "latency_chart" not in result["figures"]
    assert list(tmp_path.glob("*.png")) == []


def test_raw_values_lie_next_to_the_result_by_hand(server, tmp_path):
    done = load_test(tmp_path, server.url, "--rate", "300", "--duration", "1", "--no-charts")
    assert done.returncode == 0, done.stderr
    figures = only_result(tmp_path)["figures"]
    raw = np.load(tmp_path / figures["raw_file"])
    assert len(raw) == figures["total_requests"] and raw["ok"].all()
    assert np.percentile(raw["latency_ms"], 99.9) == pytest.approx(
        figures["p99_9_latency_ms"], rel=1e-3
    )
    assert (np.diff(raw["intended_seconds"]) >= 0).all()
    assert raw["intended_seconds"][0] > 0 and raw["intended_seconds"][-1] < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--rate", "0"), "0"), (("--arrival", "poisson"), "give its --rate"),
     (("--slo-ms", "-1"), "-1"), (("--processes", "0"), "0")],
)  # fmt: skip
def test_wrong_flags_are_exit_code_2_and_one_sentence(arguments, said):
    done = subprocess.run(
        (sys.executable, str(SCRIPT), *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


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
