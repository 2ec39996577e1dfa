"""The suite as a program, with scripted clients for its workloads, with or without a card.

The project's `benchmarking/` is copied beside stand-ins for the workload scripts, so that the
program under test is the real one and needs no torch. Cards are scripted through NVML.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nvml_stub
from program_copy import copy_programs
from recorded_rows import plain, read_plain
from waiting import wait_until

from benchmarking.planning.workloads import WORKLOADS
from benchmarking.records import run_folder

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


class Bench:
    """A copy of the suite with scripted workloads, in a folder of its own."""

    def __init__(self, root: Path, *more_scripts: str) -> None:
        self.root = root
        self.results = root / "results"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CUDA_")
        }
        self.environment["GPU_SHARING_STATE_DIR"] = str(root / "state")
        scripts = [kind.script for kind in WORKLOADS.values()]
        copy_programs(root, CLIENT, [*scripts, *more_scripts])
        self.script()

    # --- the machine and its jobs -----------------------------------------------------------------

    def script(self, *rules: dict) -> None:
        """Say how the clients behave."""
        self.environment["SCRIPTED_CLIENT"] = json.dumps([FAST, *rules])

    def add_card(self, **state: object) -> None:
        """Put a scripted H100 into the machine; keyword arguments change the card."""
        self.change_card(**state)
        library = nvml_stub.build_nvml_stub(self.root)
        card = self.root / "card.txt"
        self.environment = nvml_stub.stub_environment(library, card, self.environment)
        self.add_program("nvidia-cuda-mps-control", CONTROL_PROGRAM)
        programs = self.root / "bin"
        self.environment["PATH"] = f"{programs}{os.pathsep}{self.environment['PATH']}"

    def change_card(self, **state: object) -> None:
        """Make the card an H100 with this state, while the programs run too."""
        nvml_stub.write_state(self.root / "card.txt", **state)

    def add_program(self, name: str, text: str) -> None:
        """Put a program in front of the PATH."""
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def save_mode(self, mode: str, text: str) -> None:
        """Write what a mode script would have left about the card."""
        state = self.root / "state"
        state.mkdir()
        (state / f"{mode}-{nvml_stub.GPU_UUID}.state").write_text(text)

    def start_daemon(self, saved: str = "") -> None:
        """Pretend that `enable_mps.sh` was run, and saved this with its state."""
        pipe = self.root / "pipe"
        pipe.mkdir()
        (pipe / "running").write_text("")
        self.save_mode("mps", f"pipe_directory={pipe}\n{saved}")

    # --- running ----------------------------------------------------------------------------------

    def command(self, *arguments: str) -> list[str]:
        """The command line of a run with a short window; on a card it holds two process lists."""
        script = str(self.root / "benchmarking" / "benchmark_suite.py")
        least = "0.4" if "NVML_STUB_STATE" in self.environment else "0.2"
        fixed = ["--results-dir", str(self.results), "--min-seconds", least]
        return [sys.executable, script, *fixed, *arguments]

    def resume_command(self, run_id: str) -> list[str]:
        """The command line that goes on with a run, with the flags that it was started with."""
        return [*self.command()[:2], "--resume", run_id, "--results-dir", str(self.results)]

    def to_its_end(self, command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command line to its end; keyword arguments are those of `subprocess.run`."""
        how = {"env": self.environment, "timeout": 100} | how
        return subprocess.run(command, capture_output=True, text=True, check=False, **how)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the suite to its end."""
        return self.to_its_end(self.command(*arguments))

    def resume(self, run_id: str) -> subprocess.CompletedProcess[str]:
        """Go on with a run to its end."""
        return self.to_its_end(self.resume_command(run_id))

    def start(self, *arguments: str, until: str, said: str) -> subprocess.Popen[str]:
        """Start a run; return once a client's log (`mine-1-r0/0`) says this."""
        process = subprocess.Popen(
            self.command(*arguments), env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        logs = f"clients/{until}.events.jsonl"
        wait_until(
            lambda: any(said in path.read_text() for path in self.results.rglob(logs)),
            f"{until} says {said}",
        )
        return process

    def must(self, *arguments: str, code: int = 0) -> SimpleNamespace:
        """Run what has to end with this code; return the run that it left."""
        done = self.run(*arguments)
        assert done.returncode == code, done.stderr
        return self.only_run()

    def analyze(self) -> subprocess.CompletedProcess[str]:
        """Start the analysis of all runs."""
        script = str(self.root / "benchmarking" / "analyze_results.py")
        return self.to_its_end([sys.executable, script, "--results-dir", str(self.results)])

    # --- what a run left --------------------------------------------------------------------------

    def report(self) -> str:
        """Make the report; return its text."""
        done = self.analyze()
        assert done.returncode == 0, done.stderr
        return (self.results / "report.md").read_text()

    def only_run(self) -> SimpleNamespace:
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


def names(run: SimpleNamespace) -> list[str]:
    """The co-runs in the order of their records."""
    return [record["co_run"] for record in run.co_run_records]


def outcomes(run: SimpleNamespace) -> list[str]:
    """How each co-run ended."""
    return [record["outcome"] for record in run.co_run_records]


def statuses(run: SimpleNamespace, co_run: str) -> list[str]:
    """How each client of a co-run ended."""
    return [record["status"] for record in run.clients_of(co_run)]


def verdicts(run: SimpleNamespace, phase: str = "co_run") -> list[str]:
    """What was proved of each client of a phase."""
    return [record["proof"]["verdict"] for record in run.client_records
            if record["phase"] == phase]  # fmt: skip


def window_seconds(record: dict) -> float:
    """The length of a record's window."""
    return record["window_end_seconds"] - record["window_start_seconds"]
