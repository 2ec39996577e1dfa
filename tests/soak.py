"""Kills a run at random moments, over and over, and looks at what is left each time.

    python3 tests/soak.py --kills 200 --seed 1
    python3 tests/soak.py --kills 10 --seed 1 --on-gpu      # real jobs on the first GPU

Every round starts a run of scripted jobs under time slicing and MPS on a pretended H100
(`fakes/`): run_experiments.sh, stress_test.sh, or the suite alone. At a random moment a signal
(SIGINT, SIGTERM or SIGKILL) goes to the driver, the suite, a client or the sampler, or the MPS
daemon dies. Then:

- no process of the run is left, of its own accord;
- the GPU's mode is what it was before; where the driver itself was killed by SIGKILL, it is after
  `gpu-configs/gpu_status.sh --restore`;
- every row that was on disk at the kill is there, and the report can be made;
- the run goes on with `--resume` and is complete: every row once, the finished ones not repeated.

Ends with 1 at the first round that breaks a promise, naming seed and round; its folder is kept.

On a real GPU the jobs are the project's own, no setting of the card is changed, and who has work on
the card is not killed: a client gets SIGTERM, and the MPS daemon is left to the scripts, which end
it when it has no clients. Other processes may be on that card.
"""

from __future__ import annotations

import argparse
import itertools
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

TESTS = Path(__file__).resolve().parent
PROJECT_ROOT = TESTS.parent
sys.path[:0] = [str(PROJECT_ROOT), str(TESTS)]

import nvml_stub  # noqa: E402
from fakes.gpu_machine import FakeMachine  # noqa: E402
from program_copy import copy_programs, shorten_windows  # noqa: E402
from waiting import is_running, wait_until  # noqa: E402

from benchmarking.planning.workloads import WORKLOADS  # noqa: E402
from benchmarking.records import run_folder  # noqa: E402

CLIENT = TESTS / "fakes" / "scripted_client.py"
MARKER = "GPU_SHARING_SOAK_ROUND"
JOBS = {"match": "*", "unit_seconds": 0.02, "units": 5}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
DRIVER, SUITE, A_CLIENT, SAMPLER = "driver", "suite", "client", "sampler"
DAEMON = "MPS daemon"
MARKS = {SUITE: "benchmark_suite.py", SAMPLER: "gpu_monitor.py", A_CLIENT: "/workloads/"}
# How long a run may take to notice that it was hit, and to end.
END_SECONDS = 90.0


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
    was_hit: bool = False
    # Whom to wait for before the blow; None: whatever the moment brings.
    not_before: str | None = None
    commands: ClassVar[dict[str, list[str]]] = {
        "run_experiments.sh": ["--modes", "time-slicing,mps", "--mix", "training",
                               "--workloads", "2", "--repeats", "1", "--quick"],
        "stress_test.sh": ["mps", "2", "--quick"],
        "benchmarking/benchmark_suite.py": ["--mix", "training", "--workloads", "1,2", "--quick"],
    }  # fmt: skip
    # Longer than an undisturbed run takes on a quick machine, so that some kills come late.
    longest_seconds: ClassVar[dict[str, float]] = {
        "run_experiments.sh": 8.0, "stress_test.sh": 7.0, "benchmarking/benchmark_suite.py": 3.0,
    }  # fmt: skip

    @classmethod
    def blows(cls, script: str) -> list[tuple[str, signal.Signals]]:
        """Return who may be hit in a run of `script`, and how."""
        targets = [A_CLIENT, SAMPLER, *([DRIVER, DAEMON] if script.endswith(".sh") else [SUITE])]
        return [(target, number) for target in targets
                for number in (SIGNALS if target != DAEMON else (signal.SIGKILL,))]  # fmt: skip

    def __str__(self) -> str:
        return (f"{self.script}: {self.number.name} to the {self.target} after "
                f"{self.moment:.2f} s")  # fmt: skip

    def prepare(self) -> None:
        """Lay out a copy of the programs, the pretended GPU and the environment."""
        copy_programs(self.folder, CLIENT, [kind.script for kind in WORKLOADS.values()])
        shorten_windows(self.folder)
        shutil.copytree(PROJECT_ROOT / "gpu-configs", self.folder / "gpu-configs")
        for name in ("run_experiments.sh", "stress_test.sh", "setup_environment.sh",
                     "requirements.txt"):  # fmt: skip
            shutil.copy(PROJECT_ROOT / name, self.folder)
        self.machine = FakeMachine(self.folder / "machine", "h100")
        # The driver is isolated from PYTHONPATH, but not from the folder of its programs.
        (self.folder / nvml_stub.STAND_IN.name).symlink_to(nvml_stub.STAND_IN)
        self.card = nvml_stub.write_state(self.folder / "card.txt")
        self.environment = nvml_stub.stub_environment(
            nvml_stub.build_nvml_stub(self.folder), self.card,
            self.machine.environment(
                GPU_SHARING_STATE_DIR=str(self.folder / "state"), GPU_SHARING_WAIT_SECONDS="2",
                GPU_SHARING_LOCK_DIR=str(self.folder),
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
            return [f"./{self.script}", *([] if resume else self.commands[self.script]), *where]
        which = (
            ["--resume", "mine"] if resume else ["--run-id", "mine", *self.commands[self.script]]
        )
        return [sys.executable, self.script, *which, "--results-dir", str(self.output)]

    def go(self) -> None:
        """Start the run, hit it, and hold everything against the promises."""
        self.prepare()
        self.before = self.modes()
        process = subprocess.Popen(
            self.command(resume=False), cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / "stderr.log").open("wb"), start_new_session=True,
        )  # fmt: skip
        time.sleep(self.moment)
        if self.not_before is not None:
            wait_until(lambda: self.is_there(self.not_before, process),
                       f"the {self.not_before} is there", END_SECONDS)  # fmt: skip
        self.was_hit = self.hit(process)
        finished = self.finished_rows()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise BrokenPromiseError(f"it goes on after {END_SECONDS:g} s") from None
        self.require_nobody()
        self.require_mode()
        self.require_rows(finished)
        self.go_on()

    def modes(self) -> dict:
        """Return what a mode script may have changed."""
        state = self.machine.state()
        gpu = state["gpus"][0]
        names = ("mig_current", "instances", "compute_mode", "timeslice")
        return {"daemons": len(state["mps"]), **{name: gpu[name] for name in names}}

    def forget_the_dead(self) -> None:
        """Take the dead off the pretended card, as a real driver does."""
        nvml_stub.write_state(self.card)

    def hit(self, process: subprocess.Popen[bytes]) -> bool:
        """Send the signal; return whether there was anybody to get it at this moment."""
        if self.target == DAEMON:
            is_there = self.is_there(DAEMON, process)
            self.machine.change(mps={})
            return is_there
        pids = self.pids(self.target, process) if process.poll() is None else []
        with suppress(ProcessLookupError):  # it has just ended
            for pid in pids[-1:]:
                os.kill(pid, self.number)
                return True
        return False

    def is_there(self, target: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether a blow would meet anybody now."""
        if target == DAEMON:
            return bool(self.machine.state()["mps"])
        return process.poll() is None and bool(self.pids(target, process))

    def pids(self, target: str, process: subprocess.Popen[bytes]) -> list[int]:
        """Return the processes of a target, by their command lines."""
        if target == DRIVER:
            return [process.pid]
        mark = MARKS[target]
        found = (pid for pid, words in self.processes() if any(mark in w for w in words[:2]))
        return sorted(found)

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
        if self.modes() != self.before:
            raise BrokenPromiseError(f"mode {self.modes()}, before {self.before}")

    def runs(self) -> list[run_folder.Run]:
        """What is on disk of the round's runs."""
        if not self.output.exists():
            return []
        return [run_folder.read_run(folder) for folder in run_folder.find_runs(self.output)]

    def finished_rows(self) -> Counter[tuple]:
        """What is on disk of finished co-runs: run, co-run, when its window began."""
        return Counter(
            (run.folder.name, record.co_run, record.window_start_seconds)
            for run in self.runs()
            for record in run.co_run_records
            if record.outcome == "ok"
        )

    def require_rows(self, finished: Counter[tuple]) -> None:
        """Every finished row is still there, and the report can be made of them."""
        lost = finished - self.finished_rows()
        if lost:
            raise BrokenPromiseError(f"rows are lost: {lost}")
        is_made = (self.output / "report.md").exists()  # by the driver, after the kill
        if not is_made and self.runs():
            self.must([sys.executable, "benchmarking/analyze_results.py", "--results-dir",
                       str(self.output)])  # fmt: skip

    def go_on(self) -> None:
        """Resume, unless there is nothing to go on with; then every row is there once."""
        finished = self.finished_rows()
        self.forget_the_dead()
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
        if self.script == "run_experiments.sh":
            phases, _ = run_folder.read_phases(self.output)
            return {phase.phase for phase in phases} == {1, 2, 3, 4, 5} and all(
                phase.status != "failed" for phase in phases
            )
        runs = self.runs()
        return bool(runs) and all(run.manifest.outcome == "complete" for run in runs)

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


def rounds(
    seed: int, folder: Path, scripts: list[str], kind: type[Round] = Round
) -> Iterator[Round]:
    """Return random rounds without end, the same for the same seed."""
    draw = random.Random(seed)
    for index in itertools.count():
        script = draw.choice(scripts)
        target, number = draw.choice(kind.blows(script))
        moment = draw.uniform(0.05, kind.longest_seconds[script])
        yield kind(folder / f"{index}", script, target, number, moment)


def main() -> int:
    """Run rounds until so many have hit; return 1 at the first that breaks a promise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how many have to "
                        "hit: a target may be gone, or not there yet (default: 200)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--script", action="append", choices=list(Round.commands))
    parser.add_argument("--at-once", type=int, default=1, metavar="N",
                        help="rounds side by side (default: 1)")  # fmt: skip
    parser.add_argument("--on-gpu", action="store_true", help="real jobs on the first GPU")
    options = parser.parse_args()
    kind = Round
    if options.on_gpu:
        from soak_on_gpu import GpuRound as kind
    scripts = options.script or list(kind.commands)
    if not set(scripts) <= set(kind.commands):
        parser.error(f"--on-gpu has {', '.join(kind.commands)} only")
    # A shell lets background jobs ignore SIGINT, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    begin = time.monotonic()
    hits: Counter[str] = Counter()
    misses = 0
    endless = rounds(options.seed, folder, scripts, kind)
    with ThreadPoolExecutor(options.at_once) as pool:
        while hits.total() < options.kills:
            batch = list(itertools.islice(endless, options.at_once))
            for one, outcome in [(one, pool.submit(one.go)) for one in batch]:
                if not is_kept(one, outcome):
                    return 1
                hits[f"{one.number.name} to the {one.target}"] += one.was_hit
                misses += not one.was_hit
                print(f"{hits.total()}/{options.kills} {one}: "
                      f"{'well' if one.was_hit else 'nobody there, well'}", flush=True)  # fmt: skip
    for what, times in sorted(hits.items()):
        print(f"{times:4d}  {what}")
    print(
        f"{hits.total()} kills and {misses} misses, seed {options.seed}, "
        f"{time.monotonic() - begin:.0f} s: nothing left, nothing lost, nothing done twice"
    )
    folder.rmdir()
    return 0


def is_kept(one: Round, outcome: Future[None]) -> bool:
    """Wait for a round; say which promise it broke, and ask what is left of it to end."""
    try:
        outcome.result()
    except (BrokenPromiseError, subprocess.TimeoutExpired) as error:
        print(f"{one.folder.name}, {one}: {error}\nkept: {one.folder}")
        for pid, _ in one.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        return False
    shutil.rmtree(one.folder)
    return True


if __name__ == "__main__":
    # By its name, since soak_on_gpu imports it so: else there were two of every class.
    from soak import main as main_of_module

    sys.exit(main_of_module())
