"""A client that goes wrong beside healthy ones: who survives, what is lost, who works again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_copy import processes_of
from suite_bench import Bench
from waiting import wait_until

from benchmarking import blast_report
from benchmarking.blast_radius import judge_neighbor
from benchmarking.measuring.client import ClientResult
from benchmarking.planning.plan import PlannedClient
from workloads.custom import fault_client

PROJECT_ROOT = Path(__file__).resolve().parents[1]
FAULT_CLIENT = "workloads/custom/fault_client.py"
HEALTHY = {"match": "*", "unit_seconds": 0.02, "units": 20}
GOES_WRONG = {"match": "fault_client:*", "fail": "oom", "fail_at": 0.6}


MEMORY_LIMIT = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"


class Blast(Bench):
    """A copy of the program with scripted clients on a scripted card."""

    def __init__(self, root: Path, **card: object) -> None:
        super().__init__(root, FAULT_CLIENT)
        self.output = root / "out"
        self.add_card(**card)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.root / "benchmarking" / "blast_radius.py"),
                "--window", "1.2", "--output-dir", str(self.output), *arguments]  # fmt: skip

    def scripted(self, *rules: dict) -> dict[str, str]:
        return {**self.environment, "SCRIPTED_CLIENT": json.dumps([HEALTHY, GOES_WRONG, *rules])}

    def run(self, *arguments: str, rules: tuple[dict, ...] = (), **environment: str):
        environment = {**self.scripted(*rules), **environment}
        return self.to_its_end(self.command(*arguments), env=environment)

    def found(self) -> dict[str, Any]:
        return json.loads((self.output / "blast_radius.json").read_text())

    def identity(self, client: str) -> dict[str, Any]:
        """What a client said of itself when it was ready."""
        events = (self.output / "clients" / f"{client}.events.jsonl").read_text().splitlines()
        return next(e["identity"] for e in map(json.loads, events) if e["event"] == "ready")

    def shorten(self, constant: str, seconds: int) -> None:
        """Give a time limit of the copied program another value."""
        program = self.root / "benchmarking" / "blast_radius.py"
        text, count = re.subn(
            rf"^{constant} = .*$", f"{constant} = {seconds}", program.read_text(), flags=re.M
        )
        assert count == 1
        program.write_text(text)

    def start_daemon(self) -> None:
        """Pretend that `enable_mps.sh` was run: a daemon that answers, a state, a server's log."""
        pipe = self.root / "pipe"
        super().start_daemon(f"log_directory={pipe}\n")
        (pipe / "server.log").write_text("".join(f"line {n}\n" for n in range(20)))


@pytest.fixture
def blast(tmp_path: Path) -> Blast:
    return Blast(tmp_path)


def test_neighbors_that_survive_lose_nothing_and_a_new_client_works(blast: Blast) -> None:
    # long enough for rates, which leave out the first second
    late = ({"match": "fault_client:*", "fail_at": 1.5},)
    done = blast.run("--fault", "oom", "--neighbors", "2", "--window", "3", rules=late)
    assert done.returncode == 0, done.stderr
    found = blast.found()
    fields = ("survived", "proof", "lost_seconds")
    assert [[n[field] for field in fields] for n in found["neighbors"]] == [
        [True, "verified", 0], [True, "verified", 0],
    ]  # fmt: skip
    assert all(n["rate_before"] > 10 and n["rate_after"] > 10 for n in found["neighbors"])
    assert (found["faulty"]["status"], found["faulty"]["exit_code"]) == ("oom", 12)
    assert 1.4 < found["fault_after_seconds"] < 4
    assert found["newcomer"]["attempts"] == 1
    assert 0 < found["newcomer"]["works_after_seconds"] < 20
    assert "left 2 of 2 neighbors alive" in done.stdout
    assert (blast.output / "blast_radius.md").read_text() in done.stdout
    assert processes_of(blast.root) == []


def test_neighbors_taken_along_and_a_new_client_that_needs_two_attempts(blast: Blast) -> None:
    rules = (
        {"match": "fault_client:*", "fail": "error"},
        {"match": "batch_inference:clients/1", "fail": "error", "fail_at": 0.7},
        {"match": "batch_inference:clients/newcomer-0", "fail": "crash", "fail_at": "load"},
    )
    done = blast.run("--fault", "assert", "--neighbors", "2", rules=rules)
    assert done.returncode == 0, done.stderr
    found = blast.found()
    assert [n["survived"] for n in found["neighbors"]] == [True, False]
    assert found["neighbors"][1]["reason"] == "scripted"
    assert found["newcomer"]["attempts"] == 2
    assert found["newcomer"]["failures"] == ["exit code 7"]
    assert found["newcomer"]["works_after_seconds"] > 0.2
    assert "left 1 of 2 neighbors alive" in done.stdout
    assert "at attempt 2" in done.stdout


def test_under_mps_the_limit_is_the_faulty_clients_alone_and_the_servers_word_is_kept(
    blast: Blast,
) -> None:
    blast.start_daemon()
    done = blast.run("--mode", "mps", "--fault", "oom", "--neighbors", "1")
    assert done.returncode == 0, done.stderr
    found = blast.found()
    assert [n["proof"] for n in found["neighbors"]] == ["verified"]
    given = [blast.identity(name)["sharing_environment"] for name in ("0", "1", "newcomer-0")]
    assert [one.get(MEMORY_LIMIT) for one in given] == [None, "0=8G", None]
    assert {one["CUDA_MPS_PIPE_DIRECTORY"] for one in given} == {str(blast.root / "pipe")}
    log = [f"line {n}" for n in range(8, 20)]
    assert found["mps"] == {"servers_before": "900", "servers_after": "900", "server_log": log}
    assert "# Blast radius: oom under MPS\n" in done.stdout
    assert "after: 900.\n\n    line 8\n" in done.stdout


def test_an_illegal_access_that_is_allowed_is_measured_as_any_other_fault(blast: Blast) -> None:
    blast.start_daemon()
    message = "CUDA error: an illegal memory access was encountered\nSearch for `cudaError`\n\n"
    error = {"fail": "error", "error": {"message": message}}
    rules = (
        {"match": "fault_client:*", **error},
        {"match": "batch_inference:clients/0", **error, "fail_at": 0.7},
    )
    done = blast.run(
        "--mode", "mps", "--fault", "illegal-access", "--allow-illegal-access", "--neighbors", "1",
        rules=rules,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [n["survived"] for n in blast.found()["neighbors"]] == [False]
    assert MEMORY_LIMIT not in blast.identity("1")["sharing_environment"]
    # of a long message the report has the first line, the record all
    assert f"The faulty client: failed, {message.splitlines()[0]}.\n" in done.stdout
    assert "cudaError" not in done.stdout
    assert blast.found()["faulty"]["reason"].startswith(message[:40])


def test_under_mig_a_new_client_works_in_the_instance_of_the_faulty_one(tmp_path: Path) -> None:
    instances = [f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}" for i in range(2)]
    blast = Blast(
        tmp_path, mig_mode_current=1,
        mig_devices=[(uuid, 7 + i, 16, 9984, 0) for i, uuid in enumerate(instances)],
    )  # fmt: skip
    has_slice = {"match": "*", "identity": {"multiprocessor_count": 16}}
    done = blast.run("--mode", "mig", "--fault", "assert", "--neighbors", "1", rules=(has_slice,))
    assert done.returncode == 0, done.stderr
    seen = [blast.identity(name)["gpu_uuid"] for name in ("0", "1", "newcomer-0")]
    assert seen == [*instances, instances[1]]
    assert [n["proof"] for n in blast.found()["neighbors"]] == ["verified"]
    assert blast.found()["mps"] is None
    assert "Under MIG, a failed assertion" in done.stdout


def test_a_card_that_others_use_is_refused_unless_that_is_told(tmp_path: Path) -> None:
    blast = Blast(tmp_path, pids={os.getpid(): 900})
    refused = blast.run("--fault", "oom", "--neighbors", "1")
    assert refused.returncode == 4
    assert "other processes are on the GPU" in blast.found()["not_run"]
    done = blast.run("--fault", "oom", "--neighbors", "1", "--beside-others")
    assert done.returncode == 0, done.stderr
    assert blast.found()["not_run"] is None
    assert f"- other processes are on the GPU: pid {os.getpid()} (" in done.stdout


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "whose reader has left"])
def test_ctrl_c_leaves_no_process(blast: Blast, is_read: bool) -> None:
    launcher = blast.root / "benchmarking" / "measuring" / "launcher.py"
    launcher.write_text(launcher.read_text().replace("stop: float = 60.0", "stop: float = 0.5"))
    deaf = {"match": "batch_inference:*", "ignore_stop": not is_read}
    process = subprocess.Popen(
        blast.command("--fault", "oom", "--neighbors", "2"),
        env=blast.scripted({"match": "fault_client:*", "fail": None}, deaf),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    events = blast.output / "clients" / "0.events.jsonl"
    wait_until(lambda: events.exists() and '"units"' in events.read_text(), "neighbors at work")
    if not is_read:
        process.stderr.close()
    process.send_signal(signal.SIGINT)
    stderr = process.stderr.read() if is_read else "blast_radius.py: interrupted"
    assert process.wait(60) == 130, stderr
    assert stderr.rstrip().endswith("blast_radius.py: interrupted")
    assert processes_of(blast.root) == []


LOCKED = "GPU_SETTINGS_LOCKED=1 says that others use the card"


@pytest.mark.parametrize(
    ("more", "environment", "words"),
    [((), {}, "add --allow-illegal-access"),
     (("--allow-illegal-access",), {"GPU_SETTINGS_LOCKED": "1"}, LOCKED)],
)  # fmt: skip
def test_what_could_harm_others_is_refused_in_a_sentence_and_that_is_on_record(
    blast: Blast, more: tuple, environment: dict, words: str
) -> None:
    done = blast.run("--mode", "mps", "--fault", "illegal-access", *more, **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr
    assert words in blast.found()["not_run"]
    report = (blast.output / "blast_radius.md").read_text()
    assert report.startswith("# Blast radius: illegal-access under MPS\n\nNot run, because --fault")
    assert not (blast.output / "clients").exists()


def test_a_fault_that_cannot_happen_is_on_record_but_not_in_the_place_of_one_that_did(
    blast: Blast,
) -> None:
    rule = {"match": "fault_client:*", "fail": "crash", "fail_at": "load"}
    done = blast.run("--fault", "assert", "--neighbors", "1", rules=(rule,))
    assert done.returncode == 1
    assert blast.found()["not_run"].startswith("there was no fault to see: ")
    blast.output.joinpath("blast_radius.json").write_text(json.dumps(record_of("mps", "exit")))
    refused = blast.run("--fault", "illegal-access")
    assert refused.returncode == 2
    assert "holds a record; name another folder" in refused.stderr
    assert blast.found() == record_of("mps", "exit")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [("exit", 1, "ending with code 1, as told"), ("oom", 12, "out of GPU memory"),
     ("assert", 2, "--fault assert needs a GPU"),
     ("illegal-access", 2, "can end other people's work: --allow-illegal-access"),
     ("illegal-access --allow-illegal-access", 2, "--fault illegal-access needs a GPU"),
     ("illegal-access --allow-illegal-access, locked", 2, "GPU_SETTINGS_LOCKED=1: this card is")],
)  # fmt: skip
def test_the_faulty_job_fails_as_it_is_told(
    tmp_path: Path, fault: str, code: int, words: str
) -> None:
    told, _, locked = fault.partition(", ")
    done = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / FAULT_CLIENT), "--fault", *told.split(), "--after",
         "0.2", "--device", "cpu", "--results-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "GPU_SETTINGS_LOCKED": "1" if locked else "0"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_file_of_root_forbids_an_illegal_access_as_the_variable_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "settings-locked"
    lock.touch()
    monkeypatch.setattr(fault_client, "LOCK_OF_ROOT", lock)
    monkeypatch.delenv("GPU_SETTINGS_LOCKED", raising=False)
    words = ["--fault", "illegal-access", "--allow-illegal-access"]
    monkeypatch.setattr(sys, "argv", ["fault_client.py", *words])
    with pytest.raises(SystemExit) as end:
        fault_client.parse_arguments()
    assert end.value.code == 2
    assert f"{lock}: this card is lent or shared" in capsys.readouterr().err


def test_the_illegal_store_lies_behind_whatever_a_card_can_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from workloads.custom import far_store

    launched = []
    grids = {(1,): lambda *arguments: launched.append(arguments)}
    monkeypatch.setattr(far_store, "_store", grids)
    matrix = object()
    far_store.store_outside(matrix)
    assert launched == [(matrix, far_store.FAR_ELEMENTS)]
    address = 4 * far_store.FAR_ELEMENTS
    assert address % 128 == 0
    assert 2**46 <= address < 2**63  # 64 TiB, and no address that wraps round


def test_a_fault_that_never_comes_ends_within_the_time_limit(blast: Blast) -> None:
    blast.shorten("READY_SECONDS", 5)
    done = blast.run("--fault", "exit", "--neighbors", "1",
                     rules=({"match": "fault_client:*", "fail": None},))  # fmt: skip
    assert done.returncode == 1
    assert blast.found()["not_run"].startswith("there was no fault to see: ")
    assert processes_of(blast.root) == []


def record_of(mode: str, fault: str, **newcomer: object) -> dict[str, Any]:
    """A record of a fault that one of two neighbors survived."""
    healthy = {
        "client": 0, "label": "Batch inference", "survived": True, "status": "ok", "reason": None,
        "rate_before": 50.0, "rate_after": 49.0, "longest_gap_ms": 120.0, "lost_seconds": 0.0,
        "proof": "verified",
    }  # fmt: skip
    dead = {**healthy, "client": 1, "survived": False, "longest_gap_ms": 900.0, "lost_seconds": 2.5,
            "reason": "CUDA error: x\nmore", "proof": None}  # fmt: skip
    return {
        "schema_version": 2, "created_at": "2026-01-01T00:00:00+00:00", "command": [],
        "mode": mode, "fault": fault, "not_run": None, "notes": [], "gpu": {"name": "A GPU"},
        "fault_after_seconds": 5.0, "neighbors": [healthy, dead], "mps": None,
        "faulty": {"status": "failed", "reason": None, "exit_code": 1, "stderr_tail": []},
        "newcomer": {"attempts": 1, "patience_seconds": 120.0, "works_after_seconds": 8.0,
                     "startup_seconds": 6.5, "failures": [], **newcomer},
    }  # fmt: skip


def test_the_conclusion_says_what_was_lost_and_what_the_fault_itself_cost_a_new_client() -> None:
    dead = blast_report.markdown(record_of("mps", "assert", works_after_seconds=None))
    assert (
        "Under MPS, a failed assertion in a client's kernel left 1 of 2 neighbors alive, with a "
        "longest pause of 120 ms. 2.50 s of their work were lost. No new client worked within "
        "120 s.\n" in dead
    )
    said = blast_report.markdown(record_of("mps", "assert"))
    assert " The fault itself cost a new client 1.50 s, its own loading not counted" in said
    assert "| 1 | Batch inference | no | None | 50.0 | 49.0 | 900 | 2.50 | CUDA error: x |" in said


def test_the_summary_is_one_table_of_measured_and_refused_faults(blast: Blast) -> None:
    refused = {"schema_version": 2, "created_at": "2026-01-01", "command": [], "mode": "mps",
               "fault": "illegal-access", "not_run": "GPU_SETTINGS_LOCKED=1 | says so"}  # fmt: skip
    records = {
        "a": refused,
        "b": record_of("mps", "exit", works_after_seconds=None),
        # As the first version of the program wrote it.
        "c": {k: v for k, v in record_of("time-slicing", "oom").items() if k != "not_run"}
        | {"schema_version": 1},
    }
    for name, record in records.items():
        (blast.root / "all" / name).mkdir(parents=True)
        (blast.root / "all" / name / "blast_radius.json").write_text(json.dumps(record))
    done = blast.run("--summary", str(blast.root / "all"), str(blast.root / "all" / "c"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[4:] == [
        "| time slicing | oom | 1 of 2 | 120 | 2.50 | 1.50 | 8.00 |  |",
        "| MPS | exit | 1 of 2 | 120 | 2.50 | none within 120 |  |  |",
        "| MPS | illegal-access |  |  |  |  |  | GPU_SETTINGS_LOCKED=1 \\| says so |",
        "",
        "Measured on A GPU.",
    ]
    happened = {**refused, "not_run": None}
    for torn in ({}, happened, refused | {"mode": 7}, refused | {"schema_version": 3}):
        (blast.root / "all" / "a" / "blast_radius.json").write_text(json.dumps(torn))
        done = blast.run("--summary", str(blast.root / "all"))
        assert done.returncode == 2
        assert "a/blast_radius.json is no record of a fault" in done.stderr


def client_of(status: str, ends: list[float], job_ends: list[float]) -> ClientResult:
    planned = PlannedClient(0, "batch_inference", "Batch inference", "job", ("true",))
    events = [
        {"event": "units", "kind": "batch", "start_seconds": [end - 0.1 for end in ends],
         "duration_seconds": [0.1] * len(ends)},
        *({"event": "job", "start_seconds": end - 1, "end_seconds": end} for end in job_ends),
    ]  # fmt: skip
    return ClientResult(planned, status, None, events, None, 0, [])


def test_rates_pause_and_loss_of_a_neighbor() -> None:
    steady = [100 + 0.5 * n for n in range(1, 10)]  # up to 104.5; the fault comes at 105
    stalled = judge_neighbor(client_of("ok", [*steady, 108.0, 109.0], [104.5]), 100.0, 110.0, 105.0)
    assert stalled["rate_before"] == pytest.approx(8 / 4)  # from one second after go on
    assert stalled["rate_after"] == pytest.approx(2 / 5)
    assert stalled["longest_gap_ms"] == pytest.approx(3500)
    assert stalled["lost_seconds"] == 0

    dead = judge_neighbor(client_of("failed", steady, [102.0]), 100.0, 110.0, 105.0)
    assert not dead["survived"]
    assert dead["rate_after"] == 0
    assert dead["longest_gap_ms"] is None
    assert dead["lost_seconds"] == pytest.approx(2.5)
