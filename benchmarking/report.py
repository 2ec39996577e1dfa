"""The Markdown report, the flat table and the JSON of a comparison. Text only; writes no file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarking import comparison, figures
from benchmarking.comparison import Comparison, Group, Section
from benchmarking.estimates import Estimate
from benchmarking.number_text import duration, durations, significant

UNKNOWN = "–"

CPU_DEMO_NOTICE = (
    "**CPU demonstration: no GPU was used. These figures say nothing about GPU sharing modes "
    "(time slicing, MPS, MIG); they show only that the whole flow works.**"
)

# The flat table: column, and how it is found in a group.
_FLAT_FIGURES = (
    "interference_overhead_percent",
    "mechanism_overhead_percent",
    "stp_per_multiprocessor",
    "fairness",
    "energy_ratio",
    "success_rate_percent",
    "average_duration_seconds",
    "total_gpu_time_seconds",
    "throughput_clients",
)
_FLAT_ESTIMATES = ("stp", "antt", "overhead_percent")


# --- small parts ----------------------------------------------------------------------------


def number(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """A number for a table cell, an en dash when it is unknown."""
    if value is None:
        return UNKNOWN
    rounded = round(value, decimals) + 0.0  # no "-0"
    return f"{rounded:.{decimals}f}{' ' + unit if unit else ''}"


def spread(found: Estimate | None, decimals: int = 2) -> str:
    """An estimate for a table cell: `1.95 [1.90, 2.00]`, or the value alone from one repeat."""
    if found is None:
        return UNKNOWN
    if found.repeats < 2:
        return number(found.mean, decimals)
    mean, low, high = (number(value, decimals) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line breaks inside cells are made harmless."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bullets(items: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, columns aligned by spaces."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def _outcome(group: Group) -> str:
    if group.outcome == "ok":
        return "ok, unverified" if group.is_unverified and group.mode != "cpu-demo" else "ok"
    return group.outcome


def activity_text(group: Group) -> str:
    """Activity in percent with its source: SM activity, else utilization, else the host CPU."""
    gpu = group.gpu
    if gpu["sm_activity_percent"] is not None:
        return f"{gpu['sm_activity_percent']:.0f} % SM"
    if gpu["utilization_gpu_percent"] is not None:
        return f"{gpu['utilization_gpu_percent']:.0f} % {gpu['utilization_source'] or ''}".strip()
    if gpu["host_cpu_percent"] is not None:
        return f"{gpu['host_cpu_percent']:.0f} % host CPU"
    return UNKNOWN


# --- the terminal ---------------------------------------------------------------------------

SCORE_HEADER = (
    "mode", "mix", "clients", "repeats", "outcome", "STP", "ANTT", "overhead %", "fairness",
    "success %", "avg job s", "activity",
)  # fmt: skip


def score_rows(section: Section) -> list[list[str]]:
    """The scorecard's main columns, a row for each mode, mix and count of clients."""
    return [
        [
            group.mode_name,
            group.mix,
            str(group.clients),
            str(len(group.co_runs)),
            _outcome(group),
            spread(group.stp),
            spread(group.antt),
            spread(group.overhead_percent, 0),
            number(group.fairness),
            number(group.success_rate_percent, 0),
            number(group.average_duration_seconds, 1),
            activity_text(group),
        ]
        for group in section.groups
    ]


def terminal_text(compared: Comparison) -> str:
    """The table and the decision, for the terminal."""
    parts = []
    for section in compared.sections:
        parts.append(section.title)
        if section.is_cpu_demo:
            parts.append(CPU_DEMO_NOTICE.strip("*"))
        if section.groups:
            parts.append(plain_table(SCORE_HEADER, score_rows(section)))
        parts.append("Decision:")
        parts += [f"  * {claim.text.replace('`', '')}" for claim in _claims_or_none(section)]
        parts.append("")
    return "\n".join(parts)


def _claims_or_none(section: Section) -> list[comparison.Claim]:
    if section.claims:
        return section.claims
    ids = tuple(run.run_id for run in section.runs)
    return [comparison.Claim("No co-run here supports a statement about modes.", ids)]


# --- the report -----------------------------------------------------------------------------


def markdown(compared: Comparison, charts: Sequence[Sequence[figures.Chart]]) -> str:
    """The whole report; `charts` holds each section's charts, in the order of the sections."""
    several = len(compared.sections) > 1
    parts = ["# GPU sharing: what was found", "## Decision"]
    if several:
        parts.append(
            f"The runs come from {len(compared.sections)} unlike environments (GPU, driver, "
            "versions, engine, precision or job size differ). They stand in separate sections "
            "and are not compared with each other."
        )
    for number_, section in enumerate(compared.sections, start=1):
        if several:
            parts.append(f"### {number_}. {section.title}")
        parts += _decision(section)
    for number_, (section, drawn) in enumerate(zip(compared.sections, charts, strict=True), 1):
        heading = f"{number_}. {section.title}" if several else section.title
        parts.append(f"## {heading}")
        if section.is_cpu_demo:
            parts.append(CPU_DEMO_NOTICE)
        parts += _scorecard(section)
        parts += _charts(drawn)
        parts += _alone(section)
        parts += _clients(section)
        parts += _expected(section)
        parts += _proof(section)
        parts += _limits(section)
        parts += _doubts(section)
        parts += _environment(section)
    parts += _phases(compared.phases)
    if compared.problems:
        parts += ["## Problems while reading", bullets(compared.problems)]
    parts += _how_to_read()
    return "\n\n".join(parts) + "\n"


def _decision(section: Section) -> list[str]:
    notice = [CPU_DEMO_NOTICE] if section.is_cpu_demo else []
    sentences = [
        f"{claim.text} *(run{'s' if len(claim.run_ids) > 1 else ''} "
        f"{', '.join(f'`{run_id}`' for run_id in claim.run_ids)})*"
        for claim in _claims_or_none(section)
    ]
    return [*notice, bullets(sentences)]


def _scorecard(section: Section) -> list[str]:
    if not section.groups:
        return ["### Scorecard", "No co-run gave an answer."]
    more = [
        [
            group.mode_name,
            group.mix,
            str(group.clients),
            number(group.interference_overhead_percent, 1),
            number(group.mechanism_overhead_percent, 1),
            number(group.total_gpu_time_seconds, 1),
            number(group.energy_ratio),
            number(group.gpu["power_draw_watts"], 0),
            number(group.gpu["memory_used_mib_max"], 0),
            number(group.gpu["utilization_gpu_percent"], 0),
            number(group.gpu["sm_activity_percent"], 0),
            number(group.gpu["dram_activity_percent"], 0),
            number(group.gpu["host_cpu_percent"], 0),
        ]
        for group in section.groups
    ]
    parts = [
        "### Scorecard",
        "In brackets: the 95 % interval of three or more repeats, the range of two.",
        table(SCORE_HEADER, score_rows(section)),
        table(
            ["mode", "mix", "clients", "interference overhead %", "mechanism overhead %",
             "total GPU time s", "energy ratio", "power W", "memory MiB", "GPU utilization %",
             "SM activity %", "DRAM activity %", "host CPU %"],
            more,
        ),
    ]  # fmt: skip
    slices = [group for group in section.groups if group.stp_per_multiprocessor is not None]
    if slices:
        parts.append(
            bullets(
                f"{group.subject}: MIG instances have fewer multiprocessors "
                f"in sum than the whole card; STP per multiprocessor used, scaled to the card: "
                f"{group.stp_per_multiprocessor:.2f} (raw {group.stp.mean:.2f})"
                for group in slices
            )
        )
    return parts


def _charts(drawn: Sequence[figures.Chart]) -> list[str]:
    if not drawn:
        return []
    return [
        "### Charts",
        *(
            f"**{chart.message}**\n\n![{chart.description}]({chart.path.name})"
            for chart in drawn
        ),
    ]  # fmt: skip


def _latency_text(row: comparison.ClientRow) -> str:
    if row.latency is None:
        return UNKNOWN
    return durations([row.latency[f"p{percent}"] for percent in (50, 95, 99)])


def _alone(section: Section) -> list[str]:
    """Every distinct job alone: what the others are measured against."""
    if not section.alone:
        return []
    rows = [
        [row.label, number(row.job_seconds, 1), _latency_text(row),
         number(row.peak_memory_mib, 0)]
        for row in section.alone
    ]  # fmt: skip
    return [
        "### Each job alone (the baseline)",
        table(["job", "job s", "latency p50 / p95 / p99", "peak memory MiB (PyTorch)"], rows),
    ]


def _clients(section: Section) -> list[str]:
    rows = []
    for group in section.groups:
        for row in group.client_rows:
            tails = row.tail_slowdown
            rows.append(
                [
                    f"{group.mode_name}, {group.mix}, {group.clients}",
                    f"{row.client}: {row.label}",
                    ", ".join(dict.fromkeys(row.statuses)),
                    ", ".join(row.proof),
                    spread(row.slowdown),
                    number(row.job_seconds, 1),
                    _latency_text(row),
                    " / ".join(number(tails[p]) for p in (50, 95, 99))
                    if any(value is not None for value in tails.values())
                    else UNKNOWN,
                    number(row.peak_memory_mib, 0),
                ]
            )
    if not rows:
        return []
    return [
        "### Clients",
        "Slowdown and job time in the window in which everyone runs; latency percentiles from "
        "the raw values of all repeats; tail slowdown is the same percentile over the one alone.",
        table(
            ["mode, mix, clients", "client", "status", "proof", "slowdown", "job s",
             "latency p50 / p95 / p99", "tail slowdown p50 / p95 / p99",
             "peak memory MiB (PyTorch)"],
            rows,
        ),
    ]  # fmt: skip


def measured_text(check: comparison.Check) -> str:
    """The measured value to three significant digits, with its unit; from 1000 ms on in s."""
    if check.expectation.unit == "ms":
        return duration(check.value)
    return f"{significant(check.value)} {check.expectation.unit}"


def _check_row(name: str, check: comparison.Check) -> list[str]:
    expected = check.expectation
    note = f"; {expected.note}" if expected.note else ""
    return [
        name, check.situation, expected.name, measured_text(check),
        expected.range_text, check.verdict, f"{expected.experiment}, {expected.where}{note}",
    ]  # fmt: skip


def _expected(section: Section) -> list[str]:
    job_size = section.environment.get("job_size")
    if job_size != "guide":
        return [
            "### Against the guide's expected ranges",
            f"Not compared: the guide's ranges are for its full job sizes on a GPU, these jobs "
            f"ran at size `{job_size}`.",
        ]
    modes = [_check_row(group.mode_name, check) for group in section.groups
             for check in group.checks]  # fmt: skip
    alone = [_check_row(row.label, check) for row in section.alone for check in row.checks]
    rows = [*modes, *alone]
    together = _expected_together(section)
    if not rows and not together:
        return []
    inside = sum(row[5] == "inside" for row in rows)
    return [
        "### Against the guide's expected ranges",
        f"{inside} of {len(rows)} measured values lie inside. The ranges for a workload are for "
        "the job alone on an unnamed GPU.",
        table(
            ["what", "situation", "quantity", "measured", "guide expects", "verdict",
             "where in the guide"],
            rows,
        ),
        *together,
    ]  # fmt: skip


def _expected_together(section: Section) -> list[str]:
    """Each job's quantities alone and beside the others, a column a mode; a table a mix and count.

    Copies of one job share a line.
    """
    parts = []
    subjects: dict[str, list[Group]] = {}
    for group in section.groups:
        subjects.setdefault(group.subject, []).append(group)
    for subject, groups in subjects.items():
        columns = [[(row.label, row.checks) for row in group.client_rows] for group in groups]
        alone = [(row.label, row.checks) for row in section.alone]
        lines = dict.fromkeys(
            (label, check.expectation)
            for column in columns
            for label, checks in column
            for check in checks
        )
        rows = [
            [
                label,
                expected.name,
                expected.range_text,
                *(_measured_of(column, label, expected) for column in [alone, *columns]),
            ]
            for label, expected in lines
        ]
        if rows:
            header = ["job", "quantity", "guide expects, alone", "alone"]
            parts += [
                f"The same jobs, {subject} at the same time, for orientation:",
                table([*header, *(group.mode_name for group in groups)], rows),
            ]
    return parts


def _measured_of(
    rows: Iterable[tuple[str, Sequence[comparison.Check]]],
    label: str,
    expected: comparison.expectations.Expectation,
) -> str:
    """What clients with this label measured of a quantity, lowest to highest, with verdicts."""
    found = sorted(
        (
            check
            for row_label, checks in rows
            for check in checks
            if row_label == label and check.expectation == expected
        ),
        key=lambda check: check.value,
    )
    if not found:
        return UNKNOWN
    values = dict.fromkeys(measured_text(check) for check in (found[0], found[-1]))
    verdicts = dict.fromkeys(check.verdict for check in found)
    return f"{' to '.join(values)}: {', '.join(verdicts)}"


def _evidence_text(evidence: Any) -> str:
    if isinstance(evidence, Mapping):
        mark = {True: "ok", False: "NOT ok"}.get(evidence.get("ok"), "unknown")
        return f"{evidence.get('check')}: {evidence.get('found')} ({mark})"
    return str(evidence)


def _proof(section: Section) -> list[str]:
    if section.is_cpu_demo:
        return []
    parts = ["### Proof of mode"]
    for run in section.compared_runs:
        found = run.manifest.get("mode_evidence") or []
        name = comparison.MODE_NAMES.get(run.mode, run.mode)
        lines = [f"before the run: {_evidence_text(item)}" for item in found]
        lines += [_co_run_proof(run, co_run["co_run"]) for co_run in run.co_runs("co_run")]
        parts += [f"`{run.run_id}` ({name}):", bullets(lines or ["no evidence recorded"])]
    return parts


def _co_run_proof(run: comparison.RunView, co_run: str) -> str:
    """How many clients of a co-run were proved, then a line a client with its evidence."""
    verdicts: dict[str, int] = {}
    lines = []
    for record in run.clients("co_run", co_run):
        proof = record.get("proof") or {}
        verdict = proof.get("verdict") or "unverified"
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        found = "; ".join(_evidence_text(item) for item in proof.get("evidence") or [])
        label = record.get("label") or record["workload"]
        lines.append(
            f"  - client {record['client']}, {label}, {verdict}: {found or 'no evidence recorded'}"
        )
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return "\n".join([f"`{co_run}`: {counts or 'no client record'}", *lines])


def _limits(section: Section) -> list[str]:
    if not section.ramps:
        return []
    rows = []
    for ramp in section.ramps:
        point = ramp.breaking_point
        broken = point["clients"] is not None
        rows.append(
            [
                comparison.MODE_NAMES.get(ramp.mode, ramp.mode),
                ramp.mix,
                ", ".join(str(group.clients) for group in ramp.groups),
                str(point["clients"])
                if broken
                else f"not reached by {point['highest_clients_tried']}",
                f"{point['criterion']}: {point['detail']}" if broken else UNKNOWN,
                UNKNOWN if point["last_good_clients"] is None else str(point["last_good_clients"]),
                "none" if ramp.saturation_clients is None else str(ramp.saturation_clients),
            ]
        )
    return [
        "### How many clients",
        "The breaking point is the first count at which a client failed, or a bound that was "
        "asked for was passed. Saturation (STP under 95 % of the best so far) is another thing: "
        "everyone still runs, but more clients gain nothing.",
        table(
            ["mode", "mix", "counts tried", "breaking point", "criterion", "last good count",
             "saturation at"],
            rows,
        ),
    ]  # fmt: skip


def _doubts(section: Section) -> list[str]:
    parts = ["### Invalid, unverified, failed, left out"]
    if not section.doubts and not section.left_out:
        return [*parts, "Nothing."]
    if section.doubts:
        parts.append(bullets(section.doubts))
    if section.left_out:
        parts += ["Runs not compared:", bullets(section.left_out)]
    return parts


def _environment(section: Section) -> list[str]:
    environment = section.environment
    host = section.runs[0].manifest.get("environment") or {}
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted((host.get("versions") or {}).items())
    )
    engines = ", ".join(
        f"{workload}: {engine or 'engine unknown'}, {precision or 'precision unknown'}"
        for workload, (engine, precision) in sorted(section.engines.items())
    )
    commits = sorted(
        {
            f"{found.get('git_commit') or 'unknown'}"
            f"{' (dirty tree)' if found.get('git_dirty') else ''}"
            for run in section.runs
            for found in [run.manifest.get("environment") or {}]
        }
    )
    uuids = sorted(
        {
            str((run.manifest.get("environment") or {}).get("gpu_uuid") or "none")
            for run in section.runs
        }
    )
    rows = [
        ["GPU", str(environment.get("gpu_name") or "none")],
        ["GPU UUIDs", ", ".join(uuids)],
        ["GPU memory", number(host.get("gpu_memory_mib"), 0, "MiB")],
        ["multiprocessors", number(host.get("multiprocessor_count"), 0)],
        ["driver", str(environment.get("driver_version") or UNKNOWN)],
        ["CUDA", str(host.get("cuda_version") or UNKNOWN)],
        ["versions", versions or UNKNOWN],
        ["engine, precision", engines or UNKNOWN],
        ["job size", str(environment.get("job_size") or UNKNOWN)],
        ["host cores", number(host.get("host_cores"), 0)],
        ["operating system", str(host.get("os") or UNKNOWN)],
        ["commit", ", ".join(commits)],
    ]
    runs = [
        [
            f"`{run.run_id}`",
            str(run.manifest.get("created_at") or UNKNOWN),
            str(run.manifest.get("outcome") or UNKNOWN),
            f"`{' '.join(str(word) for word in run.manifest.get('command') or [])}`",
        ]
        for run in section.runs
    ]
    notes: dict[str, list[str]] = {}
    for run in section.runs:
        for note in run.manifest.get("notes") or []:
            notes.setdefault(str(note), []).append(f"`{run.run_id}`")
    parts = [
        "### Environment",
        table(["what", "value"], rows),
        table(["run", "started (UTC)", "outcome", "command"], runs),
    ]
    if notes:
        said = (f"{note} *({', '.join(run_ids)})*" for note, run_ids in notes.items())
        parts += ["Notes of the runs:", bullets(said)]
    return parts


def _phases(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each phase did; the analysis cannot be in the log yet, or is an earlier one's line."""
    if not phases:
        return []
    earlier = [phase for phase in phases if phase.get("name") != "analysis"]
    rows = [
        [
            str(phase.get("phase", UNKNOWN)),
            str(phase.get("name", UNKNOWN)),
            str(phase.get("status", UNKNOWN)),
            str(phase.get("reason") or UNKNOWN),
            number(phase.get("seconds"), 0),
            str(phase.get("run_folder") or UNKNOWN),
        ]
        for phase in earlier
    ]
    numbers = [phase["phase"] for phase in earlier if isinstance(phase.get("phase"), int)]
    last = max(numbers, default=0) + 1
    return [
        "## Phases",
        table(
            ["phase", "name", "status", "reason", "seconds", "run"],
            [*rows, [str(last), "analysis", "ok", "this report", UNKNOWN, UNKNOWN]],
        ),
    ]


def _how_to_read() -> list[str]:
    return [
        "## How to read the figures",
        bullets(
            [
                "**slowdown**: seconds a unit of work takes beside the others, over seconds alone.",
                "**STP**: sum of the inverse slowdowns, in GPUs' worth of work; over 1, sharing "
                "beats running the jobs one after another.",
                "**ANTT**: mean slowdown, what users feel on average.",
                "**overhead**: 1 / STP - 1; negative when sharing wins. Under MIG the guide's "
                "0 % is **interference overhead**: against the same job alone on its own instance.",
                "**mechanism overhead**: one client under the mode against alone.",
                "**fairness**: Jain's index; 1 = all equally slowed.",
                "**energy ratio**: joules together over joules one after another; under 1 saves.",
                "**GPU utilization** says that some kernel ran; **SM activity**, where the GPU "
                "has it, how much of the GPU worked.",
                "A difference is claimed only where each side has three or more repeats and their "
                "95 % intervals do not overlap. Of one or two co-runs only what was seen is said.",
            ]
        ),
    ]


# --- for programs ---------------------------------------------------------------------------


def flat_rows(compared: Comparison) -> list[dict[str, Any]]:
    """One flat dict for each mode, mix and count of clients: the rows of `comparison.csv`."""
    rows = []
    for index, section in enumerate(compared.sections, start=1):
        for group in section.groups:
            row: dict[str, Any] = {
                "section": index,
                "gpu_name": section.environment.get("gpu_name"),
                "driver_version": section.environment.get("driver_version"),
                "job_size": section.environment.get("job_size"),
                "run_id": group.run.run_id,
                "mode": group.mode,
                "mix": group.mix,
                "clients": group.clients,
                "repeats": len(group.co_runs),
                "outcome": group.outcome,
                "unverified": group.is_unverified,
            }
            for name in _FLAT_ESTIMATES:
                found: Estimate | None = getattr(group, name)
                for part in ("mean", "low", "high"):
                    row[f"{name}_{part}"] = getattr(found, part) if found else None
            row |= {name: getattr(group, name) for name in _FLAT_FIGURES}
            row |= {name: value for name, value in group.gpu.items() if name != "throttle_reasons"}
            row["throttle_reasons"] = " ".join(group.gpu["throttle_reasons"])
            rows.append(row)
    return rows


def json_text(compared: Comparison) -> str:
    """Everything that was compared, as JSON with a schema version; runs by their id."""
    value = {
        "schema_version": comparison.SCHEMA_VERSION,
        "sections": [_section_json(section) for section in compared.sections],
        "phases": compared.phases,
        "problems": compared.problems,
    }
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "cpu_demo": section.is_cpu_demo,
        "environment": section.environment,
        "versions": section.versions,
        "engines": section.engines,
        "run_ids": [run.run_id for run in section.runs],
        "claims": [dataclasses.asdict(claim) for claim in section.claims],
        "groups": [_group_json(group) for group in section.groups],
        "ramps": [
            {
                "mode": ramp.mode,
                "mix": ramp.mix,
                "clients": [group.clients for group in ramp.groups],
                "breaking_point": ramp.breaking_point,
                "saturation_clients": ramp.saturation_clients,
            }
            for ramp in section.ramps
        ],
        "alone": [dataclasses.asdict(row) for row in section.alone],
        "left_out": section.left_out,
        "doubts": section.doubts,
    }


def _group_json(group: Group) -> dict[str, Any]:
    without = {"run", "co_runs", "client_rows", "checks", "gpu"}
    value = {
        item.name: _plain(getattr(group, item.name))
        for item in dataclasses.fields(group)
        if item.name not in without
    }
    return value | {
        "run_id": group.run.run_id,
        "co_runs": [co_run["co_run"] for co_run in group.co_runs],
        "gpu": group.gpu,
        "client_rows": [dataclasses.asdict(row) for row in group.client_rows],
        "checks": [dataclasses.asdict(check) for check in group.checks],
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
