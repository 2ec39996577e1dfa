"""A wall clock that was set is told; one that runs is not."""

from __future__ import annotations

import pytest

from benchmarking.suite import measurement as run


@pytest.mark.parametrize(
    ("seconds", "words"), [(3600.0, "+3600 s"), (-7.6, "-8 s"), (1.5, None), (-1.5, None)]
)
def test_only_what_no_time_service_does_is_said(
    monkeypatch: pytest.MonkeyPatch, seconds: float, words: str | None
) -> None:
    offset = run.wall_clock_offset()
    assert run.clock_warnings(offset) == []
    real = run.time.time
    monkeypatch.setattr(run.time, "time", lambda: real() + seconds)
    said = run.clock_warnings(offset)
    assert said == (
        [f"the clock was set by {words} meanwhile; figures come from the monotonic clock"]
        if words
        else []
    )
