"""The tables of the reports: columns and cells, the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """The names of the scorecard's columns that no row knows; costs are known where asked for."""
    made = (table_of(section["groups"], columns, keys=3) for columns in (COSTS, CARD))
    return [name for table in made for name in known_only(table)[1] if "cost of" not in name]


ABOUT: Mapping[str, Column] = {
    "mix, clients": lambda one: f"{one['mix']}, {clients_text(one['clients'])}",
    "subject": subject_text,
    "figure": wording.figure_name,
}


def conclusions(section: Record) -> Table:
    """Every figure that is compared, with its interval under each mode."""
    columns: dict[str, Column] = {
        **ABOUT,
        "mode": lambda one: group_name(one["of"]),
        "value": lambda one: one["of"]["reason"] or figure_text(one, one["of"]["estimate"], True),
        "verdict on the best": lambda one: (
            (one["verdict"] or "an interval only") if one["of"]["is_best"] else ""
        ),
    }
    rows = [{**one, "of": mode} for one in section["conclusions"] for mode in one["modes"]]
    return table_of(rows, columns, keys=4)


def differences(section: Record) -> Table:
    """Every two modes of every figure with a verdict; `alone` is one job after another."""
    columns: dict[str, Column] = {
        **ABOUT,
        "mode": lambda one: one["names"].get(one["of"]["one"], one["of"]["one"]),
        "against": lambda one: one["names"].get(one["of"]["other"], one["of"]["other"]),
        "difference %": lambda one: interval_text(one["of"]),
        "p (Holm)": lambda one: p_text(one["of"]["adjusted_p_value"]),
        "verdict": lambda one: one["of"]["verdict"],
        "would have shown from % on": lambda one: number(one["of"]["smallest_shown_percent"], 1),
    }
    rows = [
        {**one, "of": pair, "names": {mode["variant"]: group_name(mode) for mode in one["modes"]}}
        for one in section["conclusions"]
        for pair in one["pairs"]
        if one["figure"] == "work" or "alone" not in (pair["one"], pair["other"])
    ]
    return table_of(rows, columns, keys=5)


def p_text(value: float | None) -> str:
    """A probability to three decimals."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def interval_text(pair: Record) -> str:
    """`16.9 [16.5, 17.3]`."""
    percent, low, high = (number(pair[part], 1) for part in ("percent", "low", "high"))
    return percent if pair["low"] is None else f"{percent} [{low}, {high}]"


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

    columns: dict[str, Column] = {
        "mode": group_name,
        "mix": lambda r: r["mix"],
        "counts tried": lambda r: ", ".join(map(str, r["clients"])),
        "fits": lambda r: str(r["fits"] or 0),
        "breaking point": broken,
        "bounds asked for": lambda r: (
            ", ".join(f"{k} {v:g}" for k, v in r["bounds"].items()) or "none"
        ),
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
    return Table(["job, next to:", *jobs], rows)


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
