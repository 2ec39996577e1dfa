"""A client that goes wrong beside healthy ones: who survives, what is lost, who works again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import program_copy
import pytest
from waiting import wait_until

from benchmarking.blast import text
from benchmarking.blast.aftermath import judge_neighbor
from benchmarking.planning.plan import WORKLOADS, PlannedClient, PlannedCoRun
from benchmarking.running.launcher import ClientOutcome, CoRunOutcome

PROJECT_ROOT = Path(__file__).resolve().parents[1]
CLIENT = Path(__file__).parent / "fakes" / "scripted_client.py"
FAULT_CLIENT = "workloads/custom/fault_client.py"
HEALTHY = {"match": "*", "unit_seconds": 0.02, "units": 20}
GOES_WRONG = {"match": "fault_client:*", "fail": "oom", "fail_at": 1.5}


class Blast:
    """A copy of the program with scripted clients on a scripted card."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "out"
        scripts = [*(kind.script for kind in WORKLOADS.values()), FAULT_CLIENT]
        program_copy.copy_programs(root, CLIENT, scripts)
        _, self.environment = program_copy.scripted_card(root)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.root / "benchmarking" / "blast_radius.py"),
                "--window", "3", "--output-dir", str(self.output), *arguments]  # fmt: skip

    def scripted(self, *rules: dict) -> dict[str, str]:
        return {**self.environment, "SCRIPTED_CLIENT": json.dumps([HEALTHY, GOES_WRONG, *rules])}

    def run(self, *arguments: str, rules: tuple[dict, ...] = (), **environment: str):
        return subprocess.run(
            self.command(*arguments), env={**self.scripted(*rules), **environment},
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    def found(self) -> dict[str, Any]:
        return json.loads((self.output / "blast_radius.json").read_text())


@pytest.fixture
def blast(tmp_path: Path) -> Blast:
    return Blast(tmp_path)


def test_neighbors_that_survive_lose_nothing_and_a_new_client_works(blast: Blast) -> None:
    done = blast.run("--fault", "oom", "--neighbors", "2")
    assert done.returncode == 0, done.stderr
    found = blast.found()
    assert [n["survived"] for n in found["neighbors"]] == [True, True]
    assert [n["proof"] for n in found["neighbors"]] == ["verified", "verified"]
    assert [n["lost_seconds"] for n in found["neighbors"]] == [0, 0]
    for neighbor in found["neighbors"]:
        assert neighbor["rate_before"] > 10
        assert neighbor["rate_after"] > 10
    assert (found["faulty"]["status"], found["faulty"]["exit_code"]) == ("oom", 12)
    assert 1.4 < found["fault_after_seconds"] < 4
    assert found["newcomer"]["attempts"] == 1
    assert 0 < found["newcomer"]["works_after_seconds"] < 20
    assert "left 2 of 2 neighbors alive" in done.stdout
    assert (blast.output / "blast_radius.md").read_text() in done.stdout
    assert program_copy.processes_of(blast.root) == []


def test_neighbors_taken_along_and_a_new_client_that_needs_two_attempts(blast: Blast) -> None:
    rules = (
        {"match": "fault_client:*", "fail": "error"},
        {"match": "batch_inference:clients/1", "fail": "error", "fail_at": 1.6},
        {"match": "batch_inference:clients/newcomer-0", "fail": "crash", "fail_at": "load"},
    )
    done = blast.run("--fault", "assert", "--neighbors", "2", rules=rules)
    assert done.returncode == 0, done.stderr
    found = blast.found()
    assert [n["survived"] for n in found["neighbors"]] == [True, False]
    assert found["neighbors"][1]["reason"] == "scripted"
    assert found["newcomer"]["attempts"] == 2
    assert found["newcomer"]["failures"] == ["exit code 7"]
    assert found["newcomer"]["works_after_seconds"] > 1
    assert "left 1 of 2 neighbors alive" in done.stdout
    assert "at attempt 2" in done.stdout


def test_ctrl_c_leaves_no_process(blast: Blast) -> None:
    process = subprocess.Popen(
        blast.command("--fault", "oom", "--neighbors", "2"),
        env=blast.scripted({"match": "fault_client:*", "fail": None}),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    events = blast.output / "clients" / "0.events.jsonl"
    wait_until(lambda: events.exists() and '"units"' in events.read_text(), "neighbors at work")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.rstrip().endswith("blast_radius.py: interrupted")
    assert program_copy.processes_of(blast.root) == []


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--fault", "illegal-access"), {}, "add --allow-illegal-access"),
        (
            ("--fault", "illegal-access", "--allow-illegal-access"),
            {"GPU_SETTINGS_LOCKED": "1"},
            "GPU_SETTINGS_LOCKED=1 says that others use the card",
        ),
        (("--fault", "fire"), {}, "invalid choice: 'fire'"),
    ],
)
def test_what_could_harm_others_is_refused_in_a_sentence(
    blast: Blast, arguments: tuple, environment: dict, words: str
) -> None:
    done = blast.run(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [("exit", 1, "ending with code 1, as told"), ("oom", 12, "out of GPU memory"),
     ("assert", 2, "--fault assert needs a GPU")],
)  # fmt: skip
def test_the_faulty_job_fails_as_it_is_told(
    tmp_path: Path, fault: str, code: int, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / FAULT_CLIENT), "--fault", fault, "--after", "0.2",
         "--device", "cpu", "--results-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def co_run_of(status: str, ends: list[float], job_ends: list[float]) -> CoRunOutcome:
    planned = PlannedClient(0, "batch_inference", "Batch inference", "job", ("true",))
    events = [
        {"event": "units", "kind": "batch", "start_seconds": [end - 0.1 for end in ends],
         "duration_seconds": [0.1] * len(ends)},
        *({"event": "job", "start_seconds": end - 1, "end_seconds": end} for end in job_ends),
    ]  # fmt: skip
    outcome = ClientOutcome(planned, status, None, events, None, 0, [])
    run = PlannedCoRun("mine", "co_run", "mps", 0, (planned,))
    return CoRunOutcome(
        run, "ok", None, [outcome], window_start_seconds=100.0, window_end_seconds=110.0
    )


def test_rates_pause_and_loss_of_a_neighbor() -> None:
    steady = [100 + 0.5 * n for n in range(1, 10)]  # up to 104.5; the fault comes at 105
    stalled = judge_neighbor(co_run_of("ok", [*steady, 108.0, 109.0], [104.5]), 0, 105.0)
    assert stalled.rate_before == pytest.approx(8 / 4)  # from one second after go on
    assert stalled.rate_after == pytest.approx(2 / 5)
    assert stalled.longest_gap_ms == pytest.approx(3500)
    assert stalled.lost_seconds == 0

    dead = judge_neighbor(co_run_of("failed", steady, [102.0]), 0, 105.0)
    assert not dead.survived
    assert dead.rate_after == 0
    assert dead.longest_gap_ms is None
    assert dead.lost_seconds == pytest.approx(2.5)


def test_a_card_on_which_nothing_works_any_more_is_said_so() -> None:
    found = {
        "mode": "mps", "fault": "assert",
        "neighbors": [{"survived": False, "longest_gap_ms": None, "lost_seconds": 2.5}],
        "newcomer": {"works_after_seconds": None, "patience_seconds": 120.0},
    }  # fmt: skip
    said = text.conclusion(found)
    assert "left 0 of 1 neighbors alive. 2.50 s of their work were lost." in said
    assert said.endswith("No new client worked within 120 s.")
