"""What a person sees of a suite run: the plan first, progress, then the figures."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from benchmarking.cli import drop_output
from benchmarking.metrics.scores import failed_requests, latency_percentile
from benchmarking.records.run_folder import PHASE_CO_RUN, Run
from benchmarking.records.types import ClientRecord, CoRunRecord, GpuFigures
from benchmarking.suite import preflight
from benchmarking.suite.setup import Setup

CPU_DEMO_BANNER = (
    "CPU DEMONSTRATION: no GPU is in use and no sharing mode is in force; "
    "these figures say nothing about GPUs."
)
UNKNOWN = "unknown"
CLIENT_COLUMNS = (
    "client", "workload", "status", "job (s)", "jobs", "slowdown", "p99 (ms)", "cores", "proof",
)  # fmt: skip
WITHOUT_GPU = ("GPU utilization", "SM activity", "GPU memory", "Power", "Energy ratio")


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Print inside the block; the run counts, also where nobody can read it any more."""
    try:
        yield
        sys.stdout.flush()
    except OSError:  # a closed pipe or terminal, a full disk
        drop_output()


def print_plan(setup: Setup, *, verbose: bool = False) -> None:
    """Print what will run with what, on what, the evidence for the mode, and how long it takes."""
    request, gpu = setup.request, setup.gpu
    where = f"{gpu['name']} ({gpu['uuid']})" if gpu else f"CPU, {setup.cores} cores"
    print(f"Plan: mode {request.mode}, mix {request.mix}, job size {setup.job_size}, on {where}")
    if setup.is_cpu_demo:
        print(CPU_DEMO_BANNER)
    for item in setup.evidence:
        mark = {True: "yes", False: "NO", None: "-"}[item.ok]
        print(f"  {mark:<4}{item.check}: {item.found}")
        if item.ok is False and item.fix:
            print(f"      run {item.fix}")
    for note in setup.notes:
        print(f"  note: {note}")
    plan = setup.secrets.hide(setup.plan.to_dict())
    for row in plan["baseline"]:
        print(f"  {row['co_run']}: {row['label']} alone")
        print(f"      {shlex.join(row['command'])}")
    if setup.baseline_run is not None:
        print(f"  baselines are those of run {setup.baseline_run.run_id}")
    for run in plan["co_runs"]:
        labels = ", ".join(f"{client['client']} {client['label']}" for client in run["clients"])
        print(f"  {run['co_run']}: {len(run['clients'])} together: {labels}")
        for client in run["clients"] if verbose else ():
            variables = " ".join(f"{key}={value}" for key, value in client["environment"].items())
            print(f"      {variables} {shlex.join(client['command'])}")
    print(f"  {preflight.estimate(setup)}", flush=True)


def print_summary(run: Run) -> None:
    """Print the figures of every co-run, and of each job alone in one line."""
    for record in run.co_run_records:
        if record.phase != PHASE_CO_RUN:
            print(_line_alone(record, run.clients_of(record.co_run)))
            continue
        title = (
            f"{record.co_run}: {record.mode}, {record.clients} "
            f"client{'s' if record.clients > 1 else ''}, {record.outcome}"
        )
        print(f"\n{title}\n{'-' * len(title)}")
        if record.reason:
            print(f"REASON: {record.reason}")
        members = run.clients_of(record.co_run)
        print_table(CLIENT_COLUMNS, [_client_row(member) for member in members])
        for label, text in _figures(record):
            print(f"  {label:<18}{text}")
        for warning in record.warnings:
            print(f"WARNING: {warning}")
    for warning in run.warnings:
        print(f"WARNING: {warning}")
    if run.manifest.effective_mode == "cpu-demo":
        print(f"\n{CPU_DEMO_BANNER}")


def _line_alone(record: CoRunRecord, members: Sequence[ClientRecord]) -> str:
    """`baseline-bert_training: BERT fine-tuning alone, ok, 1.43 s a job`, and why it is not ok."""
    labels = ", ".join(member.label for member in members)
    seconds = _number(record.summary.average_duration_seconds, ".2f")
    why = f"; REASON: {record.reason}" if record.reason else ""
    return f"{record.co_run}: {labels} alone, {record.outcome}, {seconds} s a job{why}"


def _client_row(record: ClientRecord) -> tuple[str, ...]:
    durations = [job.duration_seconds for job in record.jobs if job.in_window]
    p99_ms = latency_percentile(record.latency_ms, 99, failed_requests(record))
    return (
        str(record.client),
        record.label,
        record.status,
        _number(sum(durations) / len(durations) if durations else None, ".2f"),
        str(len(durations)),
        _number(record.slowdown, ".2f"),
        _number(p99_ms, ".1f", unknown="-"),
        _number(record.window_host_cpu_fraction, ".2f", unknown="-"),
        record.proof.verdict.replace("_", " "),
    )


def _figures(record: CoRunRecord) -> list[tuple[str, str]]:
    summary, gpu = record.summary, record.gpu or GpuFigures()
    counted = summary.throughput_clients
    # Whoever answers at a fixed rate delivers no more on a faster GPU.
    is_part = counted != record.clients
    only = f", throughput clients only: {counted} of {record.clients}" if is_part else ""
    is_cpu_demo = record.mode == "cpu-demo"
    worth = "1 = one job after another" if is_cpu_demo else "GPUs' worth of work delivered"
    lines = [
        ("Success rate", summary.success_rate_percent, ".0f", " %"),
        ("Average duration", summary.average_duration_seconds, ".2f", " s a job"),
        ("Total GPU time", summary.total_gpu_time_seconds, ".2f", " s"),
        ("STP", summary.stp, ".2f", f" ({worth}{only})"),
        ("ANTT", summary.antt, ".2f", " (mean slowdown)"),
        ("Overhead", summary.overhead_percent, "+.1f", " % against one after the other"),
        ("Fairness", summary.fairness, ".3f", " (Jain, 1 = all equally slowed)"),
        ("Energy ratio", summary.energy_ratio, ".2f", " (under 1 = sharing saves)"),
        ("GPU utilization", gpu.utilization_gpu_percent, ".0f",
         f" % ({gpu.utilization_source})"),
        ("SM activity", gpu.sm_activity_percent, ".0f", " %"),
        ("GPU memory", gpu.memory_used_mib_max, ".0f", " MiB at most"),
        ("Power", gpu.power_draw_watts, ".0f", " W"),
        ("Host CPU", gpu.host_cpu_percent, ".0f", " %"),
    ]  # fmt: skip
    hidden = WITHOUT_GPU if is_cpu_demo else ()
    return [
        (label, _number(value, form, unit))
        for label, value, form, unit in lines
        if label not in hidden
    ]


def _number(value: float | None, form: str, unit: str = "", *, unknown: str = UNKNOWN) -> str:
    return unknown if value is None else f"{value:{form}}{unit}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: by rich on a terminal, in plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        # A cell is a text: what looks like markup in a label is part of it.
        Console(markup=False, emoji=False).print(table)
        return
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in (header, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
