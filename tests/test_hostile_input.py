"""Hostile requests over real sockets: a 4xx that says why, or an answer; nobody else is hurt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from hostile_requests import LIMITS, Attack, http_attacks, picture_attacks
from server_clients import ChaosClient
from server_figures import figures_of
from server_process import ServerProcess, jpeg, running
from waiting import limit


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(tmp_path_factory.mktemp("hostile"), *LIMITS) as process:
        yield process


@pytest.mark.parametrize("attack", [*picture_attacks(), *http_attacks()], ids=lambda one: one.name)
def test_what_is_odd_is_answered_and_what_is_wrong_is_refused_with_a_reason(
    server: ServerProcess, attack: Attack
) -> None:
    assert not any((status or 0) >= 500 for status in attack.statuses)
    status, body = attack.carry_out(server.port)
    assert status in attack.statuses, body
    if status == 200 and attack.pieces[0].startswith(b"POST"):
        assert len(json.loads(body)["predictions"]) == 5
    elif status not in (200, None):
        said = json.loads(body)["error"]
        assert 10 < len(said) < 400
        assert "Traceback" not in said
        assert attack.says in said


def served(server: ServerProcess, seconds: float) -> list[float]:
    """Send right pictures one after another; return how many seconds each took."""
    latencies, good = [], jpeg()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        answer = server.predict(good)
        assert answer.status_code == 200, answer.text
        latencies.append(time.monotonic() - begin)
    return latencies


def test_under_fire_others_are_served_and_nothing_piles_up(server: ServerProcess) -> None:
    chaos = ChaosClient(server.port, rate=100.0, seed=1)
    chaos.start()
    try:
        latencies = served(server, 3.0)
        for _ in range(4):  # buffers and caches grow at first, for 10 s or so
            before = figures_of(server.process.pid)
            latencies += served(server, 5.0)
            after = figures_of(server.process.pid)
            if after.resident_mib < 1.03 * before.resident_mib:
                break
    finally:
        chaos.stop()
    assert len(latencies) > 5
    assert max(latencies) < limit(5)
    assert chaos.faults == []
    assert {200, 400, 404, 413, None} <= set(chaos.answers)
    assert after.resident_mib < 1.03 * before.resident_mib
    assert after.threads <= before.threads
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Decode" not in log  # libtiff's own words
