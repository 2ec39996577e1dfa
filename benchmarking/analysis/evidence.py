"""The report's evidence: proof of mode, environment, what was left out or skipped and why."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.analysis import cells
from benchmarking.analysis.comparison import Section
from benchmarking.analysis.document import (
    UNKNOWN,
    Bullets,
    Chapter,
    Item,
    Paragraph,
    Table,
    code,
)
from benchmarking.analysis.runs import CoRun, RunView


def proof(section: Section) -> Chapter | None:
    """What showed, before the runs and for each client, that the mode was in force."""
    if section.is_cpu_demo:
        return None
    chapter = Chapter("Proof of mode", is_folded=True)
    for run in section.compared_runs:
        found = run.manifest.get("mode_evidence") or []
        items = [Item(f"before the run: {_evidence_text(item)}") for item in found]
        items += [_co_run_proof(CoRun(run, record)) for record in run.co_runs()]
        chapter.blocks.append(Paragraph(f"{code(run.run_id)} ({run.mode_name}):"))
        chapter.blocks.append(Bullets(items or [Item("no evidence recorded")]))
    return chapter


def _evidence_text(evidence: Any) -> str:
    if isinstance(evidence, Mapping):
        mark = {True: "ok", False: "NOT ok"}.get(evidence.get("ok"), "unknown")
        return f"{evidence.get('check')}: {evidence.get('found')} ({mark})"
    return str(evidence)


def _co_run_proof(co_run: CoRun) -> Item:
    """How many clients of a co-run were proved, then a line a client with its evidence."""
    verdicts: Counter[str] = Counter()
    lines = []
    for record in co_run.clients:
        found = record.get("proof") or {}
        verdict = found.get("verdict") or "unverified"
        verdicts[verdict] += 1
        evidence = "; ".join(_evidence_text(item) for item in found.get("evidence") or [])
        label = record.get("label") or record["workload"]
        lines.append(
            f"client {record['client']}, {label}, {verdict}: {evidence or 'no evidence recorded'}"
        )
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return Item(f"{code(co_run.name)}: {counts or 'no client record'}", lines)


def doubts(section: Section) -> Chapter:
    """Everything that was skipped, invalid, unverified or merged, and why."""
    chapter = Chapter("Invalid, unverified, failed, left out")
    if not section.doubts and not section.left_out:
        chapter.blocks.append(Paragraph("Nothing."))
    if section.doubts:
        chapter.blocks.append(Bullets.of(section.doubts))
    if section.left_out:
        chapter.blocks += [Paragraph("Runs not compared:"), Bullets.of(section.left_out)]
    return chapter


def environment(section: Section) -> Chapter:
    """Card, driver, versions, host; the runs with their commands; what they noted."""
    chapter = Chapter("Environment", [Table(["what", "value"], _environment_rows(section))])
    runs = [
        [
            code(run.run_id),
            str(run.manifest.get("created_at") or UNKNOWN),
            str(run.manifest.get("outcome") or UNKNOWN),
            str(run.environment.get("gpu_uuid") or "none"),
            code(shlex.join(str(word) for word in run.manifest.get("command") or [])),
        ]
        for run in section.runs
    ]
    chapter.blocks.append(Table(["run", "started (UTC)", "outcome", "GPU", "command"], runs))
    notes: dict[str, list[str]] = {}
    for run in section.runs:
        for note in run.manifest.get("notes") or []:
            notes.setdefault(str(note), []).append(code(run.run_id))
    if notes:
        said = (f"{note} *({', '.join(run_ids)})*" for note, run_ids in notes.items())
        chapter.blocks += [Paragraph("Notes of the runs:"), Bullets.of(said)]
    return chapter


def _environment_rows(section: Section) -> list[list[str]]:
    host = section.runs[0].environment
    versions = ", ".join(f"{n} {v}" for n, v in sorted((host.get("versions") or {}).items()))
    engines = ", ".join(
        f"{workload}: {engine or 'engine unknown'}, {precision or 'precision unknown'}"
        for workload, (engine, precision) in sorted(section.engines.items())
    )
    uuids = {str(run.environment.get("gpu_uuid") or "none") for run in section.runs}
    return [
        ["GPU", str(section.environment.get("gpu_name") or "none")],
        ["GPU UUIDs", ", ".join(sorted(uuids))],
        ["GPU memory", cells.number(host.get("gpu_memory_mib"), 0, "MiB")],
        ["multiprocessors", cells.number(host.get("multiprocessor_count"), 0)],
        ["driver", str(section.environment.get("driver_version") or UNKNOWN)],
        ["CUDA", str(host.get("cuda_version") or UNKNOWN)],
        ["versions", versions or UNKNOWN],
        ["engine, precision", engines or UNKNOWN],
        ["job size", str(section.environment.get("job_size") or UNKNOWN)],
        ["host cores", cells.number(host.get("host_cores"), 0)],
        ["operating system", str(host.get("os") or UNKNOWN)],
        ["commit", ", ".join(sorted({_commit(run) for run in section.runs}))],
    ]


def _commit(run: RunView) -> str:
    dirty = " (dirty tree)" if run.environment.get("git_dirty") else ""
    return f"{run.environment.get('git_commit') or 'unknown'}{dirty}"


def phases(lines: Sequence[Mapping[str, Any]]) -> Chapter | None:
    """What each phase did; the analysis cannot be in the log yet, or is an earlier one's line."""
    if not lines:
        return None
    earlier = [phase for phase in lines if phase.get("name") != "analysis"]
    rows = [
        [
            str(phase.get("phase", UNKNOWN)),
            str(phase.get("name", UNKNOWN)),
            str(phase.get("status", UNKNOWN)),
            str(phase.get("reason") or UNKNOWN),
            cells.number(phase.get("seconds"), 0),
            str(phase.get("run_folder") or UNKNOWN),
        ]
        for phase in earlier
    ]
    numbers = [phase["phase"] for phase in earlier if isinstance(phase.get("phase"), int)]
    last = [str(max(numbers, default=0) + 1), "analysis", "ok", "this report", UNKNOWN, UNKNOWN]
    header = ["phase", "name", "status", "reason", "seconds", "run"]
    return Chapter("Phases", [Table(header, [*rows, last], keys=2)], level=2)


def refusals(lines: Sequence[Mapping[str, Any]]) -> Chapter | None:
    """What was refused before it had a run, and why."""
    if not lines:
        return None
    rows = [
        [
            line["created_at"],
            str(line["exit_code"]),
            line["sentence"],
            code(shlex.join(line["command"])),
        ]
        for line in lines
    ]
    header = ["when (UTC)", "exit code", "why", "command"]
    return Chapter("What was refused, and why", [Table(header, rows)], level=2)
