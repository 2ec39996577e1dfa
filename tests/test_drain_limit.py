"""A shutdown whose work outlasts --drain-seconds ends in time, and tells what was cut off."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from server_figures import processes_of
from server_process import ServerProcess, running
from waiting import is_running, wait_until

# Past the limit until the result file is there: the moment that a device is left at any rate, and
# a busy machine. The interpreter's end comes on top: PyTorch takes a second or two for it there.
RESULT_MARGIN_SECONDS = 1.0
END_MARGIN_SECONDS = 5.0
INSIDE = "inference_server_requests_inside"


@contextmanager
def long_work(server: ServerProcess) -> Iterator[None]:
    """A batch that takes far longer than the limit, and an upload that does."""
    threads = [threading.Thread(target=each, args=(server,)) for each in (ask_for_much, send_much)]
    for thread in threads:
        thread.start()
    wait_until(lambda: inside(server) == 1, "a request inside")
    time.sleep(0.3)
    yield
    for thread in threads:
        thread.join()


def ask_for_much(server: ServerProcess) -> None:
    with suppress(requests.ConnectionError):
        server.batch_predict({"batch_size": 1024})


def send_much(server: ServerProcess, piece: bytes = bytes(10_000)) -> None:
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", server.port)) as sender:
        sender.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n")
        while True:
            time.sleep(0.1)
            sender.sendall(piece)


def inside(server: ServerProcess) -> int:
    metrics = requests.get(f"{server.url}/metrics", timeout=10).text
    (line,) = [each for each in metrics.splitlines() if each.startswith(INSIDE)]
    return int(float(line.split()[-1]))


def stop_in_time(server: ServerProcess, limit_seconds: float) -> dict:
    """End the server; return the figures of its result, which was there in time."""
    pids = processes_of(server.process.pid)
    sent, begin = time.time(), time.monotonic()
    assert server.stop() == 0, server.log.read_text()
    assert time.monotonic() - begin < limit_seconds + END_MARGIN_SECONDS
    assert not any(map(is_running, pids))
    (path,) = server.results.glob("inference_server_*.json")
    assert path.stat().st_mtime - sent < limit_seconds + RESULT_MARGIN_SECONDS
    return json.loads(path.read_text())["figures"]


@pytest.mark.parametrize("frontends", ["0", "2"], ids=["one process", "two front ends"])
def test_what_outlasts_the_drain_is_cut_off_and_counted(tmp_path: Path, frontends: str) -> None:
    flags = ("--drain-seconds", "2", "--max-batch", "8", "--frontends", frontends)
    with running(tmp_path, *flags) as server:
        with long_work(server):
            figures = stop_in_time(server, 2.0)
        assert figures["unanswered_requests"] == 2
        assert figures["lost_front_ends"] == 0
        assert "2 requests were cut off by the end; give them more than 2 s" in (
            server.log.read_text()
        )


def test_a_signal_right_after_the_word_that_it_is_ready_begins_a_drain(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", "10") as server:
        assert stop_in_time(server, 10.0)["unanswered_requests"] == 0


def test_who_drips_or_says_nothing_does_not_hold_up_a_shutdown(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", "30") as server:
        address = ("127.0.0.1", server.port)
        with (
            socket.create_connection(address, timeout=30) as dripping,
            socket.create_connection(address, timeout=30) as silent,
        ):
            dripping.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nx")
            assert server.stats()["total_requests"] == 0  # by then the server has read that
            figures = stop_in_time(server, 3.0)
            assert dripping.recv(4096).startswith(b"HTTP/1.1 408 ")
            assert silent.recv(1) == b""
        assert figures["unanswered_requests"] == 0


def test_one_batch_that_outlasts_the_drain_is_left_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one thread a batch takes seconds, and nothing ends one that is under way.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running(tmp_path, "--drain-seconds", "1", "--max-batch", "96") as server:
        with long_work(server):
            figures = stop_in_time(server, 1.0)
        assert figures["unanswered_requests"] == 2
        assert "the device was still at work" in server.log.read_text()
        assert "terminate called" not in server.log.read_text()


def test_a_stopped_front_end_does_not_outlast_a_short_drain(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", "1", "--frontends", "1") as server:
        (front_end,) = processes_of(server.process.pid)[1:]
        os.kill(front_end, signal.SIGSTOP)
        assert stop_in_time(server, 1.0)["lost_front_ends"] == 1
        assert "did not end by itself and was killed" in server.log.read_text()
