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
from conftest import PROJECT_ROOT
from suite_bench import Bench

from benchmarking.measuring import card, locks
from benchmarking.records import run_folder
from benchmarking.suite import preflight
from benchmarking.suite.session import run_suite
from workloads.common import device

SMALL_INSTANCE = {
    "mig_mode_current": 1,
    "mig_devices": [("MIG-aaaaaaaa-0000-0000-0000-000000000000", 7, 16, 3500, 0)],
}


@pytest.mark.parametrize(
    ("state", "arguments", "code", "words"),
    [
        ({"memory_total_mib": 16384}, "--mix mixed", 0, None),
        ({"memory_total_mib": 11264}, "--mix mixed", 0,
         "mixed-4-r0 needs about 11 GiB of GPU memory and 11 GiB are there: it may run out"),
        ({"memory_total_mib": 6144}, "--mix mixed", 2,
         "6 GiB are there: take fewer --workloads, another --mix"),
        # the larger counts of a ramp may break
        ({"memory_total_mib": 6144}, "--mix training --workloads 1,4", 0,
         "training-4-r0 needs about 13 GiB"),
        (SMALL_INSTANCE, "--mode mig --mix training --workloads 1", 0,
         "training-1-r0 needs about 3 GiB of GPU memory and 3 GiB are there"),
    ],
)  # fmt: skip
def test_whether_jobs_fit_the_card_is_said_before_they_run(
    card_bench: Bench, state: dict, arguments: str, code: int, words: str | None
) -> None:
    card_bench.change_card(**state)
    done = card_bench.run(*arguments.split(), "--quick", "--dry-run")
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert words in said if words else "GiB" not in said


def test_little_disk_is_told_none_is_refused_and_a_plan_says_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said_with(free: int, *words: str, code: int = 0) -> str:
        disk = SimpleNamespace(free=free)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: disk)
        words = ("--device", "cpu", "--dry-run", "--results-dir", str(tmp_path), *words)
        assert run_suite(words, from_driver=True).exit_code == code
        return "".join(capsys.readouterr())

    assert "MB are free" not in said_with(10**12, "--job", "sleep 1")
    assert f"only 20 MB are free in {tmp_path}" in said_with(20 * 10**6, "--job", "sleep 1")
    refused = said_with(0, "--job", "sleep 1", code=1)
    assert "(No space left on device): make room there" in refused
    estimate = r"^  about \d+ s: 1 job alone, 1 co-run$"
    assert re.search(estimate, said_with(10**12, "--mix", "inference"), re.MULTILINE)


@pytest.mark.parametrize("is_own", [False, True])
def test_pids_that_a_container_hides_and_more_clients_than_were_set_up_are_told(
    card_bench: Bench, is_own: bool
) -> None:
    card_bench.save_mode("time-slicing", "clients=4\n")
    stand_in = card_bench.root / "benchmarking" / "suite" / "preflight.py"
    with stand_in.open("a") as stream:
        stream.write(f"\n\ndef is_own_pid_namespace():\n    return {is_own}\n")
    said = card_bench.run("--workloads", "8", "--dry-run").stdout
    assert ("start it with --pid=host" in said) == is_own
    assert "set up for 4: run ./gpu-configs/setup_time_slicing.sh 8" in said
    assert "set up for" not in card_bench.run("--workloads", "4", "--dry-run").stdout


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        # no namespace of its own: the quota is a scheduler's, or systemd-run's
        ("0::/slurm/job_7/step_0", {"slurm/job_7/cpu.max": "400000 100000",
                                    "slurm/job_7/step_0/cpu.max": "max 100000"}, 4),
        # version 1: of a job on the host, and in a container, which sees its own group at the top
        ("5:cpu,cpuacct:/job_7\n3:cpuset:/", {"cpu/job_7/cpu.cfs_quota_us": "250000",
                                              "cpu/job_7/cpu.cfs_period_us": "100000"}, 2),
        ("5:cpu,cpuacct:/docker/0d9b\n0::/", {"cpu/cpu.cfs_quota_us": "300000",
                                              "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("", {}, 64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("usable_cores", [card.usable_cores, device.usable_cores])
def test_a_quota_of_cores_counts_wherever_the_control_group_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usable_cores: Callable[[Path], int],
    groups: str, files: dict[str, str], cores: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    under = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in [("proc/self/cgroup", groups), *under.items()]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert usable_cores(tmp_path) == cores


# --- one run at a time ------------------------------------------------------------------------


def test_a_second_run_is_refused_with_the_pid_of_the_first(bench: Bench) -> None:
    bench.script({"match": "*:training-1-r0/*", "units": 100000})
    flags = ("--mix", "training", "--workloads", "1")
    first = bench.start(*flags, until="training-1-r0/0", said="")
    try:
        second = bench.run("--mix=training", "--job-arguments=--token hunter2", "--run-id=second")
        assert second.returncode == 4
        sentence = f"another run is at work on this machine's CPU: pid {first.pid}"
        assert sentence in second.stderr
        assert "--allow-contention" in second.stderr
        assert not (bench.results / "second").exists()
        assert "hunter2" not in (bench.results / run_folder.REFUSALS_FILE).read_text()
        bench.script()
        allowed = ("--mix", "inference", "--workloads", "1", "--run-id", "allowed")
        assert bench.run(*allowed, "--allow-contention").returncode == 0
        manifest = run_folder.read_run(bench.results / "allowed").manifest
        assert manifest.is_contended
        assert sentence in manifest.notes[-1]
    finally:
        first.terminate()
        first.communicate(timeout=60)


@pytest.fixture
def lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of locks of the test's own."""
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_driver_holds_the_lock_over_its_suite_runs(lock_folder: Path) -> None:
    program = "from benchmarking.measuring import locks\nwith locks.hold('GPU-1'): print('held')"
    ask = [sys.executable, "-c", program]
    with locks.hold("GPU-1"):
        with locks.hold("GPU-1"), locks.hold("GPU-2"):
            pass
        done = subprocess.run(ask, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
        # whose it is is said where that is another user
        assert f"at work on GPU GPU-1: pid {os.getpid()}; wait" in done.stderr
    done = subprocess.run(ask, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n"


def test_a_variable_that_is_empty_names_no_folder_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    usual.mkdir()
    monkeypatch.setenv(locks.FOLDER_VARIABLE, "")
    monkeypatch.setattr(locks, "FOLDERS", (usual,))
    monkeypatch.chdir(tmp_path)
    with locks.hold("GPU-1"):
        assert list(tmp_path.iterdir()) == [usual]


def test_neither_a_link_nor_a_file_that_others_may_open_is_taken_for_a_lock(
    lock_folder: Path,
) -> None:
    path = lock_folder / f"{locks.PREFIX}.{locks.CPU}.{os.getuid()}.lock"
    target = lock_folder / "elsewhere"
    path.symlink_to(target)
    with pytest.raises(locks.InUseError, match="cannot be told: remove"), locks.hold(None):
        pass
    assert not target.exists()
    path.unlink()
    path.touch(0o644)
    with pytest.raises(locks.InUseError, match="not a file of yours alone"), locks.hold(None):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")
def test_another_users_run_is_seen_and_his_name_on_a_file_alone_is_none(lock_folder: Path) -> None:
    uid = 65534
    path = lock_folder / f"{locks.PREFIX}.GPU-1.{uid}.lock"
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with locks.hold("GPU-1"):
            pass  # it is root's own file, whatever its name says
        shutil.chown(path, uid)
        taken = f"pid {os.getpid()} of nobody"
        with pytest.raises(locks.InUseError, match=taken), locks.hold("GPU-1"):
            pass
    with locks.hold("GPU-1"):
        pass
