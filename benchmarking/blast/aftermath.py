"""Watches a co-run for its fault, and finds out when a new client works again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarking.suite.event_log import first_unit_end_seconds
from benchmarking.suite.launcher import Client, CoRunResult, FinishRule

POLL_SECONDS = 0.02
# Between two new clients where the first could not work.
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class UntilOver(FinishRule):
    """Ends the launcher's window when the aftermath has been seen; a failure does not end it."""

    over: threading.Event = field(default_factory=threading.Event)
    tolerates_failures: bool = True

    def is_done(self, client: Client) -> bool:
        """Whether the aftermath is over, the same for every client."""
        return self.over.is_set()


class Aftermath(threading.Thread):
    """From the fault until neighbors have been watched long enough and a new client has worked.

    To be read after the thread has ended: `fault_seconds` (CLOCK_MONOTONIC, `None` where there was
    no fault), `attempts`, and `works_seconds`, when a new client had done its first unit.
    """

    def __init__(
        self,
        faulty: Client,
        run_newcomer: Callable[[int], CoRunResult],
        *,
        over: threading.Event,
        watch_seconds: float,
        patience_seconds: float,
    ) -> None:
        """Prepare to watch `faulty`; `run_newcomer(attempt)` runs one new client to its end."""
        super().__init__(name="aftermath", daemon=True)
        self._faulty = faulty
        self._run_newcomer = run_newcomer
        self._over = over
        self._watch_seconds = watch_seconds
        self._patience_seconds = patience_seconds
        self._given_up = threading.Event()
        self.fault_seconds: float | None = None
        self.attempts: list[CoRunResult] = []
        self.works_seconds: float | None = None

    def run(self) -> None:
        """Watch until everything is known."""
        try:
            while not self._faulty.has_failed:
                if self._given_up.wait(POLL_SECONDS):
                    return
            self.fault_seconds = self._time_of_fault()
            self._bring_newcomers(self.fault_seconds)
            left = self.fault_seconds + self._watch_seconds - time.monotonic()
            self._given_up.wait(max(0.0, left))
        finally:
            self._over.set()

    def give_up(self) -> None:
        """Wait for nothing any more."""
        self._given_up.set()

    def _time_of_fault(self) -> float:
        """When it said that it failed, else now, when it is seen to have ended."""
        error = self._faulty.error
        return time.monotonic() if error is None else float(error["time_seconds"])

    def _bring_newcomers(self, fault_seconds: float) -> None:
        while not self._given_up.is_set():
            seen = self._run_newcomer(len(self.attempts))
            self.attempts.append(seen)
            self.works_seconds = first_unit_end_seconds(seen.clients[0].events)
            if self.works_seconds is not None:
                return
            if time.monotonic() - fault_seconds > self._patience_seconds:
                return
            self._given_up.wait(RETRY_SECONDS)


@dataclass(frozen=True)
class Neighbor:
    """What a fault did to one healthy client; times in seconds, rates in units a second.

    `rate_before` and `rate_after` are `None` where nothing was seen; `longest_gap_ms` is the
    longest time without a finished unit that ends after the fault; `lost_seconds` is the work of
    the job in hand that is gone, 0 for one that survived.
    """

    client: int
    label: str
    survived: bool
    status: str
    reason: str | None
    rate_before: float | None
    rate_after: float | None
    longest_gap_ms: float | None
    lost_seconds: float


def unit_ends(events: Sequence[dict]) -> list[float]:
    """Return when each unit of work ended, in order."""
    return sorted(
        start + duration
        for event in events if event["event"] == "units"
        for start, duration in zip(event["start_seconds"], event["duration_seconds"], strict=True)
    )  # fmt: skip


def judge_neighbor(
    seen: CoRunResult, number: int, fault_seconds: float, settle_seconds: float = 1.0
) -> Neighbor:
    """Return what the fault did to client `number` of the co-run.

    Rates leave out the `settle_seconds` after go; the rate after the fault is that of the time from
    the fault to the end of the window, so a stall lowers it.
    """
    client = seen.clients[number]
    ends = unit_ends(client.events)
    begin, end = seen.window_start_seconds + settle_seconds, seen.window_end_seconds
    before = [at for at in ends if begin <= at < fault_seconds]
    after = [at for at in ends if fault_seconds <= at <= end]
    survived = client.status == "ok"
    points = [*before[-1:], *after, *([end] if survived else [])]
    gaps = [later - earlier for earlier, later in itertools.pairwise(points)]
    job_ends = [e["end_seconds"] for e in client.events if e["event"] == "job"]
    last_safe = max(job_ends, default=seen.window_start_seconds)
    died = max(ends, default=seen.window_start_seconds)
    return Neighbor(
        client=client.planned.client,
        label=client.planned.label,
        survived=survived,
        status=client.status,
        reason=client.reason,
        rate_before=_rate(before, fault_seconds - begin),
        rate_after=_rate(after, end - fault_seconds),
        longest_gap_ms=1000 * max(gaps) if gaps else None,
        lost_seconds=0.0 if survived else max(0.0, died - last_safe),
    )


def _rate(ends: Sequence[float], seconds: float) -> float | None:
    return len(ends) / seconds if seconds > 0 else None
