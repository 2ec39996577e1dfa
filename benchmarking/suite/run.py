"""A suite run from its first download to its last record: alone first, then together.

Every record is written as soon as it is known, since what comes later may fail.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.cli import EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, RunEnded, SuiteError
from benchmarking.measuring.jobs import resolve_all
from benchmarking.measuring.sampler import Sampler
from benchmarking.modes.names import MODE_MIG, MODE_MPS
from benchmarking.planning.plan import Plan, PlannedCoRun, carried_arguments
from benchmarking.planning.ramp import Ramp
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_NULL, PHASE_SHARE_BASELINE
from benchmarking.records.types import ClientRecord, RunOutcome
from benchmarking.suite import baselines, preflight
from benchmarking.suite.baselines import BaselineMismatchError, newest_reusable, require_reusable
from benchmarking.suite.measurement import Measurement, RunContext
from benchmarking.suite.resume import EarlierPart, unlike_environment


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
        self._repeated: set[str] = set()  # jobs whose baseline was measured again
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
        outcome: RunOutcome = "failed"
        if self._round_is_done():
            self._writer.finish("complete")
            return EXIT_COMPLETE
        try:
            self._resolve_jobs()
            self._take_over_baselines()
            with Sampler(
                self._writer.samples_path,
                self._writer.monitor_log_path,
                gpu=gpu["uuid"] if gpu else None,
            ) as sampler:
                self._context.note(sampler.failure)
                self._note_idle_power(sampler)
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

    def _round_is_done(self) -> bool:
        """Whether nothing of a round is left to do, so that nobody need look for data again."""
        number, earlier = self._context.round, self._earlier
        runs = [*self._plan.baseline, *self._plan.co_runs]
        due = [run.co_run for run in runs if number is not None and run.repeat == number - 1]
        found = [earlier.finished(name) for name in due if earlier]
        return (
            bool(due)
            and len(found) == len(due)
            and all(record is not None and record[0].outcome == "ok" for record in found)
        )

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
        answers = resolve_all(jobs.values(), self._context.stop, self._progress.say)
        resolved = {
            job_key: [str(argument) for argument in answer.get("arguments") or []]
            for job_key, answer in zip(jobs, answers, strict=True)
        }
        if self._earlier:
            self._require_like_earlier(self._earlier, answers, resolved)
        for (job_key, client), answer in zip(jobs.items(), answers, strict=True):
            if resolved[job_key] != found.get(job_key):
                self._change_clients(job_key, resolved[job_key])
            for note in answer.get("notes") or []:
                self._context.note(f"{client.label}: {note}")
            self._context.describe_environment(answer.get("environment") or {})
        self._writer.update_manifest(resolved_arguments=resolved)
        self._save_plan()

    def _require_like_earlier(
        self, earlier: EarlierPart, answers: Sequence[dict[str, Any]],
        resolved: Mapping[str, Sequence[str]],
    ) -> None:  # fmt: skip
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
        unlike_environment(earlier, known, resolved)

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
        """Keep the plan; what was measured before stands in it as it was run then."""
        plan = self._setup.secrets.hide(self._plan.to_dict())
        before = self._earlier.run.manifest.plan if self._earlier else {}
        for part, rows in plan.items():
            ran = {
                row["co_run"]: row for row in before.get(part, ())
                if self._earlier and self._earlier.finished(row["co_run"])
            }  # fmt: skip
            plan[part] = [ran.get(row["co_run"], row) for row in rows]
        self._writer.update_manifest(plan=plan)

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

    def _note_idle_power(self, sampler: Sampler) -> None:
        """Keep what the card draws before the first client of the run."""
        if self._setup.gpu and self._writer.manifest.environment.idle_power_watts is None:
            samples = sampler.samples_past(time.monotonic())
            watts = samples[-1].get("power_draw_watts") if samples else None
            self._context.describe_environment({"idle_power_watts": watts})

    # --- alone and together ------------------------------------------------------------------

    def _run_baselines(self, sampler: Sampler) -> None:
        """Run every job alone, and the null; the first repeat calibrates what is carried on."""
        total = len(self._plan.baseline)
        for number in range(total):
            planned = self._plan.baseline[number]
            if not self._is_in_round(planned):
                continue
            is_calibrated = planned.clients[0].job_key in self._measured.reference.whole
            share = "instance" if self._setup.mode.name == MODE_MIG else "partition"
            where = {PHASE_SHARE_BASELINE: f" on its {share}", PHASE_NULL: ", the null"}
            what = f"{planned.clients[0].label} alone{where.get(planned.phase, '')}"
            stage = f"baseline {number + 1}/{total}: {what}"
            record = self._run_alone(planned, stage, sampler)
            if not is_calibrated:
                self._change_clients(record.job_key, carried_arguments(record.figures))
            self._save_plan()
            if planned.phase == PHASE_BASELINE and not self._is_done(planned):
                self._repeat_disturbed(record.job_key, sampler)

    def _run_alone(
        self, planned: PlannedCoRun, stage: str, sampler: Sampler, *, is_again: bool = False
    ) -> ClientRecord:
        seconds = preflight.estimated_seconds(planned, self._setup)
        with self._stage(planned, stage, seconds):
            rule = preflight.finish_rule(self._setup, planned)
            return self._measured.run_one(planned, rule, sampler, is_again=is_again)[0]

    def _repeat_disturbed(self, job_key: str, sampler: Sampler) -> None:
        """Measure a baseline again that was disturbed, once for each job."""
        found = baselines.disturbed(self._measured.reference.repeats_of(job_key))
        if found is None or self._setup.is_cpu_demo:
            return
        name, why = found
        planned = next(run for run in self._plan.baseline if run.co_run == name)
        self._measure_again(planned, why, sampler)
        found = baselines.disturbed(self._measured.reference.repeats_of(job_key))
        if found is not None:
            self._context.note(f"{found[0]}: still disturbed ({found[1]})")

    def _measure_again(self, planned: PlannedCoRun, why: str, sampler: Sampler) -> None:
        """Measure a baseline once more; what it was before counts no longer."""
        client = planned.clients[0]
        self._context.note(f"{planned.co_run}: the baseline was disturbed ({why}); it is repeated")
        # With what was calibrated by then, so that it is the same work.
        added = self._added_arguments.get(client.job_key, ())
        again = planned.map_clients(lambda one: one.with_arguments(added))
        self._run_alone(again, f"again: {client.label} alone", sampler, is_again=True)

    def _is_in_round(self, planned: PlannedCoRun) -> bool:
        """Whether a co-run is to be done now, or was in an earlier round."""
        number = self._context.round
        if number is None or planned.repeat == number - 1:
            return True
        return planned.repeat < number - 1 and self._is_done(planned)

    def _is_done(self, planned: PlannedCoRun) -> bool:
        return bool(self._earlier and self._earlier.finished(planned.co_run))

    def _stage(
        self, planned: PlannedCoRun, text: str, seconds: float | None
    ) -> contextlib.AbstractContextManager[None]:
        """Say that a co-run begins, unless one of an earlier round is only looked up."""
        if self._context.round is not None and self._is_done(planned):
            return contextlib.nullcontext()
        return self._progress.stage(text, seconds)

    def _run_co_runs(self, sampler: Sampler) -> None:
        """Run the counts of the plan, and those next to them that the ramp asks for."""
        if self._request.is_paired:
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
        for planned in filter(self._is_in_round, self._plan.co_runs):
            try:
                took = max(took, self._run_planned(planned, took, sampler))
            except RunEnded as end:
                failure = failure or _only_failed(end)
        if failure is not None:
            raise failure

    def _run_count(self, count: int, sampler: Sampler) -> bool:
        """Run every repeat of one count; return whether all stayed within the bounds."""
        took = 0.0
        for planned in filter(self._is_in_round, self._co_runs_of(count)):
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
        if planned.repeat > 0 and not self._is_done(planned) and is_over:
            self._context.note(
                f"{planned.co_run} left out: the budget of {budget:g} minutes allows no further "
                "repeat"
            )
            return 0.0
        rule = preflight.finish_rule(self._setup, planned)
        what = f"co-run {planned.co_run}: {len(planned.clients)} clients under {planned.mode}"
        usual = preflight.estimated_seconds(planned, self._setup)
        begin = time.monotonic()
        with self._stage(planned, what, took or usual):
            clients = self._measured.run_one(planned, rule, sampler)
        seconds = 0.0 if self._is_done(planned) else time.monotonic() - begin
        self._repeat_impossible_baselines(clients, sampler)
        return seconds

    def _repeat_impossible_baselines(
        self, clients: Sequence[ClientRecord], sampler: Sampler
    ) -> None:
        """Measure again, once, what was alone slower than together; under MPS and MIG it cannot."""
        own = {run.clients[0].job_key: run for run in self._plan.baseline}
        if self._setup.mode.name in (MODE_MPS, MODE_MIG):
            return
        for client in clients:
            planned = own.get(client.job_key)
            faster = baselines.impossible_speed(client)
            if planned is None or faster is None or client.job_key in self._repeated:
                continue
            self._repeated.add(client.job_key)
            self._measure_again(planned, f"client {client.client}: {faster}", sampler)

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
