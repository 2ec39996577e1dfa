#!/usr/bin/env python3
"""Let one client go wrong next to healthy ones, and report who survived.

    python3 benchmarking/blast_radius.py --mode time-slicing --fault oom
    python3 benchmarking/blast_radius.py --mode mps --fault assert --neighbors 3
    python3 benchmarking/blast_radius.py --summary results   # one table of all that was measured

Healthy clients and one faulty client (workloads/custom/fault_client.py) share the GPU under a mode
that must be in force. In the middle the faulty one runs out of memory (its own cap), exits, fails
an assertion in a kernel or, with --allow-illegal-access, writes outside of its memory. Reported are
the neighbors that survived, their rates before and after, the longest pause, the work that was
lost, and when a new client works again. A fault that is refused or does not happen leaves a record
of that, with the reason. It is part of no other program.

Exit codes: 0 measured, 1 the fault could not be seen or the record not be written, 2 usage, 3 no
usable GPU, 4 the mode is not in force, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.blast_report import (
    FAULTS,
    SCHEMA_VERSION,
    is_measured,
    markdown,
    own_cost_seconds,
    summary,
)
from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    PROJECT_ROOT,
    OneLineParser,
    RunEnded,
    SuiteError,
    count,
    positive_float,
)
from benchmarking.drivers.program import (
    UntilOver,
    claim_folder,
    exit_code_of,
    launch,
    resolve_jobs,
    write_report,
)
from benchmarking.measuring import locks
from benchmarking.measuring.client import Client, ClientResult
from benchmarking.measuring.event_log import first_unit_end_seconds, last_event, tail_of
from benchmarking.measuring.launcher import CoRunResult, FinishRule
from benchmarking.measuring.progress import Progress
from benchmarking.measuring.proofs import judge_clients
from benchmarking.measuring.sampler import Sampler
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.modes.mode_scripts import lock_reason, read_state
from benchmarking.modes.mps import MpsMode, ask_mps_control
from benchmarking.modes.names import MODE_MPS, MODES
from benchmarking.planning import limits
from benchmarking.planning.plan import PlannedClient, PlannedCoRun
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import MIXES
from benchmarking.records.run_folder import utc_now
from benchmarking.suite.setup import Setup, prepared

NAME = "blast_radius"
FAULT_CLIENT = "workloads/custom/fault_client.py"
# Under MPS the daemon's own limit stands behind the cap that the client sets itself.
MPS_MEMORY_LIMIT = "8G"
READY_SECONDS = 1800.0
NEWCOMER_SECONDS = 120.0
# Between two new clients where the first could not work.
RETRY_SECONDS = 1.0
# From go on, until a neighbor's rate counts.
SETTLE_SECONDS = 1.0
POLL_SECONDS = 0.02
SERVER_LOG_LINES = 12
# Raises nothing where nobody reads it any more, which would leave clients that do not stop.
say = Progress().say


def main() -> int:
    """Let it happen, or read what happened; return the exit code."""
    options = parse_arguments()
    work = print_summary if options.summary else let_it_happen
    fix = "or name another --output-dir"
    return exit_code_of(lambda stop: work(options, stop), options.output_dir or Path(), fix)


def parse_arguments() -> argparse.Namespace:
    """Return the checked flags; ends the process with code 2 where they make no sense."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=MODES[:3], default=MODES[0], help="(default: %(default)s)")
    add("--fault", choices=tuple(FAULTS))
    add("--neighbors", type=count, default=3, metavar="N", help="(default: 3)")
    add("--mix", choices=sorted(MIXES), default="inference",
        help="the neighbors' jobs (default: inference)")  # fmt: skip
    add("--window", type=positive_float, default=10.0, metavar="S",
        help="the fault comes after half of it (default: 10)")  # fmt: skip
    add("--allow-illegal-access", action="store_true",
        help="for --fault illegal-access on a card of your own: under MPS it ends the work of "
        "everybody on the card")  # fmt: skip
    add("--allow-contention", "--beside-others", action="store_true",
        help="measure although foreign processes are on the GPU, and say so")  # fmt: skip
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    add("--output-dir", type=Path, metavar="DIR",
        help="(default: results/blast_radius-MODE-FAULT-TIME)")  # fmt: skip
    add("--summary", type=Path, nargs="+", metavar="DIR",
        help="measure nothing: print one table of what these output folders, or those in them, "
        "hold")  # fmt: skip
    options = parser.parse_args()
    if bool(options.summary) == bool(options.fault):
        parser.error("give --fault to measure one, or --summary for a table of several")
    if options.fault:
        options.output_dir = options.output_dir or free_folder(options)
    return options


def free_folder(options: argparse.Namespace) -> Path:
    """Return a folder for this call: two may come in the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path("results") / f"{NAME}-{options.mode}-{options.fault}-{stamp}"
    numbered = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([base], numbered) if not path.exists())


def print_summary(options: argparse.Namespace, stop: StopSignal) -> int:
    """Print one table of what was measured before; return the exit code."""
    print(summary(options.summary), end="")
    return EXIT_COMPLETE


def let_it_happen(options: argparse.Namespace, stop: StopSignal) -> int:
    """Prepare, measure, write and print what was found, or why nothing was; return the code."""
    if is_measured(options.output_dir):
        raise SuiteError(
            f"--output-dir {options.output_dir} holds a record; name another folder", EXIT_USAGE
        )
    claim_folder("--output-dir", options.output_dir)
    record = {
        "schema_version": SCHEMA_VERSION, "created_at": utc_now(), "command": sys.argv,
        "mode": options.mode, "fault": options.fault, "not_run": None,
    }  # fmt: skip
    request = Request(
        mode=options.mode, mix=options.mix, counts=(options.neighbors + 1,), gpu=options.gpu,
        device=options.device, quick=True, allow_contention=options.allow_contention,
    )  # fmt: skip
    try:
        refuse_harm(options)
        is_refused = not options.allow_contention
        with (
            prepared(request) as setup,
            locks.hold_or_note(setup.gpu_uuid, is_refused=is_refused) as note,
        ):
            setup.notes.extend([note] if note else [])
            record |= measure(options, setup, stop)
    except SuiteError as error:
        record["not_run"] = str(error)
        write_report(options.output_dir, NAME, record, markdown(record))
        raise
    write_report(options.output_dir, NAME, record, markdown(record))
    print(markdown(record))
    print(f"results: {options.output_dir}")
    return EXIT_COMPLETE


def refuse_harm(options: argparse.Namespace) -> None:
    """Raise `SuiteError` for a fault that could end other people's work without their leave."""
    if options.fault != "illegal-access":
        return
    lock = lock_reason(os.environ)
    if lock is not None:
        raise SuiteError(
            f"--fault illegal-access: {lock} says that others use the card", EXIT_USAGE
        )
    if not options.allow_illegal_access:
        raise SuiteError(
            "--fault illegal-access can end other people's work on this card; on a card of your "
            "own add --allow-illegal-access", EXIT_USAGE,
        )  # fmt: skip


def measure(options: argparse.Namespace, setup: Setup, stop: StopSignal) -> dict[str, Any]:
    """Run the co-run and its newcomers; return what was found as plain data.

    Raises:
        SuiteError: The clients did not get ready, or there was no fault to see.
        RunEnded: Somebody asked to stop; no process is left.
    """
    planned = with_fault(options, setup, resolve_jobs(setup.plan, stop, say).co_runs[0])
    say(f"{options.neighbors} neighbors and a faulty client get ready under {setup.mode.name}")
    folder = options.output_dir
    with Sampler(
        folder / "gpu_samples.jsonl", folder / "gpu_monitor.log", gpu=setup.gpu_uuid
    ) as sampler:
        blast = Blast(options, setup, planned, stop)
        seen = blast.run()
        if seen.outcome == "interrupted" or stop.requested:
            raise RunEnded("interrupted", EXIT_INTERRUPTED)
        begin, end = seen.window_start_seconds, seen.window_end_seconds
        if blast.fault_seconds is None or begin is None or end is None:
            raise SuiteError(f"there was no fault to see: {seen.reason}", EXIT_FAILED)
        samples = list(sampler.samples_past(end))
    proofs = judge_clients(setup.mode, seen, samples)
    return {
        "mode": setup.mode.name,
        "notes": [*setup.notes, *filter(None, [sampler.failure])],
        "gpu": dict(setup.gpu) if setup.gpu else None,
        "fault_after_seconds": blast.fault_seconds - begin,
        "neighbors": [
            judge_neighbor(seen.clients[number], begin, end, blast.fault_seconds)
            | {"proof": proof.verdict if (proof := proofs[number]) else None}
            for number in range(options.neighbors)
        ],
        "faulty": {
            key: getattr(seen.clients[-1], key)
            for key in ("status", "reason", "exit_code", "stderr_tail")
        },
        "newcomer": describe_newcomer(blast),
        "mps": describe_mps(setup, blast.servers_before),
    }


def with_fault(options: argparse.Namespace, setup: Setup, planned: PlannedCoRun) -> PlannedCoRun:
    """Put the faulty client in the place of the last one."""
    last = planned.clients[-1]
    environment = dict(last.environment)
    if setup.mode.name == MODE_MPS and options.fault == "oom":
        environment |= limits.variables(memory_limit=MPS_MEMORY_LIMIT)
    device = "cuda" if setup.gpu else "cpu"
    flags = ["--fault", options.fault, "--after", f"{options.window / 2:g}", "--device", device]
    flags += ["--allow-illegal-access"] if options.allow_illegal_access else []
    faulty = PlannedClient(
        last.client, "fault", f"faulty job ({options.fault})", f"fault {options.fault}",
        (sys.executable, str(PROJECT_ROOT / FAULT_CLIENT), *flags), environment,
    )  # fmt: skip
    return dataclasses.replace(planned, clients=(*planned.clients[:-1], faulty))


@dataclass
class Blast:
    """A co-run with a fault, and what comes from the fault on.

    `fault_seconds` and `works_seconds`, when a new client had done its first unit, are on
    CLOCK_MONOTONIC, `None` where it did not come to that.
    """

    options: argparse.Namespace
    setup: Setup
    planned: PlannedCoRun
    stop: StopSignal
    rule: UntilOver = field(default_factory=lambda: UntilOver(0.0, tolerates_failures=True))
    given_up: threading.Event = field(default_factory=threading.Event)
    fault_seconds: float | None = None
    works_seconds: float | None = None
    servers_before: str | None = None
    attempts: list[CoRunResult] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the clients' output goes."""
        return self.options.output_dir / "clients"

    def run(self) -> CoRunResult:
        """Run neighbors, fault and newcomers by the suite's launcher; leave no process behind."""
        seen = None
        watching: list[Future[None]] = []

        def before_go(clients: Sequence[Client]) -> None:
            self.setup.mode.observe()
            # Not before there are clients: the first one of a daemon starts its server.
            self.servers_before = mps_servers(self.setup)
            say(f"the fault comes in {self.options.window / 2:g} s")
            watching.append(pool.submit(self._watch, clients[-1]))

        with ThreadPoolExecutor(1) as pool:
            try:
                seen = launch(
                    self.planned, self.folder, self.stop, say, self.rule, timeout=READY_SECONDS,
                    before_go=before_go,
                )  # fmt: skip
            finally:
                # Where all have failed a new client may be yet to come; else there is no more.
                if seen is None or seen.outcome != "failed":
                    self.given_up.set()
        for future in watching:
            future.result()  # raises what the watching raised
        return seen

    def _watch(self, faulty: Client) -> None:
        """Wait for the fault and a new client that works; watch neighbors for half the window."""
        try:
            while not faulty.has_failed:
                if self.given_up.wait(POLL_SECONDS):
                    return
            # When it said that it failed, else now, when it is seen to have ended.
            error = last_event(faulty.events, "error") or {}
            self.fault_seconds = error.get("time_seconds") or time.monotonic()
            watched = self.fault_seconds + self.options.window / 2
            while not self.given_up.is_set():
                self.attempts.append(self._run_newcomer())
                events = self.attempts[-1].clients[0].events
                self.works_seconds = first_unit_end_seconds(events)
                is_late = time.monotonic() - self.fault_seconds > NEWCOMER_SECONDS
                if self.works_seconds is not None or is_late:
                    break
                self.given_up.wait(RETRY_SECONDS)
            self.given_up.wait(max(0.0, watched - time.monotonic()))
        finally:
            self.rule.over.set()

    def _run_newcomer(self) -> CoRunResult:
        """Run a job like the first neighbor's in the faulty one's place, until a unit is done."""
        attempt = len(self.attempts)
        say(f"a new client starts (attempt {attempt + 1})")
        like, place = self.planned.clients[0], self.planned.clients[-1]
        kept = {name: value for name, value in place.environment.items()
                if name != limits.MEMORY_VARIABLE}  # fmt: skip
        newcomer = dataclasses.replace(like, client=place.client + 1, environment=kept)
        alone = dataclasses.replace(self.planned, co_run="newcomer", clients=(newcomer,))
        rule = FinishRule(min_seconds=0.0, window_seconds=0.0, min_units=1)
        return launch(
            alone, self.folder, self.stop, say, rule, timeout=NEWCOMER_SECONDS,
            name=f"newcomer-{attempt}",
        )  # fmt: skip


def judge_neighbor(
    client: ClientResult, start: float, end: float, fault_seconds: float
) -> dict[str, Any]:
    """Return what a fault did to a client; times in seconds, rates in units a second.

    The window from `start` to `end` and the fault are moments on CLOCK_MONOTONIC.

    Rates leave out the first second after go; `rate_after` is that of the time from the fault to
    the end of the window, so a stall lowers it. `longest_gap_ms` is the longest time without a
    finished unit that ends after the fault, `lost_seconds` the work of the job in hand that is
    gone, 0 for one that survived.
    """
    units = [event for event in client.events if event["event"] == "units"]
    ends = sorted(
        start + duration for event in units
        for start, duration in zip(event["start_seconds"], event["duration_seconds"], strict=True)
    )  # fmt: skip
    begin = start + SETTLE_SECONDS
    before = [at for at in ends if begin <= at < fault_seconds]
    after = [at for at in ends if fault_seconds <= at <= end]
    survived = client.status == "ok"
    points = [*before[-1:], *after, *([end] if survived else [])]
    gaps = [later - earlier for earlier, later in itertools.pairwise(points)]
    job_ends = [event["end_seconds"] for event in client.events if event["event"] == "job"]
    last_safe = max(job_ends, default=start)
    died = max(ends, default=start)
    return {
        "client": client.planned.client,
        "label": client.planned.label,
        "survived": survived,
        "status": client.status,
        "reason": client.reason,
        "rate_before": len(before) / (fault_seconds - begin) if fault_seconds > begin else None,
        "rate_after": len(after) / (end - fault_seconds) if end > fault_seconds else None,
        "longest_gap_ms": 1000 * max(gaps) if gaps else None,
        "lost_seconds": 0.0 if survived else max(0.0, died - last_safe),
    }


def describe_newcomer(blast: Blast) -> dict[str, Any]:
    """Return when a new client worked, and how long its own start took."""
    fault, works, last = blast.fault_seconds, blast.works_seconds, blast.attempts[-1:]
    events = [event for attempt in last for event in attempt.clients[0].events]
    loaded = [event["startup_seconds"] for event in events if event["event"] == "loaded"]
    times = {
        "works_after_seconds": None if works is None or fault is None else works - fault,
        "startup_seconds": loaded[0] if loaded else None,
    }
    ends = [attempt.clients[0] for attempt in blast.attempts]
    return {
        "attempts": len(ends),
        "patience_seconds": NEWCOMER_SECONDS,
        "fault_cost_seconds": own_cost_seconds(times),
        **times,
        "failures": [client.reason for client in ends if client.status != "ok"],
    }


def mps_servers(setup: Setup) -> str | None:
    """Return the pids of the daemon's servers as it prints them, `None` without MPS."""
    if not isinstance(setup.mode, MpsMode):
        return None
    answer = ask_mps_control(setup.mode.pipe_directory() or "", "get_server_list")
    return None if answer is None else " ".join(answer.split()) or "none"


def describe_mps(setup: Setup, servers_before: str | None) -> dict[str, Any] | None:
    """Return what the MPS daemon says after the fault, `None` without MPS."""
    if not isinstance(setup.mode, MpsMode):
        return None
    state = read_state(MODE_MPS, str((setup.gpu or {}).get("uuid")), os.environ)
    folder = state.get("log_directory")
    return {
        "servers_before": servers_before,
        "servers_after": mps_servers(setup),
        "server_log": tail_of(Path(folder) / "server.log", SERVER_LOG_LINES) if folder else [],
    }


if __name__ == "__main__":
    sys.exit(main())
