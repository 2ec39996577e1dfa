"""What a person sees of a suite run: the plan first, progress, then the figures."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL, percentile
from benchmarking.records.run_folder import PHASE_CO_RUN, Run
from benchmarking.suite.setup import Setup

CPU_DEMO_BANNER = (
    "CPU DEMONSTRATION: no GPU is in use and no sharing mode is in force; "
    "these figures say nothing about GPUs."
)
UNKNOWN = "unknown"
CLIENT_COLUMNS = (
    "client", "workload", "status", "job (s)", "jobs", "slowdown", "p99 (ms)", "cores", "proof",
)  # fmt: skip


class Teller:
    """Prints progress on standard error, with the time since the start."""

    def __init__(self) -> None:
        """Start the clock."""
        self._start_seconds = time.monotonic()

    def say(self, text: str) -> None:
        """Print one line; a run goes on where nobody can read it any more."""
        elapsed = time.monotonic() - self._start_seconds
        with contextlib.suppress(OSError):
            print(f"[{elapsed:7.1f} s] {text}", file=sys.stderr, flush=True)


def print_plan(setup: Setup, *, verbose: bool = False) -> None:
    """Print what will run beside what, on what, and the evidence for the mode."""
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
    for run in setup.plan.baseline:
        print(f"  {run.co_run}: {run.clients[0].label} alone")
        print(f"      {run.command_line_of(run.clients[0])}")
    if setup.baseline_run is not None:
        print(f"  baselines are those of run {setup.baseline_run.run_id}")
    for run in setup.plan.co_runs:
        labels = ", ".join(f"{client.client} {client.label}" for client in run.clients)
        print(f"  {run.co_run}: {len(run.clients)} together: {labels}")
        if verbose:
            for client in run.clients:
                variables = " ".join(f"{key}={value}" for key, value in client.environment.items())
                print(f"      {variables} {run.command_line_of(client)}")
    sys.stdout.flush()


def print_summary(run: Run) -> None:
    """Print the figures of every co-run (of the baselines where there is nothing else)."""
    records = msgspec.to_builtins(run.co_run_records)
    for record in [one for one in records if one["phase"] == PHASE_CO_RUN] or records:
        title = (
            f"{record['co_run']}: {record['mode']}, {record['clients']} "
            f"client{'s' if record['clients'] > 1 else ''}, {record['outcome']}"
        )
        print(f"\n{title}\n{'-' * len(title)}")
        if record["reason"]:
            print(f"REASON: {record['reason']}")
        members = msgspec.to_builtins(run.clients_of(record["co_run"]))
        print_table(
            CLIENT_COLUMNS,
            [_client_row(member) for member in members],
        )
        for label, text in _figures(record):
            print(f"  {label:<18}{text}")
        for warning in record.get("warnings") or []:
            print(f"WARNING: {warning}")
    for warning in run.warnings:
        print(f"WARNING: {warning}")
    if run.manifest.effective_mode == "cpu-demo":
        print(f"\n{CPU_DEMO_BANNER}")


def _client_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    durations = [job["duration_seconds"] for job in record["jobs"] if job["in_window"]]
    latencies = record["latency_ms"] or []
    p99_ms = percentile(latencies, 99) if len(latencies) >= FEWEST_FOR_A_TAIL else None
    return (
        str(record["client"]),
        record["label"],
        record["status"],
        _number(sum(durations) / len(durations) if durations else None, ".2f"),
        str(len(durations)),
        _number(record["slowdown"], ".2f"),
        _number(p99_ms, ".1f", unknown="-"),
        _number(record.get("window_host_cpu_fraction"), ".2f", unknown="-"),
        record["proof"]["verdict"].replace("_", " "),
    )


def _figures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    summary, gpu = record["summary"], record["gpu"] or {}
    source = gpu.get("utilization_source")
    counted = summary.get("throughput_clients")
    # Whoever answers at a fixed rate delivers no more on a faster GPU.
    is_part = counted not in (None, record["clients"])
    only = f", throughput clients only: {counted} of {record['clients']}" if is_part else ""
    lines = [
        ("Success rate", _number(summary["success_rate_percent"], ".0f", " %")),
        ("Average duration", _number(summary["average_duration_seconds"], ".2f", " s a job")),
        ("Total GPU time", _number(summary["total_gpu_time_seconds"], ".2f", " s")),
        ("STP", _number(summary["stp"], ".2f", f" (GPUs' worth of work{only})")),
        ("ANTT", _number(summary["antt"], ".2f", " (mean slowdown)")),
        ("Overhead", _number(summary["overhead_percent"], "+.1f",
                             " % against one after the other")),
        ("Fairness", _number(summary["fairness"], ".3f", " (Jain, 1 = all equally slowed)")),
        ("Energy ratio", _number(summary["energy_ratio"], ".2f", " (under 1 = sharing saves)")),
        ("GPU utilization", _number(gpu.get("utilization_gpu_percent"), ".0f",
                                    f" % ({source})")),
        ("SM activity", _number(gpu.get("sm_activity_percent"), ".0f", " %")),
        ("GPU memory", _number(gpu.get("memory_used_mib_max"), ".0f", " MiB at most")),
        ("Power", _number(gpu.get("power_draw_watts"), ".0f", " W")),
        ("Host CPU", _number(gpu.get("host_cpu_percent"), ".0f", " %")),
    ]  # fmt: skip
    if record["mode"] == "cpu-demo":
        without_gpu = ("GPU utilization", "SM activity", "GPU memory", "Power", "Energy ratio")
        return [line for line in lines if line[0] not in without_gpu]
    return lines


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
        Console().print(table)
        return
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in (header, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
