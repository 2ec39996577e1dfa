"""Processor time of clients, and when the host is said to have been the limit."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
import recorded_rows
from waiting import wait_until

from benchmarking.hardware import host_cpu, host_limit
from benchmarking.records.types import ClientRecord, GpuFigures

# One SM-starved GPU, and a client whose launching thread never waits.
GPU = {"host_cpu_percent": 7.0, "sm_activity_percent": 21.0, "utilization_gpu_percent": 60.0}
IDLE, BUSY = "busiest_thread_cpu_fraction", "sm_activity_percent"


def client(**changes: object) -> ClientRecord:
    row = {"label": "BERT", "slowdown": 1.0, "window_host_cpu_fraction": 1.1,
           "busiest_thread_cpu_fraction": 0.98}  # fmt: skip
    return msgspec.convert(recorded_rows.client("c", 0, **(row | changes)), ClientRecord)


def gpu(changes: dict[str, float | None] | None) -> GpuFigures | None:
    return None if changes is None else GpuFigures(**(GPU | changes))


@pytest.mark.parametrize(
    ("record", "figures", "expected"),
    [
        ({}, {}, True),
        ({IDLE: 0.2}, {}, False),
        # Who spins while it waits for small kernels leaves the GPU no gap.
        ({}, {"utilization_gpu_percent": 99.0}, False),
        ({}, {BUSY: 80.0}, False),
        ({}, None, None),
        ({}, {"utilization_gpu_percent": None}, None),
        ({IDLE: None}, {}, None),
    ],
)
def test_alone_a_busy_thread_beside_a_gpu_with_gaps_is_the_limit(
    record: dict, figures: dict | None, expected: bool | None
) -> None:
    assert host_limit.is_host_limited(client(**record), gpu(figures), None) is expected


@pytest.mark.parametrize(
    ("record", "figures", "alone", "expected"),
    [
        ({}, {}, True, True),
        ({"slowdown": 1.8}, {}, True, False),
        ({"slowdown": None}, {}, True, None),
        ({}, {}, False, False),
        ({}, {BUSY: 85.0}, True, False),
        # An older baseline says nothing of it, and then nothing is claimed.
        ({}, {}, None, None),
        ({IDLE: 0.2}, {}, None, False),
    ],
)
def test_together_who_was_limited_alone_and_is_hardly_slowed_down_still_is(
    record: dict, figures: dict, alone: bool | None, expected: bool | None
) -> None:
    together = client(clients=2, **record)
    limited = host_limit.is_host_limited(together, gpu(figures), client(host_limited=alone))
    assert limited is expected
    if expected:
        assert host_limit.is_host_limited(together, gpu(figures), None) is None


LIMITED, WAITING = {"host_limited": True}, {"window_host_cpu_fraction": 1.0}


@pytest.mark.parametrize(
    ("figures", "clients", "words"),
    [
        ({}, [LIMITED, WAITING], "SM activity was 21 %, while one thread was busy all the time in "
                                 "client 0 (BERT)"),
        ({BUSY: None, "utilization_gpu_percent": 30.0}, [LIMITED],
         "GPU utilization was 30 %, while one thread was busy all the time in client 0 (BERT)"),
        ({}, [WAITING], None),
        ({"host_cpu_percent": 99.0}, [], "its CPU was 99 % busy, while SM activity was 21 %"),
        ({"host_cpu_percent": 99.0, BUSY: 80.0}, [], None),
        # Cores that a container may not use do not hide a full host.
        ({}, [WAITING] * 16, "the clients used 16.0 of 16 cores, while SM activity was 21 %"),
        (None, [LIMITED], None),
    ],
)  # fmt: skip
def test_a_sentence_says_in_what_way_the_host_was_the_bottleneck(
    figures: dict | None, clients: list[dict], words: str | None
) -> None:
    said = host_limit.warnings(gpu(figures), [client(**changes) for changes in clients], 16)
    assert said == ([f"CPU-bound (host bottleneck): {words}"] if words else [])


BURN = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"


@pytest.mark.parametrize("own_session", [True, False])
def test_a_client_is_charged_for_living_and_ended_child_processes(own_session: bool) -> None:
    program = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {BURN!r}])
child = subprocess.Popen([sys.executable, "-c", {BURN + "time.sleep(60)"!r}],
                         start_new_session={own_session})
print("ready", flush=True)
sys.stdin.read()
child.kill()
"""
    nothing = host_cpu.CpuReading(0.0)
    client = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert client.stdout.readline() == b"ready\n"
        wait_until(lambda: host_cpu.read_process_trees([client.pid])[0].seconds >= 0.35, "both")
        (reading,) = host_cpu.read_process_trees([client.pid])
        # Twice 0.2, counted in ticks of 10 ms.
        assert 0.35 <= reading.seconds < 1.7
        assert 0.1 <= reading.busiest_since(nothing) < reading.seconds
    finally:
        client.communicate(timeout=10)
    assert host_cpu.read_process_trees([client.pid, None]) == [None, None]  # it is gone
