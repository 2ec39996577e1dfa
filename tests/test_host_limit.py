"""Processor time of clients, and when the host is said to have been the limit."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarking.hardware import host_cpu, host_limit

EAGER = {
    "client": 0, "label": "BERT fine-tuning", "job_key": "bert", "slowdown": 1.0,
    "window_host_cpu_fraction": 1.1, "busiest_thread_cpu_fraction": 0.98,
}  # fmt: skip
WAITING = {**EAGER, "client": 1, "label": "Jupyter session", "busiest_thread_cpu_fraction": 0.2}
IDLE_GPU = {
    "host_cpu_percent": 7.0, "sm_activity_percent": 21.0, "utilization_gpu_percent": 60.0,
}  # fmt: skip
ALONE = {"bert": {"host_limited": True}}


def judge(record: dict, gpu: dict | None, baselines: dict | None = None) -> bool | None:
    """Judge a client beside another if there are baselines, else alone."""
    others = [] if baselines is None else [WAITING]
    return host_limit.judged([record, *others], gpu, baselines or {})[0]["host_limited"]


def test_alone_a_busy_thread_beside_a_gpu_with_gaps_is_the_limit() -> None:
    assert judge(EAGER, IDLE_GPU) is True
    assert judge(WAITING, IDLE_GPU) is False
    # Who spins while it waits for small kernels leaves the GPU no gap.
    assert judge(EAGER, {**IDLE_GPU, "utilization_gpu_percent": 99.0}) is False
    assert judge(EAGER, {**IDLE_GPU, "sm_activity_percent": 80.0}) is False
    assert judge(EAGER, None) is None
    assert judge({**EAGER, "busiest_thread_cpu_fraction": None}, IDLE_GPU) is None


def test_together_who_was_limited_alone_and_is_hardly_slowed_down_still_is() -> None:
    assert judge(EAGER, IDLE_GPU, ALONE) is True
    assert judge({**EAGER, "slowdown": 1.8}, IDLE_GPU, ALONE) is False
    assert judge(EAGER, IDLE_GPU, {"bert": {"host_limited": False}}) is False
    assert judge(EAGER, {**IDLE_GPU, "sm_activity_percent": 85.0}, ALONE) is False
    # An older baseline says nothing of it, and then nothing is claimed.
    assert judge(EAGER, IDLE_GPU, {"bert": {}}) is None


def test_a_limited_client_is_named_in_a_sentence() -> None:
    limited = {**EAGER, "host_limited": True}
    (sentence,) = host_limit.warnings(IDLE_GPU, [limited, {**WAITING, "host_limited": False}], 16)
    assert sentence == (
        "the host was the limit: SM activity was 21 %, while one thread was busy all the time in "
        "client 0 (BERT fine-tuning)"
    )
    assert host_limit.warnings(IDLE_GPU, [{**EAGER, "host_limited": None}], 16) == []
    no_gpm = {**IDLE_GPU, "sm_activity_percent": None, "utilization_gpu_percent": 30.0}
    assert "GPU utilization was 30 %" in host_limit.warnings(no_gpm, [limited])[0]


def test_a_host_without_a_free_core_is_the_limit_only_while_the_gpu_has_little_to_do() -> None:
    full = {**IDLE_GPU, "host_cpu_percent": 99.0}
    assert host_limit.warnings(full, []) == [
        "the host was the limit: its CPU was 99 % busy, while SM activity was 21 %"
    ]
    assert host_limit.warnings({**full, "sm_activity_percent": 80.0}, []) == []
    assert host_limit.warnings(None, []) == []


def test_cores_that_a_container_may_not_use_do_not_hide_a_full_host() -> None:
    clients = [{**EAGER, "window_host_cpu_fraction": 1.0}] * 4
    (sentence,) = host_limit.warnings(IDLE_GPU, clients, host_cores=4)
    assert "the clients used 4.0 of 4 cores" in sentence
    assert host_limit.warnings(IDLE_GPU, clients, host_cores=16) == []


BURN = "import time; end = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


@pytest.mark.parametrize("own_session", [True, False])
def test_a_client_is_charged_for_living_and_ended_child_processes(own_session: bool) -> None:
    burn = BURN.format(seconds=0.3)
    program = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {burn!r}])
child = subprocess.Popen([sys.executable, "-c", {burn + chr(10) + "time.sleep(60)"!r}],
                         start_new_session={own_session})
print("ready", flush=True)
sys.stdin.read()
child.kill()
"""
    client = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert client.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            (reading,) = host_cpu.read_process_trees([client.pid])
            if reading.seconds >= 0.6:
                break
            time.sleep(0.05)
        assert 0.6 <= reading.seconds < 2.0
        nothing = host_cpu.CpuReading(0.0)
        assert 0.2 <= reading.busiest_thread_since(nothing) < reading.seconds
    finally:
        client.communicate(timeout=10)


def test_a_process_that_is_gone_has_no_reading() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert host_cpu.read_process_trees([gone.pid, None]) == [None, None]
