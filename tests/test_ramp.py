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


def tried(ramp: Ramp, breaks_at: float) -> list[int]:
    counts = []
    while (count := ramp.next_count()) is not None:
        counts.append(count)
        ramp.note(count, holds=count < breaks_at)
    return counts


@pytest.mark.parametrize(
    ("breaks_at", "options", "counts"),
    [
        (99, {}, [1, 2, 4, 6, 8]),
        (6, {}, [1, 2, 4, 6]),
        (5, {"bisect": True}, [1, 2, 4, 6, 5]),
        (6, {"bisect": True}, [1, 2, 4, 6, 5]),
        (1, {"bisect": True}, [1]),
        (23, {"until_break": True}, [1, 2, 4, 6, 8, 16, 32]),
        (23, {"until_break": True, "bisect": True}, [1, 2, 4, 6, 8, 16, 32, 24, 20, 22, 23]),
        (999, {"until_break": True}, [1, 2, 4, 6, 8, 16, 32, MOST_CLIENTS]),
    ],
)
def test_counts_go_up_to_the_first_bad_one_and_then_halve_the_gap(
    breaks_at: int, options: dict[str, bool], counts: list[int]
) -> None:
    ramp = Ramp((1, 2, 4, 6, 8), **options)
    assert tried(ramp, breaks_at) == counts
    assert ramp.first_bad == (min((c for c in counts if c >= breaks_at), default=None))
    assert ramp.last_good == max((c for c in counts if c < breaks_at), default=None)


def test_a_mix_is_never_tried_in_part() -> None:
    ramp = Ramp((4, 8, 16), step=4, bisect=True)
    assert tried(ramp, 10) == [4, 8, 16, 12]
    assert tried(Ramp((4, 8), step=4, bisect=True), 5) == [4, 8]
    assert tried(Ramp((6,), step=6, until_break=True), 999) == [6, 12, 24, 48, 60]


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


FAULT = {"status": "failed", "reason": "an illegal memory access was encountered"}


def test_out_of_memory_is_the_cause_whatever_else_failed_with_it() -> None:
    found = judged({**FAULT, "failed_at": 1.0}, {"status": "oom", "failed_at": 2.0}, {})
    assert (found["kind"], found["client"], found["lost_neighbors"]) == ("oom", 1, [])
    assert describe(found) == "client 1 (Job) ran out of memory"


def test_who_fails_after_another_under_mps_was_taken_along() -> None:
    found = judged({**FAULT, "failed_at": 1.2}, {**FAULT, "failed_at": 1.0}, {})
    assert (found["kind"], found["client"], found["lost_neighbors"]) == ("crash", 1, [0])
    assert describe(found).endswith("; it took along client 0")


def test_without_mps_each_failure_is_its_own() -> None:
    found = judged({**FAULT, "failed_at": 1.2}, {**FAULT, "failed_at": 1.0}, mode="time-slicing")
    assert (found["kind"], found["lost_neighbors"]) == ("crash", [])


def test_cudas_word_for_a_terminated_client_is_a_lost_neighbor() -> None:
    said = "CUDA error: the MPS client has been terminated by the server"
    found = judged({"status": "failed", "reason": "exit code 1", "stderr_tail": [said]}, {})
    assert (found["kind"], found["client"], found["lost_neighbors"]) == ("lost_neighbor", 0, [0])


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [("timeout", "timeout", "time limit"), ("killed", "killed", "from outside"),
     ("failed", "crash", "crashed: so it was")],
)  # fmt: skip
def test_crash_kill_and_time_limit_are_told_apart(status: str, kind: str, words: str) -> None:
    outcome = "timeout" if status == "timeout" else "failed"
    found = judged({"status": status, "reason": "so it was"}, {}, outcome=outcome)
    assert found["kind"] == kind
    assert words in describe(found)


def test_out_of_memory_says_who_held_what() -> None:
    said = "out of GPU memory: tried 2.50 GiB with 1.00 GiB of 80.00 GiB free"
    found = judged({"status": "oom", "reason": said})
    assert describe(found) == f"client 0 (Job) ran {said.replace('GPU ', '')}"


@pytest.mark.parametrize("cause", ["diverged", "not_finite", "damaged_file", "unreadable_image"])
def test_a_cause_that_the_client_named_is_the_reason_and_no_crash(cause: str) -> None:
    named = {"status": "failed", "cause": cause, "reason": "the sentence", "failed_at": 2.0}
    found = judged({**FAULT, "failed_at": 3.0}, named, mode="time-slicing")
    assert (found["kind"], found["client"]) == (cause, 1)
    assert describe(found) == "client 1 (Job): the sentence"


def test_a_neighbor_without_proof_is_not_the_cause() -> None:
    unproved = {"status": "invalid", "reason": "its pid is not among []"}
    found = judged(unproved, {"status": "killed", "reason": "ended by SIGKILL"})
    assert (found["kind"], found["client"]) == ("killed", 1)


def test_clients_that_were_never_measured_were_refused() -> None:
    assert judged({"status": "failed", "reason": "all of it"})["kind"] == "refused"


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
