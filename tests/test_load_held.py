"""A slice of the long load on the server (`load_held.py`), and its bounds, which can be broken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chaos_client import SLOW, ChaosClient
from held_load_bounds import HeldLoad, judged, quarter_medians, quarter_p99_ms

PROGRAM = Path(__file__).with_name("load_held.py")
WELL = HeldLoad(
    requests=100, failures={}, hostile_requests=9, slow_senders=6, chaos_faults=[],
    resident_mib=[500.0, 501.0, 502.0, 509.9], gpu_memory_mib=[900.0, 901.0, 902.0, 903.0],
    p99_ms=[10.0, 19.0, 12.0, 11.0], threads=(20, 20), open_files=(40, 39),
    drain_answers={200: 50}, drain_lost=[], drain_seconds=2.0, drain_limit_seconds=30.0,
    exit_code=0, unanswered=0,
)  # fmt: skip


def test_a_slice_of_the_load_loses_nothing_and_leaves_nothing_open(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    flags = ("--requests", "2000", "--round-seconds", "1", "--lead-in-seconds", "1", "--stub",
             "--device", "cpu")  # fmt: skip
    done = subprocess.run((sys.executable, str(PROGRAM), *flags, "--json", str(file)),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(file.read_text())
    # So short a load on a busy machine says nothing about memory and p99.
    broken = [name for name, kept in figures["bounds"].items() if not kept]
    assert [name for name in broken if not name.startswith(("memory", "p99"))] == [], done.stdout
    assert figures["requests"] == 2000
    assert figures["lead_in_requests"] == math.ceil(figures["offered_per_second"])
    assert figures["lead_in_p99_ms"] > 0
    assert figures["chaos_requests"] > 10
    assert 0 < figures["hostile_requests"] < figures["chaos_requests"]
    assert figures["slow_senders"] >= 6
    assert figures["gpu_memory_mib"] is None
    assert done.stdout.splitlines()[-1].startswith(("2000 requests beside", "kept: "))


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("no good request", {"failures": {"HTTP 500": 1}}),
        ("no good request", {"requests": 0}),
        ("every hostile request", {"chaos_faults": ["bomb: 500"]}),
        ("memory", {"resident_mib": [500.0, 503.0, 507.0, 511.0]}),
        ("memory", {"resident_mib": [None, 500.0, 500.0, 500.0]}),
        ("GPU memory", {"gpu_memory_mib": [900.0, 906.0, 912.0, 918.1]}),
        ("GPU memory", {"gpu_memory_mib": [900.0, 900.0, 900.0, None]}),
        ("hostile requests were sent", {"hostile_requests": 0}),
        ("slow senders", {"slow_senders": 0}),
        ("p99", {"p99_ms": [10.0, 10.0, 20.1, 10.0]}),
        ("p99", {"p99_ms": [10.0, None, 10.0, 10.0]}),
        ("no more threads", {"threads": (20, 21)}),
        ("no more open files", {"open_files": (40, 41)}),
        ("SIGTERM under load", {"drain_lost": ["reset"]}),
        ("SIGTERM under load", {"drain_answers": {200: 9, 503: 1}}),
        ("SIGTERM under load", {"drain_answers": {}}),
        ("SIGTERM under load", {"unanswered": None}),
        ("SIGTERM: ended", {"exit_code": 1}),
        ("SIGTERM: ended", {"drain_seconds": 30.1}),
    ],
)
def test_each_bound_is_broken_by_its_fault_alone(broken: str, fault: dict) -> None:
    assert all(judged(WELL).values())
    (name,) = [name for name, kept in judged(replace(WELL, **fault)).items() if not kept]
    assert name.startswith(broken)


def test_without_a_gpu_nothing_is_said_of_its_memory() -> None:
    bounds = judged(replace(WELL, gpu_memory_mib=None))
    assert all(bounds.values())
    assert not [name for name in bounds if name.startswith("GPU")]


def test_a_leaking_server_is_seen_in_the_medians_of_the_quarters() -> None:
    seconds = np.arange(100.0)
    samples = np.stack((seconds, 500 + seconds), axis=1)
    assert quarter_medians(samples) == [512.0, 537.0, 562.0, 587.0]
    assert quarter_medians([]) == [None] * 4


def test_the_p99_of_a_quarter_is_of_what_was_answered() -> None:
    latency = np.repeat([0.01, 0.02, 0.03, 9.0], 100)
    ok = latency < 1
    assert quarter_p99_ms(latency, ok) == [pytest.approx(10), pytest.approx(20),
                                           pytest.approx(30), None]  # fmt: skip


def test_wrong_flags_end_in_a_usage_error() -> None:
    done = subprocess.run((sys.executable, str(PROGRAM), "--requests", "0"),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "--requests" in done.stderr


class Scripted:
    """Stands for an attack with an answer."""

    name, statuses = "scripted", frozenset({400})

    def __init__(self, status: int | Exception | None) -> None:
        self._status = status

    def carry_out(self, port: int, on_connected: Callable[[], None]) -> tuple[int | None, bytes]:
        if isinstance(self._status, Exception):
            raise self._status
        on_connected()
        return self._status, b""


@pytest.mark.parametrize(
    ("status", "wrong", "wrong_at_the_end"),
    [(400, False, False), (503, False, False), (200, True, True), (500, True, True),
     (None, True, False), (ConnectionRefusedError("refused"), True, False)],
)  # fmt: skip
def test_only_a_server_that_is_told_to_stop_may_close_and_refuse_connections(
    status: int | Exception | None, wrong: bool, wrong_at_the_end: bool
) -> None:
    chaos = ChaosClient(port=0, rate=1.0, seed=1)
    chaos._carry_out(SLOW, Scripted(status))
    assert bool(chaos.faults) is wrong
    assert chaos.slow_senders == (not isinstance(status, Exception))
    chaos.faults.clear()
    chaos.expect_end()
    chaos._carry_out(SLOW, Scripted(status))
    assert bool(chaos.faults) is wrong_at_the_end
