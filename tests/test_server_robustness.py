"""The server under slow, silent and greedy clients, and with processes of its own that die."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests
from hostile_requests import encoded, png_chunk, png_of
from PIL import Image
from server_figures import figures_of
from server_process import ServerProcess, jpeg, png, running
from waiting import is_running, limit, wait_until

from workloads.inference.batching import COUNT, RECORD, Engine
from workloads.inference.batching import HEAD as HEADER
from workloads.inference.image_input import PICTURE_BYTES

HEAD = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
BODY_BYTES = 15 << 20
CUT_OFF = encoded("PNG", array=np.zeros((1900, 1900, 3), np.uint8))[:-60]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    with running(tmp_path_factory.mktemp("server"), "--request-seconds", "3") as process:
        yield process


@pytest.fixture(scope="module")
def patient_server(tmp_path_factory) -> Iterator[ServerProcess]:
    """One that waits long: what it refuses, it does for the processor time or the memory."""
    with running(tmp_path_factory.mktemp("patient"), "--request-seconds", "60") as process:
        yield process


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


class Dripping:
    """Connections that send a start at once and then a byte now and then."""

    def __init__(self, server: ServerProcess, count: int, start: bytes, drop: bytes) -> None:
        self.connections = [connect(server) for _ in range(count)]
        for connection in self.connections:
            connection.sendall(start)
        self._drop = drop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()

    def _drip(self) -> None:
        while not self._ended.wait(0.3):
            for connection in self.connections:
                with suppress(OSError):
                    connection.send(self._drop)

    def __enter__(self) -> Dripping:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for connection in self.connections:
            connection.close()


def worst_seconds(server: ServerProcess, requests_: int) -> float:
    """The longest that one of so many good requests took."""
    content, longest = jpeg(), 0.0
    for _ in range(requests_):
        begin = time.monotonic()
        assert server.predict(content).status_code == 200
        longest = max(longest, time.monotonic() - begin)
    return longest


def resident_mib(server: ServerProcess) -> float:
    return figures_of(server.process.pid).resident_mib


def result_of(server: ServerProcess) -> dict:
    (path,) = server.results.glob("inference_server_*.json")
    return json.loads(path.read_text())


# --- slow, silent and greedy clients --------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "drop", "answer"),
    [(b"GET /health HTTP/1.1\r\nX: ", b"x", b""), (HEAD % 1000, b"x", b"HTTP/1.1 408 "),
     (b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n",
      b"HTTP/1.1 408 ")],
    ids=["headers", "body", "chunks"],
)  # fmt: skip
def test_fifty_slow_senders_are_cut_at_their_deadline_while_others_are_served(
    server, start, drop, answer
):
    begin = time.monotonic()
    with Dripping(server, 50, start, drop) as senders:
        assert worst_seconds(server, 20) < limit(2.0)
        received = senders.connections[0].makefile("rb").read()
        assert received.startswith(answer)
        if answer:
            assert b"did not arrive within 3 s" in received
        assert 2.0 < time.monotonic() - begin < limit(6.0)


@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 20_000),
     (b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 20_000),
     (b"", HEAD % len(CUT_OFF) + CUT_OFF)],
    ids=["a body that nobody asked for", "tiny chunks", "pictures that are cut off"],
)  # fmt: skip
def test_one_connection_that_sends_all_it_can_holds_nobody_off(tmp_path, start, piece):
    with (
        running(tmp_path, "--workers", "1", "--request-seconds", "20") as server,
        connect(server) as greedy,
        connect(server) as other,
    ):

        def send() -> None:
            with suppress(OSError):
                greedy.sendall(start)
                while True:
                    greedy.sendall(piece)

        threading.Thread(target=send, daemon=True).start()
        time.sleep(0.3)
        begin = time.monotonic()
        other.sendall(HEAD % len(jpeg()) + jpeg())
        assert other.recv(20).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - begin < limit(2.0)
        with suppress(OSError):  # cut already
            greedy.shutdown(socket.SHUT_RDWR)


def test_two_hundred_silent_connections_hold_nobody_off(tmp_path):
    with (
        running(tmp_path, "--max-connections", "100", "--request-seconds", "30") as server,
        ExitStack() as stack,
    ):
        silent = [stack.enter_context(connect(server)) for _ in range(200)]
        # Those that hold a connection and say nothing make room after a second, in two turns.
        assert worst_seconds(server, 10) < limit(6.0)
        assert silent[0].recv(1) == b""


def test_one_address_cannot_take_all_connections_and_this_machine_may(tmp_path):
    with (
        running(tmp_path, "--max-connections-per-address", "4") as server,
        ExitStack() as stack,
    ):

        def answers_from(address: str) -> list[bytes]:
            where = ("127.0.0.1", server.port)
            opened = [
                stack.enter_context(socket.create_connection(where, 10, (address, 0)))
                for _ in range(12)
            ]
            for connection in opened:
                connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            return [connection.recv(4096).split(b"\r\n")[0] for connection in opened]

        held = answers_from("127.0.0.2")
        assert held.count(b"HTTP/1.1 503 Refused") == 8 and held.count(b"HTTP/1.1 200 OK") == 4
        for other in ("127.0.0.3", "127.0.0.1"):
            assert answers_from(other).count(b"HTTP/1.1 200 OK") >= 4
        assert set(answers_from("127.0.0.1")) == {b"HTTP/1.1 200 OK"}


def test_who_never_reads_his_answers_is_cut(server):
    with connect(server) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.settimeout(1.0)
        with suppress(OSError):
            while True:
                greedy.sendall(b"GET /stats HTTP/1.1\r\n\r\n" * 1000)
        assert worst_seconds(server, 5) < limit(10.0)

        def is_cut() -> bool:
            try:
                greedy.send(b"x")
            except TimeoutError:
                return False
            except OSError:
                return True
            return False

        wait_until(is_cut, "the end of the connection")


def test_forty_unfinished_bodies_of_fifteen_mebibytes_take_bounded_memory(tmp_path):
    with running(tmp_path, "--request-seconds", "20") as server, ExitStack() as stack:
        before = resident_mib(server)
        connections = [stack.enter_context(connect(server)) for _ in range(40)]
        piece = bytes(1 << 20)
        statuses = []
        for connection in connections:
            with suppress(OSError):
                connection.sendall(HEAD % BODY_BYTES)
                for _ in range(14):
                    connection.sendall(piece)
        assert worst_seconds(server, 5) < limit(5.0)
        # Both workers may hold 64 MiB; what the interpreter keeps beside that is bounded too.
        assert resident_mib(server) - before < 300
        for connection in connections:
            connection.settimeout(0.2)
            with suppress(OSError):
                statuses.append(connection.recv(4096)[9:12])
        assert b"503" in statuses


def test_few_open_files_end_in_refusals_and_not_in_a_server_that_only_looks_healthy(tmp_path):
    limit = ("bash", "-c", 'ulimit -n 64 && exec "$@"', "-")
    with running(tmp_path, under=limit) as server:
        with ThreadPoolExecutor(48) as pool:
            futures = [pool.submit(server.predict, jpeg(seed)) for seed in range(96)]
            statuses = {f.result().status_code for f in futures if f.exception() is None}
        assert statuses <= {200, 503} and 200 in statuses
        wait_until(lambda: server.predict(jpeg()).status_code == 200, "a recovery")


# --- pictures that cost more than they weigh ------------------------------------------------------


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose scans repeat."""
    file = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def repeating_tiff() -> bytes:
    """A TIFF of 20x20000 whose rows are all the same million bytes of the file."""
    rows, width, data = 20_000, 20, bytes(1_000_000)
    entries = {256: (4, [width]), 257: (4, [rows]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]),
               273: (4, [8] * rows), 277: (3, [1]), 278: (4, [1]),
               279: (4, [len(data)] * rows)}  # fmt: skip
    directory, extra = b"", b""
    start = 8 + len(data)
    extra_start = start + 2 + 12 * len(entries) + 4
    for tag, (kind, values) in entries.items():
        packed = struct.pack(f"<{len(values)}{'I' if kind == 4 else 'H'}", *values)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place = struct.pack("<I", extra_start + len(extra))
            extra += packed
        directory += struct.pack("<HHI", tag, kind, len(values)) + place
    head = struct.pack("<2sHI", b"II", 42, start)
    return head + data + struct.pack("<H", len(entries)) + directory + bytes(4) + extra


def gif_of_a_huge_frame() -> bytes:
    """A GIF whose screen is small and whose one frame claims 40000x40000."""
    screen = struct.pack("<6sHHBBB", b"GIF89a", 100, 100, 0, 0, 0)
    control = struct.pack("<BBBBHBB", 0x21, 0xF9, 4, 8, 0, 0, 0)
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 40_000, 40_000, 0)
    return screen + control + frame + b"\x02\x02\x4c\x01\x00\x3b"


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [(many_scans(3000), 413, "scans"),
     (png_of(1, 1, png_chunk(b"zzZz") * 1_300_000), 413, "takes too long"),
     (repeating_tiff(), 400, "longer than its file"), (gif_of_a_huge_frame(), 413, "pixels"),
     (many_scans(1), 200, "predictions")],
    ids=["scans", "chunks", "TIFF that repeats", "GIF of a huge frame", "ordinary scans"],
)  # fmt: skip
def test_a_small_file_that_takes_long_or_much_memory_is_refused_before_it_does(
    patient_server, content, status, said
):
    before = resident_mib(patient_server)
    answer = patient_server.predict(content)
    assert answer.status_code == status, answer.text
    assert said in answer.text
    assert resident_mib(patient_server) - before < 100 + len(content) / 2**18
    assert patient_server.predict(jpeg()).status_code == 200


# --- processes that die, and the end --------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced_and_said_and_costs_only_its_own_requests(tmp_path):
    with running(tmp_path, STUB_BATCH_SECONDS=0.3) as server:
        first, second = server.workers()
        sessions = [requests.Session() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            futures = [
                pool.submit(session.post, f"{server.url}/predict", data=jpeg(), timeout=30)
                for session in sessions
            ]
            time.sleep(0.2)
            os.kill(first, signal.SIGKILL)
            answered = [future.exception() is None for future in futures]
        assert any(answered)
        wait_until(lambda: server.stats()["workers"] == 2, "another worker")
        assert second in server.workers() and first not in server.workers()
        for _ in range(5):
            assert server.predict(jpeg()).status_code == 200
        assert server.stop() == 0
        assert f"web worker {first} exited prematurely" in server.log.read_text()
        assert result_of(server)["figures"]["lost_workers"] == 1


def test_a_worker_that_is_stuck_is_replaced(tmp_path):
    with running(tmp_path, "--request-seconds", "1") as server:
        stopped = server.workers()[0]
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: not is_running(stopped), "its end")
        wait_until(lambda: server.stats()["workers"] == 2, "another worker")
        assert server.predict(jpeg()).status_code == 200


@pytest.mark.parametrize("victim", ["engine", "master"])
def test_nobody_is_left_behind_when_the_engine_or_the_web_server_is_killed(tmp_path, victim):
    with running(tmp_path) as server:
        workers = server.workers()
        if victim == "engine":
            server.process.kill()
        else:
            os.kill(psutil.Process(workers[0]).ppid(), signal.SIGKILL)
            assert server.process.wait(60) == 1
            assert "the web server has ended" in server.log.read_text()
        wait_until(lambda: not any(map(is_running, workers)), "the workers' end", limit(2.0))


def test_sigterm_answers_what_is_in_flight_then_writes_the_result(tmp_path):
    flags = ("--max-batch", "4", "--queue-size", "64")
    with running(tmp_path, *flags, STUB_BATCH_SECONDS=0.2) as server, ThreadPoolExecutor(8) as pool:
        workers = server.workers()
        kept_alive = requests.Session()
        assert kept_alive.get(f"{server.url}/health", timeout=10).status_code == 200
        futures = [pool.submit(server.batch_predict, {"batch_size": 12}) for _ in range(8)]
        wait_until(lambda: server.stats()["waiting_images"] >= 12, "12 waiting images")
        # A terminal sends it to every process of the group.
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        # A client with an open connection gets an answer and is told that it was the last one.
        late = kept_alive.get(f"{server.url}/health", timeout=10)
        assert (late.status_code, late.json()["status"]) == (503, "shutting down")
        assert late.headers["Connection"] == "close"
        answers = [future.result() for future in futures]
        assert server.process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200] * 8
    assert not any(map(is_running, workers))
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health", timeout=5)
    result = result_of(server)
    assert result["figures"]["batch_predict"]["successful_requests"] == 8
    assert result["figures"]["unanswered_requests"] == result["figures"]["lost_workers"] == 0
    assert result["identity"]["port"] == server.port
    assert result["settings"]["weights"] == "random"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_whose_log_nobody_takes_any_more_drains_and_writes_its_result(number, tmp_path):
    said = 'exec "$@" 2> >(head -n 3 >&2)'  # its reader leaves when it is ready
    under = ("bash", "-c", said, "server")
    with running(tmp_path, under=under, STUB_BATCH_SECONDS=1) as server:
        wait_until(lambda: "try: curl" in server.log.read_text(), "the end of its log")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.predict, png(3))
            wait_until(lambda: server.stats()["requests_inside"], "a request in flight")
            server.process.send_signal(number)
            assert server.process.wait(60) == 0
            assert answer.result().status_code == 200
    assert result_of(server)["figures"]["successful_requests"] == 1


class GatedModel:
    """A model whose batches end when they are let."""

    def __init__(self) -> None:
        self.is_at_work, self.may_end = threading.Event(), threading.Event()

    def start(self, pictures: list[np.ndarray]) -> np.ndarray:
        return np.zeros((sum(map(len, pictures)), 10), np.float32)

    def finish(self, rows: np.ndarray) -> np.ndarray:
        self.is_at_work.set()
        assert self.may_end.wait(60)
        return rows


@pytest.mark.parametrize("leaves_unread", [False, True])
def test_what_a_worker_says_last_is_heard_before_the_engine_has_closed(leaves_unread):
    args = SimpleNamespace(max_batch=1, max_delay_ms=0.0, queue_size=1, request_seconds=60.0)
    model, asked, may_tell = GatedModel(), threading.Event(), threading.Event()

    def tell(question: str) -> bytes:
        asked.set()
        assert question == "easy" or may_tell.wait(60)
        return b""

    engine = Engine(args, tell)
    engine.start()
    (pictures, engines_pictures), (questions, engines_questions) = (
        socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)
    )
    with os.fdopen(os.memfd_create("pictures"), "wb") as memory:
        memory.truncate(PICTURE_BYTES + 1)
        ends = engines_pictures, engines_questions, memory
        socket.send_fds(engine.worker_door, [b"1"], [end.fileno() for end in ends])
        for end in ends[:2]:
            end.close()
    if leaves_unread:  # answers that lie in its sockets when it ends
        pictures.send(HEADER.pack(b"s", 0) + COUNT.pack(1))
        questions.send(HEADER.pack(b"q", 0) + b"easy")
        for end in (pictures, questions):
            assert select.select([end], [], [], 60)[0]
    engine.model = model
    pictures.send(HEADER.pack(b"s", 1) + COUNT.pack(1))
    assert model.is_at_work.wait(60)
    pictures.send(HEADER.pack(b"r", 0) + RECORD.pack(0, 200, 1, 0.0, *[0.1] * 4))
    asked.clear()
    questions.send(HEADER.pack(b"q", 1) + b"hard")
    assert asked.wait(60)
    questions.send(HEADER.pack(b"e", 0) + COUNT.pack(2))
    for end in (pictures, questions, engine.worker_door):
        end.close()
    may_tell.set()
    model.may_end.set()
    assert engine.close(60.0)
    assert (engine.unanswered, engine.lost_workers) == (2, [])
    assert engine.statistics.snapshot()["successful_requests"] == 1


def test_who_drips_or_says_nothing_does_not_hold_up_a_shutdown(tmp_path):
    with running(tmp_path, "--drain-seconds", "30") as server:
        with Dripping(server, 1, HEAD % 1000, b"x") as senders, connect(server) as silent:
            time.sleep(0.5)
            begin = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begin < limit(6.0)
            assert senders.connections[0].recv(4096).startswith(b"HTTP/1.1 408 ")
            assert silent.recv(1) == b""
        assert result_of(server)["figures"]["unanswered_requests"] == 0


@pytest.mark.parametrize(
    ("batch_seconds", "size", "asked", "said"),
    [(0.1, 1024, 2, "2 requests were cut off by the end; give them more than 1 s"),
     (20.0, 32, 1, "the device was still at work"), (0.0, 0, 0, "exited prematurely")],
    ids=["requests", "one batch", "a stopped worker"],
)  # fmt: skip
def test_what_outlasts_the_drain_is_left_and_told(tmp_path, batch_seconds, size, asked, said):
    flags = ("--drain-seconds", "1", "--max-batch", "8" if size > 32 else "32")
    with (
        running(tmp_path, *flags, STUB_BATCH_SECONDS=batch_seconds) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        worker = server.workers()[0]
        if not asked:
            os.kill(worker, signal.SIGSTOP)
        answers = [pool.submit(server.batch_predict, {"batch_size": size}) for _ in range(asked)]
        wait_until(lambda: server.stats()["requests_inside"] >= asked, "all requests inside")
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < limit(6.0)
        assert not is_running(worker)
        assert all(isinstance(one.exception(), requests.ConnectionError) for one in answers)
    assert said in server.log.read_text()
    figures = result_of(server)["figures"]
    assert figures["unanswered_requests"] == asked and figures["lost_workers"] == (not asked)
