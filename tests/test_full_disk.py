"""A disk that runs full while something runs: a sentence, no torn record, and it can go on.

Programs, jobs' contract and the disk are real, GPU and jobs pretended.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT_ROOT
from mode_script_runner import open_folder
from program_copy import processes_of
from recorded_rows import read_plain
from soak import Round
from test_benchmark_suite import Bench
from tiny_disk import TinyDisk, needs_mount, tiny_disk
from waiting import wait_until

from benchmarking.records import run_folder
from workloads.common import cli
from workloads.common.client import Recorder
from workloads.common.errors import EXIT_NOT_FINITE, DivergedError

RUN, FULL = "run_experiments.sh", "No space left on device"


def run_on(
    disk: TinyDisk, where: Path, environment: dict[str, str] | None, *words: str | Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        disk.command(where, *words), env=environment, stdin=subprocess.DEVNULL, timeout=100,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def fill_when(
    disk: TinyDisk, where: Path, environment: dict[str, str], words: list[str], events: str
) -> tuple[int, str]:
    """Run a command; fill the disk once a client has done work; return exit code and stderr."""
    process = subprocess.Popen(
        disk.command(where, *words), env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(
        lambda: any('"units"' in path.read_text() for path in disk.seen.rglob(events)),
        "a client at work",
    )
    disk.fill()
    _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr


def records_are_whole(folder: Path) -> bool:
    return not any("truncated" in warning for warning in run_folder.read_run(folder).warnings)


# --- suite and analysis ---------------------------------------------------------------------------


@needs_mount
def test_a_suite_and_an_analysis_on_a_full_disk_say_so_and_go_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    bench.script({"match": "*:training-2-r0/*", "units": 20})
    with tiny_disk(bench.results) as disk:
        flags = ["--mix", "training", "--workloads", "2", "--window", "1.5", "--run-id", "mine"]
        events = "clients/training-2-r0/1.events.jsonl"
        code, stderr = fill_when(disk, tmp_path, bench.environment, bench.command(*flags), events)
        assert code == 1
        said = f"cannot write to {bench.results}/mine ({FULL}): make room there or bring it back"
        assert f"{said}, then go on with --resume {bench.results}/mine" in stderr
        assert "Traceback" not in stderr
        assert processes_of(bench.root) == []
        assert records_are_whole(disk.seen / "mine")

        analyze = [
            sys.executable, bench.root / "benchmarking" / "analyze_results.py", "--each-run",
            "--results-dir", bench.results,
        ]  # fmt: skip
        refused = run_on(disk, tmp_path, bench.environment, *analyze)
        assert refused.returncode == 1
        assert refused.stderr.splitlines() == [
            f"analyze_results.py: error: cannot write to {bench.results} ({FULL}): make room there "
            "or bring it back, or choose another --output"
        ]
        assert not (disk.seen / "report.html").exists()

        disk.make_room()
        resume = bench.resume_command("mine")
        gone_on = run_on(disk, tmp_path, bench.environment, *resume)
        assert gone_on.returncode == 0, gone_on.stderr
        run = read_plain(disk.seen / "mine")
        assert run.warnings == []
        rows = [(row["co_run"], row["client"], row["status"]) for row in run.client_records]
        assert rows == [
            ("baseline-resnet_training", 0, "ok"), ("training-2-r0", 0, "ok"),
            ("training-2-r0", 1, "ok"),
        ]  # fmt: skip
        (resumption,) = run.manifest["resumptions"]
        assert resumption["ended"] in ("killed", "failed")
        assert run_on(disk, tmp_path, bench.environment, *analyze).returncode == 0


@needs_mount
def test_a_suite_that_has_no_room_for_its_first_file_is_one_sentence(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with tiny_disk(bench.results) as disk:
        disk.fill()
        done = run_on(disk, tmp_path, bench.scripted_environment(), *bench.command())
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            f"cannot write to {bench.results} ({FULL}): make room there, or name another "
            "--results-dir"
        )
        assert "Traceback" not in done.stderr


# --- drivers --------------------------------------------------------------------------------------


@pytest.fixture
def driven() -> Iterator[Round]:
    """The driver script with suite, jobs and GPU."""
    with open_folder() as folder:
        made = Round(folder, RUN, "suite", signal.SIGTERM, 0.0)
        made.prepare()
        yield made


@pytest.fixture
def disk(driven: Round) -> Iterator[TinyDisk]:
    """A small disk for the driver's results."""
    with tiny_disk(driven.output) as made:
        yield made


def kept_open(driven: Round) -> dict[str, str]:
    """An environment in which the second of two clients works on when the first has done a job."""
    rule = {"match": "*:training-2-r0/1", "units": 75}
    jobs = [*json.loads(driven.environment["SCRIPTED_CLIENT"]), rule]
    return {**driven.environment, "SCRIPTED_CLIENT": json.dumps(jobs)}


@needs_mount
def test_an_experiment_on_a_full_disk_has_that_for_its_reason_and_goes_on(
    driven: Round, disk: TinyDisk
) -> None:
    code, stderr = fill_when(
        disk, driven.folder, kept_open(driven), driven.command(resume=False),
        "time-slicing/clients/training-2-r0/0.events.jsonl",
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in stderr
    assert driven.machine.state()["mps"] == {}
    assert processes_of(driven.folder) == []
    # what there is room for in the last block of the file: the rows, each whole
    rows, warnings = run_folder.read_phases(disk.seen)
    assert warnings == []
    reason = {row.name: row.reason for row in rows if row.status == "failed"}
    assert f"cannot write to {driven.output}/time-slicing ({FULL})" in reason["time-slicing"]
    assert f"cannot write to {driven.output} ({FULL})" in reason["mps"]
    assert f"cannot write to {driven.output} ({FULL})" in reason["analysis"]

    disk.make_room()
    gone_on = run_on(disk, driven.folder, driven.environment, *driven.command(resume=True))
    assert gone_on.returncode == 0, gone_on.stderr
    rows, warnings = run_folder.read_phases(disk.seen)
    assert warnings == []
    assert {row.status for row in rows if row.name != "mig"} == {"ok"}
    assert driven.machine.state()["mps"] == {}


# --- a folder that is taken away ------------------------------------------------------------------


def test_a_results_folder_that_is_taken_away_and_brought_back_is_gone_on_with(
    driven: Round,
) -> None:
    folder = driven.folder
    driven.commands = {RUN: ["--modes", "mps", "--mix", "training", "--workloads", "2",
                             "--repeats", "1", "--quick"]}  # fmt: skip
    process = subprocess.Popen(
        driven.command(resume=False), cwd=folder, env=kept_open(driven), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    events = driven.output / "mps" / "clients" / "training-2-r0" / "0.events.jsonl"
    wait_until(lambda: events.exists() and '"units"' in events.read_text(), "clients at work")
    aside = folder / "aside"
    driven.output.rename(aside)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    said = f"cannot write to {driven.output}/mps (No such file or directory): make room there or"
    assert said in stderr
    assert "Traceback" not in stderr
    assert driven.machine.state()["mps"] == {}
    assert processes_of(folder) == []
    assert not driven.output.exists()

    aside.rename(driven.output)
    gone_on = subprocess.run(
        driven.command(resume=True), cwd=folder, env=driven.environment, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=100,
    )  # fmt: skip
    assert gone_on.returncode == 0, gone_on.stderr
    run = read_plain(driven.output / "mps")
    assert run.manifest["outcome"] == "complete"
    assert len(run.manifest["resumptions"]) == 1
    phases = {row.name: row for row in run_folder.read_phases(driven.output)[0]}
    assert phases["mps"].status == "ok"
    assert phases["mps"].reason == "it was cut off before its end and went on"


# --- a job by hand --------------------------------------------------------------------------------


@needs_mount
@pytest.mark.parametrize("what", ["result", "events", "print"])
def test_a_job_that_cannot_write_is_one_sentence_and_code_1(tmp_path: Path, what: str) -> None:
    program = tmp_path / "job.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from workloads.common import cli, client, results\n"
        f"folder = Path({str(tmp_path / 'out')!r})\n"
        "def main():\n"
        "    log = client.Recorder(folder / 'events')\n"
        f"    if {what!r} == 'result':\n"
        "        results.write_result(folder, 'job', {})\n"
        f"    elif {what!r} == 'events':\n"
        "        log.write('units', many=list(range(10000)))\n"
        "    else:\n"
        "        sys.stdout = open(folder / 'stdout', 'w')\n"
        "        print('x' * 9000)\n"
        "    return 0\n"
        "cli.run_main(main)\n"
    )
    with tiny_disk(tmp_path / "out") as disk:
        disk.fill()
        environment = {"PYTHONPATH": str(PROJECT_ROOT), "PATH": "/usr/bin:/bin"}
        done = run_on(disk, tmp_path, environment, sys.executable, program)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("job.py: error: cannot write ")
    assert f"({FULL}): make room there, or name another folder with --results-dir" in sentence


def test_what_a_job_failed_of_first_is_what_it_says_with_a_full_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads.common import client

    def main() -> int:
        client._tell_and_raise(Recorder(Path("/dev/full")), DivergedError("the loss is gone"))

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run_main(main)
    assert ended.value.code == EXIT_NOT_FINITE
    assert capsys.readouterr().err == "job.py: error: the loss is gone\n"
