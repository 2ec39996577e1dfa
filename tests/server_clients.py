"""Clients of a server under test: right ones that send all they can, and unwanted ones."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import requests
from hostile_requests import Attack, http_attacks, picture_attacks, slow_attacks

SENDERS, SLOW_SENDERS = 4, 6
# Past the server's deadline for a whole request, so that it is the one who ends them.
SLOW_SECONDS = 45.0
SLOW_PAUSE_SECONDS = 0.2
KEPT_FAULTS = 20
# What a full server may say to anything: next to the load that these are meant for it may be.
FULL = 503


class ClosedLoop:
    """Clients over kept-alive connections, until the server says that an answer was its last one.

    Attributes:
        answered: The statuses that came back.
        lost: What became of the requests that were accepted and not answered.
    """

    def __init__(self, url: str, content: bytes, clients: int) -> None:
        """Start ``clients`` that post ``content`` to the server at ``url``."""
        self.answered: list[int] = []
        self.lost: list[str] = []
        self._url, self._content = f"{url}/predict", content
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def expect_end(self) -> None:
        """From now on the server may refuse new connections: it is about to be told to stop."""
        self._ending.set()

    def join(self) -> None:
        """Wait until every client has ended."""
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        with requests.Session() as session:
            while True:
                late = self._ending.is_set()
                try:
                    answer = session.post(self._url, data=self._content, timeout=60)
                except requests.RequestException as error:
                    if not (late and "refused" in str(error)):
                        self.lost.append(str(error))
                    return
                self.answered.append(answer.status_code)
                if answer.headers.get("Connection") == "close":
                    return


class ChaosClient:
    """Sends what nobody should, at random, and keeps what came back.

    Some senders draw from the attacks of `hostile_requests.py`; others are slow or silent all the
    time.
    """

    def __init__(self, port: int, rate: float, seed: int) -> None:
        """Prepare ``rate`` attacks a second in all on the server at ``port`` of this machine."""
        self.answers: Counter[int | None] = Counter()  # by status; None: closed without one
        self.faults: list[str] = []  # what was not right, as sentences
        self.slow_senders = 0  # that have connected
        self._lock = threading.Lock()
        self._ending, self._ended = threading.Event(), threading.Event()
        self._port, self._pause_seconds = port, SENDERS / rate
        self._threads = [
            threading.Thread(target=self._send_quickly, args=(random.Random(seed + n),))
            for n in range(SENDERS)
        ]
        # Nobody waits for these: they end with the process.
        self._slow = [
            threading.Thread(target=self._send_slowly, args=(attack,), daemon=True)
            for attack in slow_attacks(SLOW_SECONDS) * (SLOW_SENDERS // 3)
        ]

    def start(self) -> None:
        for thread in [*self._threads, *self._slow]:
            thread.start()

    def expect_end(self) -> None:
        """From now on the server may close or refuse connections."""
        self._ending.set()

    def stop(self) -> None:
        """End; the slow ones are left where they are."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _send_quickly(self, draw: random.Random) -> None:
        attacks = [*picture_attacks(), *http_attacks()]
        while not self._ended.wait(draw.expovariate(1.0 / self._pause_seconds)):
            self.carry_out(draw.choice(attacks))

    def _send_slowly(self, attack: Attack) -> None:
        # A server that has ended, or is full, is not asked again at once.
        while not self._ended.wait(SLOW_PAUSE_SECONDS):
            self.carry_out(attack, is_slow=True)

    def carry_out(self, attack: Attack, *, is_slow: bool = False) -> None:
        def connected() -> None:
            with self._lock:
                self.slow_senders += is_slow

        started = time.monotonic()
        try:
            status, body = attack.carry_out(self._port, connected)
        except OSError as error:
            if not self._ending.is_set():
                seconds = time.monotonic() - started
                self._blame(f"{attack.name}: {error or type(error).__name__} after {seconds:.0f} s")
            return
        with self._lock:
            self.answers[status] += 1
        right = attack.statuses | {FULL} | ({None} if self._ending.is_set() else set())
        if status not in right or b"Traceback" in body:
            self._blame(f"{attack.name}: {status} {body[:200].decode(errors='replace')}")

    def _blame(self, fault: str) -> None:
        if not self._ended.is_set() and len(self.faults) < KEPT_FAULTS:
            self.faults.append(fault)


class ChaosProcess:
    """Chaos clients in processes of their own, one after another, and what they found in sum."""

    def __init__(self, port: int, rate: float, seed: int) -> None:
        self.answers: Counter[int | None] = Counter()
        self.faults: list[str] = []
        self.slow_senders = 0
        self._arguments = port, rate, seed

    @contextmanager
    def running(self) -> Iterator[Connection]:
        """One of them, as long as the block lasts.

        It is told of the server's end by a message, which it answers: from then on it expects it.
        """
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_attack, args=(theirs, *self._arguments), daemon=True
        )
        process.start()
        theirs.close()
        try:
            yield ours
            ours.send("stop")
            answers, faults, slow_senders = ours.recv()
        finally:
            process.kill()
        self.answers += answers
        self.faults += faults
        self.slow_senders += slow_senders


def _attack(pipe: Connection, port: int, rate: float, seed: int) -> None:
    client = ChaosClient(port, rate, seed)
    client.start()
    while pipe.recv() == "the end is near":
        client.expect_end()
        pipe.send("understood")
    client.stop()
    pipe.send((client.answers, client.faults, client.slow_senders))
