"""A suite run from its first download to its last record: alone first, then together.

Every record is written as soon as it is known, since what comes later may fail.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.cli import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, RunEnded, SuiteError
from benchmarking.modes.names import MODE_MIG
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_SHARE_BASELINE
from benchmarking.suite import preflight
from benchmarking.suite.baselines import BaselineMismatchError, newest_reusable, require_reusable
from benchmarking.suite.jobs import resolve_all
from benchmarking.suite.launcher import FinishRule
from benchmarking.suite.measurement import Measurement, RunContext
from benchmarking.suite.plan import Plan, PlannedCoRun, carried_arguments
from benchmarking.suite.ramp import Ramp
from benchmarking.suite.resume import unlike_environment
from benchmarking.suite.sampler import Sampler


class SuiteRun:
    """Carries out a setup, writing every record as soon as it is known.

    `ending` says why the run ended, where it did not come to its end.
    """

    def __init__(self, context: RunContext) -> None:
        """Take what to do and how; nothing is run yet."""
        self._context = context
        self._setup = context.setup
        self._request = context.setup.request
        self._writer = context.writer
        self._progress = context.progress
        self._earlier = context.earlier
        self._plan = context.setup.plan
        self._measured = Measurement(context)
        self._added_arguments: dict[str, list[str]] = {}
        self._start_seconds = time.monotonic()
        self.ending: str | None = None
        self._code = EXIT_FAILED

    def execute(self) -> int:
        """Run everything and return the exit code; the manifest says how it ended.

        Where it can be written: a full disk or a folder that was taken away ends the run, too.
        """
        try:
            return self._execute()
        except OSError as error:
            folder = self._writer.folder
            said = (
                f"cannot write to {folder} ({error.strerror or error}): make room there or bring "
                f"it back, then go on with --resume {folder}"
            )
            self._progress.say(said)
            self.ending = f"{said}; before that: {self.ending}" if self.ending else said
            return self._code

    def _execute(self) -> int:
        gpu = self._setup.gpu
        outcome = "failed"
        try:
            self._resolve_jobs()
            self._take_over_baselines()
            with Sampler(
                self._writer.samples_path,
                self._writer.monitor_log_path,
                gpu=gpu["uuid"] if gpu else None,
            ) as sampler:
                self._context.note(sampler.failure)
                self._run_baselines(sampler)
                self._run_co_runs(sampler)
            outcome = "complete"
        except RunEnded as end:
            outcome, self._code, self.ending = end.outcome, end.exit_code, end.reason
            self._context.note(self.ending)
        except SuiteError as error:
            self._code, self.ending = error.exit_code, str(error)
            self._context.note(self.ending)
            # Nothing new is known of a run that may not go on here, or not yet.
            if self._earlier and not self._measured.done:
                outcome = self._earlier.outcome
        finally:
            self._writer.finish(outcome)
        return EXIT_COMPLETE if outcome == "complete" else self._code

    # --- once before -------------------------------------------------------------------------

    def _resolve_jobs(self) -> None:
        """Let each distinct job find or download its data once; clients never download.

        What a reused baseline's jobs found is looked at first: the same data, and no second search.
        """
        reused = self._setup.baseline_run
        found = (reused.manifest.resolved_arguments if reused else None) or {}
        for job_key, arguments in found.items():
            self._change_clients(job_key, arguments)
        jobs = self._plan.jobs()
        labels = ", ".join(client.label for client in jobs.values())
        with self._progress.stage(f"resolving data and weights: {labels}", None):
            answers = resolve_all(jobs.values(), self._context.stop, self._progress.say)
        resolved = {
            job_key: [str(argument) for argument in answer.get("arguments") or []]
            for job_key, answer in zip(jobs, answers, strict=True)
        }
        if self._earlier:
            self._require_like_earlier(answers, resolved)
        for (job_key, client), answer in zip(jobs.items(), answers, strict=True):
            if resolved[job_key] != found.get(job_key):
                self._change_clients(job_key, resolved[job_key])
            for note in answer.get("notes") or []:
                self._context.note(f"{client.label}: {note}")
            self._context.describe_environment(answer.get("environment") or {})
        self._writer.update_manifest(resolved_arguments=resolved)
        self._save_plan()

    def _require_like_earlier(
        self, answers: Sequence[dict[str, Any]], resolved: Mapping[str, Sequence[str]]
    ) -> None:
        """Refuse to go on in another environment, or with other data."""
        gpu = self._setup.gpu or {}
        known = {
            "gpu_name": gpu.get("name"),
            "gpu_uuid": gpu.get("uuid"),
            "driver_version": gpu.get("driver_version"),
            "timeslice": self._setup.timeslice,
            "host_cores": self._setup.cores,
        }
        for answer in answers:
            environment = answer.get("environment") or {}
            known |= {name: environment.get(name) for name in ("versions", "git_commit")}
        unlike_environment(self._earlier, known, resolved)

    def _change_clients(self, job_key: str, arguments: Sequence[str]) -> None:
        """Give more flags to the clients of a job that have not run yet."""
        self._added_arguments.setdefault(job_key, []).extend(arguments)
        self._plan = self._plan.map_clients(
            lambda client: (
                client.with_arguments(arguments) if client.job_key == job_key else client
            ),
            skip=self._measured.done,
        )

    def _save_plan(self) -> None:
        self._writer.update_manifest(plan=self._setup.secrets.hide(self._plan.to_dict()))

    def _take_over_baselines(self) -> None:
        """Reuse another run's baselines where they were asked for, or where MIG needs them."""
        results_dir, manifest = self._request.results_dir, self._writer.manifest
        jobs = list(self._plan.jobs())
        run = self._setup.baseline_run
        if run is not None:
            try:
                require_reusable(run, manifest, jobs)
            except BaselineMismatchError as error:
                raise SuiteError(str(error), EXIT_USAGE) from error
        elif self._setup.mode.name == MODE_MIG:
            run = newest_reusable(results_dir, manifest, jobs)
            if run is None:
                self._context.note(
                    "MIG is on and no matching whole-GPU baseline was found in "
                    f"{results_dir}: STP and overhead stay unknown (take one with --mode "
                    "exclusive before MIG is enabled)"
                )
        if run is None:
            return
        self._progress.say(f"baselines are those of run {run.run_id}")
        reference = self._measured.reference
        reference.whole, reference.whole_joules = run.baselines(), run.energy_alone_joules()
        self._writer.update_manifest(baseline_run_id=run.run_id)
        for job_key, record in reference.whole.items():
            self._change_clients(job_key, carried_arguments(record.figures))
        self._save_plan()

    # --- alone and together ------------------------------------------------------------------

    def _run_baselines(self, sampler: Sampler) -> None:
        least = preflight.least_seconds(self._setup, PHASE_BASELINE)
        jobs = 1 if self._setup.is_cpu_demo else preflight.BASELINE_MIN_JOBS
        rule = FinishRule(min_seconds=least, min_jobs=jobs, long_job_seconds=least)
        total = len(self._plan.baseline)
        for number in range(total):
            planned = self._plan.baseline[number]
            client = planned.clients[0]
            is_share = planned.phase == PHASE_SHARE_BASELINE
            where = "on its instance" if is_share else "alone"
            seconds = preflight.estimated_seconds(planned, self._setup)
            with self._progress.stage(
                f"baseline {number + 1}/{total}: {client.label} {where}", seconds
            ):
                record = self._measured.run_one(planned, rule, sampler)[0]
            known = self._measured.reference.share if is_share else self._measured.reference.whole
            known[client.job_key] = record
            if not is_share or client.job_key not in self._measured.reference.whole:
                self._change_clients(client.job_key, carried_arguments(record.figures))
            self._save_plan()

    def _run_co_runs(self, sampler: Sampler) -> None:
        """Run the counts of the plan, and those next to them that the ramp asks for."""
        if self._request.is_pairs:
            self._run_pairs(sampler)
            return
        ramp = Ramp(
            sorted({len(run.clients) for run in self._plan.co_runs}),
            step=self._request.mix_size,
            bisect=self._request.bisect,
            until_break=self._request.until_break,
        )
        failure: RunEnded | None = None
        while (count := ramp.next_count()) is not None:
            try:
                holds = self._run_count(count, sampler)
            except RunEnded as end:
                failure, holds = failure or _only_failed(end), False
            ramp.note(count, holds=holds)
        if ramp.first_bad is not None:
            held = "no smaller count" if ramp.last_good is None else f"{ramp.last_good}"
            self._context.note(f"breaking point: {ramp.first_bad} at once; {held} held")
        if failure is not None:
            raise failure

    def _run_pairs(self, sampler: Sampler) -> None:
        """Run every pair: one that fails is an answer, and says nothing of the others."""
        failure: RunEnded | None = None
        took = 0.0
        for planned in self._plan.co_runs:
            try:
                took = max(took, self._run_planned(planned, took, sampler))
            except RunEnded as end:
                failure = failure or _only_failed(end)
        if failure is not None:
            raise failure

    def _run_count(self, count: int, sampler: Sampler) -> bool:
        """Run every repeat of one count; return whether all stayed within the bounds."""
        took = 0.0
        for planned in self._co_runs_of(count):
            took = max(took, self._run_planned(planned, took, sampler))
            if self._measured.stop_reasons.get(planned.co_run) is not None:
                return False
        return True

    def _run_planned(self, planned: PlannedCoRun, took: float, sampler: Sampler) -> float:
        """Run a co-run unless it is a repeat past the budget; return the seconds that it took.

        `took` is how long the longest one before it took.
        """
        budget = self._request.budget_minutes
        elapsed = time.monotonic() - self._start_seconds
        is_over = budget is not None and elapsed + took > 60 * budget
        is_done = self._earlier and self._earlier.finished(planned.co_run)
        if planned.repeat > 0 and not is_done and is_over:
            self._context.note(
                f"{planned.co_run} left out: the budget of {budget:g} minutes allows no further "
                "repeat"
            )
            return 0.0
        rule = FinishRule(
            min_seconds=preflight.least_seconds(self._setup, planned.phase),
            window_seconds=self._request.window_seconds,
        )
        what = f"co-run {planned.co_run}: {len(planned.clients)} clients under {planned.mode}"
        usual = preflight.estimated_seconds(planned, self._setup)
        begin = time.monotonic()
        with self._progress.stage(what, took or usual):
            self._measured.run_one(planned, rule, sampler)
        return time.monotonic() - begin

    def _co_runs_of(self, count: int) -> list[PlannedCoRun]:
        """The co-runs of one count; those that the ramp has asked for are added to the plan."""
        planned = [run for run in self._plan.co_runs if len(run.clients) == count]
        if planned:
            return planned
        added = Plan((), self._setup.co_runs_of(count)).map_clients(
            lambda client: client.with_arguments(self._added_arguments.get(client.job_key, []))
        )
        self._plan = Plan(self._plan.baseline, (*self._plan.co_runs, *added.co_runs))
        self._save_plan()
        return list(added.co_runs)


def _only_failed(end: RunEnded) -> RunEnded:
    """Return the end of a co-run whose clients failed; any other ends the whole run."""
    if end.exit_code != EXIT_FAILED:
        raise end
    return end
