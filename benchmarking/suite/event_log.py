"""What clients write about themselves, read while it is written, and the figures in a window.

The events are those of the client contract (`loaded`, `ready`, `processes`, `units`, `job`,
`error`, `done`), one JSON object a line, all times on CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]


class LineFollower:
    """Reads the whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path, *, past: int = 0) -> None:
        """Follow `path`, which need not be there yet, from the byte `past` on."""
        self._path = path
        self._offset = past

    def poll(self) -> list[bytes]:
        """Return the new lines; one that is still being written waits for the next look.

        Raises `FileNotFoundError` for a file that was there, or whose folder has gone.
        """
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            if self._offset or not self._path.parent.is_dir():
                raise
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


def parse_event(line: bytes) -> dict[str, Any]:
    """Return one line of an event file as an event.

    A line that is none comes back as an `error` event: a client that breaks the contract cannot
    be measured.
    """
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if isinstance(event, dict) and isinstance(event.get("event"), str):
        return event
    text = line.decode(errors="replace")[:200]
    return {"event": "error", "status": "failed", "message": f"not an event: {text}"}


def last_event(events: Iterable[Event], name: str) -> Event | None:
    """Return the last event of this name, or `None`."""
    found = None
    for event in events:
        if event["event"] == name:
            found = event
    return found


def first_unit_seconds(events: Iterable[Event]) -> float | None:
    """Return when the first unit began, `None` when there is none."""
    starts = [min(event["start_seconds"]) for event in events
              if event["event"] == "units" and event["start_seconds"]]  # fmt: skip
    return min(starts, default=None)


def first_unit_end_seconds(events: Iterable[Event]) -> float | None:
    """Return when the first finished unit ended, `None` when there is none."""
    ends = [start + duration for event in events if event["event"] == "units"
            for start, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True)]  # fmt: skip
    return min(ends, default=None)


def process_ids(events: Iterable[Event]) -> list[int]:
    """Return the pids of `processes` events: those that did the work of a client's jobs."""
    noted = (event["pids"] for event in events if event["event"] == "processes")
    return sorted({pid for pids in noted for pid in pids})


def units_in_window(
    events: Iterable[Event], start_seconds: float, end_seconds: float
) -> tuple[dict[str, dict[str, Any]], list[float] | None]:
    """Units that lie wholly in the window: `({kind: {count, seconds, latency}}, latency_ms)`.

    `latency_ms` holds the raw durations of all units whose duration is a response time, in the
    order of their ends as written; `None` when there is none.
    """
    units: dict[str, dict[str, Any]] = {}
    latency_ms: list[float] = []
    for event in events:
        if event["event"] != "units":
            continue
        durations = [
            duration
            for start, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True
            )
            if start >= start_seconds and start + duration <= end_seconds
        ]
        if not durations:
            continue
        is_latency = bool(event["latency"])
        unit = units.setdefault(event["kind"], {"count": 0, "seconds": 0.0, "latency": is_latency})
        unit["count"] += len(durations)
        unit["seconds"] += sum(durations)
        if is_latency:
            latency_ms += [1000 * duration for duration in durations]
    return units, latency_ms or None


def jobs_of(
    events: Iterable[Event], start_seconds: float | None, end_seconds: float | None
) -> list[dict[str, Any]]:
    """Whole jobs with their durations; `in_window` when they lie wholly in the window.

    Without a window no job is in it.
    """
    return [
        {
            "index": event["index"],
            "start_seconds": event["start_seconds"],
            "end_seconds": event["end_seconds"],
            "duration_seconds": event["end_seconds"] - event["start_seconds"],
            "in_window": start_seconds is not None
            and end_seconds is not None
            and event["start_seconds"] >= start_seconds
            and event["end_seconds"] <= end_seconds,
        }
        for event in events
        if event["event"] == "job"
    ]
