"""A client that sends what nobody should, at random, beside those whose requests are right.

    python3 tests/chaos_client.py --port 5000 --rate 20 --seed 1     # until its input ends

Some senders draw from the attacks of `hostile_requests.py`; others are slow or silent all the time.
The line `ending` on its input says that the server is about to be told to stop: from then on it may
close or refuse connections. It ends with its input and prints what came back as JSON: how many
attacks there were, the answers by kind of attack and status, the answers that were not right, and
how many slow senders have connected.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from hostile_requests import Attack, http_attacks, picture_attacks, slow_attacks  # noqa: E402

SENDERS = 4
SLOW_SENDERS = 6
# Past the server's deadline for a whole request, so that it is the one who ends them.
SLOW_SECONDS = 45.0
SLOW_PAUSE_SECONDS = 0.2
KEPT_FAULTS = 20
ENDING = "ending"
# What a full server may say to anything: beside the load that this client is meant for it may be.
FULL = 503
PICTURE, HTTP, SLOW = "pictures", "broken HTTP", "slow senders"


class ChaosClient:
    """Senders on threads, and what they found."""

    def __init__(self, port: int, rate: float, seed: int) -> None:
        """Prepare ``rate`` attacks a second in all on the server at ``port`` of this machine."""
        # By kind of attack and status; None: closed without one.
        self.answers: Counter[tuple[str, int | None]] = Counter()
        self.faults: list[str] = []  # what was not right, as sentences
        self.slow_senders = 0  # that have connected
        self._counting = threading.Lock()
        self._ending = threading.Event()
        self._port = port
        self._pause_seconds = SENDERS / rate
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_quickly, args=(random.Random(seed + n),))
            for n in range(SENDERS)
        ]
        # Nobody waits for these: they end with the process.
        self._slow = [
            threading.Thread(target=self._send_slowly, args=(attack,), daemon=True)
            for attack in slow_attacks(SLOW_SECONDS) * (SLOW_SENDERS // 3)
        ]

    @property
    def statuses(self) -> set[int | None]:
        return {status for _, status in self.answers}

    def start(self) -> None:
        for thread in [*self._threads, *self._slow]:
            thread.start()

    def expect_end(self) -> None:
        self._ending.set()

    def stop(self) -> None:
        """End; the slow ones are left where they are."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _send_quickly(self, draw: random.Random) -> None:
        attacks = [(PICTURE, attack) for attack in picture_attacks()]
        attacks += [(HTTP, attack) for attack in http_attacks()]
        while not self._ended.wait(draw.expovariate(1.0 / self._pause_seconds)):
            self._carry_out(*draw.choice(attacks))

    def _send_slowly(self, attack: Attack) -> None:
        # A server that has ended, or is full, is not asked again at once.
        while not self._ended.wait(SLOW_PAUSE_SECONDS):
            self._carry_out(SLOW, attack)

    def _carry_out(self, kind: str, attack: Attack) -> None:
        started = time.monotonic()
        try:
            status, body = attack.carry_out(self._port, lambda: self._note_connected(kind))
        except OSError as error:
            if self._ending.is_set():
                return
            self._blame(f"{attack.name}: {error or type(error).__name__} "
                        f"after {time.monotonic() - started:.0f} s")  # fmt: skip
            return
        with self._counting:
            self.answers[kind, status] += 1
        right = attack.statuses | {FULL} | ({None} if self._ending.is_set() else set())
        if status not in right or b"Traceback" in body:
            self._blame(f"{attack.name}: {status} {body[:200].decode(errors='replace')}")

    def _note_connected(self, kind: str) -> None:
        if kind == SLOW:
            with self._counting:
                self.slow_senders += 1

    def _blame(self, fault: str) -> None:
        if not self._ended.is_set() and len(self.faults) < KEPT_FAULTS:
            self.faults.append(fault)

    def report(self) -> dict:
        by_kind: dict[str, dict[str, int]] = {PICTURE: {}, HTTP: {}, SLOW: {}}
        for (kind, status), times in self.answers.most_common():
            by_kind[kind][str(status)] = times
        return {
            "attacks": sum(self.answers.values()),
            "answers": by_kind,
            "slow_senders": self.slow_senders,
            "faults": self.faults,
        }


def main() -> None:
    """Attack until the standard input ends, then say what came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=20.0, metavar="R", help="attacks a second")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    client = ChaosClient(options.port, options.rate, options.seed)
    client.start()
    for line in sys.stdin:
        if line.strip() == ENDING:
            client.expect_end()
    client.stop()
    print(json.dumps(client.report()))


if __name__ == "__main__":
    main()
