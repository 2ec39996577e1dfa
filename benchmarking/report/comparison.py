"""What the runs of a results folder say together: the plain dict that comparison.json holds.

Everything that renders takes this dict; timelines are drawn of the co-runs themselves. Null is
unknown, never 0.

An estimate is `{"mean", "low", "high", "values", "is_interval"}`: a figure over rounds. `values`
has one a round; `low` and `high` are its 95 % interval where `is_interval` (three rounds or more),
else the lowest and the highest value. `mode` is time-slicing, mps, mig, exclusive or cpu-demo,
`settings` what it was set to in words (`even`, `50/25 %`), `variant` both in one name, as flags
have it: `mps`, `mps:even`, `mps:50/25`.

    schema_version  5
    phases, problems, refusals     rows of phases.jsonl, sentences, rows of refusals.jsonl
    prices          {gpu_price_per_hour, kwh_price}; either may be null, costs are in its currency
    differences[]   {fact, values: one a section, null where unknown}: why runs stand apart
    matters_percent                differences within it do not matter
    sections[]      runs on one environment; figures of two sections are never compared
      title, cpu_demo, environment, versions, engines, run_ids
      runs[]        {run_id, created_at, outcome, mode, settings, variant, mix, session, method,
                    gpu_uuid, environment, command, notes, mode_evidence[],
                    co_runs[{co_run, phase, clients, repeat, outcome, reason, window_seconds,
                    warnings, proofs[{client, label, verdict, evidence[]}]}]}
      drift_guarded                whether every mode was measured in rounds of one session
      own_error     {percent, ratio (estimate: one client under time slicing over the same alone),
                    label, rounds, is_over_limit (above 2 %)}; null: not measured
      conclusions[] one for each subject of each mix, at the count with the most modes:
        mix, clients
        subject     "whole card" or a job's label; of a job its workload and how many copies
        figure      work (of the whole card: seconds of alone-work a second, higher is better),
                    slowdown (times as long as alone, lower is better; of copies their mean), of a
                    service median_ms; energy_joules_per_work and tail_ms: intervals, no verdict
        better      "higher" or "lower"
        is_claim    whether the verdict is one; without, `verdict` is null
        modes[]     {variant, mode, settings, estimate or null, reason it has none, is_best,
                    is_tied: not surely worse than the best, percent: of tail_ms which percentile}
        best        variant, or null
        verdict     sure: the best is better than every other one
                    no difference that matters: so says every one that is not surely worse
                    cannot tell: these rounds show no difference; see smallest_shown_percent
                    not enough rounds: `rounds` (1 or 2) of three
                    not measured: `reason`
        rounds      the fewest of the modes
        pairs[]     {one, other, percent, low, high (95 % interval of one over other, in percent),
                    p_value, adjusted_p_value (Holm), verdict, better, smallest_shown_percent: the
                    smallest difference that would be found four times in five}; `other` may be
                    "alone": the same jobs one after another, or the job by itself
        runner_up, runner_up_percent (the best over it), smallest_shown_percent, reason, run_ids
      expectations[]               {mix, clients, source (guide, vendor), rule (in words), mode,
                    subject, expected, found (in a word or a figure each), holds (yes, no, cannot
                    tell)}: does it hold for this mix on this card?
      worst_slowdowns[]            {mix, clients, variant, label, slowdown (estimate), caused_by
                    (label, or null), source (pairs, only neighbor, null), next_to[] labels}, the
                    worst first, one for each mode of each mix and pair
      not_measured[]               {mode, reason}
      groups[]      a row for each mode, mix and count of clients:
        mode, settings, variant, mix, clients, outcome, reason, run_ids, gpu_uuids, co_runs,
        baseline_ids, is_unverified, drift_guarded, rounds,
        invalid     why figures against the baseline are void, or null; such a row has none but
                    its clients', nor has one whose outcome is not ok
        stp         estimate: work delivered, the sum of n_i T_i / L
        stp_alone   estimate: the same of each job alone, the clients' mean (under 1 with pauses)
        antt, overhead_percent, interference_overhead_percent, mechanism_overhead_percent,
        energy_ratio, joules_per_job, joules_per_work (a second of alone-work), estimates;
        fairness (median and range)
        stp_per_multiprocessor, success_rate_percent, average_duration_seconds,
        total_gpu_time_seconds, throughput_clients
        cost_per_1000_work, energy_cost_per_1000_work      of 1,000 seconds of alone-work
        gpu         means over the rounds of what the card's samples say, in nvidia-smi's words
        client_rows[]              {client, workload, label, job_key, statuses, proof, reasons,
                    slowdown (estimate), job_seconds, job_time_ratio (over alone), latency {mean,
                    median, std, min, max, p50, p95, p99}: all rounds' raw values together,
                    apart_latency {kind: as latency}, such as of first tokens,
                    tail_percent (the highest percentile that stands), tail_ms (estimate: its mean
                    is that of the raw values together), tail_slowdown {"50", "95", "99"}, p99_ms,
                    median_ms (estimates, as tail_ms), responses, missed, is_closed_loop (p99 is
                    service time), slo {percent, bound_ms}, service, joules_per_job,
                    peak_memory_mib, invalid, checks[] against the guide's ranges}
        checks[]
      ramps[]       {mode, settings, variant, mix, clients[], bounds, breaking_point, fits,
                    saturation_clients, sufficient_clients}; `fits`: the most clients that met the
                    criteria before it broke
      interference[]               of pairs: {mode, settings, variant, mix, latency_jobs,
                    jobs_in_all (the cells are of the first 50), cells[]}
      pair_choices[]               {jobs: [a, b], work delivered by both: as in conclusions} which
                    mode for each pair
      noisy[]       {label, kind, points[{variant, mode, settings, duty, slowdown (estimate)}],
                    break_even[{variant, duty or null, reason}]}: the neighbor's duty from which a
                    slice of one's own (MIG) is better
      alone[] (client rows), left_out[], doubts[]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarking.metrics.estimates import estimate
from benchmarking.modes.names import MODE_MIG
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_NULL, PHASE_SHARE_BASELINE
from benchmarking.records.types import CoRunRecord, Phase
from benchmarking.report import claims, conclusions, judgments, ramps
from benchmarking.report.groups import Baselines, CoRun, Group, measure, plain
from benchmarking.report.merging import (
    Section,
    alone_of,
    baseline_run,
    differences,
    find_sections,
    merge,
)
from benchmarking.report.rows import alone_rows, group_row
from benchmarking.report.runs import MeasuredRun, Results
from benchmarking.report.wording import clients_text, section_title

SCHEMA_VERSION = 5
OWN_ERROR_LIMIT_PERCENT = 2.0
# What is told of each run, of its machine (besides what the section's runs have in common), and of
# its co-runs.
_OF_RUN = ("created_at", "outcome", "mix", "session", "method", "command", "notes", "mode_evidence")
_OF_MACHINE = (
    "gpu_memory_mib", "multiprocessor_count", "idle_power_watts", "cuda_version", "host_cores",
    "os", "git_commit", "git_dirty",
)  # fmt: skip
_OF_CO_RUN = ("co_run", "phase", "clients", "repeat", "outcome", "reason", "warnings")


def compare(
    results: Results,
    *,
    slo_ms: float | None = None,
    matters_percent: float = claims.MATTERS_PERCENT,
    gpu_price_per_hour: float | None = None,
    kwh_price: float | None = None,
) -> tuple[dict[str, Any], dict[str, CoRun]]:
    """Compare the runs of a results folder; returns the comparison and its co-runs by name.

    `slo_ms` bounds the responses of latency jobs; without it the bound that a run was given counts.
    """
    sections = []
    co_runs: dict[str, CoRun] = {}
    found_sections = find_sections(results.runs)
    for section in found_sections:
        measured = _Measured(section, results)
        groups, excluded = _groups(measured, slo_ms)
        found = _section(measured, groups, excluded, results, slo_ms, matters_percent)
        for group in found["groups"]:
            group |= _costs(group, gpu_price_per_hour, kwh_price)
        sections.append(found)
        co_runs |= {one.name: one for group in groups for one in group.co_runs}
    comparison = {
        "schema_version": SCHEMA_VERSION,
        "matters_percent": matters_percent,
        "prices": {"gpu_price_per_hour": gpu_price_per_hour, "kwh_price": kwh_price},
        "sections": sections,
        "differences": differences(found_sections),
        "phases": results.phases,
        "problems": [*results.problems, *(text for run in results.runs for text in run.problems)],
        "refusals": results.refusals,
    }
    return comparison, co_runs


class _Measured:
    """A section's co-runs with their figures; each run's baselines are looked up once."""

    def __init__(self, section: Section, results: Results) -> None:
        self.section = section
        self.every_run = [*results.runs, *results.references]
        self._alone: dict[tuple[str, Phase], Baselines] = {}

    def co_run(self, run: MeasuredRun, record: CoRunRecord) -> CoRun:
        share = self._alone_of(run, PHASE_SHARE_BASELINE) if run.has_own_shares else None
        return measure(run, record, self._alone_of(run, PHASE_BASELINE), share)

    def _alone_of(self, run: MeasuredRun, phase: Phase) -> Baselines:
        if (run.name, phase) not in self._alone:
            self._alone[run.name, phase] = alone_of(run, self.every_run, phase)
        return self._alone[run.name, phase]

    def group(self, runs: list[MeasuredRun], clients: int, slo_ms: float | None) -> Group:
        co_runs = [self.co_run(run, one) for run in runs for one in run.judged(clients)]
        lenders = [baseline_run(run, self.every_run) or run for run in runs]
        baseline_ids = list(dict.fromkeys(lender.name for lender in lenders))
        return Group(runs, co_runs, baseline_ids, slo_ms or runs[0].manifest.bounds.max_p99_ms)


def _section(
    measured: _Measured, groups: list[Group], excluded: list[str], results: Results,
    slo_ms: float | None, matters_percent: float,
) -> dict[str, Any]:  # fmt: skip
    """One section as data."""
    runs, conditions = measured.section.runs, measured.section.conditions
    environment = conditions["environment"]
    is_cpu_demo = environment["is_cpu_demo"]
    own_error = _own_error(measured)
    for group in groups:
        group.row = group_row(group, own_error["percent"] if own_error else None)
    single = [group for group in groups if group.pair is None]
    error_percent = own_error["percent"] if own_error and own_error["is_over_limit"] else 0.0
    concluded, pair_choices = conclusions.conclude(
        groups, matters_percent, error_percent, is_cpu_demo=is_cpu_demo
    )
    lenders = [baseline_run(run, measured.every_run) for run in runs]
    return {
        "title": section_title(environment),
        "cpu_demo": is_cpu_demo,
        "environment": environment,
        "versions": conditions["version"],
        "engines": {name: list(pair) for name, pair in conditions["engine"].items()},
        "run_ids": [run.name for run in runs],
        "runs": [_run(run) for run in runs],
        "drift_guarded": bool(groups) and all(group.is_guarded for group in groups),
        "own_error": own_error,
        "conclusions": concluded,
        "pair_choices": pair_choices,
        "expectations": judgments.expectations(concluded, groups),
        "worst_slowdowns": judgments.worst_slowdowns(groups),
        "not_measured": judgments.not_measured(groups, runs, results, is_cpu_demo=is_cpu_demo),
        "groups": [group.row for group in single],
        "ramps": ramps.find_ramps(single),
        "interference": ramps.interference(groups, runs),
        "noisy": ramps.noisy(groups),
        "alone": alone_rows([*runs, *filter(None, lenders)], slo_ms),
        "left_out": excluded,
        "doubts": judgments.doubts(runs, single),
    }


def _groups(measured: _Measured, slo_ms: float | None) -> tuple[list[Group], list[str]]:
    """A group for each combination of mode, settings, mix and clients, and what is excluded."""
    candidates: dict[tuple[str, str, str, int], list[MeasuredRun]] = {}
    for run in (part for whole in measured.section.runs for part in whole.by_jobs()):
        for clients in sorted({record.clients for record in run.co_runs()}):
            key = (run.mode, run.settings, run.manifest.mix, clients)
            candidates.setdefault(key, []).append(run)
    groups, excluded = [], []
    newest: dict[tuple[str, int], Group] = {}
    for (*_, mix, clients), runs in candidates.items():
        chosen, others = merge(runs, clients)
        excluded += others
        if not chosen:
            continue
        group = measured.group(chosen, clients, slo_ms)
        other = newest.setdefault((mix, clients), group)
        if all(other.jobs.get(client, job) == job for client, job in group.jobs.items()):
            groups.append(group)
        else:
            what = f"{group.first.variant}, {mix}, {clients_text(clients)}"
            unlike = f"other jobs than the newer {other.first.name}"
            excluded += [f"{name} ({what}): {unlike}" for name in group.run_ids]
    layouts = {group.first.settings for group in groups if group.first.mode == MODE_MIG}
    for run in (run for group in groups for run in group.runs):
        run.is_one_layout_of_several = run.mode == MODE_MIG and len(layouts) > 1
    groups.sort(key=lambda one: (one.mix, one.clients, one.first.order))
    return groups, excluded


def _own_error(measured: _Measured) -> dict[str, Any] | None:
    """One client where a baseline would find the same; its distance from it is the method's own."""
    nulls = [
        measured.co_run(run, record)
        for run in measured.section.runs
        for record in run.co_runs(PHASE_NULL)
        if record.outcome == "ok"
    ]
    ratio = estimate(one.clients[0].slowdown for one in nulls)
    if ratio is None:
        return None
    percent = 100 * abs(ratio.mean - 1)
    return {
        "percent": percent,
        "ratio": plain(ratio),
        "label": nulls[0].clients[0].label,
        "rounds": ratio.repeats,
        "is_over_limit": percent > OWN_ERROR_LIMIT_PERCENT,
    }


def _run(run: MeasuredRun) -> dict[str, Any]:
    """A run's own facts, with the proof of its mode."""
    manifest = run.manifest
    machine = _fields(manifest.environment, _OF_MACHINE)
    if manifest.environment.project_version is not None:
        machine["project_version"] = manifest.environment.project_version
    return {
        "run_id": run.name,
        **_fields(manifest, _OF_RUN),
        **run.kind,
        "gpu_uuid": manifest.environment.gpu_uuid,
        "environment": machine,
        "co_runs": [
            {
                **_fields(co_run.record, _OF_CO_RUN),
                "window_seconds": co_run.window_seconds,
                "proofs": [
                    {"client": one.client, "label": one.label, **msgspec.to_builtins(one.proof)}
                    for one in co_run.clients
                ],
            }
            for co_run in (CoRun(run, one, run.clients_of(one)) for one in run.co_run_records)
        ],
    }


def _fields(struct: msgspec.Struct, names: Sequence[str]) -> dict[str, Any]:
    return {name: msgspec.to_builtins(getattr(struct, name)) for name in names}


def _costs(
    group: dict[str, Any], gpu_price_per_hour: float | None, kwh_price: float | None
) -> dict[str, float | None]:
    """What 1,000 seconds of alone-work cost, by the card's hours and by its energy."""
    stp, joules = group["stp"], group["joules_per_work"]
    return {
        "cost_per_1000_work": (
            gpu_price_per_hour * 1000 / stp["mean"] / 3600 if gpu_price_per_hour and stp else None
        ),
        "energy_cost_per_1000_work": (
            kwh_price * 1000 * joules["mean"] / 3.6e6 if kwh_price and joules else None
        ),
    }
