"""A server with front ends as processes: one server to its clients, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from server_process import ServerProcess, jpeg, running
from waiting import is_running, wait_until

from workloads.inference.front_end_links import SILENT_SECONDS


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("front-ends")
    with running(folder, "--frontends", "2", "--max-batch", "4", "--queue-size", "8") as process:
        yield process


def front_ends(server: ServerProcess) -> list[int]:
    """Return the process ids of the front ends."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return sorted(
        pid
        for pid in children
        if b"front_end_process.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def open_sockets(pid: int) -> int:
    sockets = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # Closed since the folder was read.
            sockets += os.readlink(path).startswith("socket:")
    return sockets


def post(session: requests.Session, server: ServerProcess, content: bytes) -> requests.Response:
    return session.post(f"{server.url}/predict", files={"image": ("a.jpg", content)}, timeout=30)


def test_front_ends_never_import_torch(server):
    for pid in front_ends(server):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_connections_are_shared_out_evenly(server):
    pids = front_ends(server)
    before = [open_sockets(pid) for pid in pids]
    sessions = [requests.Session() for _ in range(12)]
    for session in sessions:
        assert session.get(f"{server.url}/health", timeout=10).status_code == 200
    opened = [open_sockets(pid) - count for pid, count in zip(pids, before, strict=True)]
    for session in sessions:
        session.close()
    assert opened == [6, 6]
    wait_until(lambda: [open_sockets(pid) for pid in pids] == before, "every socket closed")


def test_every_front_end_gives_the_same_answers(server):
    for _ in range(2):  # Each connection goes to another front end.
        with requests.Session() as session:
            answers = [post(session, server, jpeg(seed)).json() for seed in (1, 2, 1)]
            tops = [[entry["class_id"] for entry in answer["predictions"]] for answer in answers]
            assert tops[0] == tops[2] != tops[1]
            assert answers[0]["latency_ms"] > answers[0]["gpu_ms"] > 0
            batch = session.post(
                f"{server.url}/batch_predict", json={"batch_size": 10}, timeout=30
            ).json()
            assert (batch["batch_size"], batch["batches"]) == (10, 3)
            bad = session.post(f"{server.url}/predict", data=b"no picture", timeout=30)
            assert bad.status_code == 400 and "cannot decode" in bad.json()["error"]


def test_statistics_are_the_same_from_every_front_end(server):
    sessions = [requests.Session() for _ in range(2)]
    before = server.stats()["successful_requests"]
    for _ in range(2):
        assert {post(session, server, jpeg()).status_code for session in sessions} == {200}
    for session in sessions:
        stats = session.get(f"{server.url}/stats", timeout=10).json()
        assert stats["successful_requests"] == before + 4
        assert stats["front_ends"] == 2
        assert stats["latency_parts_ms"]["queue"]["p99_ms"] >= 0
        metrics = session.get(f"{server.url}/metrics", timeout=10)
        assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        counter = 'inference_server_requests_total{endpoint="predict",status="200"}'
        (line,) = [line for line in metrics.text.splitlines() if line.startswith(counter)]
        predicted = stats["endpoints"]["predict"]["statuses"]["200"]
        assert float(line.split()[-1]) == predicted
        session.close()


def test_one_bound_holds_over_all_front_ends(server):
    before = server.stats()
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(server.predict, [jpeg()] * 48))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    # Each front end alone would let twelve in; both look at the sum.
    after = server.stats()
    assert after["total_requests"] == before["total_requests"] + 48
    assert after["statuses"]["503"] - before["statuses"].get("503", 0) == len(refused)
    assert server.predict(jpeg()).status_code == 200


def test_ctrl_c_drains_every_front_end_and_the_result_has_all_requests(server):
    # The last test of this server: it ends it.
    pids = front_ends(server)
    before = server.stats()["successful_requests"]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(server.batch_predict, {"batch_size": 24}) for _ in range(2)]
        wait_until(lambda: server.stats()["waiting_images"] >= 4, "4 waiting images")
        # A terminal sends it to every process of the group.
        for pid in (server.process.pid, *pids):
            os.kill(pid, signal.SIGINT)
        assert [future.result().status_code for future in futures] == [200] * 2
    assert server.process.wait(60) == 0
    assert not any(map(is_running, pids))
    (path,) = server.results.glob("inference_server_*.json")
    result = json.loads(path.read_text())
    assert result["figures"]["successful_requests"] == before + 2
    assert result["figures"]["unanswered_requests"] == result["figures"]["lost_front_ends"] == 0
    assert result["settings"]["front_ends"] == result["identity"]["front_ends"] == 2


def test_a_killed_front_end_is_said_and_the_others_go_on_until_none_is_left(tmp_path):
    with running(tmp_path, "--frontends", "2") as server:
        first, second = front_ends(server)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: "the server goes on with 1" in server.log.read_text(), "its words")
        assert f"(pid {first}) ended unexpectedly (signal 9)" in server.log.read_text()
        for _ in range(3):
            assert server.predict(jpeg()).status_code == 200
        assert server.stats()["front_ends"] == 1
        os.kill(second, signal.SIGKILL)
        assert server.process.wait(30) == 1
        last_line = server.log.read_text().strip().splitlines()[-1]
        assert "no other is left to answer" in last_line


def crowd(server: ServerProcess) -> list[socket.socket]:
    """Open more connections than the socket of a stopped front end takes (about 280)."""
    return [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(700)]


def is_served(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    return connection.recv(64).startswith(b"HTTP/1.1 200 ")


def test_a_stopped_front_end_keeps_nobody_else_waiting_and_answers_when_it_goes_on(tmp_path):
    with running(tmp_path, "--frontends", "2", "--max-connections", "2000") as server:
        stopped = front_ends(server)[0]
        os.kill(stopped, signal.SIGSTOP)
        connections = crowd(server)
        for _ in range(5):
            assert server.predict(jpeg()).status_code == 200
        os.kill(stopped, signal.SIGCONT)
        assert all(map(is_served, connections))
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(SILENT_SECONDS + 0.5)
        # It has the fewest connections by far, and still none is given to it.
        for connection in connections:
            connection.close()
        with ThreadPoolExecutor(8) as pool:
            assert {a.status_code for a in pool.map(server.predict, [jpeg()] * 24)} == {200}
        os.kill(stopped, signal.SIGKILL)
        wait_until(lambda: "the server goes on with 1" in server.log.read_text(), "its words")
        assert server.predict(jpeg()).status_code == 200
        assert server.stop() == 0


def test_a_server_ends_in_time_although_a_front_end_is_stopped(tmp_path):
    flags = ("--frontends", "2", "--max-connections", "2000", "--drain-seconds", "10")
    with running(tmp_path, *flags) as server:
        stopped = front_ends(server)[0]
        os.kill(stopped, signal.SIGSTOP)
        connections = crowd(server)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 10.0
        for connection in connections:
            connection.close()
        assert not is_running(stopped)
        assert f"(pid {stopped}) did not end by itself and was killed" in server.log.read_text()
        (path,) = server.results.glob("inference_server_*.json")
        assert json.loads(path.read_text())["figures"]["lost_front_ends"] == 1


def test_clients_are_turned_away_while_every_front_end_is_stopped(tmp_path):
    with running(tmp_path, "--frontends", "1", "--max-connections", "2000") as server:
        (stopped,) = front_ends(server)
        os.kill(stopped, signal.SIGSTOP)
        connections = crowd(server)
        refused = requests.get(f"{server.url}/health", timeout=10)
        assert refused.status_code == 503
        assert "no front end takes connections" in refused.json()["error"]
        os.kill(stopped, signal.SIGCONT)
        assert is_served(connections[0])
        assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
        for connection in connections:
            connection.close()


def test_nobody_is_left_behind_when_the_gpu_process_is_killed(tmp_path):
    with running(tmp_path, "--frontends", "2") as server:
        pids = front_ends(server)
        assert len(pids) == 2
        server.process.kill()
        wait_until(lambda: not any(map(is_running, pids)), "the end of the front ends")
