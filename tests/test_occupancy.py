"""Other people's processes on the GPU are told apart from ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarking.measuring import proofs
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.planning.plan import PlannedClient, PlannedCoRun

NAME_ITSELF = """
import sys
with open("/proc/self/comm", "w") as stream:
    stream.write(sys.argv[1])
print("named", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mps_server(tmp_path: Path) -> Iterator[int]:
    """A process whose program has the name of an MPS server."""
    program = shutil.copy(shutil.which("sleep") or "sleep", tmp_path / "nvidia-cuda-mps-server")
    with subprocess.Popen([program, "60"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def impostor() -> Iterator[int]:
    """A process that only calls itself an MPS server."""
    with subprocess.Popen(
        [sys.executable, "-c", NAME_ITSELF, "nvidia-cuda-mps-server"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "named\n"
        yield process.pid


def sample(time_seconds: float, *pids: int, mps: tuple[int, ...] = ()) -> dict:
    return {
        "time_seconds": time_seconds,
        "compute_pids": [{"pid": pid, "used_memory_mib": 1} for pid in pids],
        "mps_pids": [{"pid": pid, "used_memory_mib": 1} for pid in mps],
    }


def test_an_mps_server_does_not_occupy_the_gpu_and_what_calls_itself_one_does(
    mps_server: int, impostor: int
) -> None:
    pids = [mps_server, impostor, os.getpid(), 2**22 + 1]
    found = proofs.foreign_pids([{"pid": pid} for pid in pids])
    assert found == sorted(pids[1:])


def foreign(samples: list[dict], start: float, end: float, *own: int) -> list[int]:
    """The foreign pids in the window of a co-run whose clients had these pids."""
    planned = [PlannedClient(i, "w", "W", "job", ("x",)) for i in range(len(own))]
    clients = [ClientResult(one, "ok", None, [], {"pid": pid}, 0, [])
               for one, pid in zip(planned, own, strict=True)]  # fmt: skip
    run = PlannedCoRun("c", "co_run", "mps", 0, tuple(planned))
    return proofs.foreign_pids_in_window(
        CoRunResult(
            run, "ok", None, clients, ready_seconds=start, window_start_seconds=start,
            window_end_seconds=end,
        ),
        samples,
    )  # fmt: skip


def test_who_is_listed_within_the_window_and_is_not_ours_is_foreign() -> None:
    seen = [sample(0.5, 7), sample(1.0, 10, 11), sample(2.0, 10, 12, mps=(13,)), sample(3.5, 8)]
    assert foreign(seen, 1.0, 3.0, 10) == [11, 12, 13]
    assert foreign(seen, 1.0, 3.0, 10, 11, 12, 13) == []


def test_without_one_of_ours_in_the_list_nobody_is_called_foreign() -> None:
    assert foreign([sample(1.0, 10, 11)], 0.0, 2.0, 99) == []


def test_a_process_is_named_with_its_owner_where_that_is_another() -> None:
    own = os.getpid()
    assert proofs.describe_pids([own]).startswith(f"pid {own} (")
    assert " of " not in proofs.describe_pids([own])
    assert proofs.describe_pids([2**22 + 1]) == f"pid {2**22 + 1} (name unknown)"
