"""The suite as a program: real processes end to end, with scripted clients for the workloads.

The project's `benchmarking/` is copied beside stand-ins for the workload scripts, so that the
program under test is the real one and needs no torch. Cards are scripted through NVML.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec
import nvml_stub
import pytest
from msgspec.structs import asdict, replace
from program_copy import copy_programs, processes_of
from recorded_rows import client, co_run, plain, read_plain
from waiting import wait_until

from benchmarking import PROJECT_VERSION
from benchmarking.measuring import baselines, sampler
from benchmarking.measuring import co_run_records as records
from benchmarking.measuring.client import ClientResult
from benchmarking.measuring.launcher import CoRunResult
from benchmarking.measuring.progress import Progress
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.planning.workloads import WORKLOADS
from benchmarking.records import run_folder
from benchmarking.records.types import ClientRecord, Environment, Manifest, Proof

PROJECT_ROOT = Path(__file__).resolve().parents[1]
CLIENT = Path(__file__).parent / "fakes" / "scripted_client.py"
FAST = {"match": "*", "unit_seconds": 0.02, "units": 4}
CONTROL_PROGRAM = """#!/bin/sh
running="$CUDA_MPS_PIPE_DIRECTORY/running"
[ -e "$running" ] || { echo "Cannot find MPS control daemon process"; exit 1; }
read -r command
case "$command" in
    get_server_list) echo 900 ;;
    ps) echo "PID ID SERVER DEVICE NAMESPACE COMMAND"; sed 's/$/ 0 900 GPU-0 4026531836 x/' "$running" ;;
    "get_client_list 900") cat "$running" ;;
    lspart) cat "$CUDA_MPS_PIPE_DIRECTORY/partitions" 2>/dev/null ;;
esac
"""  # noqa: E501


# What a GPU that has left the bus no longer answers.
LOST_FUNCTIONS = (
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUUID",
    "nvmlDeviceGetComputeMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetName",
    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetUtilizationRates",
)  # fmt: skip


class Bench:
    """A copy of the suite with scripted workloads, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = root / "results"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CUDA_")
        }
        self.environment["GPU_SHARING_STATE_DIR"] = str(root / "state")
        copy_programs(root, CLIENT, [kind.script for kind in WORKLOADS.values()])

    def script(self, *rules: dict) -> None:
        """Say how the clients behave."""
        self.environment["SCRIPTED_CLIENT"] = json.dumps([FAST, *rules])

    def command(self, *arguments: str) -> list[str]:
        script = str(self.root / "benchmarking" / "benchmark_suite.py")
        # On a card the window has to hold lists of its processes.
        least = "0.4" if "NVML_STUB_STATE" in self.environment else "0.2"
        fixed = ["--results-dir", str(self.results), "--min-seconds", least]
        return [sys.executable, script, *fixed, *arguments]

    def scripted_environment(self) -> dict[str, str]:
        """The environment of a run, with quick clients where nothing else was said."""
        if "SCRIPTED_CLIENT" not in self.environment:
            self.script()
        return self.environment

    def _to_its_end(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.scripted_environment(), capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._to_its_end(self.command(*arguments))

    def must(self, *arguments: str) -> SimpleNamespace:
        """Run what has to succeed; return what it left."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return self.only_run()

    def start(self, *arguments: str, until: str, said: str) -> subprocess.Popen[str]:
        """Start a run; return once a client's log (`mine-1-r0/0`) says this."""
        process = subprocess.Popen(
            self.command(*arguments), env=self.scripted_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        logs = f"clients/{until}.events.jsonl"
        wait_until(
            lambda: any(said in path.read_text() for path in self.results.rglob(logs)),
            f"{until} says {said}",
        )
        return process

    def resume_command(self, run_id: str) -> list[str]:
        return [*self.command()[:2], "--resume", run_id, "--results-dir", str(self.results)]

    def resume(self, run_id: str) -> subprocess.CompletedProcess[str]:
        """Go on with a run, with the flags that it was started with."""
        return self._to_its_end(self.resume_command(run_id))

    def analyze(self) -> subprocess.CompletedProcess[str]:
        script = str(self.root / "benchmarking" / "analyze_results.py")
        return self._to_its_end([sys.executable, script, "--results-dir", str(self.results)])

    def report(self) -> str:
        """Make the report; return its text."""
        done = self.analyze()
        assert done.returncode == 0, done.stderr
        return (self.results / "report.md").read_text()

    def only_run(self) -> run_folder.Run:
        """The newest run; every line of it is as the published schema has it."""
        run = read_plain(run_folder.find_runs(self.results)[-1])
        assert run.warnings == []
        return run

    def refusal(self) -> dict:
        """What was refused, once, and nothing else was left; as the published schema has it."""
        (refusal,), warnings = run_folder.read_refusals(self.results)
        assert warnings == []
        assert [path.name for path in self.results.iterdir()] == [run_folder.REFUSALS_FILE]
        return plain(refusal)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A machine without a GPU."""
    return Bench(tmp_path)


@pytest.fixture
def gpu_bench(bench: Bench, tmp_path: Path) -> Callable[..., Bench]:
    """A machine with a scripted H100; keyword arguments change the card."""

    def make(**state: object) -> Bench:
        library = nvml_stub.build_nvml_stub(tmp_path)
        card = nvml_stub.write_state(tmp_path / "card.txt", **state)
        bench.environment = nvml_stub.stub_environment(library, card, bench.environment)
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "nvidia-cuda-mps-control").write_text(CONTROL_PROGRAM)
        (programs / "nvidia-cuda-mps-control").chmod(0o755)
        bench.environment["PATH"] = f"{programs}{os.pathsep}{bench.environment['PATH']}"
        return bench

    return make


def start_daemon(bench: Bench) -> None:
    """Pretend that `enable_mps.sh` was run."""
    pipe = bench.root / "pipe"
    pipe.mkdir()
    (pipe / "running").write_text("")
    state = bench.root / "state"
    state.mkdir()
    (state / f"mps-{nvml_stub.GPU_UUID}.state").write_text(f"pipe_directory={pipe}\n")


def indices(run: run_folder.Run) -> list[int]:
    return [record["identity"]["client_index"] for record in run.client_records]


def verdicts(run: run_folder.Run, phase: str = "co_run") -> list[str]:
    return [record["proof"]["verdict"] for record in run.client_records
            if record["phase"] == phase]  # fmt: skip


# --- without a GPU ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Demonstration:
    """One finished run without a GPU that several tests look at."""

    done: subprocess.CompletedProcess[str]
    run: run_folder.Run


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """The guide's four together, MPS asked for."""
    bench = Bench(tmp_path_factory.mktemp("demonstration"))
    bench.script(
        {"match": "bert_training:-/-", "resolve_notes": ["weights are random"]},
        {"match": "jupyter*", "figures_once": {"cell_repeats": "matrix=3"}},
        {"match": "batch_inference*", "latency": True},
    )
    return Demonstration(bench.run("--mode", "mps", "--workloads", "4"), bench.only_run())


def test_without_a_gpu_the_whole_flow_runs_as_a_labelled_cpu_demonstration(
    demonstration: Demonstration,
) -> None:
    done, run = demonstration.done, demonstration.run
    assert done.returncode == 0, done.stderr
    *_, report, results = done.stdout.splitlines()
    assert results == f"results: {run.folder}"
    assert report.endswith(f"benchmarking/analyze_results.py --results-dir {run.folder}")
    assert done.stdout.count("CPU DEMONSTRATION") == 2
    assert run.run_id.startswith("cpu-demo-mixed-")
    assert run.manifest["mode"] == "mps"
    assert run.manifest["effective_mode"] == "cpu-demo"
    assert run.manifest["job_size"] == "cpu"
    assert run.manifest["outcome"] == "complete"
    assert run.manifest["environment"]["versions"] == {"torch": "scripted"}
    assert run.manifest["environment"]["project_version"] == PROJECT_VERSION
    assert set(verdicts(run)) == {"not_applicable"}
    assert {record["mode"] for record in run.client_records} == {"cpu-demo"}


def test_each_job_runs_alone_first_and_then_all_together(demonstration: Demonstration) -> None:
    run = demonstration.run
    assert [record["co_run"] for record in run.co_run_records] == [
        "baseline-resnet_training", "baseline-batch_inference", "baseline-jupyter_simulation",
        "baseline-bert_training", "mixed-4-r0",
    ]  # fmt: skip
    alone = [record for record in run.client_records if record["phase"] == "baseline"]
    assert [record["slowdown"] for record in alone] == [pytest.approx(1.0)] * 4
    together = run.clients_of("mixed-4-r0")
    assert all(any(job["in_window"] for job in record["jobs"]) for record in together)
    assert all(record["slowdown"] > 0 for record in together)
    summary = run.co_run_records[-1]["summary"]
    # Scripted jobs pause only from job to job.
    expected = sum(record["normalized_progress"] for record in together)
    assert 0.95 * expected < summary["stp"] < expected
    assert summary["success_rate_percent"] == 100
    assert run.co_run_records[-1]["gpu"]["host_cpu_percent"] > 0
    assert run.co_run_records[-1]["gpu"]["utilization_gpu_percent"] is None


def test_the_summary_shows_the_guides_figures(demonstration: Demonstration) -> None:
    stdout = demonstration.done.stdout
    for name in ("Success rate", "Average duration", "Total GPU time", "Overhead", "STP", "ANTT",
                 "Fairness", "slowdown"):  # fmt: skip
        assert name in stdout


def test_clients_get_resolved_flags_and_their_share_of_the_host(
    demonstration: Demonstration,
) -> None:
    manifest = demonstration.run.manifest
    clients = manifest["plan"]["co_runs"][0]["clients"]
    assert all("--resolved yes" in " ".join(client["command"]) for client in clients)
    assert all("OMP_NUM_THREADS" in client["environment"] for client in clients)
    assert "BERT fine-tuning: weights are random" in manifest["notes"]


def test_the_calibration_of_the_baseline_reaches_the_co_run(demonstration: Demonstration) -> None:
    plan = demonstration.run.manifest["plan"]
    assert "--cell-repeats" not in plan["baseline"][2]["command"]
    notebook = plan["co_runs"][0]["clients"][2]
    assert notebook["workload"] == "jupyter_simulation"
    assert "--cell-repeats matrix=3" in " ".join(notebook["command"])
    assert "--cell-repeats" not in plan["co_runs"][0]["clients"][0]["command"]


def test_latencies_are_kept_raw(demonstration: Demonstration) -> None:
    record = demonstration.run.clients_of("mixed-4-r0")[1]
    assert abs(len(record["latency_ms"]) - record["units"]["step"]["count"]) < 1
    assert demonstration.run.clients_of("mixed-4-r0")[0]["latency_ms"] is None


def test_exclusive_mode_is_the_baseline_whose_stp_is_one_but_for_gaps_between_jobs(
    bench: Bench,
) -> None:
    run = bench.must("--mode", "exclusive", "--mix", "inference", "--workloads", "2")
    assert [record["phase"] for record in run.co_run_records] == ["baseline"]
    assert 0.95 < run.co_run_records[0]["summary"]["stp"] < 1.0


def test_rounds_go_into_one_run_the_first_calibrates_and_each_is_measured_once(
    bench: Bench,
) -> None:
    bench.script({"match": "jupyter_simulation:*", "figures_once": {"cell_repeats": "matrix=3"}})
    flags = ("--mode", "exclusive", "--mix", "mixed", "--workloads", "4", "--repeats", "2",
             "--null", "--run-id", "alone", "--session", "mine")  # fmt: skip
    for number in (1, 2, 2):
        done = bench.run(*flags, "--round", str(number))
        assert done.returncode == 0, done.stderr
    run = bench.only_run()
    jobs = ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training")
    assert [record["co_run"] for record in run.co_run_records] == [
        name for number in (0, 1)
        for name in (*(f"baseline-{job}-r{number}" for job in jobs), f"null-r{number}")
    ]  # fmt: skip
    assert (run.manifest["outcome"], run.manifest["resumptions"]) == ("complete", [])
    assert (run.manifest["session"], run.manifest["method"]) == ("mine", 2)
    commands = {row["co_run"]: row["command"] for row in run.manifest["plan"]["baseline"]}
    assert "--cell-repeats" not in commands["baseline-jupyter_simulation-r0"]
    assert "--cell-repeats" in commands["baseline-jupyter_simulation-r1"]
    (null,) = run.clients_of("null-r1")
    assert (null["phase"], null["workload"]) == ("null", "resnet_training")
    assert 0.9 < null["slowdown"] < 1.1

    together = ("--workloads", "4", "--repeats", "2", "--baseline", str(run.folder),
                "--run-id", "together", "--round")  # fmt: skip
    for number in ("1", "2"):
        done = bench.run(*together, number)
        assert done.returncode == 0, done.stderr
    other = bench.run(*together, "2", "--seed", "7")
    assert other.returncode == 2
    assert "together was made with other flags: name another --run-id" in other.stderr
    made = run_folder.read_run(bench.results / "together")
    assert [record.co_run for record in made.co_run_records] == ["mixed-4-r0", "mixed-4-r1"]


def test_a_baseline_that_was_disturbed_is_measured_again_and_the_first_counts_no_longer(
    bench: Bench,
) -> None:
    # Together it is faster than it was alone, which nobody is.
    slow_once = {"match": "*:baseline-*", "unit_seconds": 0.05}
    path = bench.root / "benchmarking" / "measuring" / "baselines.py"
    path.write_text(
        re.sub("(?m)^TOLERATED_FRACTION = .*$", "TOLERATED_FRACTION = 0.5", path.read_text())
    )
    bench.script(slow_once, {"match": "*:inference-1-*", "unit_seconds": 0.02})
    run = bench.must("--mix", "inference", "--workloads", "1")
    (note,) = [note for note in run.manifest["notes"] if "disturbed" in note]
    assert "baseline-batch_inference: the baseline was disturbed (client 0:" in note
    assert "faster together than alone); it is repeated" in note
    rows = map(json.loads, (run.folder / "records.jsonl").read_text().splitlines())
    names = [row["co_run"] for row in rows if row["record"] == "co_run"]
    assert names.count("baseline-batch_inference") == 2


def test_counts_and_repeats_make_rows_of_which_a_budget_leaves_out_all_but_the_first(
    bench: Bench,
) -> None:
    flags = ("--mix", "inference", "--workloads", "1,2", "--repeats", "3")
    planned = re.findall(r"^  (inference-\S+): ", bench.run(*flags, "--dry-run").stdout, re.M)
    assert planned == [f"inference-{count}-r{repeat}" for count in (1, 2) for repeat in range(3)]
    run = bench.must(*flags, "--budget-minutes", "0.01")
    assert [record["co_run"] for record in run.co_run_records][1:] == [
        "inference-1-r0", "inference-2-r0"]  # fmt: skip
    assert sum("left out" in note for note in run.manifest["notes"]) == 4


def test_a_window_measures_units_without_whole_jobs(bench: Bench) -> None:
    bench.script({"match": "*:inference-*", "units": 40, "unit_seconds": 0.05})
    done = bench.run("--mix", "inference", "--workloads", "1", "--window", "1.2")
    assert done.returncode == 0, done.stderr
    record = bench.only_run().clients_of("inference-1-r0")[0]
    length = record["window_end_seconds"] - record["window_start_seconds"]
    assert 1.2 <= length < 6
    assert record["units"]["step"]["count"] >= 10


# --- failures ---------------------------------------------------------------------------------


def test_a_ramp_stops_at_the_first_count_that_fails(bench: Bench) -> None:
    bench.script({"match": "*:training-2-r0/1", "fail": "oom", "fail_at": 0.05})
    done = bench.run("--mix", "training", "--workloads", "1,2,4")
    assert done.returncode == 1
    run = bench.only_run()
    assert [record["outcome"] for record in run.co_run_records] == ["ok", "ok", "failed"]
    assert [record["status"] for record in run.clients_of("training-2-r0")] == ["ok", "oom"]
    last = run.co_run_records[-1]
    assert last["summary"]["stp"] is None
    assert last["summary"]["success_rate_percent"] == 50
    assert "client 1 (ResNet50 training): oom" in last["reason"]
    assert run.manifest["outcome"] == "failed"
    assert "scripted failure: oom" in run.clients_of("training-2-r0")[1]["stderr_tail"]


def test_a_failed_baseline_ends_the_run(bench: Bench) -> None:
    bench.script({"match": "*:baseline-*", "fail": "crash", "fail_at": 0.05})
    done = bench.run("--mix", "training")
    assert done.returncode == 1
    assert "exit code 7" in done.stderr
    assert len(bench.only_run().co_run_records) == 1


def test_a_stuck_client_is_a_timeout_row(bench: Bench) -> None:
    bench.script({"match": "*:training-2-r0/0", "fail": "hang", "fail_at": 0.0})
    done = bench.run("--mix", "training", "--workloads", "2", "--timeout", "3")
    assert done.returncode == 1
    run = bench.only_run()
    assert run.co_run_records[-1]["outcome"] == "timeout"
    assert run.clients_of("training-2-r0")[0]["status"] == "timeout"


@pytest.mark.parametrize(("code", "suite_code"), [(2, 2), (3, 3), (1, 1)])
def test_a_job_that_cannot_be_prepared_ends_the_run_with_its_reason(
    bench: Bench, code: int, suite_code: int
) -> None:
    bench.script({"match": "*:-/-", "resolve_exit": code})
    done = bench.run("--mix", "training")
    assert done.returncode == suite_code
    assert "cannot resolve: scripted" in done.stderr
    assert bench.only_run().manifest["outcome"] == "failed"


def test_an_interrupted_run_keeps_what_was_done_and_leaves_no_process(bench: Bench) -> None:
    bench.script({"match": "*:training-2-r0/*", "units": 100000})
    flags = ("--mix", "training", "--workloads", "2")
    process = bench.start(*flags, until="training-2-r0/1", said='"ready"')
    time.sleep(0.3)  # into its work, of which a job tells at its end
    process.terminate()
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    *_, advice, results = stdout.splitlines()
    run = bench.only_run()
    assert results == f"results: {run.folder}"
    script = bench.root / "benchmarking" / "benchmark_suite.py"  # he stands in another folder
    assert advice == f"to go on: python3 {script} --resume {run.folder}"
    assert run.manifest["outcome"] == "interrupted"
    assert [record["outcome"] for record in run.co_run_records] == ["ok", "interrupted"]
    assert {client["status"] for client in run.clients_of("training-2-r0")} == {"interrupted"}
    assert run.co_run_records[-1]["summary"]["success_rate_percent"] is None
    assert run.co_run_records[-1]["summary"]["stp"] is None
    pids = [record["identity"]["pid"] for record in run.client_records]
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_results_folder_that_is_deleted_ends_the_run_in_a_sentence(bench: Bench) -> None:
    bench.script({"match": "*:training-2-r0/*", "units": 500})
    flags = ("--mix", "training", "--workloads", "2", "--window", "1", "--run-id", "mine")
    process = bench.start(*flags, until="training-2-r0/1", said="")
    shutil.rmtree(bench.results.rename(bench.root / "aside"))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "(No such file or directory): make room there or bring it back" in stderr
    assert "Traceback" not in stderr
    assert processes_of(bench.root) == []
    assert not bench.results.exists()


# --- usage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One for what is refused, which leaves nothing."""
    return Bench(tmp_path_factory.mktemp("refusing"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--workloads", "0"], "1 or more"), (["--workloads", "4,2"], "smallest first"),
     (["--repeats", "-1"], "1 or more"), (["--timeout", "x"], "above 0"),
     (["--mix", "other"], "invalid choice"), (["--window", "10", "--timeout", "5"], "--timeout"),
     (["--mode", "exclusive", "--baseline", "x"], "leave --baseline away"),
     (["--data-dir", "/no/such/folder"], "no folder"), (["--baseline", "nothing"], "no run"),
     (["--run-id", "a/b"], "not a folder name"),
     (["--mix", "training", "--slo-ms", "50"], "--slo-ms needs jobs with response times"),
     (["--mode", "mig", "--until-break"], "as many clients as instances"),
     (["--plan", "/no/plan.toml"], "/no/plan.toml cannot be read"),
     (["--mode", "mps", "--mps-percentage", "0"], "not a percentage over 0 and up to 100"),
     (["--mps-percentage", "50"], "limits of MPS clients need --mode mps"),
     (["--mps-partitions"], "limits of MPS clients need --mode mps"),
     (["--mode", "mps", "--mps-partitions", "--until-break"], "as many clients as static"),
     (["--mode", "mps", "--mps-partitions", "--mps-percentage", "50"], "percentage is ignored")],
)  # fmt: skip
def test_wrong_arguments_end_with_code_2_and_one_sentence(
    refusing: Bench, arguments: list[str], words: str
) -> None:
    done = refusing.run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("benchmark_suite.py: error: ")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_prints_the_plan_and_leaves_nothing(bench: Bench) -> None:
    done = bench.run("--dry-run", "--mode", "mig", "--workloads", "8")
    assert done.returncode == 0, done.stderr
    assert "mixed-8-r0: 8 together" in done.stdout
    assert "--num-operations 4 --burst-seconds 1 " in done.stdout
    assert not bench.results.exists()


def test_a_gpu_that_was_asked_for_and_is_not_there_is_code_3(bench: Bench) -> None:
    assert bench.run("--device", "cuda").returncode == 3
    assert bench.run("--gpu", "1").returncode == 3


# --- on a card --------------------------------------------------------------------------------


def test_time_slicing_on_a_card_is_verified_client_by_client(gpu_bench: Callable) -> None:
    bench = gpu_bench(utilization_gpu_percent=97, power_draw_watts=300, gpm_sm_util=35)
    bench.environment["CUDA_MPS_PIPE_DIRECTORY"] = "/somebody/elses"
    (bench.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho '|   0   Timeslice  Long  |'\n")
    (bench.root / "bin" / "nvidia-smi").chmod(0o755)
    run = bench.must("--mode", "time-slicing", "--mix", "training", "--workloads", "2", "--quick")
    assert verdicts(run, "baseline") == ["verified"]
    assert verdicts(run) == ["verified", "verified"]
    assert indices(run) == [0, 0, 1]
    identity = run.client_records[-1]["identity"]
    assert identity["gpu_uuid"] == nvml_stub.GPU_UUID
    assert "no-mps-" in identity["sharing_environment"]["CUDA_MPS_PIPE_DIRECTORY"]
    assert run.manifest["effective_mode"] == "time-slicing"
    assert run.manifest["job_size"] == "quick"
    assert run.manifest["is_contended"] is False
    environment = run.manifest["environment"]
    assert environment["timeslice"] == "Long"
    assert environment["gpu_name"] == "NVIDIA H100 80GB HBM3"
    assert environment["driver_version"] == "580.159.04"
    assert environment["multiprocessor_count"] == 132
    gpu = run.co_run_records[-1]["gpu"]
    assert gpu["utilization_gpu_percent"] == pytest.approx(97)
    assert gpu["sm_activity_percent"] == pytest.approx(35)
    length = (run.co_run_records[-1]["window_end_seconds"]
              - run.co_run_records[-1]["window_start_seconds"])  # fmt: skip
    assert gpu["energy_joules"] == pytest.approx(300 * length, rel=0.05)
    assert run.co_run_records[-1]["summary"]["energy_ratio"] > 0


@pytest.mark.parametrize(
    ("state", "lacks", "verdict", "has_energy"),
    [(nvml_stub.GTX_1080_TI, (), "verified", False),
     # no process lists, so nothing proves the mode
     (nvml_stub.RTX_2080, nvml_stub.DRIVER_440_LACKS, "unverified", True),
     (nvml_stub.RTX_3060, (), "verified", True)],
    ids=["GTX 1080 Ti", "RTX 2080 with an old driver", "RTX 3060"],
)  # fmt: skip
def test_an_older_or_smaller_card_is_measured_with_null_for_what_it_lacks(
    gpu_bench: Callable, tmp_path: Path, state: dict, lacks: tuple, verdict: str, has_energy: bool
) -> None:
    bench = gpu_bench(**state)
    nvml_stub.build_nvml_stub(tmp_path, lacks)
    run = bench.must("--mode", "time-slicing", "--mix", "training", "--workloads", "2", "--quick")
    assert verdicts(run) == [verdict, verdict]
    assert run.manifest["environment"]["gpu_memory_mib"] == state["memory_total_mib"]
    gpu, summary = run.co_run_records[-1]["gpu"], run.co_run_records[-1]["summary"]
    assert {key for key, value in gpu.items() if value is None} == {
        "sm_activity_percent", "sm_occupancy_percent", "tensor_activity_percent",
        "dram_activity_percent", *(() if has_energy else ("energy_joules",)),
    }  # fmt: skip
    assert (summary["energy_ratio"] is not None) is has_energy
    assert summary["stp"] > 0
    sliced = bench.run("--mode", "mig", "--mix", "training")
    assert sliced.returncode == 4
    assert "MIG mode is Enabled: not supported by this GPU" in sliced.stderr


def test_a_client_that_the_driver_does_not_list_makes_the_run_invalid(
    gpu_bench: Callable,
) -> None:
    bench = gpu_bench()
    bench.script({"match": "*:training-2-r0/1", "hidden": True})
    done = bench.run("--mix", "training", "--workloads", "2", "--quick")
    assert done.returncode == 5
    run = bench.only_run()
    assert run.manifest["outcome"] == "invalid"
    assert run.co_run_records[-1]["outcome"] == "invalid"
    listed, hidden = run.clients_of("training-2-r0")
    assert (listed["status"], hidden["status"]) == ("ok", "invalid")
    assert hidden["slowdown"] is None
    assert "is not among" in hidden["reason"]
    assert run.co_run_records[-1]["summary"]["stp"] is None


def test_a_gpu_that_others_use_is_refused_naming_them(gpu_bench: Callable) -> None:
    bench = gpu_bench(pids={os.getpid(): 900})
    done = bench.run("--mix", "training", "--workloads", "1", "--quick")
    assert done.returncode == 4
    assert f"other processes are on the GPU: pid {os.getpid()} (" in done.stderr
    assert "--allow-contention" in done.stderr
    refusal = bench.refusal()
    assert refusal["exit_code"] == 4
    assert refusal["command"][-1] == "--quick"
    assert done.stderr == f"benchmark_suite.py: error: {refusal['sentence']}\n"
    assert bench.run("--mix", "training", "--dry-run").returncode == 0
    assert bench.refusal() == refusal


def test_a_run_beside_others_is_marked_contended(gpu_bench: Callable) -> None:
    bench = gpu_bench(pids={os.getpid(): 900})
    run = bench.must("--mix", "training", "--workloads", "1", "--quick", "--beside-others")
    assert any("the GPU is contended" in note for note in run.manifest["notes"])
    assert run.manifest["is_contended"] is True
    for record in run.co_run_records:
        assert record["is_contended"] is True
        assert [w for w in record["warnings"] if f"contended: other processes used it meanwhile, "
                f"pid {os.getpid()} (" in w]  # fmt: skip


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        ({"nvmlInitWithFlags": 18, "nvmlInit_v2": 18}, "driver was upgraded while the old"),
        ({"nvmlDeviceGetHandleByIndex_v2": 15}, "GPU is lost (the GPU has left the bus"),
        ({"nvmlDeviceGetCount_v2": 4}, "let this account open /dev/nvidia*"),
        ({"nvmlDeviceGetUUID": 15}, "does not tell the GPU's UUID"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_asked_is_code_3_and_no_demonstration(
    gpu_bench: Callable, fail: dict, sentence: str
) -> None:
    bench = gpu_bench(fail=fail)
    done = bench.run("--mix", "training", "--workloads", "1")
    assert done.returncode == 3
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert (bench.refusal()["exit_code"], sentence in bench.refusal()["sentence"]) == (3, True)


def test_a_dry_run_that_is_refused_leaves_nothing(gpu_bench: Callable) -> None:
    bench = gpu_bench(fail={"nvmlDeviceGetHandleByIndex_v2": 15})
    assert bench.run("--dry-run").returncode == 3
    assert not bench.results.exists()


def test_a_refusal_that_cannot_be_kept_is_said_all_the_same(gpu_bench: Callable) -> None:
    bench = gpu_bench(pids={os.getpid(): 900})
    bench.results.write_text("no folder")
    done = bench.run("--mix", "training")
    assert done.returncode == 4
    assert "other processes are on the GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_was_refused_is_in_the_report_of_its_folder(gpu_bench: Callable) -> None:
    bench = gpu_bench(pids={os.getpid(): 900})
    flags = ("--mix", "training", "--workloads", "1", "--quick")
    assert bench.run(*flags).returncode == 4
    sentence = bench.refusal()["sentence"]
    nothing = bench.analyze()
    assert nothing.returncode == 2
    assert f"(refused: {sentence})" in nothing.stderr
    with (bench.results / run_folder.REFUSALS_FILE).open("a") as stream:
        stream.write('{"exit_code": 0}\n')
    assert bench.run(*flags, "--beside-others").returncode == 0
    report = bench.report()
    assert "## What was refused, and why" in report
    assert sentence in report
    assert f"{run_folder.REFUSALS_FILE}: line 2 is truncated or edited, skipped" in report


@pytest.mark.parametrize("crashes", [False, True])
def test_a_gpu_that_is_lost_meanwhile_is_the_reason_whatever_becomes_of_its_clients(
    gpu_bench: Callable, tmp_path: Path, crashes: bool
) -> None:
    bench = gpu_bench()
    if crashes:
        bench.script({"match": "*:training-1-r0/0", "fail": "crash", "fail_at": 1.2})
    flags = ("--mix", "training", "--workloads", "1,2", "--quick", "--window", "2")
    process = bench.start(*flags, until="training-1-r0/0", said='"units"')
    lost = dict.fromkeys(LOST_FUNCTIONS, 15)
    nvml_stub.write_state(tmp_path / "card.txt", fail=lost)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    run = bench.only_run()
    outcome = "failed" if crashes else "invalid"
    assert run.manifest["outcome"] == outcome
    # nothing more is tried on it
    assert [record["outcome"] for record in run.co_run_records] == ["ok", outcome]
    lost = run.co_run_records[-1]
    sentence = (
        "the GPU was lost, the driver no longer answers for it: look for Xid in the kernel's log, "
        "then reset the GPU with nvidia-smi --gpu-reset, or restart"
    )
    assert lost["reason"].startswith(sentence)
    assert ("client 0 (ResNet50 training): failed: exit code 7" in lost["reason"]) == crashes
    assert lost["stop_reason"]["kind"] == "gpu_lost"
    assert f"training-1-r0 does not hold: {sentence}" in stderr
    assert f"REASON: {sentence}" in stdout
    if crashes:
        return
    # the functions that failed are named, once
    notes = [note for note in run.manifest["notes"] if "nvmlDeviceGetUtilizationRates" in note]
    assert len(notes) == 1
    assert "GPU is lost" in notes[0]
    assert sentence in bench.report()
    nvml_stub.write_state(tmp_path / "card.txt")
    bench.script()
    assert bench.resume(run.run_id).returncode == 0
    again = bench.only_run()
    assert [record["outcome"] for record in again.co_run_records] == ["ok"] * 3


def test_mps_without_a_daemon_is_code_4_and_names_the_script(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    done = bench.run("--mode", "mps")
    assert done.returncode == 4
    assert "./gpu-configs/enable_mps.sh" in done.stderr
    assert "./gpu-configs/enable_mps.sh" in bench.refusal()["sentence"]


def test_mps_clients_are_verified_and_their_baselines_run_without_mps(
    gpu_bench: Callable,
) -> None:
    bench = gpu_bench()
    start_daemon(bench)
    run = bench.must("--mode", "mps", "--mix", "training", "--workloads", "2", "--quick")
    assert run.manifest["mps_limits"] is None
    assert indices(run) == [0, 0, 1]
    assert verdicts(run, "baseline") == ["verified"]
    assert verdicts(run) == ["verified", "verified"]
    directories = [record["identity"]["sharing_environment"]["CUDA_MPS_PIPE_DIRECTORY"]
                   for record in run.client_records]  # fmt: skip
    assert "no-mps-" in directories[0]
    assert directories[1:] == [str(bench.root / "pipe")] * 2


def test_clients_on_static_partitions_are_verified_alone_and_together(
    gpu_bench: Callable,
) -> None:
    bench, names = gpu_bench(), [f"{nvml_stub.GPU_UUID}/Dx{i}AAAAAAAAA" for i in (4, 8)]
    start_daemon(bench)
    with (bench.root / "state" / f"mps-{nvml_stub.GPU_UUID}.state").open("a") as state:
        state.write(f"partitions={','.join(names)}\n")
    rows = [f"{nvml_stub.GPU_UUID[:12]} Dx{i}AAAAA - 8 - 64 Yes\n" for i in (4, 8)]
    (bench.root / "pipe" / "partitions").write_text("".join(rows))
    bench.script({"match": "*", "identity": {"multiprocessor_count": 64}})
    jobs = ["--mode", "mps", "--mix", "training", "--workloads", "2", "--quick"]
    for number in ("1", "2"):
        rounds = ["--repeats", "2", "--round", number, "--run-id", "rounds"]
        run = bench.must(*jobs, "--mps-partitions", *rounds)
    phases = [record["phase"] for record in run.co_run_records]
    assert phases == ["baseline", "share_baseline", "co_run", "co_run"]
    assert run.co_run_records[-1]["co_run"] == "training-mps-partitions-2-r1"
    assert [record["proof"]["verdict"] for record in run.client_records] == ["verified"] * 6
    told = [record["identity"]["sharing_environment"].get("CUDA_MPS_SM_PARTITION")
            for record in run.client_records]  # fmt: skip
    assert told == [None, names[0], *names, *names]
    assert run.co_run_records[-1]["summary"]["interference_overhead_percent"] is not None
    report = bench.report()
    assert "MPS with static partitions" in report

    plain = bench.run(*jobs)
    assert plain.returncode == 4
    assert "started for clients with one (--mps-partitions)" in plain.stderr


def test_an_mps_client_that_misses_the_daemon_is_invalid(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    start_daemon(bench)
    bench.script({"match": "*:training-2-r0/0", "without_mps": True})
    done = bench.run("--mode", "mps", "--mix", "training", "--workloads", "2", "--quick")
    assert done.returncode == 5
    assert [record["status"] for record in bench.only_run().clients_of("training-2-r0")] == [
        "invalid", "ok"]  # fmt: skip


def test_mig_gives_each_client_its_instance_and_uses_an_earlier_whole_gpu_baseline(
    gpu_bench: Callable, tmp_path: Path
) -> None:
    bench = gpu_bench()
    jobs = ["--mix", "training", "--workloads", "2", "--quick"]
    assert bench.run("--mode", "exclusive", *jobs, "--run-id", "alone").returncode == 0
    instances = [(f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}", 7 + i, 16, 9984, 0)
                 for i in range(2)]  # fmt: skip
    nvml_stub.write_state(tmp_path / "card.txt", mig_mode_current=1, mig_devices=instances)
    bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    done = bench.run("--mode", "mig", *jobs, "--run-id", "sliced")
    assert done.returncode == 0, done.stderr
    run = read_plain(bench.results / "sliced")
    assert run.manifest["baseline_run_id"] == "alone"
    assert [record["phase"] for record in run.co_run_records] == ["share_baseline", "co_run"]
    assert verdicts(run) == ["verified", "verified"]
    seen = [record["identity"]["gpu_uuid"] for record in run.clients_of("training-2-r0")]
    assert seen == [instance[0] for instance in instances]
    summary = run.co_run_records[-1]["summary"]
    assert summary["stp"] > 0
    assert summary["interference_overhead_percent"] == pytest.approx(0, abs=30)


def test_a_mig_layout_gives_clients_instances_of_its_sizes_and_is_kept_with_the_run(
    gpu_bench: Callable,
) -> None:
    small, large = (f"MIG-aaaaaaaa-0000-0000-0000-00000000000{i}" for i in range(2))
    bench = gpu_bench(
        mig_mode_current=1,
        mig_devices=[(small, 7, 16, 9984, 0, "1g.10gb"), (large, 5, 16, 20096, 0, "2g.20gb")],
    )
    bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    run = bench.must(
        "--mode", "mig", "--mix", "training", "--quick", "--mig-layout", "2g.20gb,1g.10gb"
    )
    seen = [record["identity"]["gpu_uuid"] for record in run.clients_of("training-2-r0")]
    assert seen == [large, small]
    assert verdicts(run)[-2:] == ["verified", "verified"]
    assert run.manifest["mig_layout"] == ["2g.20gb", "1g.10gb"]
    assert any("instances of unlike size" in note for note in run.manifest["notes"])
    other = bench.run("--mode", "mig", "--mix", "training", "--mig-layout", "3g.40gb")
    assert other.returncode == 4
    assert "run sudo ./gpu-configs/setup_mig.sh 3g.40gb" in other.stderr


def test_mig_without_a_whole_gpu_baseline_leaves_stp_unknown(gpu_bench: Callable) -> None:
    bench = gpu_bench(
        mig_mode_current=1,
        mig_devices=[("MIG-aaaaaaaa-0000-0000-0000-000000000000", 7, 16, 9984, 0)],
    )
    bench.script({"match": "*", "identity": {"multiprocessor_count": 16}})
    run = bench.must("--mode", "mig", "--mix", "training", "--workloads", "1", "--quick")
    assert run.co_run_records[-1]["summary"]["stp"] is None
    assert any("STP and overhead stay unknown" in note for note in run.manifest["notes"])
    more = bench.run("--mode", "mig", "--mix", "training", "--workloads", "4", "--quick")
    assert more.returncode == 4
    assert "1 MIG instances for 4 clients" in more.stderr


def test_a_baseline_of_another_run_is_reused_or_refused_naming_the_field(
    gpu_bench: Callable, tmp_path: Path
) -> None:
    bench = gpu_bench()
    jobs = ["--mix", "training", "--workloads", "1", "--quick"]
    assert bench.run("--mode", "exclusive", *jobs, "--run-id", "alone").returncode == 0
    assert bench.run(*jobs, "--baseline", "alone", "--run-id", "again").returncode == 0
    again = read_plain(bench.results / "again")
    assert again.manifest["baseline_run_id"] == "alone"
    assert [record["phase"] for record in again.co_run_records] == ["co_run"]
    assert again.co_run_records[0]["summary"]["stp"] > 0

    other_engine = bench.run(*jobs, "--baseline", "alone", "--engine", "eager")
    assert other_engine.returncode == 2
    assert "engine was graph, now it is eager" in other_engine.stderr
    nvml_stub.write_state(tmp_path / "card.txt", driver_version="999.1")
    other_driver = bench.run(*jobs, "--baseline", "alone")
    assert other_driver.returncode == 2
    assert "driver_version was 580.159.04, now it is 999.1" in other_driver.stderr


def test_a_baseline_on_other_data_is_refused_naming_both(bench: Bench) -> None:
    jobs = ["--mix", "training", "--workloads", "1"]
    assert bench.run("--mode", "exclusive", *jobs, "--run-id", "alone").returncode == 0
    bench.script({"match": "*", "resolve_arguments": ["--dataset", "folder"]})
    done = bench.run(*jobs, "--baseline", "alone", "--run-id", "other")
    assert done.returncode == 2
    assert "was `--resolved yes`, now it is `--dataset folder`" in done.stderr
    assert read_plain(bench.results / "other").client_records == []


def test_the_newest_reusable_run_is_one_on_the_same_data(tmp_path: Path) -> None:
    for number, data in enumerate(["here", "elsewhere", None]):
        noted = {} if data is None else {"resolved_arguments": {"job": ["--data-dir", data]}}
        made = asdict(replace(manifest(), **noted, created_at=f"2026-01-0{3 - number}"))
        made["run_id"] = f"run-{number}"
        run = run_folder.create_run(tmp_path, made, run_id=made["run_id"])
        run.append_record(client("alone", 0, phase="baseline"))
        run.append_record(co_run("alone"))

    def found(data: str) -> str | None:
        ours = replace(manifest(), resolved_arguments={"job": ["--data-dir", data]})
        run = baselines.newest_reusable(tmp_path, ours, ["job"])
        return run and run.run_id

    assert found("here") == "run-0"
    assert found("elsewhere") == "run-1"
    # The oldest did not note its data: it is taken where nothing better is there.
    assert found("a third place") == "run-2"


def test_a_gpu_that_torch_cannot_use_is_code_3(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    bench.script({"match": "*", "identity": {"device": "cpu"}})
    done = bench.run("--mix", "training", "--quick")
    assert done.returncode == 3
    assert "driver 580.159.04" in done.stderr
    run = bench.only_run()
    assert run.manifest["outcome"] == "failed"
    assert [record["outcome"] for record in run.co_run_records] == ["failed"]
    assert [record["status"] for record in run.client_records] == ["failed"]
    assert "torch scripted cannot use it" in run.client_records[0]["reason"]
    assert run.co_run_records[0]["reason"] == run.client_records[0]["reason"]


def test_more_clients_than_were_set_up_are_warned_of(gpu_bench: Callable) -> None:
    bench = gpu_bench()
    state = bench.root / "state"
    state.mkdir()
    (state / f"time-slicing-{nvml_stub.GPU_UUID}.state").write_text("clients=4\n")
    done = bench.run("--workloads", "8", "--dry-run")
    assert "set up for 4" in done.stdout


def test_a_card_in_exclusive_process_mode_is_no_time_slicing(gpu_bench: Callable) -> None:
    done = gpu_bench(compute_mode=3).run("--mode", "time-slicing")
    assert done.returncode == 4
    assert "Exclusive_Process" in done.stderr


def test_a_gpu_index_that_does_not_exist_is_a_usage_error(gpu_bench: Callable) -> None:
    done = gpu_bench().run("--gpu", "5")
    assert done.returncode == 2
    assert nvml_stub.GPU_UUID in done.stderr


# --- records and baselines, without processes -------------------------------------------------


def co_run_of(outcome: str, *clients: ClientResult, phase: str = "co_run") -> CoRunResult:
    planned = PlannedCoRun("c", phase, "mps", 0, tuple(client.planned for client in clients))
    return CoRunResult(planned, outcome, None, list(clients), 0.5, 0.0, 1.0, 11.0, 0.1)


def client_of(seconds_a_step: float, number: int = 0, status: str = "ok") -> ClientResult:
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
        planned, status, events=events, identity={"pid": 1}, exit_code=0,
        window_host_cpu_fraction=0.5, busiest_thread_cpu_fraction=0.25,
    )  # fmt: skip


PROVED = Proof("verified", [])


def test_a_client_record_holds_slowdown_against_its_baseline() -> None:
    alone, client = client_of(0.5), client_of(1.0)
    baseline = records.client_record(
        co_run_of("ok", alone, phase="baseline"), alone, PROVED, None, None
    )
    record = records.client_record(co_run_of("ok", client), client, PROVED, baseline, None)
    assert (baseline.slowdown, baseline.units["step"].count) == (1.0, 20)
    assert record.slowdown == pytest.approx(2.0)
    assert record.normalized_progress == pytest.approx(0.5)
    assert record.jobs[0].duration_seconds == 8.0
    assert record.window_host_cpu_fraction == pytest.approx(0.5)
    assert record.busiest_thread_cpu_fraction == pytest.approx(0.25)
    assert record.figures == {"x": 1}
    assert (record.startup_seconds, record.peak_memory_mib) == (2.0, 7.0)
    assert msgspec.convert(msgspec.to_builtins(record), ClientRecord) == record


def test_the_start_skew_is_between_the_first_units_of_all_clients() -> None:
    early, late = client_of(1.0), client_of(1.0, number=1)
    late.events[1]["start_seconds"][0] = 1.03
    assert records.start_skew_ms([early, late]) == pytest.approx(30.0)
    assert records.start_skew_ms([early]) is None
    idle = dataclasses.replace(late, events=[])
    assert records.start_skew_ms([early, idle]) is None


def test_a_co_run_that_lost_its_mode_is_invalid() -> None:
    client = client_of(1.0)
    seen = co_run_of("ok", client)
    row = records.client_record(seen, client, PROVED, None, None)
    record = records.co_run_record(
        seen, [row], None, mode_failure="the daemon is gone",
        reference=records.Reference(whole={"job": row}),
    )  # fmt: skip
    assert record.outcome == "invalid"
    assert record.reason == "the daemon is gone"
    assert record.summary.stp is None


def test_a_sampler_that_cannot_start_is_a_failure_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler.sys, "executable", str(tmp_path / "no-python"))
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert "did not start" in started.failure


def test_a_sampler_with_a_torn_first_line_is_a_failure_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "torn.py"
    program.write_text("import sys\nopen(sys.argv[2], 'w').write('{\"record\": \"mon\\n')\n")
    monkeypatch.setattr(sampler, "MONITOR_SCRIPT", program)
    with sampler.Sampler(tmp_path / "samples", tmp_path / "log") as started:
        assert started.failure == "the sampler did not start: it said nothing"


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


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [({"gpu_name": "A100"}, {}, "gpu_name was A100, now it is H100"),
     ({"driver_version": "1"}, {}, "driver_version"),
     ({"versions": {"python": "3.11", "torch": "2.15"}}, {}, "version of torch was 2.15"),
     ({}, {"job_size": "quick"}, "job size was quick, now it is guide"),
     ({}, {"effective_mode": "cpu-demo"}, "cpu-demo was True")],
)  # fmt: skip
def test_unlike_environments_sizes_and_demonstrations_are_named_by_field(
    environment: dict, changes: dict, words: str
) -> None:
    (found,) = baselines.differences(replace(manifest(**environment), **changes), manifest())
    assert words in found
    assert baselines.differences(manifest(), manifest()) == []
