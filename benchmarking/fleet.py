#!/usr/bin/env python3
"""Run the same comparison on every card of a host or of a Ray cluster, and name the odd card.

    python3 benchmarking/fleet.py run -- --quick --modes time-slicing,mps
    python3 benchmarking/fleet.py run --address auto --output /shared/fleet -- --plan jobs.toml
    python3 benchmarking/fleet.py unit --output /shared/fleet -- --quick   # here, without Ray
    python3 benchmarking/fleet.py report --output /shared/fleet

`run` starts Ray on this host, or joins a cluster (--address). What stands behind `--` goes to
run_experiments.sh (see its --help), once for each whole card, into DIR/HOST/UUID/. Before that
what mode scripts have left on the card is undone, and its health is looked at for 20 s. One card
of a host is measured at a time. The same command again goes on with what was cut off, and repeats
what was refused or failed; Ctrl-C ends politely. `unit` measures the cards that it sees here, for
schedulers that give out cards by themselves; `report` makes the report of what there is: fleet.md,
fleet.json. See docs/fleet.md.

Exit codes: 0 every card was measured, 1 one was not, 2 usage, 3 no GPU, 130 interrupted; `unit`:
those of run_experiments.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking import fleet_report
from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_GPU,
    EXIT_USAGE,
    OneLineParser,
    SuiteError,
    present_folder,
)
from benchmarking.drivers.fleet_unit import DRIVER, RECORD_WORD, run_units
from benchmarking.drivers.program import exit_code_of, make_folder
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.modes.mode_scripts import LOCK_VARIABLE
from benchmarking.records.writing import one_line, write_bytes_atomic

OUTPUT = Path("results/fleet")
# Flags of run_experiments.sh that the fleet itself gives.
RESERVED = ("--gpu", "--output", "--resume", "--dry-run")
MOST_ATTEMPTS = 3  # of a unit whose worker was killed
WAIT_SECONDS = 0.2
# Archives of results pass through it, nothing else.
OBJECT_STORE_BYTES = 256 * 2**20
# Becomes the program in a process that is no child of Ray's worker: those a worker kills by SIGKILL
# when it ends.
DETACH = "import os, sys; os.fork() and os._exit(0); os.execv(sys.argv[1], sys.argv[1:])"


def main() -> int:
    """Do what the command says; return the exit code."""
    options = parse_arguments()
    command = {"run": run_fleet, "unit": run_units, "report": make_report}[options.command]
    fix = "then start it again: it goes on"
    return exit_code_of(lambda stop: command(options, stop), options.output, fix)


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments; `flags` are those of run_experiments.sh."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|unit|report")
    shared = OneLineParser(add_help=False)
    shared.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR",
                        help=f"folder of the fleet (default: {OUTPUT})")  # fmt: skip
    usage = "fleet.py %s [options] -- FLAGS OF run_experiments.sh"
    run = commands.add_parser("run", parents=[shared], usage=usage % "run", help="every card")
    run.add_argument("--address", metavar="ADDRESS", help="Ray cluster to join, such as auto or "
        "HOST:6379 (default: Ray on this host)")  # fmt: skip
    run.add_argument("--archive", type=Path, metavar="DIR", help="hosts share no folder: each "
        "writes below DIR of its own, and the results come back to --output")  # fmt: skip
    run.add_argument("--all-cards", action="store_true", help="all cards of a host at once: what "
        "they do to each other through cores and power")  # fmt: skip
    unit = commands.add_parser("unit", parents=[shared], usage=usage % "unit",
                                help="cards of this host, without Ray")  # fmt: skip
    unit.add_argument("--gpu", metavar="INDEX_OR_UUID", help="which (default: each visible)")
    unit.add_argument("--host", metavar="NAME", help="folder below DIR (default: this host's name)")
    unit.add_argument("--stop-at-eof", action="store_true",
                      help="end politely at the end of standard input")  # fmt: skip
    commands.add_parser("report", parents=[shared], help="the report of what there is")
    words = sys.argv[1:]
    own = words[: words.index("--")] if "--" in words else words
    options = parser.parse_args(own)
    options.flags = words[len(own) + 1 :]
    given = {word.partition("=")[0] for word in options.flags}
    reserved = [flag for flag in RESERVED if flag in given]
    if reserved:
        parser.error(f"{reserved[0]} behind -- is the fleet's own: leave it")
    options.output = present_folder() / options.output
    return options


def make_report(options: argparse.Namespace, stop: StopSignal) -> int:
    """Make the report of the units that there are; return the exit code."""
    return fleet_report.write(options.output, [])


def run_fleet(options: argparse.Namespace, stop: StopSignal) -> int:
    """Measure every card, then make the report; return the exit code.

    Raises:
        SuiteError: run_experiments.sh refuses the flags, or there is no Ray or no GPU.
    """
    check_flags(options.flags)
    ray = join_ray(options.address)
    make_folder("--output", options.output)
    # Tells a host that shares the folder from one where there merely is one of that name.
    mark = options.output / f".fleet-{secrets.token_hex(8)}"
    mark.touch()
    try:
        fleet = Fleet(ray, options, mark, stop)
        fleet.measure()
    finally:
        mark.unlink(missing_ok=True)
        ray.shutdown()
    code = fleet_report.write(options.output, fleet.rows_without_record())
    if stop.requested:
        print("Interrupted; the same command goes on", flush=True)
        return EXIT_INTERRUPTED
    return code


def check_flags(flags: list[str]) -> None:
    """Refuse here, and not on each card, what run_experiments.sh refuses; raises `SuiteError`."""
    command = [str(DRIVER), *flags, "--device", "cpu", "--dry-run"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
        errors="replace", check=False, env={"PYTHON": sys.executable, **os.environ},
    )  # fmt: skip
    if done.returncode != EXIT_COMPLETE:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        sentence = said[-1].removeprefix("error: ") if said else f"status {done.returncode}"
        raise SuiteError(f"{DRIVER.name}: {sentence}", EXIT_USAGE)


def join_ray(address: str | None) -> Any:
    """Return the module `ray`, connected; raises `SuiteError` where it is missing or refuses."""
    try:
        import ray
    except ImportError as error:
        raise SuiteError(
            f"Ray is missing ({error}): pip install -r requirements-fleet.txt, or measure card "
            "by card with fleet.py unit, which needs no Ray", EXIT_FAILED,
        ) from error  # fmt: skip
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        # The token that Ray leaves in it is readable by all where the umask lets it.
        with contextlib.suppress(OSError, RuntimeError):
            (Path.home() / ".ray").mkdir(mode=0o700, exist_ok=True)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # whatever Ray raises where it cannot start or connect
        sentence = f"cannot join Ray at {address}: {first_line(error)} (is it there, and is its "
        sentence += "token here? see docs/fleet.md)"
        raise SuiteError(sentence, EXIT_FAILED) from error
    return ray


def first_line(error: BaseException) -> str:
    """Return what an error says, without the pages that Ray adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Card:
    """A card of Ray's, held for the fleet by an actor, which starts the process of its unit.

    It runs on the card's host by Ray's Python, so it uses the standard library and Ray alone.
    """

    def __init__(self) -> None:
        """Have no unit yet."""
        self._unit: Any = None
        self._is_stopped = False

    def pid(self) -> int:
        """Return the worker's process id; answers as soon as Ray has given the card."""
        return os.getpid()

    def measure(
        self, words: list[str], environment: dict[str, str], directory: str, mark: str | None
    ) -> Iterator[str | bytes]:
        """Run the unit; give each line that it says, and the archive of its files at last.

        `environment` is added to that of Ray's worker. `mark` is a file that a host which shares
        the fleet's folder sees; `None`: the results go back as an archive.
        """
        import ray

        if mark is not None and not os.path.exists(mark):
            yield f"error: {os.path.dirname(mark)} is not shared with this host: use --archive DIR"
            return
        environment = {**os.environ, **environment}
        environment.pop("OMP_NUM_THREADS", None)  # Ray's, which means the worker
        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        program, command, *rest = words
        self._unit = subprocess.Popen(
            [sys.executable, "-c", DETACH, sys.executable, program, command, "--gpu", gpu, *rest],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", cwd=directory, env=environment,
            start_new_session=True,
        )  # fmt: skip
        if self._is_stopped:  # before there was a unit
            self.stop()
        record = ""
        for line in self._unit.stdout:
            yield line.rstrip("\n")
            record = line.strip().partition(RECORD_WORD)[2] or record
        self.stop()
        if mark is None and record:
            packed, path = BytesIO(), Path(record)
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                for one in (path, path.with_suffix(".log"), path.with_suffix("")):
                    if one.exists():
                        archive.add(one, f"{path.parent.name}/{one.name}")
            yield packed.getvalue()

    def stop(self) -> None:
        """Let the unit end politely: the end of its standard input asks for it."""
        self._is_stopped = True
        if self._unit is not None:
            self._unit.stdin.close()


@dataclass
class Unit:
    """A card of the cluster, and how far it is."""

    host: str
    node_id: str
    card: Any = None  # the actor that holds it
    attempts: int = 0
    has_record: bool = False
    reason: str = "not begun"  # why it has none: the last thing that it said


class Fleet:
    """The units of all cards at work: a thread for each host, or for each card."""

    def __init__(self, ray: Any, options: argparse.Namespace, mark: Path, stop: StopSignal) -> None:
        """Look which cards Ray knows; raises `SuiteError` where it knows of none."""
        self._ray, self._options, self._mark, self._stop = ray, options, mark, stop
        self._units = [
            Unit(node_name(node), node["NodeID"])
            for node in ray.nodes()
            if node["Alive"]
            for _ in range(int(node["Resources"].get("GPU", 0)))
        ]
        if not self._units:
            raise SuiteError(
                "Ray knows of no GPU: look at nvidia-smi, and at CUDA_VISIBLE_DEVICES where Ray "
                "was started", EXIT_NO_GPU,
            )  # fmt: skip

    def measure(self) -> None:
        """Measure every card; Ctrl-C lets those at work end, and begins no other."""
        hosts: dict[str, list[Unit]] = {}
        for unit in self._units:
            hosts.setdefault(unit.node_id, []).append(unit)
        print(f"fleet: {len(self._units)} cards on {len(hosts)} hosts", flush=True)
        turns = list(hosts.values())
        if self._options.all_cards:
            turns = [[unit] for unit in self._units]
        was_stopped = False
        with ThreadPoolExecutor(len(turns)) as pool:
            threads = [pool.submit(self._measure_in_turn, units) for units in turns]
            while wait(threads, timeout=WAIT_SECONDS).not_done:
                if self._stop.requested and not was_stopped:
                    was_stopped = True
                    print("Stopping: units at work undo their modes and report", flush=True)
                    for card in [unit.card for unit in self._units if unit.card]:
                        card.stop.remote()
        for thread in threads:
            thread.result()

    def rows_without_record(self) -> list[dict[str, Any]]:
        """Return host and reason of each card that has no record of its own."""
        return [
            {"host": unit.host, "reason": unit.reason}
            for unit in self._units
            if not unit.has_record
        ]

    def _measure_in_turn(self, units: list[Unit]) -> None:
        """Measure cards of a host, one after another, as Ray gives them; all are held from now."""
        asked = {self._ask_for_card(unit): unit for unit in units}
        while asked and not self._stop.requested:
            for given in self._ray.wait(list(asked), timeout=WAIT_SECONDS)[0]:
                self._measure(asked.pop(given), given)

    def _ask_for_card(self, unit: Unit) -> Any:
        """Ask Ray for a card on the unit's host; return the answer to come, the worker's pid."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Two calls at once: the unit's lines, and what stops it.
        unit.card = self._ray.remote(Card).options(
            num_gpus=1, num_cpus=0, max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(unit.node_id, soft=False),
        ).remote()  # fmt: skip
        return unit.card.pid.remote()

    def _measure(self, unit: Unit, given: Any) -> None:
        """Measure a card that Ray has given; a unit whose worker is killed goes on in another."""
        output = (self._options.archive or self._options.output).absolute()
        own = ["unit", "--host", unit.host, "--output", str(output), "--stop-at-eof"]
        words = [os.path.abspath(__file__), *own, "--", *self._options.flags]
        # Who locks the cards' settings here means the hosts', too.
        lock = {name: os.environ[name] for name in (LOCK_VARIABLE,) if name in os.environ}
        mark = None if self._options.archive else str(self._mark)
        unit.attempts += 1
        try:
            worker = self._ray.get(given)
            print(f"{unit.host}: a unit begins, in Ray's worker {worker}", flush=True)
            measure = unit.card.measure.options(num_returns="streaming")
            for answer in measure.remote(words, lock, os.getcwd(), mark):
                self._take(unit, self._ray.get(answer))
        except self._ray.exceptions.RayError as error:
            unit.reason = f"Ray: {first_line(error)}"
            print(f"{unit.host}: {unit.reason}", flush=True)
            is_dead = isinstance(error, self._ray.exceptions.RayActorError)
            if is_dead and unit.attempts < MOST_ATTEMPTS:
                # It keeps its turn: its driver may still be ending.
                self._measure_in_turn([unit])

    def _take(self, unit: Unit, said: str | bytes) -> None:
        """Take what the unit's actor gives: a line, or the archive of its files."""
        if isinstance(said, bytes):
            unpack(said, self._options.output)
        elif RECORD_WORD in said:
            unit.has_record = True
        else:
            unit.reason = one_line(said)  # another host's words
            print(f"{unit.host}: {unit.reason}", flush=True)


def unpack(packed: bytes, folder: Path) -> None:
    """Write the files of an archive that another host sent, and nothing outside of `folder`.

    tarfile's own filter came with Python 3.11.4 and 3.10.12; Debian 12 has 3.11.2.
    """
    folder = folder.resolve()
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        for member in archive:
            target = (folder / member.name).resolve()
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and target.is_relative_to(folder):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(target, content.read(), mode=member.mode & 0o777)


def node_name(node: dict[str, Any]) -> str:
    """Return the name of a node's host, or the one that `ray start --node-name` gave it."""
    named = node["NodeName"] != node["NodeManagerAddress"]
    return node["NodeName"] if named else node["NodeManagerHostname"]


if __name__ == "__main__":
    sys.exit(main())
