"""The tables of what stands behind the figures: guide's ranges, environment, proof, phases."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.metrics.number_text import duration, significant
from benchmarking.report import wording
from benchmarking.report.tables import Column, Table, group_name, table_of
from benchmarking.report.wording import UNKNOWN, number

Record = Mapping[str, Any]

# --- the guide's ranges ---------------------------------------------------------------------------


def guide_ranges(section: Record) -> Table:
    """Modes and jobs alone next to the guide's ranges; then jobs together, for orientation."""
    found = [(group_name(group), check) for group in section["groups"] for check in group["checks"]]
    if section["environment"]["job_size"] == "guide":
        found += [(row["label"], check) for row in section["alone"] for check in row["checks"]]
        found += [
            (f"{row['label']}, {group_name(group)}", check)
            for group in section["groups"]
            for row in group["client_rows"]
            for check in row["checks"]
        ]
    columns: dict[str, Column] = {
        "what": lambda c: c["name"],
        "situation": lambda c: c["situation"],
        "quantity": lambda c: c["expectation"]["name"],
        "measured": measured_text,
        "guide expects": lambda c: range_text(c["expectation"]),
        "verdict": lambda c: c["verdict"],
        "where in the guide": lambda c: "{experiment}, {where}".format(**c["expectation"]),
        "note": lambda c: c["expectation"]["note"] or UNKNOWN,
    }
    return table_of([{"name": name, **check} for name, check in found], columns, keys=3)


def range_text(expected: Record) -> str:
    """The range as the guide writes it: `60-120 s`, or `100 %` for a single value."""
    low, high = expected["low"], expected["high"]
    return f"{f'{low:g}' if low == high else f'{low:g}-{high:g}'} {expected['unit']}"


def measured_text(check: Record) -> str:
    """The measured value to three significant digits, with its unit; from 1000 ms on in s."""
    unit = check["expectation"]["unit"]
    return duration(check["value"]) if unit == "ms" else f"{significant(check['value'])} {unit}"


# --- environment and evidence ---------------------------------------------------------------------


def environment(section: Record) -> Table:
    """Card, driver, versions, engines, host; what the runs have not in common, each once."""
    known = {name: [value] for name, value in section["environment"].items()}
    for run in section["runs"]:
        dirty = " (dirty tree)" if run["environment"]["git_dirty"] else ""
        commit = run["environment"]["git_commit"]
        told = {**run["environment"], "git_dirty": None, "git_commit": commit and commit + dirty}
        for name, value in told.items():
            known.setdefault(name, []).append(value)
    known["versions"] = [f"{name} {version}" for name, version in section["versions"].items()]
    known["engine, precision"] = [
        f"{workload}: {', '.join(str(part or 'unknown') for part in engine)}"
        for workload, engine in sorted(section["engines"].items())
    ]
    rows = [
        [name.replace("_", " "), "; ".join(dict.fromkeys(str(v) for v in values if v is not None))]
        for name, values in known.items()
    ]
    return Table(["what", "value"], [row for row in rows if row[1]])


def runs(section: Record) -> Table:
    """The runs with the commands that made them."""
    columns: dict[str, Column] = {
        "run": lambda r: r["run_id"],
        "started (UTC)": lambda r: r["created_at"] or UNKNOWN,
        "mode": group_name,
        "outcome": lambda r: r["outcome"] or UNKNOWN,
        "GPU": lambda r: r["gpu_uuid"] or "none",
        "command": lambda r: shlex.join(map(str, r["command"] or [])) or UNKNOWN,
    }
    return table_of(section["runs"], columns, code=(0, 5))


def proofs(run: Record) -> Table:
    """What showed, before a run and for each client, that the mode was in force."""
    rows = [["before the run", "", wording.evidence_text(one)] for one in run["mode_evidence"]]
    for co_run in run["co_runs"]:
        counts = Counter(proof["verdict"] or "unverified" for proof in co_run["proofs"])
        rows += [
            [
                co_run["co_run"],
                f"{proof['client']}: {proof['label']}, {proof['verdict'] or 'unverified'}",
                "; ".join(map(wording.evidence_text, proof["evidence"])) or "no evidence recorded",
            ]
            for proof in co_run["proofs"]
        ]
        rows.append([co_run["co_run"], "all", ", ".join(f"{n} {v}" for v, n in counts.items())])
    return Table(["co-run", "client", "evidence"], rows, keys=2)


def phases(logged: Sequence[Record]) -> Table:
    """What each phase did; the analysis cannot be in the log yet, or is an earlier one's line."""
    lines = [line for line in logged if line.get("name") != "analysis"]
    numbers = [line["phase"] for line in lines if isinstance(line.get("phase"), int)]
    lines.append({"phase": max(numbers, default=0) + 1, "name": "analysis", "status": "ok",
                  "reason": "this report"})  # fmt: skip
    columns: dict[str, Column] = {
        name: lambda line, name=name: str(line.get(name) or UNKNOWN)
        for name in ("phase", "name", "status", "reason")
    }
    columns["seconds"] = lambda line: number(line.get("seconds"), 0)
    columns["run"] = lambda line: str(line.get("run_folder") or UNKNOWN)
    return table_of(lines, columns, keys=2)


def refusals(lines: Sequence[Record]) -> Table:
    """What was refused before it had a run, and why."""
    columns: dict[str, Column] = {
        "when (UTC)": lambda line: line["created_at"],
        "exit code": lambda line: str(line["exit_code"]),
        "why": lambda line: line["sentence"],
        "command": lambda line: shlex.join(line["command"]),
    }
    return table_of(lines, columns, code=(3,))
