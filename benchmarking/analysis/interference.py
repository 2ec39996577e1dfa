"""Who harms whom: each job beside each other one under a mode, from the runs of `--mix pairs`.

A pair is a mix of its own, so its co-runs merge over calls by the same rules as all others. No
input or output.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis import noise
from benchmarking.analysis.groups import build_group
from benchmarking.analysis.merging import merge
from benchmarking.analysis.runs import CoRun, RunView, failed_requests, mode_name, mode_order
from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.suite.plan import PAIR_CLIENTS

Record = Mapping[str, Any]
Pair = tuple[str, str]

OK, MISSING = "ok", "not measured"


@dataclass(frozen=True)
class InterferenceCell:
    """What one job felt beside another: both by label. A job beside itself pools both clients.

    `outcome` is a co-run's, or `MISSING` where the pair was planned and gave no answer.
    `tail_slowdown` is p99 over p99 alone, from the raw latencies of all repeats, `responses` the
    smaller number of those on the two sides.
    """

    job: str
    beside: str
    outcome: str
    slowdown: Estimate | None = None
    p99_ms: float | None = None
    tail_slowdown: float | None = None
    responses: int = 0
    stp: Estimate | None = None
    is_unverified: bool = False
    run_ids: tuple[str, ...] = ()

    @property
    def other(self) -> str:
        """The job beside it, as a sentence names it."""
        return "itself" if self.beside == self.job else self.beside


@dataclass(frozen=True)
class InterferenceMatrix:
    """All pairs of one mode and mix; `latency_jobs` are the labels of those with response times.

    `same_twice` are the figures of pairs that two or more runs took.
    """

    mode: str
    settings: str
    mix: str
    jobs: tuple[str, ...]
    latency_jobs: frozenset[str]
    cells: tuple[InterferenceCell, ...]
    same_twice: tuple[noise.SameTwice, ...] = ()

    @property
    def title(self) -> str:
        """The mode and its settings as they are written in sentences."""
        return mode_name(self.mode, self.settings)

    @property
    def jobs_with_tails(self) -> list[str]:
        """Labels of the jobs that answered often enough beside somebody for a p99."""
        with_tail = {cell.job for cell in self.cells if cell.tail_slowdown is not None}
        return [job for job in self.jobs if job in with_tail]

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The runs that the figures come from."""
        return tuple(dict.fromkeys(run_id for cell in self.cells for run_id in cell.run_ids))

    def cell(self, job: str, beside: str) -> InterferenceCell:
        """What `job` felt beside `beside`."""
        found = (c for c in self.cells if (c.job, c.beside) == (job, beside))
        return next(found, InterferenceCell(job, beside, MISSING))

    def every_cell(self) -> list[InterferenceCell]:
        """A cell for each job beside each, row by row, those without an answer included."""
        return [self.cell(job, beside) for job in self.jobs for beside in self.jobs]


def find_matrices(
    runs: Sequence[RunView], alone_of: Callable[[RunView], Mapping[str, Record]]
) -> tuple[list[InterferenceMatrix], list[str]]:
    """The matrices of a section's runs, newest first, and what is left out of them.

    `alone_of(run)` gives a run's baseline records by job key.
    """
    by_mode: dict[tuple[str, str, str], dict[Pair, list[RunView]]] = {}
    for run in runs:
        if run.is_pairs:
            by_pair = by_mode.setdefault((run.mode, run.settings, run.mix), {})
            for pair, view in _by_pair(run).items():
                by_pair.setdefault(pair, []).append(view)
    matrices, left_out = [], []
    for (*kind, mix), by_pair in by_mode.items():
        cells: list[InterferenceCell] = []
        groups = []
        latency_jobs: frozenset[str] = frozenset()
        for candidates in by_pair.values():
            chosen, others = merge(candidates, PAIR_CLIENTS)
            left_out += others
            latency_jobs = latency_jobs.union(*map(_with_latency, chosen))
            if chosen:
                alone = alone_of(chosen[0])
                cells += _cells(chosen, alone)
                groups.append(build_group(chosen, PAIR_CLIENTS, alone))
        jobs = tuple(dict.fromkeys(job for pair in by_pair for job in pair))
        if cells:
            with_latency = latency_jobs.intersection(jobs)
            twice = tuple(noise.same_twice(groups))
            matrices.append(InterferenceMatrix(*kind, mix, jobs, with_latency, tuple(cells), twice))
    return sorted(matrices, key=lambda m: (m.mix, mode_order(m.mode), m.settings)), left_out


def _by_pair(run: RunView) -> dict[Pair, RunView]:
    """The run as one run for each planned pair of labels, with that pair's co-runs alone."""
    by_pair: dict[Pair, list[dict[str, Any]]] = {}
    for planned in run.planned(PAIR_CLIENTS):
        first, second = (client["label"] for client in planned["clients"])
        by_pair.setdefault((first, second), []).append(planned)
    return {pair: _only(run, pair, planned) for pair, planned in by_pair.items()}


def _only(run: RunView, pair: Pair, planned: Sequence[Mapping[str, Any]]) -> RunView:
    names = {co_run["co_run"] for co_run in planned}
    return dataclasses.replace(
        run,
        manifest={
            **run.manifest,
            "mix": f"{run.mix}: {' beside '.join(pair)}",
            "plan": {"co_runs": list(planned)},
        },
        records=[r for r in run.records if r["phase"] == "baseline" or r["co_run"] in names],
    )


def _with_latency(run: RunView) -> set[str]:
    """Labels of the jobs that gave response times, alone or together."""
    return {
        record["label"]
        for record in run.records
        if record["record"] == "client" and record.get("latency_ms")
    }


def _cells(runs: Sequence[RunView], alone: Mapping[str, Record]) -> list[InterferenceCell]:
    """Both directions of one pair; one cell for a job beside itself."""
    co_runs = [co_run for run in runs for co_run in run.judged(PAIR_CLIENTS)]
    first, second = (client["label"] for client in co_runs[0].clients)
    directions = (
        [(first, second, (0, 1))]
        if first == second
        else [(first, second, (0,)), (second, first, (1,))]
    )
    run_ids = tuple(run.run_id for run in runs)
    return [
        dataclasses.replace(_cell(job, beside, places, co_runs, alone), run_ids=run_ids)
        for job, beside, places in directions
    ]


def _cell(
    job: str,
    beside: str,
    places: Sequence[int],
    co_runs: Sequence[CoRun],
    alone: Mapping[str, Record],
) -> InterferenceCell:
    """One direction; `places` are the numbers of the clients that run `job`."""
    outcome = next((c.record["outcome"] for c in co_runs if not c.is_ok), OK)
    # A pair that failed once has no figure, whatever its other repeats gave.
    good = co_runs if outcome == OK else []
    records = [[co_run.clients[place] for place in places] for co_run in good]
    latencies = [ms for members in records for r in members for ms in r.get("latency_ms") or []]
    job_key = co_runs[0].clients[places[0]].get("job_key", "")
    by_itself = alone.get(job_key) or {}
    alone_ms = by_itself.get("latency_ms") or []
    missed = sum(failed_requests(r) for members in records for r in members)
    tail_slowdown = scores.tail_slowdown(
        latencies,
        alone_ms,
        scores.TAIL_PERCENT,
        failed=missed,
        failed_alone=failed_requests(by_itself),
    )
    return InterferenceCell(
        job=job,
        beside=beside,
        outcome=outcome,
        slowdown=estimate(_mean_slowdown(members) for members in records),
        p99_ms=(
            None
            if tail_slowdown is None
            else scores.latency_percentile(latencies, scores.TAIL_PERCENT, missed)
        ),
        tail_slowdown=tail_slowdown,
        responses=min(len(latencies), len(alone_ms)),
        stp=estimate(co_run.summary("stp") for co_run in good),
        is_unverified=any(co_run.is_unverified for co_run in good),
    )


def _mean_slowdown(records: Sequence[Record]) -> float | None:
    known = [record["slowdown"] for record in records if record.get("slowdown") is not None]
    return statistics.fmean(known) if len(known) == len(records) else None
