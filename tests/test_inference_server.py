"""The server process over real HTTP: answers, batching, limits, client contract."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest
import requests
from held_client import HeldClient
from hostile_requests import read_all
from server_process import SCRIPT, SMALL, ServerProcess, jpeg, png, running
from waiting import limit, wait_until

from workloads.inference.batching import Statistics

GUIDE_STATS = (
    "total_requests", "success_rate_percent", "average_latency_ms", "p50_ms", "p95_ms", "p99_ms",
    "qps",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with running(folder, "--max-batch", "8", STUB_BATCH_SECONDS=0.02) as process:
        yield process


@pytest.fixture(scope="module")
def full_server(tmp_path_factory) -> Iterator[ServerProcess]:
    """A slow server that takes little at a time."""
    with running(
        tmp_path_factory.mktemp("full"), "--max-batch", "1", "--queue-size", "1",
        "--request-seconds", "2", "--workers", "1", STUB_BATCH_SECONDS=0.1,
    ) as process:  # fmt: skip
        yield process


def test_a_real_model_is_served_and_named_and_only_one_process_holds_torch(tmp_path):
    with running(tmp_path, "--max-batch", "8", script=SCRIPT) as server:
        body = requests.get(f"{server.url}/health", timeout=10).json()
        assert (body["status"], body["engine"]) == ("ok", "eager")
        assert (body["device"], body["model"], body["weights"]) == ("cpu", "resnet18", "random")
        for pid in server.workers():
            with open(f"/proc/{pid}/maps") as maps:
                assert "libtorch" not in maps.read()
        content = jpeg(size=300)
        form = requests.post(f"{server.url}/predict", files={"image": ("a", content)}, timeout=30)
        raw = server.predict(content)
    assert form.status_code == raw.status_code == 200
    top = form.json()["predictions"]
    assert [entry["rank"] for entry in top] == [1, 2, 3, 4, 5]
    assert all(isinstance(entry["class_name"], str) for entry in top)
    probabilities = [entry["probability"] for entry in top]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1
    assert (raw.json()["predictions"], raw.json()["weights"]) == (top, "random")
    assert raw.json()["latency_ms"] >= raw.json()["gpu_ms"] > 0


def test_requests_that_arrive_together_are_batched_and_get_their_own_answers(server):
    reds = list(range(0, 240, 5))
    before = server.stats()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(server.predict, map(png, reds)))
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.json()["predictions"][0]["class_id"] for answer in answers] == reds
    assert answers[3].json()["predictions"][2]["class_name"] == f"class {reds[3] + 2}"
    assert max(answer.json()["batch_size"] for answer in answers) >= 4
    histogram = server.stats()["batch_size_histogram"]
    assert max(map(int, histogram)) <= 8
    images = sum(int(size) * count for size, count in histogram.items())
    images -= sum(int(size) * count for size, count in before["batch_size_histogram"].items())
    assert images == len(reds)


@pytest.mark.parametrize(
    ("body", "size", "batches"),
    [(None, 32, 4), ({}, 32, 4), ({"batch_size": 3}, 3, 1), ({"batch_size": 20}, 20, 3)],
)
def test_batch_predict_defaults_to_32_and_splits_what_is_larger_than_a_batch(
    server, body, size, batches
):
    answer = requests.post(f"{server.url}/batch_predict", timeout=60,
                           **({} if body is None else {"json": body}))  # fmt: skip
    figures = answer.json()
    assert (figures["batch_size"], figures["batches"]) == (size, batches)
    assert figures["samples_per_second"] == pytest.approx(
        size / figures["latency_ms"] * 1e3, rel=0.05
    )


def test_stats_count_what_was_answered_and_keep_batches_and_bad_requests_apart(server):
    before = server.stats()
    assert server.predict(jpeg(2)).status_code == 200
    assert server.predict(b"no picture").status_code == 400
    assert server.batch_predict({"batch_size": 2}).status_code == 200
    assert requests.options(f"{server.url}/predict", timeout=10).status_code == 200  # no request
    after = server.stats()
    assert all(name in after for name in GUIDE_STATS)
    changes = {"total_requests": 2, "successful_requests": 1, "rejected_requests": 1, "images": 1}
    assert {name: after[name] - before[name] for name in changes} == changes
    assert after["batch_predict"]["images"] == before["batch_predict"]["images"] + 2
    # Whoever sends what is no picture does not make the server look unreliable.
    assert after["failed_requests"] == 0 and after["success_rate_percent"] == 100.0
    assert after["latency_responses"] == after["successful_requests"]
    assert after["few_responses_for"][-1] == "p99_ms"
    assert 0 < after["p50_ms"] <= after["p95_ms"] <= after["p99_ms"] <= after["max_ms"]
    assert after["average_latency_ms"] > 0 and after["qps"] > 0
    assert after["latency_parts_ms"]["gpu"]["mean_ms"] > 0
    assert after["workers"] == 2
    metrics = requests.get(f"{server.url}/metrics", timeout=10)
    assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rpartition(" ")[::2] for line in metrics.text.splitlines())
    name = 'inference_server_requests_total{endpoint="predict",status="200"}'
    assert float(lines[name]) == after["successful_requests"]
    assert float(lines["inference_server_workers"]) == 2
    assert "inference_server_waiting_images" in lines


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [("PUT", "/stats", 405, "GET"), ("BREW", "/health", 405, "GET"),
     ("OPTIONS", "/predict", 200, "POST"), ("HEAD", "/health", 200, "")],
)  # fmt: skip
def test_methods_are_answered_as_http_says(server, method, path, status, allowed):
    answer = requests.request(method, server.url + path, timeout=10)
    assert (answer.status_code, bool(answer.content)) == (status, status != 200)
    assert allowed in answer.headers.get("Allow", "").split(", ")


def test_no_page_of_another_origin_and_no_foreign_name_reaches_a_local_server(server):
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}, 200),
        ({"Host": "127.1.2.3"}, 200),
        ({"Host": "[::1]:1"}, 200),
    ):
        answer = requests.post(f"{server.url}/predict", data=jpeg(), headers=headers, timeout=10)
        assert answer.status_code == status, headers


def test_the_page_for_people_is_whole_and_loads_nothing_from_elsewhere(server):
    page = requests.get(server.url, timeout=10)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=[\"'](?!blob)", page.text) and "http://" not in page.text
    for endpoint in ("/predict", "/batch_predict", "/stats", "/health", "/metrics"):
        assert endpoint in page.text


def opened_page(url: str, profile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
         "--disable-background-networking", f"--user-data-dir={profile}", "--window-size=390,844",
         "--virtual-time-budget=3000", "--dump-dom", url),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.browser
def test_the_page_shows_latencies_of_a_slow_device_in_plain_numbers(tmp_path):
    with running(tmp_path, STUB_BATCH_SECONDS=1.2) as slow:
        assert "<dt>p50</dt><dd>none yet</dd>" in opened_page(slow.url, tmp_path).stdout
        assert requests.post(f"{slow.url}/predict", jpeg(), timeout=20).status_code == 200
        done = opened_page(slow.url, tmp_path)
    assert re.search(r"<dt>p50</dt><dd>1[23]\d0 ms", done.stdout), done.stdout


@pytest.mark.browser
def test_the_page_shows_classes_and_figures_at_the_width_of_a_phone(server, tmp_path):
    done = opened_page(server.url, tmp_path)
    assert "Ready: resnet18 with random weights on cpu" in done.stdout, done.stderr
    assert "<dt>requests</dt>" in done.stdout
    assert f"{server.url}/predict -F" in done.stdout


@pytest.mark.browser
def test_the_page_lets_a_key_be_typed_while_it_asks_again_and_again(tmp_path):
    async def focused(page: str) -> str:
        script = """new Promise((done) => {
            const wait = (question, then) =>
                question() ? then() : setTimeout(wait, 20, question, then);
            const asked = () => performance.getEntriesByType("resource").length;
            wait(() => document.getElementById("key")?.hidden === false, () => {
                const before = asked();
                document.getElementById("secret").focus();
                wait(() => asked() >= before + 4, () => done(document.activeElement.id));
            });
        })"""
        call = {"id": 1, "method": "Runtime.evaluate",
                "params": {"expression": script, "awaitPromise": True}}  # fmt: skip
        async with aiohttp.ClientSession() as session, session.ws_connect(page) as connection:
            await connection.send_json(call)
            answer = await connection.receive_json(timeout=60)
        return answer["result"]["result"]["value"]

    profile = tmp_path / "profile"
    command = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
               "--remote-debugging-port=0", f"--user-data-dir={profile}")  # fmt: skip
    with (
        running(tmp_path, INFERENCE_API_KEY="a-key-of-a-test") as server,
        subprocess.Popen((*command, server.url), stderr=subprocess.DEVNULL) as browser,
    ):
        try:
            port = profile / "DevToolsActivePort"
            wait_until(lambda: port.exists() and port.read_text(), "the browser")
            pages = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
            wait_until(
                lambda: "Inference server" in requests.get(pages, timeout=10).text, "the page"
            )
            page = next(p for p in requests.get(pages, timeout=10).json() if p["type"] == "page")
            assert asyncio.run(focused(page["webSocketDebuggerUrl"])) == "secret"
        finally:
            browser.kill()


def test_what_is_sent_over_one_connection_is_answered_in_order_and_announced_excess_ends_it(server):
    def talk(*pieces: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            for piece in pieces:
                connection.sendall(piece)
            return read_all(connection)

    answer = talk(b"POST /predict HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"Connection: close" in answer
    assert "too large" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    content = jpeg()
    predict = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n" % len(content)
    others = b"GET /nowhere HTTP/1.1\r\n\r\n" * 20 + b"GET /health HTTP/1.0\r\n\r\n"
    answers = talk(predict + b"\r\n" + content + others)
    assert re.findall(rb"HTTP/1\.[01] (\d+) ", answers) == [b"200", *[b"404"] * 20, b"200"]
    assert answers.count(b"Connection: close") == 1
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(predict + b"Connection: close\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_full_server_refuses_at_once_and_stays_healthy(full_server):
    before = full_server.stats()
    content = jpeg(size=90)
    with ThreadPoolExecutor(17) as pool:
        futures = [pool.submit(full_server.predict, content) for _ in range(16)]
        health = pool.submit(requests.get, f"{full_server.url}/health", timeout=10)
        answers = [future.result() for future in futures]
    assert health.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["error"] for answer in refused)
    # A refusal is counted a moment after it was answered.
    asked = before["total_requests"] + 16
    wait_until(lambda: full_server.stats()["total_requests"] == asked, "the count of all")
    after = full_server.stats()
    assert after["failed_requests"] == before["failed_requests"] + len(refused)
    assert full_server.predict(content).status_code == 200


def test_who_left_or_waited_too_long_has_no_further_batch_computed(full_server):
    body = b'{"batch_size": 4}'
    head = b"POST /batch_predict HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: "
    before = full_server.stats()["batch_size_histogram"].get("1", 0)
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", full_server.port)) as connection:
            connection.sendall(head + b"%d\r\n\r\n" % len(body) + body)
    time.sleep(1.5)  # 40 batches of 0.1 s were asked for
    assert full_server.stats()["batch_size_histogram"]["1"] - before <= 12


def test_a_client_on_the_control_channel_is_healthy_only_when_warm_and_drains_on_stop(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with HeldClient(tmp_path, "tests/stub_server.py", *SMALL, "--port", str(port)) as client:
        client.wait_for("loaded")
        cold = requests.get(f"{url}/health", timeout=10)
        assert (cold.status_code, cold.json()["status"]) == (503, "loading")
        refused = requests.post(f"{url}/predict", data=jpeg(), timeout=10)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        client.say("warm")
        identity = client.wait_for("ready")[0]["identity"]
        assert (identity["port"], identity["model"]) == (port, "resnet18")
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        client.say("go")
        time.sleep(0.5)
        for seed in range(3):
            assert requests.post(f"{url}/predict", data=jpeg(seed), timeout=30).status_code == 200
        client.say("stop")
        assert client.exit_code() == 0
        units = client.events("units")
        assert {(event["kind"], event["latency"]) for event in units} == {("request", True)}
        durations = [d for event in units for d in event["duration_seconds"]]
        assert len(durations) == 3 and min(durations) > 0
        assert client.events("done")[0]["jobs"] == 1


def test_a_taken_port_and_an_unknown_model_are_one_sentence_and_exit_code_2(here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, said in (
            (("--host", "::", "--port", port),
             f"cannot listen on :: port {port} (Address already in use); name another"),
            (("--port", "70000"), "above 65535"),
            (("--model", "resnet5", "--port", "0"), "no classifier 'resnet5'; the nearest of"),
        ):  # fmt: skip
            done = here.run("workloads/inference/inference_server.py", *SMALL, *flags)
            assert done.returncode == 2
            assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_both_families_of_addresses_are_served_and_printed_as_urls(tmp_path):
    with running(tmp_path, "--host", "::") as server:
        for host in ("127.0.0.1", "[::1]"):
            answer = requests.get(f"http://{host}:{server.port}/health", timeout=10)
            assert answer.status_code == 200
        log = server.log.read_text()
    assert f"ready on port {server.port}: http://localhost:{server.port}" in log
    # Who can be reached from elsewhere and has no key is told so.
    assert "anybody who reaches :: port" in log
    # The variables of other web servers change nothing.
    with running(
        tmp_path, "--host", "::1", "--frontends", "0", GUNICORN_CMD_ARGS="--bind 0.0.0.0:1",
        SCRIPT_NAME="/x", WEB_CONCURRENCY="", FLASK_DEBUG=1, GUNICORN_FD=0, GEVENT_LOOP="nosuch",
        SENDFILE="?", GUNICORN_PID=1, LISTEN_FDS=3, PORT=1,
        under=("bash", "-c", 'exec "$@" <&- >&-', "-"),
    ) as local:  # fmt: skip
        url = f"http://[::1]:{local.port}"
        assert requests.post(f"{url}/predict", data=jpeg(), timeout=30).status_code == 200
        assert url in local.log.read_text()
        assert "anybody" not in local.log.read_text()
        assert len(local.workers()) == 1
        assert local.stop() == 0


def test_a_device_that_fails_is_a_500_for_who_waits_and_the_end_of_the_server(tmp_path):
    with running(tmp_path, STUB_FAIL=77) as server:
        assert server.predict(png(76)).status_code == 200
        failed = server.predict(png(77))
        assert failed.status_code == 500 and "device failed" in failed.json()["error"]
        assert server.process.wait(30) == 1
        assert "RuntimeError: the stub model fails" in server.log.read_text()


def test_a_second_signal_ends_a_server_that_drains_at_once(tmp_path):
    with (
        running(tmp_path, "--max-batch", "1", STUB_BATCH_SECONDS=0.2) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(server.batch_predict, {})
        wait_until(lambda: server.stats()["requests_inside"], "a request inside")
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGINT)  # a terminal's to the group, say: the same one
        time.sleep(1.3)
        assert server.process.poll() is None
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        assert time.monotonic() - begin < limit(4)


def test_the_window_of_ten_seconds_and_that_of_a_hundred_thousand_requests_slide():
    statistics, now = Statistics(dict), time.monotonic()
    for age_seconds in (60.0, 13.0, 10.5, 9.0, 5.0, 0.0):
        statistics.record("predict", 200, 1, now - age_seconds - 0.001, 0.001, 0.0, 0.0, 0.0)
    assert statistics.snapshot()["qps_last_10_seconds"] == 0.3
    assert [end - start for _, start, end in statistics.take_units()] == [pytest.approx(1e-3)] * 6
    assert list(statistics.take_units()) == []
    statistics = Statistics(dict)
    for number in range(120_000):
        seconds = 1.0 if number < 110_000 else 0.001
        statistics.record("predict", 200, 1, 0.0, seconds, 0.0, 0.0, seconds)
    figures = statistics.snapshot()
    assert (figures["successful_requests"], figures["latency_responses"]) == (120_000, 100_000)
    assert (figures["min_ms"], figures["p95_ms"]) == (1.0, 1000.0)
    assert figures["few_responses_for"] == []
