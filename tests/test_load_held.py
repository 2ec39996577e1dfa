"""A slice of the long load on the server (`load_held.py`), and its bounds, which can be broken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from load_held import judged, p99_ms, quarter_medians

PROGRAM = Path(__file__).with_name("load_held.py")
WELL = {
    "requests": 100, "failures": {}, "hostile_requests": 9, "slow_senders": 6, "chaos_faults": [],
    "resident_mib": [500.0, 501.0, 502.0, 509.9], "p99_ms": [10.0, 19.0, 12.0, 11.0],
    "gpu_memory_mib": [900.0, 901.0, 902.0, 903.0],
    "threads": (20, 20), "open_files": (40, 39), "drain_answers": {200: 50}, "drain_lost": [],
    "drain_seconds": 2.0, "exit_code": 0, "unanswered": 0,
}  # fmt: skip


@pytest.mark.timeout(900)  # 2,000 pictures to decode, on however busy a machine
def test_a_slice_of_the_load_loses_nothing_and_leaves_nothing_open(tmp_path):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        (sys.executable, str(PROGRAM), "--requests", "2000", "--round-seconds", "1",
         "--lead-in-seconds", "1", "--stub", "--device", "cpu", "--json", str(file)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(file.read_text())
    # So short a load on a busy machine says nothing about memory and p99.
    broken = [name for name, kept in figures["bounds"].items() if not kept]
    assert [name for name in broken if not name.startswith(("memory", "p99"))] == [], done.stdout
    assert figures["requests"] == 2000
    assert figures["lead_in_requests"] == math.ceil(figures["offered_per_second"])
    assert figures["lead_in_p99_ms"] > 0
    assert 0 < figures["hostile_requests"] < figures["chaos_requests"]
    assert figures["chaos_requests"] > 10 and figures["slow_senders"] >= 6
    assert done.stdout.splitlines()[-1].startswith(("2000 requests next", "kept: "))


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
def test_each_bound_is_broken_by_its_fault_alone(broken, fault):
    assert all(judged(WELL).values())
    (name,) = [name for name, kept in judged(WELL | fault).items() if not kept]
    assert name.startswith(broken)
    # Without a card nothing is said of its memory.
    assert len(judged(WELL | {"gpu_memory_mib": None})) == len(judged(WELL)) - 1


def test_a_leaking_server_and_a_slow_one_are_seen():
    seconds = np.arange(100.0)
    samples = np.stack((seconds, 500 + seconds), axis=1)
    assert quarter_medians(samples) == [512.0, 537.0, 562.0, 587.0]
    assert quarter_medians([]) == [None] * 4
    fields = [("intended", "f8"), ("end", "f8"), ("failure", "O")]
    rows = np.array([(1.0, 1.02, "")] * 99 + [(1.0, 9.0, "timeout")], dtype=fields)
    assert p99_ms(rows) == pytest.approx(20) and p99_ms(rows[-1:]) is None
