"""What the load test and its worker processes tell each other over their pipes.

A worker unpickles these, so this module imports nothing that costs start-up time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# A record of one request: five float64 in this order, in seconds on CLOCK_MONOTONIC.
# ``free`` is when a client was free to send it, ``sent`` is NaN where it never was, ``ok`` is 1
# for an answer with status 200 and 0 otherwise.
RECORD_FIELDS = ("intended", "free", "sent", "end", "ok")


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker process does in every job; sent once, before the warm-up.

    Attributes:
        url: Address of ``/predict``.
        requests: Distinct requests, headers and body, as the bytes on the wire.
        clients: Connections that are opened and warmed up before the start.
        threads: The most requests in flight; a closed loop has one thread a client.
        duration_seconds: How long requests are sent for.
        timeout_seconds: The longest that a client waits, for a connection or for an answer.
        warm_up_requests: Requests a client before the start, not counted.
        offsets: Open loop: float64 seconds from the start to each intended send, ascending;
            None for a closed loop.
    """

    url: str
    requests: list[bytes]
    clients: int
    threads: int
    duration_seconds: float
    timeout_seconds: float
    warm_up_requests: int
    offsets: bytes | None


@dataclass(frozen=True)
class Prepared:
    """A worker's clients are warm."""


@dataclass(frozen=True)
class Begin:
    """Start a job at ``start_seconds`` on CLOCK_MONOTONIC, which all processes share."""

    start_seconds: float


@dataclass(frozen=True)
class Stop:
    """Report what is known and end; requests in flight are given up."""


@dataclass
class Report:
    """What a worker measured since its last report.

    Attributes:
        records: float64 records of finished requests, one after another (RECORD_FIELDS).
        failures: Failed requests by kind.
        cpu_seconds: Processor time of the worker.
        connections_opened: Connections opened after the start: its own or a reset one again.
        last: Whether the job is over.
    """

    records: bytes = b""
    failures: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    connections_opened: int = 0
    last: bool = False
