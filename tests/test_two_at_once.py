"""Two programs on one card: whoever is at work has it until its end, and is not disturbed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import test_blast_radius
import test_speed_table
import test_sweep
from nvml_stub import GPU_UUID

from benchmarking.measuring import locks

AT_WORK = f"another run is at work on GPU {GPU_UUID}: pid {os.getpid()}"
ASKS_FOR_LOCK = '#!/bin/sh\nflock --nonblock "{lock}" echo free >>"{log}" || echo held >>"{log}"\n'


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The card's lock, of this test alone."""
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / f"{locks.PREFIX}.{GPU_UUID}.{os.getuid()}.lock"


def test_no_fault_happens_on_a_card_that_another_run_is_at_work_on(tmp_path: Path) -> None:
    blast = test_blast_radius.Blast(tmp_path)
    with locks.hold(GPU_UUID):
        refused = blast.run("--fault", "oom", "--neighbors", "1")
        assert refused.returncode == 4
        assert AT_WORK in blast.found()["not_run"]
        assert not (blast.output / "clients").exists()
        allowed = blast.run("--fault", "oom", "--neighbors", "1", "--allow-contention")
    assert allowed.returncode == 0, allowed.stderr
    assert AT_WORK in "".join(blast.found()["notes"])


def test_a_speed_table_says_that_another_run_is_at_work_on_the_card(tmp_path: Path) -> None:
    bench = test_speed_table.Bench(tmp_path)
    with locks.hold(GPU_UUID):
        assert bench.run("--only", "resnet50-batch1")[0] == 0
    assert [AT_WORK in note for note in bench.table()["notes"]] == [True]


def test_a_sweep_has_the_card_between_two_values_too(tmp_path: Path, lock: Path) -> None:
    sweeper, log = test_sweep.Sweeper(tmp_path), tmp_path / "calls.log"
    sweeper.add_card()
    for name in ("setup_time_slicing.sh", "reset_time_slicing.sh"):
        sweeper.add_program(f"../gpu-configs/{name}", ASKS_FOR_LOCK.format(lock=lock, log=log))
    jobs = ("--workloads", "1", "--mix", "training")
    with locks.hold(GPU_UUID):
        refused = sweeper.run("timeslice", "short", *jobs, change=True)
        assert refused.returncode == 4
        assert AT_WORK in refused.stderr
        assert not sweeper.output.exists()
    done = sweeper.run("timeslice", "short,long", *jobs, change=True)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == ["held"] * 4


@pytest.mark.parametrize("program", ["blast_radius", "speed_table"])
def test_two_in_one_folder_are_kept_apart_though_on_two_cards(tmp_path: Path, program: str) -> None:
    output = tmp_path / ("out" if program == "blast_radius" else "speed")
    output.mkdir()
    with (output / "run.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if program == "blast_radius":
            done = test_blast_radius.Blast(tmp_path).run("--fault", "oom", "--neighbors", "1")
            code, said = done.returncode, done.stderr
        else:
            code, said = test_speed_table.Bench(tmp_path).run("--only", "resnet50-batch1")
    assert code == 2
    assert f"{output}: another {program} is at work there: wait, or stop it" in said
    assert [path.name for path in output.iterdir()] == ["run.lock"]
