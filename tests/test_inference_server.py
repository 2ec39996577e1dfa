"""The real server process over real HTTP: answers, batching, limits, draining, client contract."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests
from closed_loop import ClosedLoop
from held_client import HeldClient
from server_process import SCRIPT, SMALL, ServerProcess, jpeg, running
from waiting import wait_until

GUIDE_STATS = (
    "total_requests", "success_rate_percent", "average_latency_ms", "p50_ms", "p95_ms", "p99_ms",
    "qps",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with running(folder, "--max-batch", "8", "--max-body-mib", "1") as process:
        yield process


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that allows little of everything."""
    folder = tmp_path_factory.mktemp("strict")
    with running(
        folder, "--max-batch", "1", "--queue-size", "1", "--request-seconds", "2",
        "--max-pixels", "10000", "--max-batch-predict", "4",
    ) as process:  # fmt: skip
        yield process


def test_health_names_the_device_and_the_model(server):
    answer = requests.get(f"{server.url}/health", timeout=10)
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ok"
    assert (body["device"], body["model"], body["weights"]) == ("cpu", "resnet18", "random")


def test_multipart_and_raw_uploads_give_the_same_five_classes(server):
    content = jpeg(size=300)
    multipart = requests.post(
        f"{server.url}/predict", files={"image": ("a.jpg", content)}, timeout=30
    )
    raw = server.predict(content)
    assert multipart.status_code == raw.status_code == 200
    top = multipart.json()["predictions"]
    assert [entry["rank"] for entry in top] == [1, 2, 3, 4, 5]
    assert all(isinstance(entry["class_name"], str) for entry in top)
    probabilities = [entry["probability"] for entry in top]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1
    assert raw.json()["predictions"] == top
    assert raw.json()["weights"] == "random"
    assert raw.json()["latency_ms"] >= raw.json()["gpu_ms"] > 0


def test_requests_that_arrive_together_are_batched(server):
    content = jpeg(1)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(server.predict, [content] * 24))
    assert {answer.status_code for answer in answers} == {200}
    assert max(answer.json()["batch_size"] for answer in answers) >= 4
    # Batched or alone, a picture gets the same classes.
    tops = {tuple(p["class_id"] for p in answer.json()["predictions"]) for answer in answers}
    assert len(tops) == 1
    histogram = server.stats()["batch_size_histogram"]
    assert max(int(size) for size in histogram) <= 8


def test_batch_predict_defaults_to_32_and_splits_what_is_larger_than_a_batch(server):
    for body, size, batches in ((None, 32, 4), ({}, 32, 4), ({"batch_size": 3}, 3, 1),
                                ({"batch_size": 20}, 20, 3)):  # fmt: skip
        answer = (
            requests.post(f"{server.url}/batch_predict", timeout=60)
            if body is None
            else server.batch_predict(body)
        )
        assert answer.status_code == 200
        figures = answer.json()
        assert (figures["batch_size"], figures["batches"]) == (size, batches)
        assert figures["samples_per_second"] == pytest.approx(
            size / figures["latency_ms"] * 1e3, rel=1e-6
        )


def test_stats_count_what_was_answered(server):
    before = server.stats()
    assert server.predict(jpeg(2)).status_code == 200
    assert server.predict(b"no picture").status_code == 400
    after = server.stats()
    assert all(name in after for name in GUIDE_STATS)
    assert after["total_requests"] == before["total_requests"] + 2
    assert after["successful_requests"] == before["successful_requests"] + 1
    assert after["rejected_requests"] == before["rejected_requests"] + 1
    assert after["failed_requests"] == before["failed_requests"] == 0
    assert after["success_rate_percent"] == pytest.approx(
        100 * after["successful_requests"] / after["total_requests"]
    )
    assert 0 < after["p50_ms"] <= after["p95_ms"] <= after["p99_ms"] <= after["max_ms"]
    assert after["average_latency_ms"] > 0 and after["qps"] > 0
    assert after["latency_parts_ms"]["gpu"]["mean_ms"] > 0


@pytest.mark.parametrize(
    ("body", "said"),
    [(b'{"batch_size": 0}', "from 1 to 1024"), (b'{"batch_size": -1}', "from 1 to 1024"),
     (b'{"batch_size": 1e9}', "whole number"), (b'{"batch_size": 2000}', "from 1 to 1024"),
     (b'{"batch_size": NaN}', "whole number"), (b'{"batch_size": "8"}', "whole number"),
     (b'{"batch_size": true}', "whole number"), (b'{"batch_size": null}', "whole number"),
     (b"[1]", "JSON object"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"),
     (b"[" * 100_000, "not valid JSON")],
)  # fmt: skip
def test_a_bad_batch_size_is_a_400_that_says_why(server, body, said):
    answer = requests.post(f"{server.url}/batch_predict", data=body, timeout=10)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_bad_upload_is_a_400_that_says_why(server):
    def post(**arguments):
        return requests.post(f"{server.url}/predict", timeout=10, **arguments)

    two = [("image", ("a.jpg", jpeg())), ("image", ("b.jpg", jpeg()))]
    for answer, said in (
        (post(), "no image"),
        (post(files={"picture": ("a.jpg", jpeg())}), "fields found: 'picture'"),
        (post(files=two), "2 fields named 'image'"),
        (post(files={"image": ("a.jpg", b"")}), "empty"),
        (post(data=jpeg()[:1000]), "cannot decode"),
        (post(data=b"x", headers={"Content-Type": "multipart/form-data"}), "no file"),
        (post(data=b'{"image": 1}', headers={"Content-Type": "application/json"}), "not one of"),
    ):
        assert answer.status_code == 400
        assert said in answer.json()["error"]


def test_wrong_paths_and_methods_are_json_errors(server):
    for method, path, status in (
        ("GET", "/nowhere", 404), ("GET", "/predict", 405), ("PUT", "/stats", 405),
        ("BREW", "/health", 405), ("BREW", "/nowhere", 404),
    ):  # fmt: skip
        answer = requests.request(method, server.url + path, timeout=10)
        assert answer.status_code == status
        assert answer.json()["error"]
        if status == 405:
            assert answer.headers["Allow"] == ("POST" if path == "/predict" else "GET")


def test_a_method_that_nobody_knows_ends_neither_the_connection_nor_the_requests_after_it(server):
    brew = b"BREW /health HTTP/1.1\r\nContent-Length: 3\r\n\r\npot"
    answers = exchange(server.port, brew + brew.replace(b"BREW", b"PUT"), half_close=True)
    # The parser gives up a line of requests at an unknown method; that is not the first here.
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answers) == [b"405", b"405"]
    assert exchange(server.port, b"PUT" + brew[4:] + brew).startswith(b"HTTP/1.1 400 ")
    # Its first line and its body may come apart.
    pieces = brew[:25], brew[25:-2], brew[-2:]
    assert exchange(server.port, *pieces, half_close=True).startswith(b"HTTP/1.1 405 ")


def test_too_long_a_body_is_a_413(server):
    answer = server.predict(b"\0" * (1_500_000))
    assert answer.status_code == 413
    assert "too large" in answer.json()["error"]
    # Far above the limit it is refused by its announced length, before it is sent.
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
        )
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too large" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"].encode()


def exchange(port: int, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send raw bytes and return everything that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


def test_what_the_http_parser_refuses_is_json_too(server):
    for request, status in (
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
        (b"POST /predict HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"400"),
        (b"BREW\r\n\r\n", b"400"),
    ):
        head, _, body = exchange(server.port, request).partition(b"\r\n\r\n")
        assert head.split()[1] == status
        assert json.loads(body)["error"]
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


def test_headers_that_drip_in_without_end_are_refused_too(server):
    pieces = [b"GET /health HTTP/1.1\r\nX: ", *[b"x" * 1000] * 80]
    answer = exchange(server.port, *pieces)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


def test_requests_sent_ahead_are_answered_in_order_and_the_last_one_closes(server):
    content = jpeg()
    predict = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    answers = exchange(
        server.port,
        predict + b"GET /nowhere HTTP/1.1\r\n\r\n" * 20 + b"GET /health HTTP/1.0\r\n\r\n",
    )
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", answers)
    assert statuses == [b"200", *[b"404"] * 20, b"200"]
    assert answers.count(b"Connection: close") == 1


def test_a_client_that_asks_first_is_told_to_go_on(server):
    content = jpeg()
    head = b"POST /predict HTTP/1.1\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_an_offer_of_another_protocol_is_passed_over(server):
    content = jpeg()
    head = (
        b"POST /predict HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABk\r\nContent-Length: %d\r\n\r\n" % len(content)
    )
    answer = exchange(server.port, head + content[:100], content[100:])
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_head_and_options_have_no_body(server):
    head = requests.head(f"{server.url}/health", timeout=10)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) > 0
    options = requests.options(f"{server.url}/predict", timeout=10)
    assert (options.status_code, options.headers["Allow"]) == (200, "POST")


def test_an_endless_chunked_body_is_cut_at_the_limit(server):
    start = b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"\0" * 0x10000 + b"\r\n"
    answer = exchange(server.port, start, *[chunk] * 60)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


def test_a_chunked_upload_is_answered(server):
    content = jpeg()
    answer = requests.post(f"{server.url}/predict", data=iter([content[:999], content[999:]]))
    assert answer.status_code == 200


def test_a_client_that_leaves_in_the_middle_harms_nobody(server):
    content = jpeg()
    head = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content)
    for pieces, status in (((head, content[:100]), b"400"), ((head, content), b"200"),
                           ((b"GET /he",), b"400")):  # fmt: skip
        answer = exchange(server.port, *pieces, half_close=True)
        assert answer.split()[1] == status
    assert server.predict(content).status_code == 200


def test_too_many_pixels_are_a_413(strict_server):
    assert strict_server.predict(jpeg(size=100)).status_code == 200
    answer = strict_server.predict(jpeg(size=101))
    assert answer.status_code == 413
    assert "101x101" in answer.json()["error"]


def test_the_largest_synthetic_batch_is_a_flag(strict_server):
    assert strict_server.batch_predict({"batch_size": 4}).status_code == 200
    assert strict_server.batch_predict({"batch_size": 5}).status_code == 400


def test_a_full_server_refuses_at_once_and_stays_healthy(strict_server):
    before = strict_server.stats()
    content = jpeg(size=90)
    with ThreadPoolExecutor(17) as pool:
        futures = [pool.submit(strict_server.predict, content) for _ in range(16)]
        health = pool.submit(requests.get, f"{strict_server.url}/health", timeout=10)
        answers = [future.result() for future in futures]
    assert health.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["error"] for answer in refused)
    after = strict_server.stats()
    assert after["total_requests"] == before["total_requests"] + 16
    assert after["failed_requests"] == before["failed_requests"] + len(refused)
    assert strict_server.predict(content).status_code == 200


def test_slow_and_silent_senders_are_ended_while_others_are_served(strict_server):
    address = ("127.0.0.1", strict_server.port)
    silent = socket.create_connection(address, timeout=10)
    dripping = socket.create_connection(address, timeout=10)
    dripping.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(0.2):
            try:
                dripping.send(b"x")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    try:
        assert strict_server.predict(jpeg(size=90)).status_code == 200
        assert silent.recv(1) == b""
        answer = dripping.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 2 s" in answer
        assert time.monotonic() - started < 8
    finally:
        ended.set()
        thread.join()
        silent.close()
        dripping.close()


def test_sigterm_answers_what_is_in_flight_then_writes_the_result(tmp_path):
    with running(tmp_path, "--max-batch", "4") as server, ThreadPoolExecutor(8) as pool:
        kept_alive = requests.Session()
        assert kept_alive.get(f"{server.url}/health", timeout=10).status_code == 200
        futures = [pool.submit(server.batch_predict, {"batch_size": 12}) for _ in range(8)]
        wait_until(
            lambda: server.stats()["waiting_images"] >= 12, "12 waiting images", poll_seconds=0.01
        )
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        # A client with an open connection gets an answer and is told that it was the last one.
        late = kept_alive.get(f"{server.url}/health", timeout=10)
        assert (late.status_code, late.json()["status"]) == (503, "shutting down")
        assert late.headers["Connection"] == "close"
        answers = [future.result() for future in futures]
        assert server.process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200] * 8
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health", timeout=5)
    (path,) = server.results.glob("inference_server_*.json")
    result = json.loads(path.read_text())
    assert result["figures"]["total_requests"] == result["figures"]["successful_requests"] == 8
    assert result["figures"]["unanswered_requests"] == 0
    assert result["identity"]["port"] == server.port
    assert result["settings"]["weights"] == "random"


def test_sigterm_under_load_loses_no_request(tmp_path):
    with running(tmp_path, "--max-batch", "4") as server:
        clients = ClosedLoop(server.url, jpeg(size=64), 6)
        time.sleep(1.0)
        clients.expect_end()
        assert server.stop() == 0
        clients.join()
    assert clients.lost == []
    assert set(clients.answered) == {200}


def test_a_client_on_the_leash_is_healthy_only_when_warm_and_drains_on_stop(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with HeldClient(
        tmp_path, "workloads/inference/inference_server.py", *SMALL, "--port", str(port)
    ) as client:
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


def test_a_taken_port_is_one_sentence_and_exit_code_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            (sys.executable, str(SCRIPT), *SMALL, "--port", str(port)),
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr and "Traceback" not in done.stderr
