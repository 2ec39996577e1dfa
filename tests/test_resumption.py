"""A suite run that was cut off at any moment goes on: every row once, nothing done twice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT_ROOT
from program_copy import processes_of
from recorded_rows import read_plain
from suite_bench import Bench, outcomes, statuses
from waiting import wait_until

from benchmarking.cli import SuiteError
from benchmarking.planning.plan_file import read_plan_file
from benchmarking.planning.request import Request
from benchmarking.records import run_folder
from benchmarking.records.types import MpsLimits
from benchmarking.suite import resume as resumption

CALIBRATED = {"match": "jupyter*", "figures_once": {"cell_repeats": "matrix=3"}}
PLAN = PROJECT_ROOT / "examples" / "plans" / "own-commands.toml"
ALL_ROWS = [
    ("baseline-jupyter_simulation", 0, "ok"), ("interactive-1-r0", 0, "ok"),
    ("interactive-2-r0", 0, "ok"), ("interactive-2-r0", 1, "ok"),
]  # fmt: skip


def rows(run: SimpleNamespace) -> list[tuple]:
    return [(row["co_run"], row["client"], row["status"]) for row in run.client_records]


def starts(bench: Bench) -> Counter[str]:
    """How many client folders each co-run has, the put-aside ones included."""
    folders = (bench.results / "mine" / "clients").iterdir()
    return Counter(folder.name.split(".interrupted-")[0] for folder in folders)


@pytest.mark.parametrize(
    ("co_run", "number"),
    [("baseline-jupyter_simulation", signal.SIGKILL), ("interactive-2-r0", signal.SIGINT)],
)
def test_a_run_that_was_cut_off_keeps_what_is_done_and_goes_on_without_repeating_it(
    bench: Bench, co_run: str, number: signal.Signals
) -> None:
    is_killed = number == signal.SIGKILL
    bench.script(CALIBRATED, {"match": f"*:{co_run}/*", "units": 100_000})
    flags = ("--mix", "interactive", "--workloads", "1,2", "--run-id", "mine")
    process = bench.start(*flags, until=f"{co_run}/0", said='"ready"')
    time.sleep(0.3)  # into its work, of which a job tells at its end
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=30)
    bench.script(CALIBRATED)

    before = bench.only_run()
    assert before.manifest["outcome"] == ("running" if is_killed else "interrupted")
    kept = [record for record in before.co_run_records if record["outcome"] == "ok"]
    if is_killed:
        wait_until(lambda: processes_of(bench.root) == [], "the end of clients and sampler")
        assert "mine: the run was cut off" in bench.report()
    else:
        assert process.returncode == 130
        script = bench.root / "benchmarking" / "benchmark_suite.py"  # he stands in another folder
        assert stdout.splitlines()[-2:] == [
            f"to go on: python3 {script} --resume {before.folder}", f"results: {before.folder}",
        ]  # fmt: skip
        assert outcomes(before) == ["ok", "ok", "interrupted"]
        assert statuses(before, co_run) == ["interrupted"] * 2
        assert before.co_run_records[-1]["summary"]["success_rate_percent"] is None
        assert before.co_run_records[-1]["summary"]["stp"] is None
        pids = [record["identity"]["pid"] for record in before.client_records]
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    done = bench.resume("mine")  # --min-seconds is not to be given again
    assert done.returncode == 0, done.stderr
    run = bench.only_run()
    assert run.manifest["outcome"] == "complete"
    assert [item["ended"] for item in run.manifest["resumptions"]] == [
        "killed" if is_killed else "interrupted"
    ]
    assert rows(run) == ALL_ROWS
    assert [record for record in run.co_run_records if record in kept] == kept
    assert starts(bench) == {name: 1 + (name == co_run) for name, _, _ in ALL_ROWS}
    notebooks = [client["command"] for planned in run.manifest["plan"]["co_runs"]
                 for client in planned["clients"]]  # fmt: skip
    assert all("--cell-repeats matrix=3" in " ".join(command) for command in notebooks)
    assert all(command.count("--resolved") == 1 for command in notebooks)
    monitors = (run.folder / run_folder.SAMPLES_FILE).read_text().count('"monitor"')
    assert monitors == 2


def test_bisection_finds_the_count_between_and_goes_on_where_it_was_cut_off(bench: Bench) -> None:
    bench.script(CALIBRATED, {"match": "*:interactive-4-r0/3", "fail": "oom", "fail_at": 0.05})
    flags = ("--mix", "interactive", "--workloads", "1,4", "--bisect", "--run-id", "mine")
    whole = bench.must(*flags, code=1)
    kinds = {row["co_run"]: (row["stop_reason"] or {}).get("kind") for row in whole.co_run_records}
    assert kinds == {
        "baseline-jupyter_simulation": None, "interactive-1-r0": None, "interactive-4-r0": "oom",
        "interactive-2-r0": None, "interactive-3-r0": None,
    }  # fmt: skip
    assert whole.co_run_records[2]["stop_reason"]["client"] == 3
    assert any("breaking point: 4 at once; 3 held" in note for note in whole.manifest["notes"])
    # what was added in between has everything that the others had
    added = whole.manifest["plan"]["co_runs"][-1]["clients"][0]
    assert "--resolved yes" in " ".join(added["command"])
    assert "--cell-repeats matrix=3 " in " ".join(added["command"])
    assert "OMP_NUM_THREADS" in added["environment"]

    # as if the power had failed while two at once were measured
    folder = whole.folder
    lines = (folder / run_folder.RECORDS_FILE).read_text().splitlines(keepends=True)
    cut = next(index for index, line in enumerate(lines) if '"interactive-2-r0"' in line)
    (folder / run_folder.RECORDS_FILE).write_text("".join(lines[:cut]) + lines[cut][:40])
    manifest = {**whole.manifest, "outcome": "running", "finished_at": None}
    run_folder.write_json_atomic(folder / run_folder.MANIFEST_FILE, manifest)
    assert bench.resume(str(folder)).returncode == 1
    run = read_plain(folder)
    assert rows(run) == rows(whole)
    assert "breaking point: 4 at once; 3 held" in run.manifest["notes"]
    assert starts(bench)["interactive-4-r0"] == 1
    again = bench.resume(str(folder))
    assert again.returncode == 2
    assert "run mine is complete" in again.stderr


def stored_run(
    results: Path, *, plan_text: str | None = None, **fields: object
) -> run_folder.RunWriter:
    environment = {"gpu_name": "H100", "gpu_uuid": "GPU-1", "driver_version": "550",
                   "git_commit": "aaa", "versions": {"torch": "2.4"}}  # fmt: skip
    manifest = {"command": [], "mode": "mps", "effective_mode": "mps", "mix": "mixed", "plan": {},
                "environment": environment, "baseline_run_id": None, "notes": [],
                "request": resumption.request_data(Request()), "plan_file": None}  # fmt: skip
    known = {**manifest, **fields}
    return run_folder.create_run(results, known, run_id="mine", plan_text=plan_text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "plan.toml").write_text("x = 1"), "is not the plan that the run"),
        (lambda folder: (folder / "plan.toml").chmod(0o666), "may have been written by somebody"),
        (
            lambda folder: (
                os.unlink(folder / "plan.toml"),
                os.mkfifo(folder / "plan.toml", 0o600),
            ),
            "or edited",
        ),
        (lambda folder: folder.chmod(0o777), "may have been written by somebody else"),
    ],
)
def test_a_request_comes_back_as_it_was_unless_others_may_have_written_it(
    tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    plan_file = read_plan_file(PLAN)
    asked = Request(
        results_dir=tmp_path, plan_file=plan_file, mix=plan_file.name, counts=(1, 2), slo_ms=3.0,
        mps_limits=MpsLimits(percentages=("even",)), mig_layout=("1g.5gb",),
    )  # fmt: skip
    fields = {"request": resumption.request_data(asked), "plan_file": plan_file.to_dict()}
    writer = stored_run(tmp_path, plan_text=plan_file.text, **fields)
    with pytest.raises(run_folder.RunStoreError, match="still going on"):
        resumption.read_earlier("mine", tmp_path)
    writer.finish("interrupted")
    earlier = resumption.read_earlier("mine", tmp_path)
    assert (earlier.request, earlier.outcome) == (asked, "interrupted")
    spoil(writer.folder)
    with pytest.raises(run_folder.RunStoreError, match=words):
        resumption.read_earlier("mine", tmp_path)


def test_a_run_in_a_folder_whose_name_is_no_utf_8_is_read_again(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "caf\udce9")
    run.update_manifest(notes=[str(run.folder), "é 😀"])
    place, other = run_folder.read_run(run.folder).manifest.notes
    assert ("/caf?/" in place, other) == (True, "é 😀")


REQUEST = resumption.request_data(Request())


@pytest.mark.parametrize(
    "fields",
    [{"request": None}, {"request": {**REQUEST, "counts": []}}, {"plan": {"co_runs": [3]}},
     {"request": {**REQUEST, "mix": "nothing"}}, {"plan_file": {}}],
)  # fmt: skip
def test_a_run_without_its_request_is_refused(tmp_path: Path, fields: dict) -> None:
    stored_run(tmp_path, **fields).finish("interrupted")
    with pytest.raises(run_folder.RunStoreError, match="another version of this program"):
        resumption.read_earlier("mine", tmp_path)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"gpu_name": "A100"}, "gpu_name was H100, now it is A100"),
        ({"git_commit": "bbb"}, "git_commit was aaa, now it is bbb"),
        ({"versions": {"torch": "2.5"}}, "version of torch was 2.4, now it is 2.5"),
    ],
)
def test_a_run_does_not_go_on_in_another_environment(tmp_path: Path, now: dict, words: str) -> None:
    stored_run(tmp_path).finish("interrupted")
    earlier = resumption.read_earlier("mine", tmp_path)
    resumption.unlike_environment(earlier, {"gpu_name": "H100", "git_commit": None}, {})
    with pytest.raises(SuiteError, match=words):
        resumption.unlike_environment(earlier, now, {})
