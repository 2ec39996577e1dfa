"""A suite run from its first download to its last record: alone first, then together.

Every record is written as soon as it is known, since what comes later may fail.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from benchmarking.cli import EXIT_COMPLETE, EXIT_FAILED, RunEnded, SuiteError
from benchmarking.measuring import baselines
from benchmarking.measuring.jobs import resolve_all
from benchmarking.modes.names import MODE_MIG, MODE_MPS
from benchmarking.planning.plan import Plan, PlannedCoRun, carried_arguments
from benchmarking.planning.ramp import Ramp
from benchmarking.records.run_folder import PHASE_BASELINE, PHASE_NULL, PHASE_SHARE_BASELINE
from benchmarking.records.types import ClientRecord, RunOutcome
from benchmarking.suite import preflight
from benchmarking.suite.measurement import Measured, Measurement
from benchmarking.suite.resume import unlike_environment


class SuiteRun:
    """Carries out a setup; `ending` says why it ended, where it did not come to its end."""

    def __init__(self, measurement: Measurement) -> None:
        """Take what to do, where to write it and whom to ask; nothing is run yet."""
        self._measurement = measurement
        self._setup = measurement.setup
        self._writer = measurement.writer
        self._plan = measurement.setup.plan
        self._added_arguments: dict[str, list[str]] = {}
        self._repeated: set[str] = set()  # jobs whose baseline was measured again
        self._longest_seconds: dict[int, float] = {}  # that co-runs of so many clients took
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
            self._measurement.progress.say(said)
            self.ending = f"{said}; before that: {self.ending}" if self.ending else said
            return self._code

    def _execute(self) -> int:
        outcome: RunOutcome = "failed"
        is_done = False
        measurement = self._measurement
        if self._round_is_done():
            self._writer.finish("complete")
            return EXIT_COMPLETE
        try:
            self._resolve_jobs()
            self._take_over_baselines()
            with measurement.sampler as sampler:
                measurement.note(sampler.failure)
                self._note_idle_power()
                self._run_baselines()
                self._run_co_runs()
            outcome, is_done = "complete", True
        except RunEnded as end:
            outcome, self._code, self.ending = end.outcome, end.exit_code, end.reason
            measurement.note(self.ending)
        except SuiteError as error:
            self._code = error.exit_code
            self.ending = str(self._setup.secrets.hide(str(error)))
            measurement.note(self.ending)
            # Nothing new is known of a run that may not go on here, or not yet.
            if measurement.earlier and not measurement.done:
                outcome = measurement.earlier.outcome
        finally:
            self._writer.finish(outcome)
        # Not by the outcome: that of a run that may not go on here stays what it was.
        return EXIT_COMPLETE if is_done else self._code

    def _round_is_done(self) -> bool:
        """Whether nothing of a round is left to do, so that nobody need look for data again."""
        number = self._measurement.round
        runs = (*self._plan.baseline, *self._plan.co_runs)
        due = [run for run in runs if number is not None and run.repeat == number - 1]
        found = [self._measurement.finished(run) for run in due]
        return bool(due) and all(one is not None and one[0].outcome == "ok" for one in found)

    # --- once before -------------------------------------------------------------------------

    def _resolve_jobs(self) -> None:
        """Let each distinct job find or download its data once; clients never download.

        What a reused baseline's jobs found is looked at first: the same data, and no second search.
        Raises `SuiteError` where the run would go on in another environment, or with other data.
        """
        reused, measurement = self._setup.baseline_run, self._measurement
        found = (reused.manifest.resolved_arguments if reused else None) or {}
        for job_key, arguments in found.items():
            self._change_clients(job_key, arguments)
        jobs = self._plan.jobs()
        answers = resolve_all(jobs, measurement.stop, measurement.progress.say)
        resolved = {
            job_key: [str(argument) for argument in answer.get("arguments") or []]
            for job_key, answer in answers.items()
        }
        environments = [answer.get("environment") or {} for answer in answers.values()]
        if measurement.earlier:
            known = self._setup.environment()
            for one in environments:
                known |= {name: one.get(name) for name in ("versions", "git_commit")}
            unlike_environment(measurement.earlier, known, resolved)
        for job_key, answer in answers.items():
            if resolved[job_key] != found.get(job_key):
                self._change_clients(job_key, resolved[job_key])
            for note in answer.get("notes") or []:
                measurement.note(f"{jobs[job_key].label}: {note}")
        for environment in environments:
            measurement.describe_environment(environment)
        self._writer.update_manifest(resolved_arguments=resolved)
        self._save_plan()

    def _change_clients(self, job_key: str, arguments: Sequence[str]) -> None:
        """Give more flags to the clients of a job that have not run yet."""
        self._added_arguments.setdefault(job_key, []).extend(arguments)
        self._plan = self._plan.map_clients(
            lambda client: (
                client.with_arguments(arguments) if client.job_key == job_key else client
            ),
            skip=self._measurement.done,
        )

    def _save_plan(self) -> None:
        """Keep the plan; what was measured before stands in it as it was run then."""
        plan = self._setup.secrets.hide(self._plan.to_dict())
        if earlier := self._measurement.earlier:
            for part, rows in plan.items():
                before = {row["co_run"]: row for row in earlier.run.manifest.plan.get(part, ())}
                plan[part] = [
                    before.get(row["co_run"], row) if earlier.finished(row["co_run"]) else row
                    for row in rows
                ]
        self._writer.update_manifest(plan=plan)

    def _take_over_baselines(self) -> None:
        """Reuse another run's baselines where they were asked for, or where MIG needs them."""
        results_dir, manifest = self._setup.request.results_dir, self._writer.manifest
        jobs = list(self._plan.jobs())
        run = self._setup.baseline_run
        if run is not None:
            baselines.require_reusable(run, manifest, jobs)
        elif self._setup.mode.name == MODE_MIG:
            run = baselines.newest_reusable(results_dir, manifest, jobs)
            if run is None:
                self._measurement.note(
                    "MIG is on and no matching whole-GPU baseline was found in "
                    f"{results_dir}: STP and overhead stay unknown (take one with --mode "
                    "exclusive before MIG is enabled)"
                )
        if run is None:
            return
        self._measurement.progress.say(f"baselines are those of run {run.run_id}")
        then, now = run.manifest.environment.git_commit, manifest.environment.git_commit
        if then and now and then != now:
            self._measurement.note(
                f"the baselines of run {run.run_id} were measured by commit {then[:12]} of the "
                f"project, now it is {now[:12]}"
            )
        reference = self._measurement.reference
        reference.whole, reference.whole_joules = run.baselines(), run.energy_alone_joules()
        self._writer.update_manifest(baseline_run_id=run.run_id)
        for job_key, record in reference.whole.items():
            self._change_clients(job_key, carried_arguments(record.figures))
        self._save_plan()

    def _note_idle_power(self) -> None:
        """Keep what the card draws before the first client of the run."""
        if self._setup.gpu and self._writer.manifest.environment.idle_power_watts is None:
            samples = self._measurement.sampler.samples_past(time.monotonic())
            watts = samples[-1].get("power_draw_watts") if samples else None
            self._measurement.describe_environment({"idle_power_watts": watts})

    # --- alone and together ------------------------------------------------------------------

    def _run(
        self, planned: PlannedCoRun, stage: str, seconds: float | None, *, is_again: bool = False
    ) -> Measured:
        """Run a co-run, and say that it begins, unless one of an earlier round is looked up."""
        measurement, rule = self._measurement, preflight.finish_rule(self._setup, planned)
        if measurement.round is not None and self._is_done(planned) and not is_again:
            return measurement.run_one(planned, rule)
        seconds = seconds or preflight.estimated_seconds(planned, self._setup)
        with measurement.progress.stage(stage, seconds):
            return measurement.run_one(planned, rule, is_again=is_again)

    def _is_in_round(self, planned: PlannedCoRun) -> bool:
        """Whether a co-run is to be done now, or was in an earlier round."""
        number = self._measurement.round
        if number is None or planned.repeat == number - 1:
            return True
        return planned.repeat < number - 1 and self._is_done(planned)

    def _is_done(self, planned: PlannedCoRun) -> bool:
        return self._measurement.finished(planned) is not None

    def _run_baselines(self) -> None:
        """Run every job alone, and the null; the first repeat calibrates what is carried on."""
        total, reference = len(self._plan.baseline), self._measurement.reference
        for number in range(total):
            planned = self._plan.baseline[number]
            if not self._is_in_round(planned):
                continue
            is_calibrated = planned.clients[0].job_key in reference.whole
            share = "instance" if self._setup.mode.name == MODE_MIG else "partition"
            where = {PHASE_SHARE_BASELINE: f" on its {share}", PHASE_NULL: ", the null"}
            what = f"{planned.clients[0].label} alone{where.get(planned.phase, '')}"
            _, (record,) = self._run(planned, f"baseline {number + 1}/{total}: {what}", None)
            if not is_calibrated:
                self._change_clients(record.job_key, carried_arguments(record.figures))
            self._save_plan()
            if planned.phase == PHASE_BASELINE and not self._is_done(planned):
                self._repeat_disturbed(record.job_key)

    def _repeat_disturbed(self, job_key: str) -> None:
        """Measure a baseline again that was disturbed, once for each job."""
        reference = self._measurement.reference
        found = baselines.disturbed(reference.repeats_of(job_key))
        if found is None or self._setup.is_cpu_demo:
            return
        name, why = found
        self._measure_again(next(run for run in self._plan.baseline if run.co_run == name), why)
        found = baselines.disturbed(reference.repeats_of(job_key))
        if found is not None:
            self._measurement.note(f"{found[0]}: still disturbed ({found[1]})")

    def _measure_again(self, planned: PlannedCoRun, why: str) -> None:
        """Measure a baseline once more; what it was before counts no longer."""
        client = planned.clients[0]
        self._measurement.note(
            f"{planned.co_run}: the baseline was disturbed ({why}); it is repeated"
        )
        # With what was calibrated by then, so that it is the same work.
        added = self._added_arguments.get(client.job_key, ())
        again = planned.map_clients(lambda one: one.with_arguments(added))
        self._run(again, f"again: {client.label} alone", None, is_again=True)

    def _repeat_impossible_baselines(self, clients: Sequence[ClientRecord]) -> None:
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
            self._measure_again(planned, f"client {client.client}: {faster}")

    def _run_co_runs(self) -> None:
        """Run pairs, or counts with those next to them that the ramp asks for.

        A pair that fails is an answer, and says nothing of the others.
        """
        request = self._setup.request
        ramp = Ramp(
            sorted({len(run.clients) for run in self._plan.co_runs}),
            step=request.mix_size,
            bisect=request.bisect,
            until_break=request.until_break,
        )
        pairs = [[run] for run in self._plan.co_runs]
        failure: RunEnded | None = None
        for group in pairs if request.is_paired else self._ramp_groups(ramp):
            try:
                holds = self._run_group(group)
            except RunEnded as end:
                if end.exit_code != EXIT_FAILED:  # any other ends the whole run
                    raise
                failure, holds = failure or end, False
            ramp.note(len(group[0].clients), holds=holds)
        if ramp.first_bad is not None and not request.is_paired:
            held = "no smaller count" if ramp.last_good is None else f"{ramp.last_good}"
            self._measurement.note(f"breaking point: {ramp.first_bad} at once; {held} held")
        if failure is not None:
            raise failure

    def _ramp_groups(self, ramp: Ramp) -> Iterator[Sequence[PlannedCoRun]]:
        """Yield the co-runs of one count after another; those not laid out yet join the plan."""
        while (count := ramp.next_count()) is not None:
            planned = [run for run in self._plan.co_runs if len(run.clients) == count]
            if not planned:
                added = Plan((), self._setup.co_runs_of(count)).map_clients(
                    lambda one: one.with_arguments(self._added_arguments.get(one.job_key, []))
                )
                planned = list(added.co_runs)
                self._plan = Plan(self._plan.baseline, (*self._plan.co_runs, *planned))
                self._save_plan()
            yield planned

    def _run_group(self, group: Sequence[PlannedCoRun]) -> bool:
        """Run the repeats of one count, or a pair; return whether all stayed within the bounds."""
        for planned in filter(self._is_in_round, group):
            count, is_done = len(planned.clients), self._is_done(planned)
            longest = self._longest_seconds.get(count, 0.0)
            if planned.repeat > 0 and not is_done and self._is_past_budget(longest):
                self._measurement.note(
                    f"{planned.co_run} left out: the budget of "
                    f"{self._setup.request.budget_minutes:g} minutes allows no further repeat"
                )
                continue
            stage = f"co-run {planned.co_run}: {count} clients under {planned.mode}"
            begin = time.monotonic()
            record, clients = self._run(planned, stage, longest)
            if not is_done:
                self._longest_seconds[count] = max(longest, time.monotonic() - begin)
            self._repeat_impossible_baselines(clients)
            if record.stop_reason is not None:
                return False
        return True

    def _is_past_budget(self, seconds: float) -> bool:
        """Whether so many seconds more are over the budget."""
        minutes = self._setup.request.budget_minutes
        spent = time.monotonic() - self._start_seconds
        return minutes is not None and spent + seconds > 60 * minutes
