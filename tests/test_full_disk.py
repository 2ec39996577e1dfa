"""A disk that runs full while something runs: a sentence, no truncated record, and it can go on.

Programs, jobs' contract and the disk are real, GPU and jobs pretended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic_runs
from conftest import PROJECT_ROOT
from mode_script_runner import open_folder
from program_copy import processes_of
from recorded_rows import read_plain
from soak import Round
from suite_bench import Bench
from tiny_disk import needs_mount, tiny_disk
from waiting import wait_until

from benchmarking.records import run_folder
from workloads.common import cli, client
from workloads.common.errors import EXIT_NOT_FINITE, DivergedError

RUN, FULL = "run_experiments.sh", "No space left on device"


def disturb(
    command: list[str], where: Path, environment: dict[str, str], events: Path, how: object
) -> str:
    """Run a command until a client has done work, do this, and return what it said at code 1."""
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: events.exists() and '"units"' in events.read_text(), "a client at work")
    how()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    return stderr


def run(command: list[str], where: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command to its end; return exit code and stderr."""
    done = subprocess.run(
        command, cwd=where, env=environment, stdin=subprocess.DEVNULL, timeout=100,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@needs_mount
def test_each_runs_page_needs_no_room_for_temporary_files(tmp_path: Path) -> None:
    for mode in ("time-slicing", "mps"):
        made = synthetic_runs.run(mode, mode, {4: [2.0, 2.04, 2.1]})
        synthetic_runs.write(tmp_path / "results", made)
    script = PROJECT_ROOT / "benchmarking" / "analyze_results.py"
    with tiny_disk(tmp_path / "temporary") as disk:
        disk.fill()
        filler = disk.seen / "filler"
        os.truncate(filler, filler.stat().st_size - 2**14)  # room for a test file, not for charts
        command = disk.command(tmp_path, sys.executable, script, "--each-run")
        found = run(command, tmp_path, {**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert found == (0, "")
    assert len([*tmp_path.glob("results/*/report.html")]) == 2


@needs_mount
def test_a_folder_of_locks_that_anybody_has_filled_keeps_no_run_away(
    bench: Bench, tmp_path: Path
) -> None:
    with tiny_disk(tmp_path / "locks") as disk:
        disk.fill()
        environment = bench.environment | {"GPU_SHARING_LOCK_DIR": str(tmp_path / "locks")}
        command = disk.command(tmp_path, *bench.command("--workloads", "1"))
        assert run(command, tmp_path, environment)[0] == 0


@needs_mount
def test_a_suite_and_an_analysis_on_a_full_disk_say_so_and_go_on_once_there_is_room(
    bench: Bench, tmp_path: Path
) -> None:
    bench.script({"match": "*:training-2-r0/*", "units": 20})
    with tiny_disk(bench.results) as disk:

        def on_disk(*words: str | Path) -> tuple[int, str]:
            return run(disk.command(tmp_path, *words), tmp_path, bench.environment)

        disk.fill()
        code, said = on_disk(*bench.command())
        assert code == 1
        advice = "make room there, or name another --results-dir"
        assert said.endswith(f": error: cannot write to {bench.results} ({FULL}): {advice}\n")
        assert "Traceback" not in said
        disk.make_room()

        flags = ("--mix", "training", "--workloads", "2", "--window", "1.5", "--run-id", "mine")
        said = disturb(
            disk.command(tmp_path, *bench.command(*flags)), tmp_path, bench.environment,
            disk.seen / "mine/clients/training-2-r0/1.events.jsonl", disk.fill,
        )  # fmt: skip
        full = f"cannot write to {bench.results}/mine ({FULL}): make room there or bring it back"
        assert f"{full}, then go on with --resume {bench.results}/mine" in said
        assert processes_of(bench.root) == []
        assert not any(
            "truncated" in one for one in run_folder.read_run(disk.seen / "mine").warnings
        )

        script = bench.root / "benchmarking" / "analyze_results.py"
        analyze = (sys.executable, script, "--each-run", "--results-dir", bench.results)
        full = f"cannot write to {bench.results} ({FULL}): make room there or bring it back"
        sentence = f"analyze_results.py: error: {full}, or choose another --output\n"
        assert on_disk(*analyze) == (1, sentence)
        assert not (disk.seen / "report.html").exists()

        disk.make_room()
        code, said = on_disk(*bench.resume_command("mine"))
        assert code == 0, said
        made = read_plain(disk.seen / "mine")
        assert made.warnings == []
        rows = [(row["co_run"], row["client"], row["status"]) for row in made.client_records]
        assert rows == [
            ("baseline-resnet_training", 0, "ok"), ("training-2-r0", 0, "ok"),
            ("training-2-r0", 1, "ok"),
        ]  # fmt: skip
        (resumption,) = made.manifest["resumptions"]
        assert resumption["ended"] in ("killed", "failed")
        assert on_disk(*analyze)[0] == 0


# --- drivers --------------------------------------------------------------------------------------


@pytest.fixture
def driven() -> Iterator[Round]:
    """The driver script with suite, jobs and GPU."""
    with open_folder() as folder:
        made = Round(folder, RUN, "suite", signal.SIGTERM, 0.0)
        flags = ("--mix", "training", "--workloads", "2", "--repeats", "1", "--quick")
        made.commands = {RUN: ["--modes", "mps", *flags]}
        made.prepare()
        yield made


def kept_open(driven: Round) -> dict[str, str]:
    """An environment in which the second of two clients works on when the first has done a job."""
    rule = {"match": "*:training-2-r0/1", "units": 75}
    jobs = [*json.loads(driven.environment["SCRIPTED_CLIENT"]), rule]
    return {**driven.environment, "SCRIPTED_CLIENT": json.dumps(jobs)}


@pytest.mark.parametrize("is_full", [pytest.param(True, marks=needs_mount), False])
def test_an_experiment_whose_results_folder_is_full_or_gone_has_that_for_its_reason_and_goes_on(
    driven: Round, is_full: bool
) -> None:
    output, aside = driven.output, driven.folder / "aside"
    with tiny_disk(output) if is_full else contextlib.nullcontext() as disk:
        seen = disk.seen if is_full else output

        def command(*, resume: bool) -> list[str]:
            words = driven.command(resume=resume)
            return disk.command(driven.folder, *words) if is_full else words

        said = disturb(
            command(resume=False), driven.folder, kept_open(driven),
            seen / "mps/clients/training-2-r0/0.events.jsonl",
            disk.fill if is_full else lambda: output.rename(aside),
        )  # fmt: skip
        why = FULL if is_full else "No such file or directory"
        assert f"cannot write to {output}/mps ({why})" in said
        assert driven.machine.state()["mps"] == {}
        assert processes_of(driven.folder) == []
        if is_full:  # what there is room for in the last block of the file: the rows, each whole
            rows, warnings = run_folder.read_phases(seen)
            assert warnings == []
            reason = {row.name: row.reason for row in rows if row.status == "failed"}
            assert f"cannot write to {output}/mps ({FULL})" in reason["mps"]
            assert f"cannot write to {output} ({FULL})" in reason["analysis"]
        else:
            assert not output.exists()

        disk.make_room() if is_full else aside.rename(output)
        code, said = run(command(resume=True), driven.folder, driven.environment)
        assert code == 0, said
        manifest = read_plain(seen / "mps").manifest
        assert (manifest["outcome"], len(manifest["resumptions"])) == ("complete", 1)
        rows, warnings = run_folder.read_phases(seen)
        assert warnings == []
        assert {row.name: row.status for row in rows} == {
            "baseline": "ok", "time-slicing": "skipped", "mps": "ok", "mig": "skipped",
            "analysis": "ok",
        }  # fmt: skip
        assert driven.machine.state()["mps"] == {}


# --- a job by hand --------------------------------------------------------------------------------

JOB = """
import sys
from pathlib import Path
from workloads.common import cli, client, results
what, folder = sys.argv[1], Path(sys.argv[2])
def main():
    log = client.Recorder(folder / "events")
    if what == "result":
        results.write_result(folder, "job", {})
    elif what == "events":
        log.write("units", many=list(range(10000)))
    else:
        sys.stdout = open(folder / "stdout", "w")
        print("x" * 9000)
    return 0
cli.run_main(main)
"""


@needs_mount
def test_a_job_that_cannot_write_is_one_sentence_and_code_1(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    environment = {"PYTHONPATH": str(PROJECT_ROOT), "PATH": "/usr/bin:/bin"}
    advice = f"({FULL}): make room there, or name another folder with --results-dir"
    with tiny_disk(tmp_path / "out") as disk:
        disk.fill()
        for what in ("result", "events", "print"):
            words = (sys.executable, tmp_path / "job.py", what, tmp_path / "out")
            code, said = run(disk.command(tmp_path, *words), tmp_path, environment)
            assert code == 1
            assert said.startswith("job.py: error: cannot write ")
            assert said.count("\n") == 1
            assert advice in said


def test_what_a_job_failed_of_first_is_what_it_says_with_a_full_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        log = client.Recorder(Path("/dev/full"))
        client._tell_and_raise(log, DivergedError("the loss is gone"))

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run_main(main)
    assert ended.value.code == EXIT_NOT_FINITE
    assert capsys.readouterr().err == "job.py: error: the loss is gone\n"
