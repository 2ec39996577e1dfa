#!/usr/bin/env python3
"""Let one client go wrong beside healthy ones, and report who survived.

    python3 benchmarking/blast_radius.py --mode time-slicing --fault oom
    python3 benchmarking/blast_radius.py --mode mps --fault assert --neighbors 3
    python3 benchmarking/blast_radius.py --summary results   # one table of all that was measured

Healthy clients and one faulty client (workloads/custom/fault_client.py) share the GPU under a mode
that must be in force. In the middle the faulty one runs out of memory (its own cap), exits, fails
an assertion in a kernel or, with --allow-illegal-access, writes outside of its memory. Reported are
the neighbors that survived, their rates before and after, the longest pause, the work that was
lost, and when a new client works again. A fault that is refused or does not happen leaves a record
of that, with the reason. It is part of no other program.

Exit codes: 0 measured, 1 the fault could not be seen, 2 usage, 3 no usable GPU, 4 the mode is not
in force, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarking.blast import summary, text
from benchmarking.blast.aftermath import Aftermath, UntilOver, judge_neighbor
from benchmarking.modes.mode_scripts import lock_reason, read_state
from benchmarking.modes.mps import MpsMode, ask_mps_control
from benchmarking.records.run_folder import ClientPaths, utc_now, write_json_atomic
from benchmarking.speed.process_run import Interrupted, Processes, RunFailedError
from benchmarking.suite import limits
from benchmarking.suite.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    OneLineParser,
    SuiteError,
    positive_float,
    positive_int,
)
from benchmarking.suite.launcher import (
    OUTCOME_INTERRUPTED,
    Client,
    CoRunResult,
    FinishRule,
    Launcher,
    StopSignal,
    Timeouts,
    client_base_environment,
    tail_of,
)
from benchmarking.suite.plan import MIXES, MODE_MPS, MODES, PlannedClient, PlannedCoRun
from benchmarking.suite.proofs import judge_clients
from benchmarking.suite.request import Request
from benchmarking.suite.sampler import Sampler
from benchmarking.suite.setup import PROJECT_ROOT, Setup, no_mps_folder, prepare

FAULTS = tuple(text.FAULT_WORDS)
FAULT_CLIENT = "workloads/custom/fault_client.py"
# Under MPS the daemon's own limit stands behind the cap that the client sets itself.
MPS_MEMORY_LIMIT = "8G"
READY_SECONDS = 1800.0
NEWCOMER_SECONDS = 120.0
SERVER_LOG_LINES = 12


def main() -> int:
    """Prepare, let it happen, print and write what was found; return the exit code."""
    options = parse_arguments()
    try:
        if options.summary:
            print(summary.markdown(summary.find_records(options.summary)), end="")
            return EXIT_COMPLETE
        refuse_harm(options)
        found = prepare_and_measure(options)
    except summary.RecordError as error:
        return complain(error, EXIT_USAGE)
    except (SuiteError, RunFailedError) as error:
        note_not_run(options, error)
        return complain(error, getattr(error, "exit_code", EXIT_FAILED))
    except Interrupted:
        print("blast_radius.py: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(write(found, options.output_dir))
    print(f"results: {options.output_dir}")
    return EXIT_COMPLETE


def parse_arguments() -> argparse.Namespace:
    """Return the checked flags; ends the process with code 2 where they make no sense."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=MODES[:3], default=MODES[0], help="(default: %(default)s)")
    add("--fault", choices=FAULTS)
    add("--neighbors", type=positive_int, default=3, metavar="N", help="(default: 3)")
    add("--mix", choices=sorted(MIXES), default="inference",
        help="the neighbors' jobs (default: inference)")  # fmt: skip
    add("--window", type=positive_float, default=10.0, metavar="S",
        help="the fault comes after half of it (default: 10)")  # fmt: skip
    add("--allow-illegal-access", action="store_true",
        help="for --fault illegal-access on a card of your own: under MPS it ends the work of "
        "everybody on the card")  # fmt: skip
    add("--allow-contention", "--beside-others", action="store_true",
        help="measure although other people's processes are on the GPU, and say so")  # fmt: skip
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
    if options.summary:
        return options
    options.output_dir = options.output_dir or free_folder(options)
    if summary.may_be_measured(options.output_dir):
        parser.error(f"--output-dir {options.output_dir} holds a record; name another folder")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {options.output_dir}: {error.strerror}; name another folder")
    return options


def free_folder(options: argparse.Namespace) -> Path:
    """Return a folder for this call: two may come in the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path("results") / f"blast_radius-{options.mode}-{options.fault}-{stamp}"
    numbered = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([base], numbered) if not path.exists())


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


def prepare_and_measure(options: argparse.Namespace) -> dict[str, Any]:
    """Find the GPU, check the mode, and measure; raises what `prepare` and `measure` raise."""
    request = Request(
        mode=options.mode, mix=options.mix, counts=(options.neighbors + 1,), gpu=options.gpu,
        device=options.device, quick=True, allow_contention=options.allow_contention,
    )  # fmt: skip
    with StopSignal().watching() as stop_signal, no_mps_folder() as empty:
        setup = prepare(request, empty, os.environ, require_mode=True)
        return measure(options, setup, stop_signal)


def write(found: Mapping[str, Any], folder: Path) -> str:
    """Write a record and its report into a folder; return the report."""
    write_json_atomic(folder / summary.RECORD_FILE, found)
    report = text.markdown(found)
    (folder / "blast_radius.md").write_text(report, encoding="utf-8")
    return report


def note_not_run(options: argparse.Namespace, error: Exception) -> None:
    """Leave on record why the fault did not happen."""
    record = summary.not_run(options.mode, options.fault, sys.argv, utc_now(), str(error))
    write(record, options.output_dir)


def complain(error: Exception, code: int) -> int:
    """Print an error in a sentence and return its exit code."""
    print(f"blast_radius.py: error: {error}", file=sys.stderr)
    return code


def measure(options: argparse.Namespace, setup: Setup, stop_signal: StopSignal) -> dict[str, Any]:
    """Run the co-run and its newcomers; return what was found as plain data.

    Raises:
        RunFailedError: The clients did not get ready, or there was no fault to see.
        Interrupted: Somebody asked to end; no process is left.
    """
    planned = with_fault(options, setup, resolved(setup, Processes(stop_signal, READY_SECONDS)))
    say(f"{options.neighbors} neighbors and a faulty client get ready under {setup.mode.name}")
    with Sampler(
        options.output_dir / "gpu_samples.jsonl", options.output_dir / "gpu_monitor.log",
        gpu=setup.gpu["uuid"] if setup.gpu else None,
    ) as sampler:  # fmt: skip
        servers_before = mps_servers(setup)
        seen, aftermath = run_clients(options, setup, planned, stop_signal)
        if seen.outcome == OUTCOME_INTERRUPTED or stop_signal.requested:
            raise Interrupted
        if aftermath is None or aftermath.fault_seconds is None:
            raise RunFailedError(f"there was no fault to see: {seen.reason}")
        samples = list(sampler.samples_past(seen.window_end_seconds))
    proofs = judge_clients(setup.mode, seen, samples)
    return {
        "schema_version": summary.SCHEMA_VERSION,
        "created_at": utc_now(),
        "command": sys.argv,
        "mode": setup.mode.name,
        "fault": options.fault,
        "not_run": None,
        "notes": list(setup.notes),
        "gpu": setup.gpu and dict(setup.gpu),
        "fault_after_seconds": aftermath.fault_seconds - seen.window_start_seconds,
        "neighbors": [
            {
                **dataclasses.asdict(judge_neighbor(seen, number, aftermath.fault_seconds)),
                "proof": proofs[number].verdict if proofs[number] else None,
            }
            for number in range(options.neighbors)
        ],
        "faulty": {
            key: getattr(seen.clients[-1], key)
            for key in ("status", "reason", "exit_code", "stderr_tail")
        },
        "newcomer": describe_newcomer(aftermath, options),
        "mps": describe_mps(setup, servers_before),
    }


def resolved(setup: Setup, processes: Processes) -> PlannedCoRun:
    """Return the co-run with its data and weights found once."""
    plan = setup.plan
    for job_key, client in plan.jobs().items():
        say(f"resolving data and weights: {client.label}")
        answer = processes.run_for_json(
            client.command[1], [*client.command[2:], "--resolve"], client.environment
        )
        plan = plan.map_clients(
            lambda other, key=job_key, found=answer["arguments"]: (
                other.with_arguments(found) if other.job_key == key else other
            )
        )
    return plan.co_runs[0]


def with_fault(options: argparse.Namespace, setup: Setup, planned: PlannedCoRun) -> PlannedCoRun:
    """Put the faulty client in the place of the last one."""
    last = planned.clients[-1]
    environment = dict(last.environment)
    if setup.mode.name == MODE_MPS and options.fault == "oom":
        environment |= limits.variables(memory_limit=MPS_MEMORY_LIMIT)
    device = "cuda" if setup.gpu else "cpu"
    flags = ["--fault", options.fault, "--after", f"{options.window / 2:g}", "--device", device]
    flags += ["--allow-illegal-access"] if options.allow_illegal_access else []
    command = (sys.executable, str(PROJECT_ROOT / FAULT_CLIENT), *flags)
    faulty = PlannedClient(
        last.client, "fault", f"faulty job ({options.fault})", f"fault {options.fault}", command,
        environment,
    )  # fmt: skip
    return dataclasses.replace(planned, clients=(*planned.clients[:-1], faulty))


def run_clients(
    options: argparse.Namespace, setup: Setup, planned: PlannedCoRun, stop_signal: StopSignal
) -> tuple[CoRunResult, Aftermath | None]:
    """Run neighbors, fault and newcomers by the suite's launcher; leave no process behind."""
    rule = UntilOver(min_seconds=0.0)
    aftermath: Aftermath | None = None
    launcher = Launcher(
        client_base_environment(os.environ), timeouts=Timeouts(timeout=READY_SECONDS),
        stop_signal=stop_signal, say=say,
    )  # fmt: skip

    def before_go(clients: Sequence[Client]) -> None:
        nonlocal aftermath
        setup.mode.observe()
        say(f"the fault comes in {options.window / 2:g} s")
        aftermath = Aftermath(
            clients[-1], lambda attempt: run_newcomer(options, planned, stop_signal, attempt),
            over=rule.over, watch_seconds=options.window / 2, patience_seconds=NEWCOMER_SECONDS,
        )  # fmt: skip
        aftermath.start()

    seen = launcher.run(
        planned, lambda _, client: client_paths(options.output_dir, str(client)), rule, before_go
    )
    if aftermath is not None:
        if seen.outcome == OUTCOME_INTERRUPTED:
            aftermath.give_up()
        aftermath.join()
    return seen, aftermath


def run_newcomer(
    options: argparse.Namespace, planned: PlannedCoRun, stop_signal: StopSignal, attempt: int
) -> CoRunResult:
    """Run a job like the first neighbor's in the faulty one's place, until a unit is done."""
    say(f"a new client starts (attempt {attempt + 1})")
    like, place = planned.clients[0], planned.clients[-1]
    kept = {name: value for name, value in place.environment.items()
            if name != limits.MEMORY_VARIABLE}  # fmt: skip
    newcomer = dataclasses.replace(like, client=place.client + 1, environment=kept)
    launcher = Launcher(
        client_base_environment(os.environ), timeouts=Timeouts(timeout=NEWCOMER_SECONDS),
        stop_signal=stop_signal, say=say,
    )  # fmt: skip
    return launcher.run(
        dataclasses.replace(planned, co_run="newcomer", clients=(newcomer,)),
        lambda _, client: client_paths(options.output_dir, f"newcomer-{attempt}"),
        FinishRule(min_seconds=0.0, window_seconds=0.0, min_units=1),
    )


def client_paths(folder: Path, name: str) -> ClientPaths:
    """Return where a client's output goes."""
    (folder / "clients").mkdir(exist_ok=True)
    kinds = ("events.jsonl", "stdout.log", "stderr.log")
    paths = ClientPaths(*(folder / "clients" / f"{name}.{kind}" for kind in kinds))
    paths.events.unlink(missing_ok=True)  # of an earlier call into the same folder
    return paths


def describe_newcomer(aftermath: Aftermath, options: argparse.Namespace) -> dict[str, Any]:
    """Return when a new client worked, and how long its own start took."""
    last = aftermath.attempts[-1] if aftermath.attempts else None
    works, fault = aftermath.works_seconds, aftermath.fault_seconds
    loaded = [event for event in (last.clients[0].events if last else ())
              if event["event"] == "loaded"]  # fmt: skip
    times = {
        "works_after_seconds": None if works is None else works - fault,
        "startup_seconds": loaded[0]["startup_seconds"] if loaded else None,
    }
    return {
        "attempts": len(aftermath.attempts),
        "patience_seconds": NEWCOMER_SECONDS,
        "fault_cost_seconds": text.own_cost_seconds(times),
        **times,
        "failures": [seen.clients[0].reason for seen in aftermath.attempts
                     if seen.clients[0].status != "ok"],
    }  # fmt: skip


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
    folder = state.get("log_directory", "")
    log = tail_of(Path(folder) / "server.log", SERVER_LOG_LINES) if folder else []
    return {
        "servers_before": servers_before, "servers_after": mps_servers(setup), "server_log": log,
    }  # fmt: skip


def say(line: str) -> None:
    """Print one line of progress."""
    print(f"[blast] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
