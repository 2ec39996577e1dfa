"""The most connections that the server holds: others wait, and for no longer than they have to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hostile_requests import Attack, slow_attacks
from server_process import ServerProcess, jpeg, running

from workloads.inference.front_end import OVERDUE_CHECK_SECONDS
from workloads.inference.http_protocol import CROWDED_IDLE_SECONDS, CROWDED_SECONDS

CONNECTIONS = 8
# The deadline that others wait for where nobody makes room.
REQUEST_SECONDS = 20.0
SLOW = {attack.name: attack for attack in slow_attacks(REQUEST_SECONDS)}
# Who holds a connection and sends too little may keep it so long, is told 408 and has the same time
# to read that; each end is noticed at the next look. As many senders as there are connections all
# hold one or are behind whoever waits, so a waiting client is next. The last term is for the work
# itself on a busy machine.
BOUND_SECONDS = 2 * (CROWDED_SECONDS + OVERDUE_CHECK_SECONDS) + 4.0


@pytest.fixture(scope="module", params=["0", "2"], ids=["one process", "two front ends"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with running(
        tmp_path_factory.mktemp("crowded"), "--max-connections", str(CONNECTIONS),
        "--request-seconds", str(REQUEST_SECONDS), "--frontends", request.param,
    ) as process:  # fmt: skip
        yield process


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def ask(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")


def is_answered(connection: socket.socket) -> bool:
    return connection.recv(4096).startswith(b"HTTP/1.1 200 ")


class Redialling:
    """Senders that open the next connection as soon as the server has ended the last one."""

    def __init__(self, port: int, attack: Attack) -> None:
        self._port = port
        self._attack = attack
        self._ended = threading.Event()
        for _ in range(CONNECTIONS):
            threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                self._attack.carry_out(self._port)

    def stop(self) -> None:
        self._ended.set()


@pytest.mark.parametrize("name", ["silence", "dripping header", "dripping body"])
def test_senders_that_hold_every_connection_keep_nobody_waiting_for_their_deadline(
    server: ServerProcess, name: str
) -> None:
    senders = Redialling(server.port, SLOW[name])
    time.sleep(1.0)
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        assert server.predict(jpeg()).status_code == 200
        seconds.append(time.monotonic() - begin)
    senders.stop()
    assert max(seconds) < BOUND_SECONDS < REQUEST_SECONDS


def test_no_more_connections_are_served_than_the_limit_and_steady_senders_keep_theirs(
    server: ServerProcess,
) -> None:
    # So much of it has come that a slow line would have taken longer than this test.
    part, rest = bytes(300_000), bytes(100)
    head = f"POST /predict HTTP/1.1\r\nContent-Length: {len(part + rest)}\r\n\r\n".encode()
    senders = [connect(server) for _ in range(CONNECTIONS)]
    for sender in senders:
        sender.sendall(head + part)
    with connect(server) as waiting:
        ask(waiting)
        waiting.settimeout(2 * CROWDED_SECONDS)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        waiting.settimeout(60)
        senders[0].sendall(rest)
        assert senders[0].recv(4096).startswith(b"HTTP/1.1 400 ")  # zeros are no picture
        senders[0].close()
        assert is_answered(waiting)
    for sender in senders[1:]:
        sender.sendall(rest)
        assert sender.recv(4096).startswith(b"HTTP/1.1 400 ")
        sender.close()


def test_connections_kept_open_between_requests_make_room_for_who_waits(
    server: ServerProcess,
) -> None:
    kept = [connect(server) for _ in range(CONNECTIONS)]
    for connection in kept:
        ask(connection)
        assert is_answered(connection)
    with connect(server) as waiting:
        ask(waiting)
        begin = time.monotonic()
        assert is_answered(waiting)
        assert time.monotonic() - begin < CROWDED_IDLE_SECONDS + BOUND_SECONDS
    for connection in kept:
        assert connection.recv(1) == b""
        connection.close()
