"""What the suite makes of a co-run and of earlier runs, without processes of jobs."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import asdict, replace
from recorded_rows import client, co_run

from benchmarking.measuring import baselines, sampler
from benchmarking.measuring import co_run_records as records
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.measuring.progress import Progress
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.records import run_folder
from benchmarking.records.types import Environment, Manifest, Proof


def co_run_of(outcome: str, *clients: ClientResult, phase: str = "co_run") -> CoRunResult:
    planned = PlannedCoRun("c", phase, "mps", 0, tuple(client.planned for client in clients))
    return CoRunResult(planned, outcome, None, list(clients), 0.5, 0.0, 1.0, 11.0, 0.1)


def client_of(seconds_a_step: float, number: int = 0) -> ClientResult:
    steps = int(10 / seconds_a_step)
    events = [
        {"event": "loaded", "startup_seconds": 2.0},
        {"event": "units", "kind": "step", "latency": False,
         "start_seconds": [1 + i * seconds_a_step for i in range(steps)],
         "duration_seconds": [seconds_a_step] * steps},
        {"event": "job", "index": 0, "start_seconds": 1.0, "end_seconds": 9.0, "figures": {"x": 1}},
        {"event": "done", "jobs": 1, "host_cpu_seconds": 3.0, "peak_memory_mib": 7.0},
    ]  # fmt: skip
    planned = PlannedClient(number, "w", "W", "job", ("x",))
    return ClientResult(
        planned, "ok", events=events, identity={"pid": 1}, exit_code=0,
        window_host_cpu_fraction=0.5, busiest_thread_cpu_fraction=0.25,
    )  # fmt: skip


PROVED = Proof("verified", [])


def test_the_start_skew_is_between_the_first_units_of_all_clients() -> None:
    early, late = client_of(1.0), client_of(1.0, number=1)
    late.events[1]["start_seconds"][0] = 1.03
    assert records.start_skew_ms([early, late]) == pytest.approx(30.0)
    assert records.start_skew_ms([early]) is None
    assert records.start_skew_ms([early, dataclasses.replace(late, events=[])]) is None


def test_a_co_run_that_lost_its_mode_is_invalid() -> None:
    client = client_of(1.0)
    seen = co_run_of("ok", client)
    row = records.client_record(seen, client, PROVED, None, None)
    record = records.co_run_record(
        seen, [row], None, mode_failure="the daemon is gone",
        reference=records.Reference(whole={"job": row}),
    )  # fmt: skip
    assert (record.outcome, record.reason) == ("invalid", "the daemon is gone")
    assert record.summary.stp is None


def test_a_sampler_that_does_not_start_well_is_a_failure_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "truncated.py"
    script.write_text("import sys\nopen(sys.argv[2], 'w').write('{\"record\": \"mon\\n')\n")
    monkeypatch.setattr(sampler, "MONITOR_SCRIPT", script)
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert "it said nothing" in started.failure
    monkeypatch.setattr(sampler.sys, "executable", str(tmp_path / "no-python"))
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert "did not start" in started.failure


def test_a_long_run_does_not_go_through_all_its_samples_after_every_co_run(tmp_path: Path) -> None:
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        first, second = (list(started.samples_past(time.monotonic())) for _ in range(2))
        assert started.failure is None
    assert len(second) > 1
    assert second[0] == first[-1]


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    with open("/dev/full", "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with pytest.raises(OSError, match="No space"):
            print("lost", file=sys.stderr, flush=True)
        progress.say("nobody reads this")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def manifest(**environment: object) -> Manifest:
    known = {"gpu_name": "H100", "driver_version": "580",
             "versions": {"python": "3.11", "torch": "2.11"}}  # fmt: skip
    return Manifest(
        schema_version=3, run_id="r", created_at="", mode="mps", effective_mode="mps", mix="mixed",
        job_size="guide", plan={}, notes=[], environment=Environment(**{**known, **environment}),
    )  # fmt: skip


def test_the_newest_reusable_run_is_one_on_the_same_data(tmp_path: Path) -> None:
    for number, data in enumerate(["here", "elsewhere", None]):
        noted = {} if data is None else {"resolved_arguments": {"job": ["--data-dir", data]}}
        made = asdict(replace(manifest(), **noted, created_at=f"2026-01-0{3 - number}"))
        made["run_id"] = f"run-{number}"
        run = run_folder.create_run(tmp_path, made, run_id=made["run_id"])
        run.append_record(client("alone", 0, phase="baseline"))
        run.append_record(co_run("alone"))

    # The oldest did not note its data: it is taken where nothing better is there.
    for data, expected in (("here", "run-0"), ("elsewhere", "run-1"), ("a third place", "run-2")):
        ours = replace(manifest(), resolved_arguments={"job": ["--data-dir", data]})
        assert baselines.newest_reusable(tmp_path, ours, ["job"]).run_id == expected


def test_unlike_environments_sizes_and_demonstrations_are_named_by_field() -> None:
    demonstration = replace(manifest(gpu_name="A100"), job_size="quick", effective_mode="cpu-demo")
    found = baselines.differences(demonstration, manifest())
    for words in ("gpu_name was A100, now it is H100", "job size was quick", "cpu-demo was True"):
        assert any(words in difference for difference in found)
    assert baselines.differences(manifest(), manifest()) == []
