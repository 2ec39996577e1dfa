"""What the runs of a results folder say together: sections and scorecards. No input or output.

Runs on unlike environments (GPU model, driver, library versions, job size; engine and precision of
a workload) never stand in one section. In a section, the newest run that was judged represents a
combination of mode, mix and clients; the others are listed as left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking import baselines, expectations, metrics, run_store
from benchmarking.estimates import Estimate, estimate, overhead_estimate, range_estimate

Record = Mapping[str, Any]

SCHEMA_VERSION = 1

CPU_DEMO = "cpu-demo"
MODE_NAMES = {
    "time-slicing": "time slicing",
    "mps": "MPS",
    "mig": "MIG",
    "exclusive": "exclusive",
    CPU_DEMO: "CPU demo",
}
_MODE_ORDER = tuple(MODE_NAMES)

# An outcome that answers "does this count of clients work?"; the others prove nothing either way.
_JUDGED = frozenset({"ok", "failed", "timeout"})

TAIL_PERCENTILES = (50, 95, 99)

# Names under which a workload's figures give a quantity of the guide, the first that is there wins.
_FIGURE_NAMES: Mapping[str, tuple[str, ...]] = {
    "epoch_seconds": ("epoch_seconds", "mean_epoch_seconds", "epoch_duration_seconds"),
    "test_accuracy_percent": ("test_accuracy_percent", "final_test_accuracy_percent"),
    "train_accuracy_percent": ("train_accuracy_percent", "final_train_accuracy_percent"),
    "samples_per_second": ("samples_per_second", "throughput_samples_per_second"),
    "mean_latency_ms": ("mean_latency_ms", "latency_mean_ms"),
    "p99_latency_ms": ("p99_latency_ms", "latency_p99_ms", "p99_ms"),
    "requests_per_second": ("requests_per_second", "qps"),
    "total_requests": ("total_requests",),
    "success_rate_percent": ("success_rate_percent",),
    "session_seconds": ("session_seconds", "total_session_seconds"),
    "active_seconds": ("active_seconds", "gpu_active_seconds"),
    "active_percent": ("active_percent", "gpu_active_percent"),
    "idle_seconds": ("idle_seconds", "total_idle_seconds"),
    "idle_percent": ("idle_percent",),
}

# What a co-run's GPU section holds and how repeats are put together.
_GPU_FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "utilization_gpu_percent": statistics.fmean,
    "sm_activity_percent": statistics.fmean,
    "sm_occupancy_percent": statistics.fmean,
    "tensor_activity_percent": statistics.fmean,
    "dram_activity_percent": statistics.fmean,
    "memory_used_mib_max": max,
    "power_draw_watts": statistics.fmean,
    "energy_joules": statistics.fmean,
    "sm_clock_mhz": statistics.fmean,
    "host_cpu_percent": statistics.fmean,
}


def clients_text(clients: int) -> str:
    """`1 client`, `4 clients`."""
    return f"{clients} client{'' if clients == 1 else 's'}"


# --- what is compared -----------------------------------------------------------------------


@dataclass
class RunView:
    """One run as it was read: its manifest, its records, and what was wrong with its files.

    `run_id` names it in the report: the manifest's run id, or the run's path below the results
    folder where several runs share that id. `experiment` is the folder that it stands in.
    """

    run_id: str
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    experiment: str = ""

    @property
    def mode(self) -> str:
        """The mode that was in force: `cpu-demo` without a GPU, whatever was asked for."""
        return self.manifest.get("effective_mode") or self.manifest.get("mode") or "unknown"

    @property
    def mix(self) -> str:
        """The mix of jobs."""
        return self.manifest.get("mix") or "unknown"

    @property
    def is_invalid(self) -> bool:
        """Whether the run as a whole lacks proof of its mode."""
        return self.manifest.get("outcome") == "invalid"

    @classmethod
    def of(cls, run: run_store.Run, name: str) -> RunView:
        """View of a run as the run store read it, under this name."""
        records = [*run.client_records, *run.co_run_records]
        return cls(name, run.manifest, records, list(run.warnings), str(run.folder.parent))

    def clients(self, phase: str, co_run: str | None = None) -> list[dict[str, Any]]:
        """Client records of a phase (`baseline`, `co_run`), of one co-run when it is named."""
        return [
            record
            for record in self.records
            if record.get("record") == "client"
            and record.get("phase") == phase
            and co_run in (None, record.get("co_run"))
        ]

    def co_runs(self, phase: str) -> list[dict[str, Any]]:
        """Co-run records of a phase."""
        return [
            record
            for record in self.records
            if record.get("record") == "co_run" and record.get("phase") == phase
        ]

    def engines(self) -> dict[str, tuple[Any, Any]]:
        """Engine and precision by workload, as the clients reported them at `ready`."""
        found: dict[str, tuple[Any, Any]] = {}
        for record in self.records:
            identity = record.get("identity") if record.get("record") == "client" else None
            if identity:
                pair = (identity.get("engine"), identity.get("precision"))
                found.setdefault(record["workload"], pair)
        return found


@dataclass(frozen=True)
class Check:
    """A measured value beside the guide's range."""

    expectation: expectations.Expectation
    value: float
    verdict: str
    situation: str


@dataclass
class ClientRow:
    """One client of a co-run group, over the group's repeats."""

    client: int
    workload: str
    label: str
    statuses: list[str]
    proof: list[str]
    reasons: list[str]
    slowdown: Estimate | None
    job_seconds: float | None
    latency: dict[str, float] | None
    tail_slowdown: dict[int, float | None]
    p99_ms: Estimate | None
    peak_memory_mib: float | None
    checks: list[Check]


@dataclass
class Group:
    """The co-runs (repeats) of one mode, mix and count of clients, from one run."""

    mode: str
    mix: str
    clients: int
    run: RunView
    co_runs: list[dict[str, Any]]
    outcome: str
    reason: str | None
    stp: Estimate | None
    antt: Estimate | None
    overhead_percent: Estimate | None
    interference_overhead_percent: float | None
    mechanism_overhead_percent: float | None
    stp_per_multiprocessor: float | None
    fairness: float | None
    energy_ratio: float | None
    success_rate_percent: float | None
    average_duration_seconds: float | None
    total_gpu_time_seconds: float | None
    throughput_clients: int | None
    gpu: dict[str, Any]
    client_rows: list[ClientRow]
    checks: list[Check]

    @property
    def mode_name(self) -> str:
        """The mode as it is written in sentences."""
        return MODE_NAMES.get(self.mode, self.mode)

    @property
    def subject(self) -> str:
        """What ran: `mixed, 4 clients`."""
        return f"{self.mix}, {clients_text(self.clients)}"

    @property
    def is_unverified(self) -> bool:
        """Whether some client's membership in the mode could not be checked."""
        return any("unverified" in row.proof for row in self.client_rows)

    @property
    def ran_out_of_time(self) -> bool:
        """Whether the run was completed without the repeats that its plan held for this count."""
        planned = {
            co_run["co_run"]
            for co_run in (self.run.manifest.get("plan") or {}).get("co_runs") or []
            if len(co_run["clients"]) == self.clients
        }
        done = {co_run["co_run"] for co_run in self.run.co_runs("co_run")}
        return self.run.manifest.get("outcome") == "complete" and not planned <= done


@dataclass
class Ramp:
    """One mode and mix over several counts of clients."""

    mode: str
    mix: str
    groups: list[Group]
    breaking_point: dict[str, Any]
    saturation_clients: int | None


@dataclass(frozen=True)
class Claim:
    """A sentence of the decision, with the runs that its numbers come from."""

    text: str
    run_ids: tuple[str, ...]


@dataclass
class Section:
    """Runs on one environment, compared with each other."""

    environment: dict[str, Any]
    versions: dict[str, Any]
    engines: dict[str, tuple[Any, Any]]
    runs: list[RunView]
    groups: list[Group] = field(default_factory=list)
    ramps: list[Ramp] = field(default_factory=list)
    alone: list[ClientRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def is_cpu_demo(self) -> bool:
        """Whether no GPU was there: then nothing here speaks of GPU sharing modes."""
        return self.environment["is_cpu_demo"]

    @property
    def compared_runs(self) -> list[RunView]:
        """Runs that a compared group comes from, in the scorecard's order."""
        return list({group.run.run_id: group.run for group in self.groups}.values())

    def most_compared(self, mix: str) -> list[Group]:
        """Groups of the mix at one count of clients, where the modes can be compared best.

        That is the count with the most modes that have an STP, the largest such count.
        """
        by_clients: dict[int, list[Group]] = {}
        for group in self.groups:
            if group.mix == mix:
                by_clients.setdefault(group.clients, []).append(group)
        return max(
            by_clients.items(),
            key=lambda item: (sum(group.stp is not None for group in item[1]), item[0]),
        )[1]

    @property
    def title(self) -> str:
        """GPU, driver and job size in a few words."""
        environment = self.environment
        if self.is_cpu_demo:
            return f"CPU demonstration (job size {environment['job_size']})"
        return (
            f"{environment['gpu_name']}, driver {environment['driver_version']}, "
            f"job size {environment['job_size']}"
        )


@dataclass
class Comparison:
    """Everything that the report says, in one object."""

    sections: list[Section]
    phases: list[dict[str, Any]]
    problems: list[str]


# --- building it ----------------------------------------------------------------------------


def compare(
    runs: Sequence[RunView], phases: Sequence[dict[str, Any]] = (), problems: Sequence[str] = ()
) -> Comparison:
    """Compare runs: sections by environment, the newest judged run a combination.

    `phases` are the lines of the unattended run's phase log, `problems` what was wrong with files
    outside the runs.
    """
    sections = _sections(runs)
    for section in sections:
        _fill_groups(section, runs)
        section.ramps = _ramps(section.groups)
        section.alone = _alone_rows(section)
    file_problems = [f"{run.run_id}: {problem}" for run in runs for problem in run.problems]
    return Comparison(sections, list(phases), [*problems, *file_problems])


def environment_of(run: RunView) -> dict[str, Any]:
    """What must be alike for figures to be compared; versions, engine and precision apart.

    The same rule decides which baselines may be reused. On the CPU the host is the device, so its
    cores count too.
    """
    environment = run.manifest.get("environment") or {}
    alike = {name: environment.get(name) for name in baselines.COMPARED_FIELDS}
    alike["job_size"] = run.manifest.get("job_size")
    alike["is_cpu_demo"] = run.mode == CPU_DEMO
    alike["host_cores"] = environment.get("host_cores") if run.mode == CPU_DEMO else None
    return alike


def _versions(run: RunView) -> dict[str, Any]:
    """Versions that count; a run that ended before any client was ready knows none."""
    found = (run.manifest.get("environment") or {}).get("versions") or {}
    return {name: found[name] for name in baselines.COMPARED_VERSIONS if name in found}


def _created_at(run: RunView) -> tuple[str, str]:
    return (run.manifest.get("created_at") or "", run.run_id)


def _sections(runs: Sequence[RunView]) -> list[Section]:
    """Runs by environment, newest first.

    Another version of a library, or a workload with another engine or precision, opens another
    section. What a run does not know (one without co-runs has no versions, one of another mix
    other workloads) sets nothing apart. Runs that know little come last, so that none of them
    joins two environments that are unlike.
    """
    sections: list[Section] = []
    newest_first = sorted(runs, key=_created_at, reverse=True)
    for run in sorted(newest_first, key=lambda run: not _versions(run)):
        environment, versions, engines = environment_of(run), _versions(run), run.engines()
        for section in sections:
            if (
                section.environment == environment
                and _agree(section.versions, versions)
                and _agree(section.engines, engines)
            ):
                section.runs.append(run)
                section.versions |= versions
                section.engines |= engines
                break
        else:
            sections.append(Section(environment, versions, engines, [run]))
    for section in sections:
        section.runs.sort(key=_created_at, reverse=True)
    return sorted(sections, key=lambda section: _created_at(section.runs[0]), reverse=True)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def _order(mode: str) -> tuple[int, str]:
    return (_MODE_ORDER.index(mode) if mode in _MODE_ORDER else len(_MODE_ORDER), mode)


def _fill_groups(section: Section, every_run: Sequence[RunView]) -> None:
    """The newest judged run of each combination, and what is left out for it."""
    candidates: dict[tuple[str, str, int], list[RunView]] = {}
    for run in section.runs:  # newest first
        counts = {record["clients"] for record in run.co_runs("co_run")}
        for clients in counts:
            candidates.setdefault((run.mode, run.mix, clients), []).append(run)
    for (mode, mix, clients), runs in candidates.items():
        what = f"{MODE_NAMES.get(mode, mode)}, {mix}, {clients_text(clients)}"
        judged = [run for run in runs if not run.is_invalid and _judged(run, clients)]
        if not judged:
            section.left_out.append(
                f"{what}: no co-run gave an answer ({', '.join(run.run_id for run in runs)})"
            )
            continue
        newest = judged[0]
        section.groups.append(_group(newest, mode, mix, clients, _baselines(newest, every_run)))
        section.left_out += [
            f"{run.run_id} ({what}): {_why_not(run, newest, judged)} {newest.run_id}"
            for run in runs
            if run is not newest
        ]
    section.groups.sort(key=lambda group: (group.mix, group.clients, _order(group.mode)))


def _why_not(run: RunView, newest: RunView, judged: Sequence[RunView]) -> str:
    if not any(run is other for other in judged):
        return "without a judged co-run, in favor of"
    same_age = run.manifest.get("created_at") == newest.manifest.get("created_at")
    return "begun at the same second as" if same_age else "older than"


def is_valid(run: RunView, co_run: Record) -> bool:
    """Whether no client of the co-run was found outside the mode that it is named after."""
    verdicts = {
        (record.get("proof") or {}).get("verdict")
        for record in run.clients("co_run", co_run["co_run"])
    }
    return co_run["outcome"] != "invalid" and "invalid" not in verdicts


def _judged(run: RunView, clients: int) -> list[dict[str, Any]]:
    return [
        co_run
        for co_run in run.co_runs("co_run")
        if co_run["clients"] == clients and co_run["outcome"] in _JUDGED and is_valid(run, co_run)
    ]


def _baselines(run: RunView, every_run: Sequence[RunView]) -> dict[str, dict[str, Any]]:
    """Baseline client records by job, the run's own or those of the run that it reused."""
    source = _baseline_run(run, every_run)
    records = [*(_good_baselines(source) if source else []), *_good_baselines(run)]
    return {record["job_key"]: record for record in records}


def _good_baselines(run: RunView) -> list[dict[str, Any]]:
    return run_store.successful_baselines(run.clients("baseline"), run.co_runs("baseline"))


def _baseline_run(run: RunView, every_run: Sequence[RunView]) -> RunView | None:
    """The run that this one took its baselines from.

    Experiments name their runs alike, so the one in the same folder comes first; else it is the
    newest of that id that was there before, on a like environment.
    """
    wanted = run.manifest.get("baseline_run_id")
    named = [other for other in every_run if wanted and other.manifest["run_id"] == wanted]
    beside = [other for other in named if other.experiment == run.experiment]
    earlier = [
        other
        for other in named
        if _created_at(other)[0] <= _created_at(run)[0]
        and environment_of(other) == environment_of(run)
        and _agree(_versions(other), _versions(run))
        and _agree(other.engines(), run.engines())
    ]
    return max(beside or earlier, key=_created_at, default=None)


def _group(run: RunView, mode: str, mix: str, clients: int, alone: Mapping[str, Record]) -> Group:
    co_runs = _judged(run, clients)
    good = [co_run for co_run in co_runs if co_run["outcome"] == "ok"]
    broken = [co_run for co_run in co_runs if co_run["outcome"] != "ok"]
    stp = estimate(_summary_values(good, "stp"))
    interference = _mean(_summary_values(good, "interference_overhead_percent"))
    antt = estimate(_summary_values(good, "antt"))
    if interference is None and mode != "mig" and antt is not None:
        interference = metrics.interference_overhead_percent([antt.mean])
    members = [run.clients("co_run", co_run["co_run"]) for co_run in co_runs]
    gpu = _gpu_means([co_run.get("gpu") or {} for co_run in good or co_runs])
    rows = [_client_row(index, members, alone) for index in range(clients)]
    group = Group(
        mode=mode,
        mix=mix,
        clients=clients,
        run=run,
        co_runs=co_runs,
        outcome=broken[0]["outcome"] if broken else "ok",
        reason=broken[0].get("reason") if broken else None,
        stp=stp,
        antt=antt,
        overhead_percent=overhead_estimate(stp),
        interference_overhead_percent=interference,
        mechanism_overhead_percent=(
            metrics.mechanism_overhead_percent(antt.mean if antt else None)
            if clients == 1 and mode != CPU_DEMO
            else None
        ),
        stp_per_multiprocessor=_stp_per_multiprocessor(run, mode, stp, members),
        fairness=_mean(_summary_values(good, "fairness")),
        energy_ratio=_mean(_summary_values(good, "energy_ratio")),
        success_rate_percent=_mean(_summary_values(co_runs, "success_rate_percent")),
        average_duration_seconds=_mean(_summary_values(good, "average_duration_seconds")),
        total_gpu_time_seconds=_mean(_summary_values(good, "total_gpu_time_seconds")),
        throughput_clients=next(iter(_summary_values(good, "throughput_clients")), None),
        gpu=gpu,
        client_rows=[row for row in rows if row is not None],
        checks=[],
    )
    group.checks = _mode_checks(group)
    return group


def _summary_values(co_runs: Sequence[Record], name: str) -> list[Any]:
    return [(co_run.get("summary") or {}).get(name) for co_run in co_runs]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _gpu_means(sections: Sequence[Record]) -> dict[str, Any]:
    """GPU figures over repeats, with the names of their sources and of every throttle reason."""
    combined: dict[str, Any] = {}
    for name, combine in _GPU_FIGURES.items():
        known = [section[name] for section in sections if section.get(name) is not None]
        combined[name] = combine(known) if known else None
    sources = sorted({s["utilization_source"] for s in sections if s.get("utilization_source")})
    combined["utilization_source"] = ", ".join(sources) or None
    reasons = {reason for section in sections for reason in section.get("throttle_reasons") or []}
    combined["throttle_reasons"] = sorted(reasons)
    return combined


def _stp_per_multiprocessor(
    run: RunView, mode: str, stp: Estimate | None, members: Sequence[Sequence[Record]]
) -> float | None:
    """STP as if the instances had all of the card's multiprocessors (MIG; else `None`)."""
    whole = (run.manifest.get("environment") or {}).get("multiprocessor_count")
    if mode != "mig" or stp is None or not whole or not members:
        return None
    counts = [(record.get("identity") or {}).get("multiprocessor_count") for record in members[0]]
    return stp.mean * whole / sum(counts) if counts and all(counts) else None


def _client_row(
    index: int, members: Sequence[Sequence[Record]], alone: Mapping[str, Record]
) -> ClientRow | None:
    """One client over the repeats; `None` when no repeat has a record of it."""
    records = [record for repeat in members for record in repeat if record["client"] == index]
    if not records:
        return None
    return _row(records, alone.get(records[0].get("job_key", "")), "beside the others")


def _row(records: Sequence[Record], baseline: Record | None, situation: str) -> ClientRow:
    first = records[0]
    good = [record for record in records if record["status"] == "ok"]
    latencies = [value for record in good for value in record.get("latency_ms") or []]
    alone = (baseline or {}).get("latency_ms")
    peaks = [r["peak_memory_mib"] for r in records if r.get("peak_memory_mib") is not None]
    proofs = [record.get("proof") or {} for record in records]
    reasons = [
        record.get("reason") or f"exit code {record.get('exit_code')}"
        for record in records
        if record["status"] != "ok"
    ]
    return ClientRow(
        client=first["client"],
        workload=first["workload"],
        label=first.get("label") or first["workload"],
        statuses=[record["status"] for record in records],
        proof=sorted({proof.get("verdict") or "unverified" for proof in proofs}),
        reasons=reasons,
        slowdown=estimate(record.get("slowdown") for record in good),
        job_seconds=_mean(metrics.mean_job_seconds(record) for record in good),
        latency=metrics.percentiles_ms(latencies),
        tail_slowdown={
            percent: metrics.tail_slowdown(latencies, alone, percent)
            for percent in TAIL_PERCENTILES
        },
        p99_ms=range_estimate(
            metrics.percentile(record["latency_ms"], 99)
            for record in good
            if record.get("latency_ms")
        ),
        peak_memory_mib=max(peaks, default=None),
        checks=_workload_checks(good, latencies, situation),
    )


def measured_quantities(record: Record, latencies_ms: Sequence[float]) -> dict[str, float]:
    """The guide's quantities that a client record tells, by the names of `expectations`.

    Latency comes from the raw values, throughput at a fixed batch size from the same.
    """
    figures = record.get("figures") or {}
    found: dict[str, float] = {}
    for quantity, names in _FIGURE_NAMES.items():
        value = next((figures[name] for name in names if figures.get(name) is not None), None)
        if isinstance(value, (list, tuple)):
            value = _mean(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[quantity] = float(value)
    if latencies_ms:
        found["mean_latency_ms"] = statistics.fmean(latencies_ms)
        found["p99_latency_ms"] = metrics.percentile(latencies_ms, 99)
    job_seconds = metrics.mean_job_seconds(record)
    if job_seconds is not None:
        found["job_seconds"] = job_seconds
    return found


def _workload_checks(
    good: Sequence[Record], latencies: Sequence[float], situation: str
) -> list[Check]:
    if not good:
        return []
    record = good[-1]
    batch_size = (record.get("identity") or {}).get("batch_size")
    measured = measured_quantities(record, latencies)
    return [
        Check(expected, measured[expected.quantity], verdict, situation)
        for expected in expectations.for_workload(record["workload"], batch_size)
        if expected.quantity in measured
        for verdict in [expected.compare(measured[expected.quantity])]
    ]


def _mode_checks(group: Group) -> list[Check]:
    """The guide's ranges of the mode; one client alone shares nothing, so none apply to it."""
    if group.clients < 2:
        return []
    overhead = group.overhead_percent
    measured = {
        "success_rate_percent": group.success_rate_percent,
        "overhead_percent": overhead.mean if overhead else None,
        "interference_overhead_percent": group.interference_overhead_percent,
        "utilization_gpu_percent": group.gpu["utilization_gpu_percent"],
    }
    return [
        Check(expected, value, expected.compare(value), group.subject)
        for expected in expectations.for_mode(group.mode)
        for value in [measured.get(expected.quantity)]
        if value is not None
    ]


def _alone_rows(section: Section) -> list[ClientRow]:
    """Each distinct job alone, from the newest baseline of the section, with the card's figures."""
    rows: dict[str, ClientRow] = {}
    for run in section.runs:  # newest first
        gpu_by_co_run = {record["co_run"]: record.get("gpu") or {} for record in
                         run.co_runs("baseline")}  # fmt: skip
        for record in _good_baselines(run):
            if record["job_key"] in rows:
                continue
            row = _row([record], None, "alone")
            row.checks += _card_checks(record["workload"], gpu_by_co_run.get(record["co_run"], {}))
            rows[record["job_key"]] = row
    return list(rows.values())


def _card_checks(workload: str, gpu: Record) -> list[Check]:
    """Utilization and memory of the whole card while one job had it to itself."""
    memory_mib = gpu.get("memory_used_mib_max")
    measured = {
        "utilization_gpu_percent": gpu.get("utilization_gpu_percent"),
        "memory_used_gb": None if memory_mib is None else memory_mib * 2**20 / 1e9,
    }
    return [
        Check(expected, value, expected.compare(value), "alone")
        for expected in expectations.for_workload(workload)
        for value in [measured.get(expected.quantity)]
        if value is not None
    ]


def _ramps(groups: Sequence[Group]) -> list[Ramp]:
    """Every mode and mix that was measured at several counts of clients."""
    by_kind: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        by_kind.setdefault((group.mode, group.mix), []).append(group)
    ramps = []
    for (mode, mix), members in by_kind.items():
        if len(members) < 2:
            continue
        members.sort(key=lambda group: group.clients)
        co_runs = [co_run for group in members for co_run in group.co_runs]
        clients = [
            record
            for group in members
            for co_run in group.co_runs
            for record in group.run.clients("co_run", co_run["co_run"])
        ]
        stp = {
            group.clients: group.stp.mean if group.stp and group.outcome == "ok" else None
            for group in members
        }
        ramps.append(
            Ramp(
                mode,
                mix,
                members,
                metrics.breaking_point(co_runs, clients),
                metrics.saturation_count(stp),
            )
        )
    return ramps
