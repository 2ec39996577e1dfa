"""The search for the breaking point: which counts are tried, and why one did not hold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import recorded_rows

from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.stop_reasons import describe, stop_reason
from benchmarking.planning.plan import PlannedClient
from benchmarking.planning.ramp import MOST_CLIENTS, Ramp
from benchmarking.records.types import ClientRecord, CoRunRecord


@pytest.mark.parametrize(
    ("breaks_at", "options", "counts"),
    [
        (99, {}, [1, 2, 4, 6, 8]),
        (6, {}, [1, 2, 4, 6]),
        (5, {"bisect": True}, [1, 2, 4, 6, 5]),
        (6, {"bisect": True}, [1, 2, 4, 6, 5]),
        (1, {"bisect": True}, [1]),
        (23, {"until_break": True, "bisect": True}, [1, 2, 4, 6, 8, 16, 32, 24, 20, 22, 23]),
        (999, {"until_break": True}, [1, 2, 4, 6, 8, 16, 32, MOST_CLIENTS]),
        # a mix is never tried in part
        (10, {"counts": (4, 8, 16), "step": 4, "bisect": True}, [4, 8, 16, 12]),
        (5, {"counts": (4, 8), "step": 4, "bisect": True}, [4, 8]),
        (999, {"counts": (6,), "step": 6, "until_break": True}, [6, 12, 24, 48, 60]),
    ],
)
def test_counts_go_up_to_the_first_bad_one_and_then_halve_the_gap(
    breaks_at: int, options: dict[str, Any], counts: list[int]
) -> None:
    ramp = Ramp(**{"counts": (1, 2, 4, 6, 8), **options})
    tried = []
    while (count := ramp.next_count()) is not None:
        tried.append(count)
        ramp.note(count, holds=count < breaks_at)
    assert tried == counts
    assert ramp.first_bad == min((c for c in counts if c >= breaks_at), default=None)
    assert ramp.last_good == max((c for c in counts if c < breaks_at), default=None)


# --- why --------------------------------------------------------------------------------------


def judged(
    *members: dict[str, Any], mode: str = "mps", outcome: str = "failed", **bounds: float
) -> dict[str, Any] | None:
    """The reason of a co-run whose clients have these fields, `failed_at` among them."""
    records, results = [], []
    for number, fields in enumerate(members):
        row = recorded_rows.client(
            "c", number, **{"label": "Job", "mode": mode, "latency_ms": None, **fields}
        )
        events = []
        if "failed_at" in fields:
            events = [{"event": "error", "time_seconds": fields["failed_at"]}]
        planned = PlannedClient(number, "w", "Job", "job", ("x",))
        records.append(msgspec.convert(row, ClientRecord))
        results.append(ClientResult(planned, events=events))
    row = recorded_rows.co_run("c", "co_run", outcome, clients=len(members), reason="all of it")
    return stop_reason(msgspec.convert(row, CoRunRecord), results, records, **bounds)


def failed(reason: str = "an illegal memory access", **fields: object) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, **fields}


@pytest.mark.parametrize(
    ("members", "mode", "kind", "client", "lost", "words"),
    [
        # out of memory is the cause whatever else failed with it
        ([failed(failed_at=1.0), {"status": "oom", "failed_at": 2.0}, {}], "mps", "oom", 1, [],
         "client 1 (Job) ran out of memory"),
        ([{"status": "oom", "reason": "out of GPU memory: tried 2.50 GiB with 1.00 GiB free"}],
         "mps", "oom", 0, [], "client 0 (Job) ran out of memory: tried 2.50 GiB with 1.00 GiB"),
        # who fails after another under MPS was taken along, without MPS each failure is its own
        ([failed(failed_at=1.2), failed(failed_at=1.0), {}], "mps", "crash", 1, [0],
         "; it took along client 0"),
        ([failed(failed_at=1.2), failed(failed_at=1.0), {}], "time-slicing", "crash", 0, [], ""),
        ([failed("exit code 1", stderr_tail=[
            "CUDA error: the MPS client has been terminated by the server"]), {}],
         "mps", "lost_neighbor", 0, [0], ""),
        ([{"status": "timeout", "reason": "so it was"}, {}], "mps", "timeout", 0, [], "time limit"),
        ([{"status": "killed", "reason": "so it was"}, {}], "mps", "killed", 0, [], "from outside"),
        ([failed("so it was"), {}], "mps", "crash", 0, [], "crashed: so it was"),
        # a cause that the client named is no crash
        ([failed(failed_at=3.0), failed("the loss is gone", cause="diverged", failed_at=2.0)],
         "time-slicing", "diverged", 1, [], "client 1 (Job): the loss is gone"),
        # a neighbor without proof is not the cause
        ([{"status": "invalid", "reason": "its pid is not among []"},
          {"status": "killed", "reason": "ended by SIGKILL"}], "mps", "killed", 1, [], ""),
        # never measured
        ([failed("all of it")], "mps", "refused", None, [], ""),
    ],
)  # fmt: skip
def test_of_several_failures_the_first_cause_is_the_reason(
    members: list[dict], mode: str, kind: str, client: int | None, lost: list[int], words: str
) -> None:
    outcome = "timeout" if kind == "timeout" else "failed"
    found = judged(*members, mode=mode, outcome=outcome)
    assert (found["kind"], found["client"], found["lost_neighbors"]) == (kind, client, lost)
    assert words in describe(found)


def test_a_bound_that_is_passed_is_a_reason_though_nothing_failed() -> None:
    slow, late = {"slowdown": 2.6}, {"latency_ms": [10.0] * 90 + [80.0] * 10}
    assert judged(slow, late, outcome="ok") is None
    assert judged(slow, late, outcome="ok", max_slowdown=2.6, max_p99_ms=80.0) is None
    found = judged(slow, late, outcome="ok", max_slowdown=2.5)
    assert found["kind"] == "slowdown"
    assert "2.60 passes the bound of 2.5" in describe(found)
    assert judged(slow, late, outcome="ok", max_p99_ms=50.0)["kind"] == "p99"


@pytest.mark.parametrize("outcome", ["interrupted", "invalid"])
def test_what_proves_nothing_is_no_reason(outcome: str) -> None:
    assert judged({"slowdown": 9.0}, outcome=outcome, max_slowdown=2.0) is None
