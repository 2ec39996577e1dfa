"""Other people's processes on the GPU are told apart from ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from waiting import wait_until

from benchmarking.measuring import proofs
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.planning.plan import PlannedClient, PlannedCoRun

# A process that only calls itself an MPS server.
IMPOSTOR = """
import sys
with open("/proc/self/comm", "w") as stream:
    stream.write("nvidia-cuda-mps-server")
sys.stdin.read()
"""


def test_an_mps_server_does_not_occupy_the_gpu_and_what_calls_itself_one_does(
    tmp_path: Path,
) -> None:
    program = shutil.copy(shutil.which("sleep"), tmp_path / "nvidia-cuda-mps-server")
    impostor = [sys.executable, "-c", IMPOSTOR]
    with (
        subprocess.Popen([program, "60"]) as server,
        subprocess.Popen(impostor, stdin=subprocess.PIPE) as impostor,
    ):
        comm = Path(f"/proc/{impostor.pid}/comm")
        wait_until(lambda: comm.read_text().startswith("nvidia"), "the impostor's name")
        pids = [server.pid, impostor.pid, os.getpid(), 2**22 + 1]
        found = proofs.foreign_pids([{"pid": pid} for pid in pids])
        assert found == sorted(pids[1:])
        server.kill()


def foreign(samples: list[dict], start: float, end: float, *own: int) -> list[int]:
    """The foreign pids in the window of a co-run whose clients had these pids."""
    planned = [PlannedClient(i, "w", "W", "job", ("x",)) for i in range(len(own))]
    clients = [ClientResult(one, "ok", None, [], {"pid": pid}, 0, [])
               for one, pid in zip(planned, own, strict=True)]  # fmt: skip
    run = PlannedCoRun("c", "co_run", "mps", 0, tuple(planned))
    result = CoRunResult(
        run, "ok", None, clients, ready_seconds=start, window_start_seconds=start,
        window_end_seconds=end,
    )  # fmt: skip
    return proofs.foreign_pids_in_window(result, samples)


def sample(time_seconds: float, *pids: int, mps: tuple[int, ...] = ()) -> dict:
    def listed(pids: tuple[int, ...]) -> list[dict]:
        return [{"pid": pid, "used_memory_mib": 1} for pid in pids]

    return {"time_seconds": time_seconds, "compute_pids": listed(pids), "mps_pids": listed(mps)}


def test_who_is_listed_within_the_window_and_is_not_ours_is_foreign() -> None:
    seen = [sample(0.5, 7), sample(1.0, 10, 11), sample(2.0, 10, 12, mps=(13,)), sample(3.5, 8)]
    assert foreign(seen, 1.0, 3.0, 10) == [11, 12, 13]
    assert foreign(seen, 1.0, 3.0, 10, 11, 12, 13) == []
    # without one of ours in the list nobody is called foreign
    assert foreign([sample(1.0, 10, 11)], 0.0, 2.0, 99) == []


def test_a_process_is_named_with_its_owner_where_that_is_another() -> None:
    own = os.getpid()
    assert proofs.describe_pids([own]).startswith(f"pid {own} (")
    assert " of " not in proofs.describe_pids([own])
    assert proofs.describe_pids([2**22 + 1]) == f"pid {2**22 + 1} (name unknown)"
