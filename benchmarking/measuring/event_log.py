"""What clients write about themselves, read while it is written, and the figures in a window.

The events are those of the client contract (`loaded`, `ready`, `processes`, `units`,
`unfinished`, `job`, `error`, `done`), one JSON object a line, all times on CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from benchmarking.metrics.scores import OFFERED_RATE_KINDS
from benchmarking.records.types import Amount, Count, Job, Units
from benchmarking.records.writing import one_line

Event = Mapping[str, Any]

# A line that has not ended by then never will.
MOST_LINE_BYTES = 64 << 20
STDERR_TAIL_LINES = 20
MOST_LINE_CHARACTERS = 1000


# Infinity is no number of JSON's, but what is too large for one is read as it.
_Moment = Annotated[float, Meta(ge=-1e15, le=1e15)]
_Duration = Annotated[float, Meta(ge=0, le=1e15)]
# What is read of each event; it may carry more.
_FIELDS: dict[str, list[tuple[Any, ...]]] = {
    "loaded": [("startup_seconds", Amount | None, None)],
    "ready": [("identity", dict[str, Any] | None, None)],
    "processes": [("pids", list[int])],
    "units": [("kind", str), ("latency", bool | Literal["apart"]), ("start_seconds", list[_Moment]),
              ("duration_seconds", list[_Duration])],
    "unfinished": [("kind", str), ("latency", bool | Literal["apart"]), ("start_seconds", _Moment)],
    "job": [("index", Count), ("start_seconds", _Moment), ("end_seconds", _Moment),
            ("figures", dict[str, Any] | None, None)],
    "error": [("status", Literal["failed", "oom"] | None, None),
              ("memory", dict[str, Any] | None, None)],
    "done": [("host_cpu_seconds", Amount | None, None), ("peak_memory_mib", Amount | None, None)],
}  # fmt: skip
_Event = msgspec.defstruct("_Event", [("event", str), ("time_seconds", float | None, None)],
                           kw_only=True)  # fmt: skip
_SHAPES = {
    name: msgspec.defstruct(f"_{name}", fields, bases=(_Event,), kw_only=True)
    for name, fields in _FIELDS.items()
}


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=...)`: no link is followed, a new one is its owner's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


class LineFollower:
    """Reads the whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path, *, past: int = 0) -> None:
        """Follow `path` from the byte `past` on."""
        self._path = path
        self._offset = past

    def poll(self) -> list[bytes]:
        """Return the new lines; one that is still being written waits for the next look.

        Raises `OSError` for a file that cannot be read.
        """
        with open(self._path, "rb", opener=private_opener) as stream:
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(content) - len(whole) > MOST_LINE_BYTES:
            whole = content
        self._offset += len(whole)
        return whole.splitlines()


def tail_of(path: Path, lines: int = STDERR_TAIL_LINES) -> list[str]:
    """Last lines of a text file, cut and steering no terminal; empty when there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 65536))
            content = stream.read()
    except OSError:
        return []
    last = content.decode(errors="replace").splitlines()[-lines:]
    return [one_line(line[:MOST_LINE_CHARACTERS]) for line in last]


def parse_event(line: bytes) -> dict[str, Any]:
    """Return one line of an event file as an event.

    A line that is none comes back as an `error` event: a client that breaks the contract cannot
    be measured. NaN and infinity are no JSON, and unknown.
    """
    try:
        event = json.loads(line, parse_constant=lambda name: None)
        if event["event"] != "units":  # the longest, all of whose numbers are bounded
            event = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
        if b"\\ud" in line or b"\\uD" in line:  # half a character: a file name that is no UTF-8
            whole = json.dumps(event, ensure_ascii=False).encode(errors="replace")
            event = json.loads(whole)
        msgspec.convert(event, _SHAPES.get(event["event"], _Event))
        list(unit_spans([event]))  # raises where a start lacks a duration, or it a start
        if event["event"] == "job" and event["end_seconds"] < event["start_seconds"]:
            raise ValueError("it ended before it began")
    except (ValueError, TypeError, LookupError, RecursionError):
        text = line[:200].decode(errors="replace")
        event = {"event": "error", "time_seconds": time.monotonic(), "status": "failed",
                 "message": f"not an event: {text}"}  # fmt: skip
    return event


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def last_event(events: Iterable[Event], name: str) -> Event | None:
    """Return the last event of this name, or `None`."""
    named = [event for event in events if event["event"] == name]
    return named[-1] if named else None


def unit_spans(events: Iterable[Event]) -> Iterator[tuple[Event, float, float]]:
    """Yield `(event, start_seconds, duration_seconds)` of every unit, as written."""
    for event in events:
        if event["event"] == "units":
            for start, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True
            ):
                yield event, start, duration


def first_unit_end_seconds(events: Iterable[Event]) -> float | None:
    """Return when the first finished unit ended, `None` when there is none."""
    return min((start + duration for _, start, duration in unit_spans(events)), default=None)


def process_ids(events: Iterable[Event]) -> list[int]:
    """Return the pids of `processes` events: those that did the work of a client's jobs."""
    noted = (event["pids"] for event in events if event["event"] == "processes")
    return sorted({pid for pids in noted for pid in pids})


def units_in_window(
    events: Iterable[Event], start_seconds: float, end_seconds: float
) -> tuple[dict[str, Units], dict[str | None, list[float]]]:
    """Return the units in the window, by kind, and the latencies in ms of those that end in it.

    A unit across an edge counts by its share inside, in count as in seconds. One that was never
    finished is taken to be as long as the mean of its kind. Requests at an offered rate are no
    work: they count whole, where they end. Latencies are raw durations, as written;
    they stand under `None`, those of a kind whose latency stands `apart` under its name.
    """
    units: dict[str, Units] = {}
    latency_ms: dict[str | None, list[float]] = {}
    events = list(events)
    for event, start, duration in unit_spans(events):
        end = start + duration
        ends_inside = start_seconds < end <= end_seconds
        inside = min(end, end_seconds) - max(start, start_seconds)
        if event["kind"] in OFFERED_RATE_KINDS or duration <= 0:
            count, seconds = float(ends_inside), duration * ends_inside
        else:
            count, seconds = max(0.0, inside / duration), max(0.0, inside)
        if count:
            _add(units, event["kind"], count, seconds, latency=bool(event["latency"]))
        if ends_inside and event["latency"]:
            group = event["kind"] if event["latency"] == "apart" else None
            latency_ms.setdefault(group, []).append(1000 * duration)
    for event in events:
        if event["event"] == "unfinished":
            inside = end_seconds - max(event["start_seconds"], start_seconds)
            whole = [s for other, _, s in unit_spans(events) if other["kind"] == event["kind"]]
            mean_seconds = math.fsum(whole) / len(whole) if whole else 0.0
            if mean_seconds and inside > 0:
                # However long it took, no more than all of it was done.
                count = min(1.0, inside / mean_seconds)
                _add(units, event["kind"], count, inside, latency=bool(event["latency"]))
    return units, latency_ms


def _add(
    units: dict[str, Units], kind: str, count: float, seconds: float, *, latency: bool
) -> None:
    unit = units.setdefault(kind, Units(count=0.0, seconds=0.0, latency=latency))
    unit.count += count
    unit.seconds += seconds


def jobs_of(
    events: Iterable[Event], start_seconds: float | None, end_seconds: float | None
) -> list[Job]:
    """Return the whole jobs; without a window none is in it."""
    return [
        Job(
            index=event["index"],
            start_seconds=event["start_seconds"],
            end_seconds=event["end_seconds"],
            duration_seconds=event["end_seconds"] - event["start_seconds"],
            in_window=start_seconds is not None
            and end_seconds is not None
            and start_seconds <= event["start_seconds"]
            and event["end_seconds"] <= end_seconds,
        )
        for event in events
        if event["event"] == "job"
    ]
