"""The tables of the reports: columns and cells, the same for the page and for Markdown."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.metrics.number_text import duration, significant
from benchmarking.report import wording
from benchmarking.report.wording import (
    UNKNOWN,
    clients_text,
    digits,
    figure_text,
    milliseconds,
    mode_name,
    number,
    spread,
    subject_text,
)

Record = Mapping[str, Any]
Column = Callable[[Record], str]


@dataclass(frozen=True)
class Table:
    """A table; the first `keys` columns say what a row is about, those in `code` are commands."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    code: Sequence[int] = ()


def table_of(
    records: Iterable[Record],
    columns: Mapping[str, Column],
    keys: int = 1,
    code: Sequence[int] = (),
) -> Table:
    """A row a record, a column an entry."""
    return Table(
        list(columns),
        [[cell(record) for cell in columns.values()] for record in records],
        keys,
        code,
    )


def known_only(table: Table) -> tuple[Table, list[str]]:
    """The table without the columns that no row knows, and the names of these."""
    places = range(table.keys, len(table.header))
    empty = [place for place in places if {row[place] for row in table.rows} <= {UNKNOWN}]
    kept = [place for place in range(len(table.header)) if place not in empty]
    rows = [[row[place] for place in kept] for row in table.rows]
    header = [table.header[place] for place in kept]
    return Table(header, rows, table.keys), [table.header[place] for place in empty]


# --- figures of the whole card --------------------------------------------------------------------


def group_name(record: Record) -> str:
    """The mode of a group, a run or a matrix, with its settings."""
    return mode_name(record["mode"], record["settings"])


KEYS: Mapping[str, Column] = {
    "mode": group_name,
    "mix": lambda g: g["mix"],
    "clients": lambda g: str(g["clients"]),
}


def outcome(group: Record) -> str:
    """How the co-runs ended, and whether the mode could not be checked."""
    is_unverified = group["is_unverified"] and group["mode"] != "cpu-demo"
    return group["outcome"] + (", unverified" if is_unverified else "")


def activity(group: Record) -> str:
    """Activity in percent with its source: SM activity, else utilization, else the host CPU."""
    gpu = group["gpu"]
    for field, source in (
        ("sm_activity_percent", "SM"),
        ("utilization_gpu_percent", gpu.get("utilization_source") or ""),
        ("host_cpu_percent", "host CPU"),
    ):
        if gpu.get(field) is not None:
            return f"{gpu[field]:.0f} % {source}".strip()
    return UNKNOWN


def of_gpu(field: str, decimals: int = 0) -> Column:
    """A column of the card's figures."""
    return lambda group: number(group["gpu"].get(field), decimals)


SCORES: Mapping[str, Column] = {
    **KEYS,
    "rounds": lambda g: str(len(g["co_runs"])),
    "outcome": outcome,
    "work delivered (STP)": lambda g: spread(g["stp"]),
    "alone": lambda g: spread(g["stp_alone"]),
    "ANTT": lambda g: spread(g["antt"]),
    "overhead %": lambda g: spread(g["overhead_percent"], 0),
    "fairness": lambda g: spread(g["fairness"]),
    "success %": lambda g: number(g["success_rate_percent"], 0),
    "avg job s": lambda g: number(g["average_duration_seconds"], 1),
    "activity": activity,
}
COSTS: Mapping[str, Column] = {
    **KEYS,
    "interference overhead %": lambda g: spread(g["interference_overhead_percent"], 1),
    "mechanism overhead %": lambda g: spread(g["mechanism_overhead_percent"], 1),
    "total GPU time s": lambda g: number(g["total_gpu_time_seconds"], 1),
    "energy ratio": lambda g: spread(g["energy_ratio"]),
    "J a window": lambda g: digits(g["gpu"].get("energy_joules")),
    "J a second of work": lambda g: spread(g["joules_per_work"], 0),
    "J a job": lambda g: digits(g["joules_per_job"] and g["joules_per_job"]["mean"]),
    "power W": of_gpu("power_draw_watts"),
    "GPU cost of 1,000 s of work": lambda g: digits(g["cost_per_1000_work"]),
    "energy cost of 1,000 s of work": lambda g: digits(g["energy_cost_per_1000_work"]),
}
CARD: Mapping[str, Column] = {
    **KEYS,
    "memory MiB": of_gpu("memory_used_mib_max"),
    "GPU utilization %": of_gpu("utilization_gpu_percent"),
    "SM activity %": of_gpu("sm_activity_percent"),
    "SM occupancy %": of_gpu("sm_occupancy_percent"),
    "tensor activity %": of_gpu("tensor_activity_percent"),
    "DRAM activity %": of_gpu("dram_activity_percent"),
    "SM clock MHz": of_gpu("sm_clock_mhz"),
    "temperature °C": of_gpu("temperature_celsius"),
    "host CPU %": of_gpu("host_cpu_percent"),
    "clocks limited by": lambda g: ", ".join(g["gpu"].get("throttle_reasons") or []) or UNKNOWN,
}


def scorecard(section: Record) -> list[Table]:
    """Every co-run group's figures, in three tables that fit a page."""
    tables = [table_of(section["groups"], columns, keys=3) for columns in (SCORES, COSTS, CARD)]
    return [tables[0], *(known_only(table)[0] for table in tables[1:])]


def unknown_figures(section: Record) -> list[str]:
    """The names of the scorecard's columns that no row knows."""
    return [
        name
        for columns in (COSTS, CARD)
        for name in known_only(table_of(section["groups"], columns, keys=3))[1]
    ]


def conclusions(section: Record) -> Table:
    """Every comparison with its interval: the first table in full."""
    rows = []
    for one in section["conclusions"]:
        about = [f"{one['mix']}, {clients_text(one['clients'])}", subject_text(one), one["figure"]]
        for mode in one["modes"]:
            found = one["pairs"] if mode["variant"] == one["best"] else ()
            against = [pair_text(pair) for pair in found if pair["one"] == one["best"]]
            rows.append(
                [
                    *about,
                    mode_name(mode["mode"], mode["settings"]),
                    figure_text(one, mode["estimate"], with_spread=True)
                    if mode["estimate"]
                    else mode["reason"] or UNKNOWN,
                    (one["verdict"] or "no verdict, an interval only") if mode["is_best"] else "",
                    "; ".join(against),
                ]
            )
    header = ["mix, clients", "subject", "figure", "mode", "value", "verdict on the best",
              "the best against"]  # fmt: skip
    return Table(header, rows, keys=4)


def pair_text(pair: Record) -> str:
    """`time-slicing: +16.9 % [+16.5, +17.3], p 0.001 (Holm)`."""
    percent, low, high = (
        UNKNOWN if pair[part] is None else f"{pair[part]:+.1f}"
        for part in ("percent", "low", "high")
    )
    p_value = pair["adjusted_p_value"]
    p_text = "" if p_value is None else f", p {'< 0.001' if p_value < 0.001 else f'{p_value:.3f}'}"
    return f"{pair['other']}: {percent} % [{low}, {high}]{p_text}, {pair['verdict']}"


# --- figures of jobs ------------------------------------------------------------------------------


def clients(section: Record) -> Table:
    """What every client felt."""
    columns: dict[str, Column] = {
        "mode, mix, clients": lambda r: r["where"],
        "client": lambda r: f"{r['client']}: {r['label']}",
        "status": lambda r: ", ".join(dict.fromkeys(r["statuses"])),
        "proof": lambda r: ", ".join(r["proof"]).replace("_", " "),
        "slowdown": lambda r: spread(r["slowdown"]),
        "job s": lambda r: number(r["job_seconds"], 1),
        "job time, times alone": lambda r: number(r["job_time_ratio"]),
        "latency p50 / p95 / p99": wording.latency,
        "tail slowdown p50 / p95 / p99": wording.tail_slowdowns,
        "within the bound": wording.slo,
        "peak memory MiB (PyTorch)": lambda r: number(r["peak_memory_mib"], 0),
    }
    rows = [
        {**row, "where": f"{group_name(group)}, {group['mix']}, {group['clients']}"}
        for group in section["groups"]
        for row in group["client_rows"]
    ]
    return known_only(table_of(rows, columns, keys=2))[0]


def alone(section: Record) -> Table:
    """Every distinct job alone: what the others are measured against."""
    columns = {
        "job": lambda r: r["label"],
        "job s": lambda r: number(r["job_seconds"], 1),
        "latency p50 / p95 / p99": wording.latency,
        "J a job": lambda r: digits(r["joules_per_job"]),
        "peak memory MiB (PyTorch)": lambda r: number(r["peak_memory_mib"], 0),
    }
    return known_only(table_of(section["alone"], columns))[0]


def service_rows(section: Record) -> list[Record]:
    """The services of a section, alone and together, each with `where` it ran."""
    found = [("alone", row) for row in section["alone"]]
    found += [
        (f"{group_name(group)}, {group['mix']}, {clients_text(group['clients'])}", row)
        for group in section["groups"]
        for row in group["client_rows"]
    ]
    return [{**row, "where": where} for where, row in found if row["service"]]


def services(section: Record) -> Table:
    """What was offered to each service, and what it answered in time."""
    columns: dict[str, Column] = {
        "where": lambda r: r["where"],
        "service": lambda r: f"{r['client']}: {r['label']}",
        "offered /s": lambda r: number(r["service"]["offered_per_second"], 1),
        "mean latency": lambda r: milliseconds(r["latency"] and r["latency"]["mean"]),
        "p99 latency": lambda r: milliseconds(r["latency"] and r["latency"]["p99"]),
        "mean slowdown": lambda r: spread(r["slowdown"]),
        "p99 slowdown": lambda r: number(r["tail_slowdown"]["99"]),
        "goodput /s": lambda r: number(r["service"]["goodput_per_second"], 1),
        "within the bound": wording.slo,
        "answered": lambda r: str(r["service"]["answered"]),
        "missed": lambda r: str(r["service"]["missed"]),
    }
    return table_of(service_rows(section), columns, keys=2)


# --- ramps, pairs, noisy neighbors ----------------------------------------------------------------


def ramps(section: Record) -> Table:
    """Breaking points and saturation of every mode that was measured at several counts."""

    def broken(ramp: Record) -> str:
        point = ramp["breaking_point"]
        if point["clients"] is None:
            return f"not reached by {point['highest_clients_tried']}"
        return f"{point['clients']} ({point['criterion']}: {point['detail']})"

    def bounds(ramp: Record) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in sorted(ramp["bounds"].items()))

    columns: dict[str, Column] = {
        "mode": group_name,
        "mix": lambda r: r["mix"],
        "counts tried": lambda r: ", ".join(map(str, r["clients"])),
        "fits": lambda r: str(r["fits"] or 0),
        "breaking point": broken,
        "bounds asked for": lambda r: bounds(r) or "none",
        "saturation at": lambda r: str(r["saturation_clients"] or "none"),
    }
    return table_of(section["ramps"], columns, keys=2)


def pair_matrix(section: Record) -> Table:
    """Which mode to choose for each pair of jobs."""
    chosen = {frozenset(choice["jobs"]): choice for choice in section["pair_choices"]}
    jobs = list(dict.fromkeys(job for choice in section["pair_choices"] for job in choice["jobs"]))
    names = {mode["variant"]: mode_name(mode["mode"], mode["settings"])
             for choice in section["pair_choices"] for mode in choice["modes"]}  # fmt: skip

    def cell(choice: Record | None) -> str:
        if choice is None or choice["best"] is None:
            return UNKNOWN
        best = names.get(choice["best"], choice["best"])
        marks = {"sure": "", "no difference that matters": "either; ", "cannot tell": "? "}
        return marks.get(choice["verdict"], "") + best

    rows = [[job, *(cell(chosen.get(frozenset((job, other)))) for other in jobs)] for job in jobs]
    return Table(["", *(f"next to {job}" for job in jobs)], rows)


def pairs(section: Record) -> Table:
    """Every pair's figures."""
    columns: dict[str, Column] = {
        "mode": lambda c: c["mode"],
        "job": lambda c: c["job"],
        "next to": lambda c: "itself" if c["beside"] == c["job"] else c["beside"],
        "slowdown": lambda c: spread(c["slowdown"]) if c["outcome"] == "ok" else c["outcome"],
        "p99": lambda c: milliseconds(c["p99_ms"]),
        "p99, times alone": lambda c: number(c["tail_slowdown"]),
        "responses": lambda c: str(c["responses"]) if c["has_latency"] else UNKNOWN,
        "work of both": lambda c: spread(c["stp"]),
        "runs": lambda c: ", ".join(c["run_ids"]) or UNKNOWN,
    }
    cells = [
        {**cell, "mode": group_name(matrix), "has_latency": cell["job"] in matrix["latency_jobs"]}
        for matrix in section["interference"]
        for cell in matrix["cells"]
    ]
    return known_only(table_of(cells, columns, keys=3))[0]


def noisy(section: Record) -> Table:
    """What a neighbor that presses one resource does to each job: job x resource x mode."""
    points = [point for one in section["noisy"] for point in one["points"]]
    variants = list(dict.fromkeys(point["variant"] for point in points))
    rows = []
    for one in section["noisy"]:
        found = {(point["duty"], point["variant"]): point["slowdown"] for point in one["points"]}
        for duty in dict.fromkeys(duty for duty, _ in found):
            cells = [spread(found.get((duty, variant))) for variant in variants]
            rows.append([one["label"], one["kind"], number(duty), *cells])
        even = {limit["variant"]: limit for limit in one["break_even"]}
        if even:
            cells = [
                UNKNOWN if variant not in even
                else even[variant]["reason"] if even[variant]["duty"] is None
                else f"from {number(even[variant]['duty'])} on"
                for variant in variants
            ]  # fmt: skip
            rows.append([one["label"], one["kind"], "a slice is better", *cells])
    return Table(["job", "pressed", "duty", *variants], rows, keys=3)


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
    rows = []
    for name, check in found:
        expected = check["expectation"]
        low, high, unit = expected["low"], expected["high"], expected["unit"]
        value = f"{significant(check['value'])} {unit}"
        rows.append(
            [
                name,
                check["situation"],
                expected.get("name") or expected["quantity"].rpartition("_")[0].replace("_", " "),
                duration(check["value"]) if unit == "ms" else value,
                f"{low:g} {unit}" if low == high else f"{low:g}-{high:g} {unit}",
                check["verdict"],
                f"{expected['experiment']}, {expected['where']}"
                + (f"; {expected['note']}" if expected["note"] else ""),
            ]
        )
    header = ["what", "situation", "quantity", "measured", "guide expects", "verdict",
              "where in the guide"]  # fmt: skip
    return Table(header, rows, keys=3)


# --- environment and evidence ---------------------------------------------------------------------


def environment(section: Record) -> Table:
    """Card, driver, versions, engines."""
    known = section["environment"]
    engines = (
        f"{workload}: {', '.join(str(part or 'unknown') for part in engine)}"
        for workload, engine in sorted(section["engines"].items())
    )
    rows = [[name.replace("_", " "), str(value)] for name, value in known.items()
            if value is not None]  # fmt: skip
    rows += [
        ["versions", ", ".join(f"{n} {v}" for n, v in sorted(section["versions"].items()))],
        ["engine, precision", "; ".join(engines)],
    ]
    return Table(["what", "value"], [[name, value or UNKNOWN] for name, value in rows])


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
