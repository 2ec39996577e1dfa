"""A suite run that was cut off at any moment goes on: every row once, nothing done twice."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded_rows import read_plain
from test_benchmark_suite import PROJECT_ROOT, Bench

from benchmarking.cli import SuiteError
from benchmarking.planning.plan_file import read_plan_file
from benchmarking.planning.request import Request
from benchmarking.records import run_folder
from benchmarking.records.types import MpsLimits
from benchmarking.suite import resume as resumption

RAMP = ("--mix", "interactive", "--workloads", "1,2", "--run-id", "mine")
CALIBRATED = {"match": "jupyter*", "figures_once": {"cell_repeats": "matrix=3"}}
SLOW = {"unit_seconds": 0.02, "units": 100_000}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A machine without a GPU, whose notebooks are calibrated by their baseline."""
    made = Bench(tmp_path)
    made.script(CALIBRATED)
    return made


def cut_off(bench: Bench, co_run: str, number: signal.Signals) -> None:
    """Start the ramp and send it a signal when this co-run, which would take long, is measured."""
    bench.script(CALIBRATED, {"match": f"*:{co_run}/*", **SLOW})
    process = bench.start(*RAMP, until=f"{co_run}/0", said='"ready"')
    time.sleep(0.3)  # into its work, of which a job tells at its end
    process.send_signal(number)
    process.communicate(timeout=30)
    bench.script(CALIBRATED)


def rows(run: run_folder.Run) -> list[tuple]:
    return [(row["co_run"], row["client"], row["status"]) for row in run.client_records]


def starts(bench: Bench) -> Counter[str]:
    """How many client folders each co-run has, the put-aside ones included."""
    folders = (bench.results / "mine" / "clients").iterdir()
    return Counter(folder.name.split(".interrupted-")[0] for folder in folders)


ALL_ROWS = [
    ("baseline-jupyter_simulation", 0, "ok"), ("interactive-1-r0", 0, "ok"),
    ("interactive-2-r0", 0, "ok"), ("interactive-2-r0", 1, "ok"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("co_run", "number"),
    [
        ("baseline-jupyter_simulation", signal.SIGKILL),
        ("interactive-2-r0", signal.SIGINT),
    ],
)
def test_a_run_that_was_cut_off_goes_on_without_repeating_what_is_done(
    bench: Bench, co_run: str, number: signal.Signals
) -> None:
    cut_off(bench, co_run, number)
    before = read_plain(bench.results / "mine")
    is_killed = number == signal.SIGKILL
    assert before.manifest["outcome"] == ("running" if is_killed else "interrupted")
    kept = [record for record in before.co_run_records if record["outcome"] == "ok"]

    report = bench.report()
    assert ("mine: the run was cut off" in report) == is_killed

    done = bench.resume("mine")  # --min-seconds is not to be given again
    assert done.returncode == 0, done.stderr
    run = bench.only_run()
    assert run.manifest["outcome"] == "complete"
    assert [item["ended"] for item in run.manifest["resumptions"]] == [
        "killed" if is_killed else "interrupted"
    ]
    assert rows(run) == ALL_ROWS
    assert not is_killed or "cut off" not in bench.report()
    assert [record for record in run.co_run_records if record in kept] == kept
    assert starts(bench) == {name: 1 + (name == co_run) for name, _, _ in ALL_ROWS}
    notebooks = [
        client["command"]
        for planned in run.manifest["plan"]["co_runs"]
        for client in planned["clients"]
    ]
    assert all("--cell-repeats matrix=3" in " ".join(command) for command in notebooks)
    assert all(command.count("--resolved") == 1 for command in notebooks)
    monitors = (run.folder / run_folder.SAMPLES_FILE).read_text().count('"monitor"')
    assert monitors == 2


def test_a_ramp_goes_on_between_its_breaking_point_and_its_last_good_count(bench: Bench) -> None:
    broken = {"match": "*:training-4-r0/1", "fail": "oom", "fail_at": "load"}
    bench.script(broken)
    arguments = ("--mix", "training", "--workloads", "1,4", "--bisect", "--run-id", "mine")
    assert bench.run(*arguments).returncode == 1
    folder = bench.results / "mine"
    whole = read_plain(folder)
    # as if the power had failed while two at once were measured
    lines = (folder / run_folder.RECORDS_FILE).read_text().splitlines(keepends=True)
    cut = next(index for index, line in enumerate(lines) if '"training-2-r0"' in line)
    (folder / run_folder.RECORDS_FILE).write_text("".join(lines[:cut]) + lines[cut][:40])
    manifest = {**whole.manifest, "outcome": "running", "finished_at": None}
    run_folder.write_json_atomic(folder / run_folder.MANIFEST_FILE, manifest)

    done = bench.resume(str(folder))
    assert done.returncode == 1, done.stderr
    run = read_plain(folder)
    assert rows(run) == rows(whole)
    assert "breaking point: 4 at once; 3 held" in run.manifest["notes"]
    assert starts(bench)["training-4-r0"] == 1
    again = bench.resume(str(folder))
    assert again.returncode == 2
    assert "run mine is complete" in again.stderr


def stored_run(results: Path, **fields: object) -> run_folder.RunWriter:
    request = resumption.request_data(Request())
    environment = {"gpu_name": "H100", "gpu_uuid": "GPU-1", "driver_version": "550",
                   "git_commit": "aaa", "versions": {"torch": "2.4"}}  # fmt: skip
    manifest = {"command": [], "mode": "mps", "effective_mode": "mps", "mix": "mixed", "plan": {},
                "environment": environment, "baseline_run_id": None, "notes": [],
                "request": request, "plan_file": None}  # fmt: skip
    return run_folder.create_run(results, {**manifest, **fields}, run_id="mine")


def test_a_request_comes_back_as_it_was_with_limits_and_plan_file(tmp_path: Path) -> None:
    plan_file = read_plan_file(PROJECT_ROOT / "examples" / "plans" / "own-commands.toml")
    asked = Request(
        results_dir=tmp_path, plan_file=plan_file, mix=plan_file.name, counts=(1, 2), slo_ms=3.0,
        mps_limits=MpsLimits(percentages=("even",)), mig_layout=("1g.5gb",),
    )  # fmt: skip
    fields = {"request": resumption.request_data(asked), "plan_file": plan_file.to_dict()}
    writer = stored_run(tmp_path, **fields)
    writer.save_plan_file(plan_file.text)
    writer.finish("interrupted")
    assert resumption.read_earlier("mine", tmp_path).request == asked


def test_a_run_that_somebody_is_at_work_on_is_refused(tmp_path: Path) -> None:
    writer = stored_run(tmp_path)
    with pytest.raises(run_folder.RunStoreError, match="still going on"):
        resumption.read_earlier("mine", tmp_path)
    writer.finish("interrupted")
    assert resumption.read_earlier("mine", tmp_path).outcome == "interrupted"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "plan.toml").write_text("x = 1"), "is not the plan that the run"),
        (lambda folder: (folder / "plan.toml").chmod(0o666), "may have been written by somebody"),
        (lambda folder: folder.chmod(0o777), "may have been written by somebody else"),
    ],
)
def test_a_run_that_others_may_have_written_is_not_executed(
    tmp_path: Path, spoil: Callable, words: str
) -> None:
    plan_file = read_plan_file(PROJECT_ROOT / "examples" / "plans" / "own-commands.toml")
    writer = stored_run(tmp_path, plan_file=plan_file.to_dict())
    writer.save_plan_file(plan_file.text)
    writer.finish("interrupted")
    assert resumption.read_earlier("mine", tmp_path).request.plan_file == plan_file
    spoil(writer.folder)
    with pytest.raises(run_folder.RunStoreError, match=words):
        resumption.read_earlier("mine", tmp_path)


def test_a_run_without_its_request_is_refused(tmp_path: Path) -> None:
    stored_run(tmp_path, request=None).finish("interrupted")
    with pytest.raises(run_folder.RunStoreError, match="another version of this program"):
        resumption.read_earlier("mine", tmp_path)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"gpu_name": "A100"}, "gpu_name was H100, now it is A100"),
        ({"git_commit": "bbb"}, "git_commit was aaa, now it is bbb"),
        ({"versions": {"torch": "2.5"}}, "version of torch was 2.4, now it is 2.5"),
        ({"driver_version": "560"}, "driver_version was 550, now it is 560"),
    ],
)
def test_a_run_does_not_go_on_in_another_environment(tmp_path: Path, now: dict, words: str) -> None:
    stored_run(tmp_path).finish("interrupted")
    earlier = resumption.read_earlier("mine", tmp_path)
    resumption.unlike_environment(earlier, {"gpu_name": "H100", "git_commit": None}, {})
    with pytest.raises(SuiteError, match=words):
        resumption.unlike_environment(earlier, now, {})


def test_other_flags_beside_resume_are_refused(bench: Bench) -> None:
    done = bench.run("--resume", "mine", "--quick")
    assert done.returncode == 2
    assert json.dumps(done.stderr).count("leave --min-seconds, --quick away") == 1
