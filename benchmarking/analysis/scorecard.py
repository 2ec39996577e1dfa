"""The report's tables of figures: scorecard, clients, each job alone, how many clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarking.analysis import cells
from benchmarking.analysis.comparison import Section
from benchmarking.analysis.document import UNKNOWN, Bullets, Chapter, Paragraph, Table
from benchmarking.analysis.groups import Group
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL

_KEYS = ("mode", "mix", "clients")

_COSTS: dict[str, Callable[[Group], str]] = {
    "interference overhead %": lambda g: cells.spread(g.interference_overhead_percent, 1),
    "mechanism overhead %": lambda g: _mechanism(g),
    "total GPU time s": lambda g: cells.number(g.total_gpu_time_seconds, 1),
    "energy ratio": lambda g: cells.spread(g.energy_ratio),
    "J a window": lambda g: cells.joules(g.gpu["energy_joules"]),
    "J a job": lambda g: cells.joules(g.joules_per_job.mean if g.joules_per_job else None),
    "power W": lambda g: cells.number(g.gpu["power_draw_watts"], 0),
}
_CARD: dict[str, Callable[[Group], str]] = {
    "memory MiB": lambda g: cells.number(g.gpu["memory_used_mib_max"], 0),
    "GPU utilization %": lambda g: cells.number(g.gpu["utilization_gpu_percent"], 0),
    "SM activity %": lambda g: cells.number(g.gpu["sm_activity_percent"], 0),
    "SM occupancy %": lambda g: cells.number(g.gpu["sm_occupancy_percent"], 0),
    "tensor activity %": lambda g: cells.number(g.gpu["tensor_activity_percent"], 0),
    "DRAM activity %": lambda g: cells.number(g.gpu["dram_activity_percent"], 0),
    "SM clock MHz": lambda g: cells.number(g.gpu["sm_clock_mhz"], 0),
    "host CPU %": lambda g: cells.number(g.gpu["host_cpu_percent"], 0),
}


def scorecard(section: Section) -> Chapter | None:
    """Every co-run group's figures, in three tables that fit a page; `None` for pairs alone."""
    if not section.groups and section.matrices:
        return None
    if not section.groups:
        return Chapter("Scorecard", [Paragraph("No co-run gave an answer.")])
    chapter = Chapter(
        "Scorecard",
        [
            Paragraph(
                "In brackets: the 95 % interval of three or more repeats, the range of two; of "
                "fairness the range, beside its median."
            ),
            Table(cells.SCORE_HEADER, cells.score_rows(section.groups), keys=len(_KEYS)),
        ],
    )
    in_part = [group for group in section.groups if group.counts_in_part]
    if in_part:
        chapter.blocks.append(
            Bullets.of(
                f"{group.mode_name}, {group.subject}: STP, ANTT, overhead, fairness and durations "
                f"are of the throughput clients only: {group.throughput_clients}"
                for group in in_part
            )
        )
    unknown: list[str] = []
    for columns in (_COSTS, _CARD):
        table, left_out = _columns(section.groups, columns)
        chapter.blocks.append(table)
        unknown += left_out
    if unknown:
        chapter.blocks.append(Paragraph(f"Unknown in every row: {', '.join(unknown)}."))
    slices = [group for group in section.groups if group.stp_per_multiprocessor is not None]
    if slices:
        chapter.blocks.append(
            Bullets.of(
                f"{group.subject}: MIG instances have fewer multiprocessors in sum than the whole "
                "card; STP per multiprocessor used, scaled to the card: "
                f"{group.stp_per_multiprocessor:.2f} (raw {group.stp.mean:.2f})"
                for group in slices
            )
        )
    return chapter


def _mechanism(group: Group) -> str:
    """What the mode costs with nobody to share with; on a part of the card that is not all."""
    found = cells.spread(group.mechanism_overhead_percent, 1)
    return f"{found} (on {group.share_text})" if group.share_text and found != UNKNOWN else found


def _columns(
    groups: Sequence[Group], columns: dict[str, Callable[[Group], str]]
) -> tuple[Table, list[str]]:
    """The table of the columns that some row knows, and the names of the others."""
    values = {name: [cell(group) for group in groups] for name, cell in columns.items()}
    known = {name: found for name, found in values.items() if set(found) != {UNKNOWN}}
    rows = [
        [group.mode_name, group.mix, str(group.clients), *(found[row] for found in known.values())]
        for row, group in enumerate(groups)
    ]
    return Table([*_KEYS, *known], rows, keys=len(_KEYS)), [n for n in values if n not in known]


def alone(section: Section) -> Chapter | None:
    """Every distinct job alone: what the others are measured against."""
    if not section.alone:
        return None
    rows = [
        [
            row.label,
            cells.number(row.job_seconds, 1),
            cells.latency(row),
            cells.joules(row.joules_per_job),
            cells.number(row.peak_memory_mib, 0),
        ]
        for row in section.alone
    ]
    header = ["job", "job s", "latency p50 / p95 / p99", "J a job", "peak memory MiB (PyTorch)"]
    return Chapter("Each job alone (the baseline)", [Table(header, rows)])


def clients(section: Section) -> Chapter | None:
    """What every client felt."""
    rows = [
        [
            f"{group.mode_name}, {group.mix}, {group.clients}",
            f"{row.client}: {row.label}",
            ", ".join(dict.fromkeys(row.statuses)),
            ", ".join(row.proof).replace("_", " "),
            cells.spread(row.slowdown),
            cells.number(row.job_seconds, 1),
            cells.latency(row),
            cells.tail_slowdowns(row),
            cells.slo(row),
            cells.number(row.peak_memory_mib, 0),
        ]
        for group in section.groups
        for row in group.client_rows
    ]
    if not rows:
        return None
    has_bound = any(row.slo for group in section.groups for row in group.client_rows)
    header = [
        "mode, mix, clients", "client", "status", "proof", "slowdown", "job s",
        "latency p50 / p95 / p99", "tail slowdown p50 / p95 / p99", "within the bound",
        "peak memory MiB (PyTorch)",
    ]  # fmt: skip
    if not has_bound:
        column = header.index("within the bound")
        for cells_of_line in (header, *rows):
            del cells_of_line[column]
    return Chapter(
        "Clients",
        [
            Paragraph(
                "Slowdown and job time in the window in which everyone runs; latency percentiles "
                "from the raw values of all repeats, p95 and p99 of "
                f"{FEWEST_FOR_A_TAIL} or more; tail slowdown is the same percentile over the one "
                "alone."
            ),
            Table(header, rows, keys=2),
        ],
    )


def limits(section: Section) -> Chapter | None:
    """Breaking points and saturation of every mode that was measured at several counts."""
    if not section.ramps:
        return None
    rows = []
    for ramp in section.ramps:
        point = ramp.breaking_point
        broken, last_good = point["clients"] is not None, point["last_good_clients"]
        bounds = ", ".join(f"{name} {value:g}" for name, value in sorted(ramp.bounds.items()))
        rows.append(
            [
                ramp.mode_name,
                ramp.mix,
                ", ".join(str(group.clients) for group in ramp.groups),
                str(point["clients"])
                if broken
                else f"not reached by {point['highest_clients_tried']}",
                f"{point['criterion']}: {point['detail']}" if broken else UNKNOWN,
                bounds or "none",
                UNKNOWN if last_good is None else str(last_good),
                "none" if ramp.saturation_clients is None else str(ramp.saturation_clients),
            ]
        )
    return Chapter(
        "How many clients",
        [
            Paragraph(
                "The breaking point is the first count at which a client failed, or a bound that "
                "was asked for was passed. Saturation (STP under 95 % of the best so far) is "
                "another thing: everyone still runs, but more clients gain nothing."
            ),
            Table(
                ["mode", "mix", "counts tried", "breaking point", "criterion", "bounds asked for",
                 "last good count", "saturation at"],
                rows, keys=2,
            ),
        ],
    )  # fmt: skip
