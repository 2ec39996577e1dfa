"""Kills a run at random moments, over and over, and looks at what is left each time.

    python3 tests/soak.py --kills 200 --seed 1

Every round starts a run of scripted jobs under time slicing and MPS on a pretended H100
(`fakes/`): run_experiments.sh, stress_test.sh, or the suite alone. At a random moment a signal
(SIGINT, SIGTERM or SIGKILL) goes to the driver, the suite, a client or the sampler. Then:

- no process of the run is left, of its own accord;
- the GPU's mode is what it was before; where the driver itself was killed by SIGKILL, it is after
  `gpu-configs/gpu_status.sh --restore`;
- every row that was on disk at the kill is there, and the report can be made;
- the run goes on with `--resume` and is complete: every row once, the finished ones not repeated.

Ends with 1 at the first round that breaks a promise, naming seed and round; its folder is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROJECT_ROOT = TESTS.parent
sys.path[:0] = [str(PROJECT_ROOT), str(TESTS)]

import nvml_stub  # noqa: E402
from fakes.gpu_machine import FakeMachine  # noqa: E402
from program_copy import copy_programs  # noqa: E402
from waiting import is_running, wait_until  # noqa: E402

from benchmarking.planning.plan import WORKLOADS  # noqa: E402
from benchmarking.storage import run_store  # noqa: E402

CLIENT = TESTS / "fakes" / "scripted_client.py"
MARKER = "GPU_SHARING_SOAK_ROUND"
JOBS = {"match": "*", "unit_seconds": 0.02, "units": 10}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
DRIVER, SUITE, A_CLIENT, SAMPLER = "driver", "suite", "client", "sampler"
# How long a run may take to notice that it was hit, and to end.
END_SECONDS = 90.0

COMMANDS = {
    "run_experiments.sh": ["--modes", "time-slicing,mps", "--mix", "training", "--workloads", "2",
                           "--repeats", "1", "--quick"],
    "stress_test.sh": ["mps", "2", "--quick"],
    "benchmarking/benchmark_suite.py": ["--mix", "training", "--workloads", "1,2", "--quick"],
}  # fmt: skip


class BrokenPromiseError(AssertionError):
    """Something was left behind, lost or done twice."""


@dataclass
class Round:
    """One run, one kill, and what has to hold afterwards."""

    folder: Path
    script: str
    target: str
    number: signal.Signals
    moment: float
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (f"{self.script}: {self.number.name} to the {self.target} after "
                f"{self.moment:.2f} s")  # fmt: skip

    def prepare(self) -> None:
        """Lay out a copy of the programs, the pretended GPU and the environment."""
        copy_programs(self.folder, CLIENT, [kind.script for kind in WORKLOADS.values()])
        for name in ("lib", "gpu-configs"):
            shutil.copytree(PROJECT_ROOT / name, self.folder / name)
        for name in ("run_experiments.sh", "stress_test.sh", "setup_environment.sh",
                     "requirements.txt"):  # fmt: skip
            shutil.copy(PROJECT_ROOT / name, self.folder)
        self.machine = FakeMachine(self.folder / "machine", "h100")
        self.before = modes_of(self.machine)
        self.card = nvml_stub.write_state(self.folder / "card.txt")
        self.environment = nvml_stub.stub_environment(
            nvml_stub.build_nvml_stub(self.folder), self.card,
            self.machine.environment(
                GPU_SHARING_STATE_DIR=str(self.folder / "state"), GPU_SHARING_WAIT_SECONDS="2",
                PYTHON=sys.executable, SCRIPTED_CLIENT=json.dumps([JOBS]),
                **{MARKER: str(self.folder)},
            ),
        )  # fmt: skip

    @property
    def output(self) -> Path:
        """The results folder of the run."""
        return self.folder / "out"

    def command(self, *, resume: bool) -> list[str]:
        """The command line that starts the run, or goes on with it."""
        if self.script.endswith(".sh"):
            where = ["--resume", str(self.output)] if resume else ["--output", str(self.output)]
            return [f"./{self.script}", *([] if resume else COMMANDS[self.script]), *where]
        which = ["--resume", "mine"] if resume else ["--run-id", "mine", *COMMANDS[self.script]]
        return [sys.executable, self.script, *which, "--results-dir", str(self.output)]

    def go(self) -> None:
        """Start the run, hit it, and hold everything against the promises."""
        self.prepare()
        process = subprocess.Popen(
            self.command(resume=False), cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / "stderr.log").open("wb"), start_new_session=True,
            preexec_fn=heed_signals,
        )  # fmt: skip
        time.sleep(self.moment)
        self.hit(process)
        finished = self.finished_rows()
        process.wait(END_SECONDS)
        self.require_nobody()
        self.require_mode()
        self.require_rows(finished)
        self.go_on()

    def hit(self, process: subprocess.Popen[bytes]) -> None:
        """Send the signal; a target that is not there at this moment is left in peace."""
        own = [process.pid] if self.target == DRIVER else [
            pid for pid, words in self.processes() if self.is_target(words)
        ]  # fmt: skip
        if own and process.poll() is None:
            os.kill(sorted(own)[-1], self.number)

    def is_target(self, words: list[str]) -> bool:
        """Whether a command line is the target's."""
        marks = {
            SUITE: "benchmark_suite.py", SAMPLER: "gpu_monitor.py", A_CLIENT: "/workloads/",
        }  # fmt: skip
        return any(marks[self.target] in word for word in words[:2])

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Every living process of this round with its command line, by its environment."""
        mark = f"{MARKER}={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if is_running(int(path.name)):
                        yield int(path.name), words
            except OSError:
                continue

    def require_nobody(self) -> None:
        """No process is left; what was hit may take a while to end."""
        try:
            wait_until(lambda: not list(self.processes()), "nobody is left", END_SECONDS)
        except AssertionError:
            raise BrokenPromiseError(f"processes are left: {list(self.processes())}") from None

    def require_mode(self) -> None:
        """The GPU's mode is as before, after a SIGKILL of the driver by `--restore`."""
        if self.target == DRIVER and self.number == signal.SIGKILL:
            self.must(["./gpu-configs/gpu_status.sh", "--restore"])
        if modes_of(self.machine) != self.before:
            raise BrokenPromiseError(f"mode {modes_of(self.machine)}, before {self.before}")

    def finished_rows(self) -> Counter[tuple]:
        """What is on disk of finished co-runs: run, co-run, when its window began."""
        rows: Counter[tuple] = Counter()
        for folder in run_store.find_runs(self.output) if self.output.exists() else []:
            for record in run_store.read_run(folder).co_run_records:
                if record["outcome"] == "ok":
                    key = (folder.name, record["co_run"], record["window_start_seconds"])
                    rows[key] += 1
        return rows

    def require_rows(self, finished: Counter[tuple]) -> None:
        """Every finished row is still there, and the report can be made of them."""
        lost = finished - self.finished_rows()
        if lost:
            raise BrokenPromiseError(f"rows are lost: {lost}")
        if self.output.exists() and run_store.find_runs(self.output):
            self.must([sys.executable, "benchmarking/analyze_results.py", "--results-dir",
                       str(self.output)])  # fmt: skip

    def go_on(self) -> None:
        """Resume, unless there is nothing to go on with; then every row is there once."""
        finished = self.finished_rows()
        # The driver of a real card forgets who is dead.
        nvml_stub.write_state(self.card)
        started = (self.output / "arguments.nul").exists() if self.script.endswith(".sh") else (
            self.output / "mine" / "manifest.json").exists()  # fmt: skip
        if started and not self.is_complete():
            self.must(self.command(resume=True))
            self.require_nobody()
            self.require_mode()
            if not self.is_complete():
                raise BrokenPromiseError("the resumed run is not complete")
        rows = self.finished_rows()
        if finished - rows:
            raise BrokenPromiseError(f"rows were repeated: {finished - rows}")
        twice = [name for name, count in Counter(key[:2] for key in rows).items() if count > 1]
        if twice:
            raise BrokenPromiseError(f"rows are there twice: {twice}")

    def is_complete(self) -> bool:
        """Whether every run of the round has ended with all that was asked for."""
        if not self.script.endswith(".sh"):
            folder = self.output / "mine"
            return run_store.read_run(folder).manifest["outcome"] == "complete"
        path = self.output / "phases.jsonl"
        if self.script == "stress_test.sh":
            runs = [run_store.read_run(f).manifest for f in run_store.find_runs(self.output)]
            return bool(runs) and all(run["outcome"] == "complete" for run in runs)
        last = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            last[json.loads(line)["phase"]] = json.loads(line)["status"]
        return set(last) == {1, 2, 3, 4, 5} and "failed" not in last.values()

    def must(self, command: list[str]) -> None:
        """Run a command that has to succeed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BrokenPromiseError(
                f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1500:]}"
            )


def heed_signals() -> None:
    """Undo what a shell does to background jobs: there SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def modes_of(machine: FakeMachine) -> dict:
    """Return what a mode script may have changed of the pretended machine."""
    state = machine.state()
    gpu = state["gpus"][0]
    names = ("mig_current", "instances", "compute_mode", "timeslice")
    return {"daemons": len(state["mps"]), **{name: gpu[name] for name in names}}


def rounds(kills: int, seed: int, folder: Path, scripts: list[str]) -> Iterator[Round]:
    """Return random rounds, the same for the same seed."""
    draw = random.Random(seed)
    for index in range(kills):
        script = draw.choice(scripts)
        targets = [DRIVER, SUITE, A_CLIENT, SAMPLER]
        target = draw.choice(targets if script.endswith(".sh") else targets[1:])
        # Longer than an undisturbed run takes on a quick machine, so that some kills come late.
        longest = 14.0 if script.endswith(".sh") else 7.0
        yield Round(
            folder / f"{index}", script, target, draw.choice(SIGNALS), draw.uniform(0.05, longest)
        )


def main() -> int:
    """Run the rounds; return 1 at the first that breaks a promise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--script", action="append", choices=list(COMMANDS))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    begin = time.monotonic()
    count: Counter[str] = Counter()
    scripts = options.script or list(COMMANDS)
    for index, one in enumerate(rounds(options.kills, options.seed, folder, scripts)):
        try:
            one.go()
        except (BrokenPromiseError, subprocess.TimeoutExpired) as error:
            print(f"seed {options.seed}, round {index}, {one}: {error}\nkept: {one.folder}")
            return 1
        shutil.rmtree(one.folder)
        count[f"{one.number.name} to the {one.target}"] += 1
        print(f"{index + 1}/{options.kills} {one}: well", flush=True)
    for what, times in sorted(count.items()):
        print(f"{times:4d}  {what}")
    print(f"{options.kills} kills, seed {options.seed}, {time.monotonic() - begin:.0f} s: "
          "nothing left, nothing lost, nothing done twice")  # fmt: skip
    folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
