"""What is told before the first minute, and one run at a time on a card."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_benchmark_suite import Bench, bench, gpu_bench
from waiting import wait_until

from benchmarking.cli import EXIT_USAGE
from benchmarking.measuring import locks
from benchmarking.records import run_folder
from benchmarking.suite import preflight
from benchmarking.suite.session import run_suite

__all__ = ["bench", "gpu_bench"]  # fixtures


# --- in-process -------------------------------------------------------------------------------


def test_a_driver_gets_usage_errors_and_dry_runs_as_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = run_suite(["--workloads", "0"], from_driver=True)
    assert wrong.exit_code == EXIT_USAGE
    assert "'0' is not a whole number of 1 or more" in str(wrong.reason)
    assert capsys.readouterr().err.startswith("benchmark_suite.py: error: argument --workloads")
    with pytest.raises(SystemExit, match="2"):
        run_suite(["--workloads", "0"])
    words = ["--device", "cpu", "--mix", "inference", "--dry-run", "--results-dir", str(tmp_path)]
    assert run_suite(words, from_driver=True).exit_code == 0
    assert re.search(r"^  about \d+ s: 1 job alone, 1 co-run$", capsys.readouterr().out, re.M)


# --- memory, disk, pids -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mib", "arguments", "code", "words"),
    [
        (16384, ["--mix", "mixed"], 0, None),
        (11264, ["--mix", "mixed"], 0,
         "mixed-4-r0 needs about 11 GiB of GPU memory and 11 GiB are there: it may run out"),
        (6144, ["--mix", "mixed"], 2, "6 GiB are there: take fewer --workloads, another --mix"),
        # the larger counts of a ramp may break
        (6144, ["--mix", "training", "--workloads", "1,4"], 0, "training-4-r0 needs about 13 GiB"),
    ],
)  # fmt: skip
def test_whether_jobs_fit_the_card_is_said_before_they_run(
    gpu_bench: Callable, mib: int, arguments: list[str], code: int, words: str | None
) -> None:
    done = gpu_bench(memory_total_mib=mib).run(*arguments, "--quick", "--dry-run")
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert words in said if words else "GiB" not in said


def test_a_mig_instance_that_is_too_small_is_said(gpu_bench: Callable) -> None:
    bench = gpu_bench(
        mig_mode_current=1,
        mig_devices=[("MIG-aaaaaaaa-0000-0000-0000-000000000000", 7, 16, 3500, 0)],
    )
    done = bench.run("--mode", "mig", "--mix", "training", "--workloads", "1", "--dry-run")
    assert "training-1-r0 needs about 3 GiB of GPU memory and 3 GiB are there" in done.stdout


def test_little_disk_is_told_and_none_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_with(free: int) -> int:
        monkeypatch.setattr(
            preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free)
        )
        words = ["--device", "cpu", "--dry-run", "--results-dir", str(bench.results)]
        return run_suite([*words, "--job", "sleep 1"], from_driver=True).exit_code

    assert run_with(10**12) == 0
    assert "MB are free" not in capsys.readouterr().out
    assert run_with(20 * 10**6) == 0
    assert f"only 20 MB are free in {bench.results}" in capsys.readouterr().out
    assert run_with(0) == 1
    assert "(No space left on device): make room there" in capsys.readouterr().err


@pytest.mark.parametrize("is_own", [False, True])
def test_pids_that_a_container_hides_are_told(
    gpu_bench: Callable, monkeypatch: pytest.MonkeyPatch, is_own: bool
) -> None:
    bench = gpu_bench()
    stand_in = bench.root / "benchmarking" / "suite" / "preflight.py"
    with stand_in.open("a") as stream:
        stream.write(f"\n\ndef is_own_pid_namespace():\n    return {is_own}\n")
    done = bench.run("--dry-run")
    assert ("start it with --pid=host" in done.stdout) == is_own


# --- one run at a time ------------------------------------------------------------------------


def test_a_second_run_is_refused_with_the_pid_of_the_first(bench: Bench) -> None:
    bench.script({"match": "*:training-1-r0/*", "units": 100000})
    first = subprocess.Popen(
        bench.command("--mix", "training", "--workloads", "1"), env=bench.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: list(bench.results.rglob("0.events.jsonl")), "a client")
        second = bench.run("--mix=training", "--job-arguments=--token hunter2", "--run-id=second")
        assert second.returncode == 4
        sentence = f"another run is at work on this machine's CPU: pid {first.pid}"
        assert sentence in second.stderr
        assert "--allow-contention" in second.stderr
        assert not (bench.results / "second").exists()
        assert "hunter2" not in (bench.results / run_folder.REFUSALS_FILE).read_text()
        bench.script()
        allowed = bench.run("--mix", "inference", "--workloads", "1", "--allow-contention")
        assert allowed.returncode == 0, allowed.stderr
        manifests = [run_folder.read_run(path).manifest for path in bench.results.iterdir()
                     if path.name.startswith("cpu-demo-inference")]  # fmt: skip
        assert [manifest.is_contended for manifest in manifests] == [True]
        assert sentence in manifests[0].notes[-1]
    finally:
        first.terminate()
        first.wait(60)


def test_a_driver_holds_the_lock_over_its_suite_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    ask = [sys.executable, "-c",
           "import sys; sys.path.insert(0, '.')\n"
           "from benchmarking.measuring import locks\n"
           "with locks.hold('GPU-1'): print('held')"]  # fmt: skip
    with locks.hold("GPU-1"):
        with locks.hold("GPU-1"), locks.hold("GPU-2"):
            pass
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        assert f"GPU GPU-1: pid {os.getpid()} of" not in done.stderr
        assert f"at work on GPU GPU-1: pid {os.getpid()}; wait" in done.stderr
    assert subprocess.run(ask, capture_output=True, text=True, check=False).stdout == "held\n"


def test_neither_a_link_nor_a_file_that_others_may_open_is_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / f"{locks.PREFIX}.{locks.CPU}.{os.getuid()}.lock"
    target = tmp_path / "elsewhere"
    path.symlink_to(target)
    with pytest.raises(locks.InUseError, match="cannot be told: remove"), locks.hold(None):
        pass
    assert not target.exists()
    path.unlink()
    path.touch(0o644)
    with pytest.raises(locks.InUseError, match="not a file of yours alone"), locks.hold(None):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
def test_another_users_run_is_seen_and_his_name_on_a_file_alone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    uid = 65534
    path = tmp_path / f"{locks.PREFIX}.GPU-1.{uid}.lock"
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with locks.hold("GPU-1"):
            pass  # it is root's own file, whatever its name says
        shutil.chown(path, uid)
        with (
            pytest.raises(locks.InUseError, match=f"pid {os.getpid()} of nobody"),
            locks.hold("GPU-1"),
        ):
            pass
    with locks.hold("GPU-1"):
        pass
