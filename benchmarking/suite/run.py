"""A suite run from its first download to its last record: alone first, then together.

Every record is written as soon as it is known, since what comes later may fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.hardware import host_limit
from benchmarking.hardware.gpu_samples import summarize_samples
from benchmarking.modes.sharing_mode import GPU_ANSWERS, GPU_LOST_FIX, SharingMode
from benchmarking.records.run_folder import (
    PHASE_BASELINE,
    PHASE_CO_RUN,
    PHASE_SHARE_BASELINE,
    RunWriter,
)
from benchmarking.suite import preflight, proofs, stop_reasons
from benchmarking.suite.baselines import (
    BaselineMismatchError,
    identity_differences,
    newest_reusable,
    require_reusable,
)
from benchmarking.suite.co_run_records import client_record, co_run_record
from benchmarking.suite.console import Progress
from benchmarking.suite.jobs import resolve_all
from benchmarking.suite.launcher import (
    OUTCOME_INTERRUPTED,
    OUTCOME_INVALID,
    OUTCOME_OK,
    Client,
    CoRunOutcome,
    CoRunRefused,
    FinishRule,
    Interruption,
    Launcher,
    Patience,
    client_base_environment,
)
from benchmarking.suite.limits import PERCENTAGE_VARIABLE
from benchmarking.suite.plan import (
    COMMAND_WORKLOAD,
    MODE_MIG,
    Plan,
    PlannedCoRun,
    carried_arguments,
)
from benchmarking.suite.ramp import Ramp
from benchmarking.suite.resume import EarlierPart, unlike_environment
from benchmarking.suite.sampler import Sampler
from benchmarking.suite.setup import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_INVALID,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    Setup,
    SuiteError,
)

Record = dict[str, Any]

# A client of ours that cannot use the GPU leaves with this code.
CLIENT_EXIT_NO_GPU = 3
# Past what a time service adds to the wall clock, or takes from it, in slewing.
CLOCK_TOLERANCE_SECONDS = 2.0


@dataclass
class _Reference:
    """Baselines by job: on the whole GPU, and on the client's own share where there is one."""

    whole: dict[str, Record] = field(default_factory=dict)
    whole_joules: dict[str, float | None] = field(default_factory=dict)
    share: dict[str, Record] = field(default_factory=dict)


class SuiteRun:
    """Carries out a setup, writing every record as soon as it is known.

    `ending` says why the run ended, where it did not come to its end.
    """

    def __init__(
        self,
        setup: Setup,
        writer: RunWriter,
        stop: Interruption,
        progress: Progress,
        earlier: EarlierPart | None = None,
    ) -> None:
        """Take what to do, where to write it, whom to ask whether to stop, and whom to tell.

        `earlier` is what a run that goes on has of it already.
        """
        self._setup = setup
        self._request = setup.request
        self._plan = setup.plan
        self._writer = writer
        self._stop = stop
        self._progress = progress
        self._say = progress.say
        self._earlier = earlier
        self._launcher = Launcher(
            client_base_environment(os.environ),
            patience=Patience(timeout=setup.request.timeout_seconds),
            interruption=stop,
            say=progress.say,
        )
        self._reference = _Reference()
        self._done: set[str] = set()
        self._added_arguments: dict[str, list[str]] = {}
        self._stop_reasons: dict[str, Record | None] = {}
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
            self._say(said)
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
                self._note(sampler.failure)
                self._run_baselines(sampler)
                self._run_co_runs(sampler)
            outcome = "complete"
        except RunEnded as end:
            outcome, self._code, self.ending = end.outcome, end.exit_code, end.reason
            self._note(self.ending)
        except SuiteError as error:
            self._code, self.ending = error.exit_code, str(error)
            self._note(self.ending)
            # Nothing new is known of a run that may not go on here, or not yet.
            outcome = self._earlier.outcome if self._earlier and not self._done else outcome
        finally:
            self._writer.finish(outcome)
        return EXIT_COMPLETE if outcome == "complete" else self._code

    def _note(self, text: str | None) -> None:
        """Say something and keep it with the run."""
        if text:
            self._say(text)
        if text and text not in self._writer.manifest["notes"]:
            self._writer.update_manifest(notes=[*self._writer.manifest["notes"], text])

    # --- once before -------------------------------------------------------------------------

    def _resolve_jobs(self) -> None:
        """Let each distinct job find or download its data once; clients never download.

        What a reused baseline's jobs found is looked at first: the same data, and no second search.
        """
        reused = self._setup.baseline_run
        found = (reused.manifest.get("resolved_arguments") if reused else None) or {}
        for job_key, arguments in found.items():
            self._change_clients(job_key, arguments)
        jobs = self._plan.jobs()
        labels = ", ".join(client.label for client in jobs.values())
        with self._progress.stage(f"resolving data and weights: {labels}", None):
            answers = resolve_all(jobs.values(), self._stop, self._say)
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
                self._note(f"{client.label}: {note}")
            self._describe_environment(answer.get("environment") or {})
        self._writer.update_manifest(resolved_arguments=resolved)
        self._save_plan()

    def _require_like_earlier(
        self, answers: Sequence[Record], resolved: Mapping[str, Sequence[str]]
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

    def _describe_environment(self, found: Mapping[str, Any]) -> None:
        """Fill in what is not known of the environment yet."""
        environment = self._writer.manifest["environment"]
        unknown = {
            key: value for key, value in found.items()
            if key in environment and value is not None and environment[key] in (None, {})
        }  # fmt: skip
        if unknown:
            self._writer.update_manifest(environment={**environment, **unknown})

    def _change_clients(self, job_key: str, arguments: Sequence[str]) -> None:
        """Give more flags to the clients of a job that have not run yet."""
        self._added_arguments.setdefault(job_key, []).extend(arguments)
        self._plan = self._plan.map_clients(
            lambda client: (
                client.with_arguments(arguments) if client.job_key == job_key else client
            ),
            skip=self._done,
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
                self._note(
                    "MIG is on and no matching whole-GPU baseline was found in "
                    f"{results_dir}: STP and overhead stay unknown (take one with --mode "
                    "exclusive before MIG is enabled)"
                )
        if run is None:
            return
        self._say(f"baselines are those of run {run.run_id}")
        self._reference.whole = run.baselines()
        self._reference.whole_joules = run.energy_alone_joules()
        self._writer.update_manifest(baseline_run_id=run.run_id)
        for job_key, record in self._reference.whole.items():
            self._change_clients(job_key, carried_arguments(record["figures"]))
        self._save_plan()

    # --- alone and together ------------------------------------------------------------------

    def _run_baselines(self, sampler: Sampler) -> None:
        least = preflight.least_seconds(self._setup, is_baseline=True)
        jobs = 1 if self._setup.is_cpu_demo else preflight.BASELINE_MIN_JOBS
        rule = FinishRule(min_seconds=least, min_jobs=jobs, long_job_seconds=least)
        total = len(self._plan.baseline)
        for number in range(total):
            planned = self._plan.baseline[number]
            client = planned.clients[0]
            is_share = planned.phase == PHASE_SHARE_BASELINE
            where = "on its instance" if is_share else "alone"
            seconds = preflight.estimated_seconds(planned, self._setup, is_baseline=True)
            with self._progress.stage(
                f"baseline {number + 1}/{total}: {client.label} {where}", seconds
            ):
                record = self._run_one(planned, rule, sampler)[0]
            known = self._reference.share if is_share else self._reference.whole
            known[client.job_key] = record
            if not is_share or client.job_key not in self._reference.whole:
                self._change_clients(client.job_key, carried_arguments(record["figures"]))
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
            self._note(f"breaking point: {ramp.first_bad} at once; {held} held")
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
            if self._stop_reasons.get(planned.co_run) is not None:
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
            self._note(
                f"{planned.co_run} left out: the budget of {budget:g} minutes allows no further "
                "repeat"
            )
            return 0.0
        rule = FinishRule(
            min_seconds=preflight.least_seconds(self._setup, is_baseline=False),
            window_seconds=self._request.window_seconds,
        )
        what = f"co-run {planned.co_run}: {len(planned.clients)} clients under {planned.mode}"
        usual = preflight.estimated_seconds(planned, self._setup, is_baseline=False)
        begin = time.monotonic()
        with self._progress.stage(what, took or usual):
            self._run_one(planned, rule, sampler)
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

    # --- one co-run --------------------------------------------------------------------------

    def _run_one(self, planned: PlannedCoRun, rule: FinishRule, sampler: Sampler) -> list[Record]:
        """Run one co-run, write its records, return those of its clients.

        Raises `RunEnded` when it did not end well, `SuiteError` when the clients were not what
        they should be: what follows would build on it.
        """
        if self._stop.requested:
            raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
        finished = self._earlier and self._earlier.finished(planned.co_run)
        if finished:
            return self._take_from_record(*finished)
        mode = self._setup.alone_mode if planned.phase == PHASE_BASELINE else self._setup.mode
        refusal: SuiteError | None = None

        def before_go(clients: list[Client]) -> None:
            nonlocal refusal
            try:
                self._check_identities(clients)
            except SuiteError as error:
                refusal = error
                raise CoRunRefused(str(error)) from error
            mode.observe()

        clock = wall_clock_offset()
        seen = self._launcher.run(planned, self._writer.client_paths, rule, before_go)
        self._done.add(planned.co_run)
        record, clients, gpu_lost = self._recorded(seen, mode, sampler, clock)
        if refusal is not None:
            raise refusal
        if gpu_lost and record["outcome"] != OUTCOME_INTERRUPTED:
            # What follows would only meet the same.
            outcome = "invalid" if record["outcome"] == OUTCOME_INVALID else "failed"
            raise RunEnded(outcome, EXIT_NO_GPU, f"{planned.co_run}: {record['reason']}")
        _raise_unless_well(record, clients)
        return clients

    def _take_from_record(self, record: Record, clients: list[Record]) -> list[Record]:
        """Do as if a co-run of the earlier part had been run just now."""
        self._say(f"{record['co_run']} is done already")
        self._done.add(record["co_run"])
        self._stop_reasons[record["co_run"]] = record.get("stop_reason")
        if record["phase"] == PHASE_BASELINE:
            joules = (record["gpu"] or {}).get("energy_joules")
            self._reference.whole_joules[clients[0]["job_key"]] = joules
        _raise_unless_well(record, clients)
        return clients

    def _check_identities(self, clients: list[Client]) -> None:
        """Refuse clients on another kind of device, or unlike those of the baseline."""
        wanted = "cpu" if self._setup.is_cpu_demo else "cuda"
        for client in clients:
            identity = client.identity or {}
            # A command says nothing of its device: the driver's process lists do.
            is_command = client.planned.workload == COMMAND_WORKLOAD
            if not is_command and identity.get("device") != wanted:
                raise SuiteError(
                    f"{client.name} ran on {identity.get('device')} though a GPU is there: torch "
                    f"{(identity.get('versions') or {}).get('torch')} cannot use it with driver "
                    f"{(self._setup.gpu or {}).get('driver_version')}; install a build of torch "
                    "that fits, or give --device cpu", EXIT_NO_GPU,
                )  # fmt: skip
            baseline = self._reference.whole.get(client.planned.job_key)
            unlike = identity_differences(baseline, identity)
            if unlike:
                raise SuiteError(
                    f"{client.name} is unlike its baseline: {'; '.join(unlike)}", EXIT_USAGE
                )
        if self._setup.mode.name != MODE_MIG:
            first = clients[0].identity or {}
            # A client with a part of the multiprocessors is shown no others.
            is_limited = PERCENTAGE_VARIABLE in clients[0].planned.environment
            seen = None if is_limited else first.get("multiprocessor_count")
            versions = first.get("versions") or {}
            self._describe_environment({"multiprocessor_count": seen, "versions": versions})

    def _recorded(
        self, seen: CoRunOutcome, mode: SharingMode, sampler: Sampler, clock: float
    ) -> tuple[Record, list[Record], str | None]:
        """Judge what was seen of a co-run and write its records: they, and how the GPU was lost."""
        planned, reference = seen.planned, self._reference
        samples = self._samples_of(seen, sampler)
        gpu = self._gpu_figures(seen, samples)
        gpu_lost, mode_failure = _lost(mode)
        clients = [
            client_record(seen, client, proof, reference.whole.get(client.planned.job_key))
            for client, proof in zip(
                seen.clients, proofs.judge_clients(mode, seen, samples), strict=True
            )
        ]
        clients = host_limit.judged(clients, gpu, reference.whole)
        baselines = dict(reference.whole)
        if planned.phase == PHASE_BASELINE and clients[0]["status"] == "ok":
            # A baseline is its own reference.
            job_key = clients[0]["job_key"]
            baselines[job_key] = clients[0]
            reference.whole_joules[job_key] = (gpu or {}).get("energy_joules")
        record = co_run_record(
            seen,
            clients,
            gpu,
            mode_failure=mode_failure,
            gpu_lost=gpu_lost,
            baselines=baselines,
            energy_alone_joules=reference.whole_joules,
            share_baselines=reference.share if planned.mode == MODE_MIG else None,
            host_cores=self._setup.cores,
        )
        foreign = proofs.foreign_pids_in_window(seen, samples)
        record["warnings"] += [*clock_warnings(clock), *proofs.contention_warnings(foreign)]
        record["is_contended"] = bool(foreign)
        # The bounds are for jobs that share the GPU.
        request, bounds = self._request, {}
        if planned.phase == PHASE_CO_RUN:
            bounds = {"max_slowdown": request.max_slowdown, "max_p99_ms": request.slo_ms}
        reason = stop_reasons.stop_reason(
            record, seen.clients, clients, **bounds, gpu_lost=gpu_lost
        )
        record["stop_reason"] = self._stop_reasons[planned.co_run] = reason
        for line in (*clients, record):
            self._writer.append_record(self._setup.secrets.hide(line))
        for warning in record["warnings"]:
            self._say(warning)
        if reason is not None:
            self._say(f"{planned.co_run} does not hold: {stop_reasons.in_words(reason)}")
        return record, clients, gpu_lost

    def _samples_of(self, seen: CoRunOutcome, sampler: Sampler) -> list[Record]:
        samples: list[Record] = []
        if seen.window_end_seconds is not None and not sampler.failure:
            samples = list(sampler.samples_past(seen.window_end_seconds))
            self._note(sampler.failure)
        for complaint in sampler.complaints():
            self._note(complaint)
        return samples

    def _gpu_figures(self, seen: CoRunOutcome, samples: list[Record]) -> Record | None:
        start, end = seen.window_start_seconds, seen.window_end_seconds
        if start is None or end is None or not samples:
            return None
        figures = summarize_samples(samples, start, end)
        if self._setup.is_cpu_demo:
            # A GPU that is there but not in use says nothing about this run.
            return {key: figures[key] if key == "host_cpu_percent" else None for key in figures}
        return figures


def _lost(mode: SharingMode) -> tuple[str | None, str | None]:
    """Say whether the GPU no longer answers, or else whether the mode is no longer in force."""
    lost = next((item for item in mode.check() if item.ok is False), None)
    if lost is None:
        return None, None
    if lost.check == GPU_ANSWERS:
        return f"the GPU was lost, the driver no longer answers for it: {GPU_LOST_FIX}", None
    return None, f"{lost.check}: {lost.found}"


def _only_failed(end: RunEnded) -> RunEnded:
    """Return the end of a co-run whose clients failed; any other ends the whole run."""
    if end.exit_code != EXIT_FAILED:
        raise end
    return end


def _raise_unless_well(record: Mapping[str, Any], clients: list[Record]) -> None:
    outcome, what = record["outcome"], f"{record['co_run']}: {record['reason']}"
    if outcome == OUTCOME_OK:
        return
    if outcome == OUTCOME_INTERRUPTED:
        raise RunEnded("interrupted", EXIT_INTERRUPTED, "interrupted")
    if outcome == OUTCOME_INVALID:
        raise RunEnded("invalid", EXIT_INVALID, what)
    said = next(
        (client["stderr_tail"][-1] for client in clients
         if client["status"] != "ok" and client["stderr_tail"]
         and str(client["reason"]) not in client["stderr_tail"][-1]), None,
    )  # fmt: skip
    no_gpu = any(client["exit_code"] == CLIENT_EXIT_NO_GPU for client in clients)
    reason = f"{what} ({said})" if said else what
    raise RunEnded("failed", EXIT_NO_GPU if no_gpu else EXIT_FAILED, reason)


def wall_clock_offset() -> float:
    """Return how far the wall clock is from the monotonic one: it changes when it is set."""
    return time.time() - time.monotonic()


def clock_warnings(offset: float) -> list[str]:
    """Say, in one sentence or none, by how much the wall clock was set since it had an `offset`."""
    seconds = wall_clock_offset() - offset
    if abs(seconds) <= CLOCK_TOLERANCE_SECONDS:
        return []
    said = f"the clock was set by {seconds:+.0f} s meanwhile"
    return [f"{said}; figures come from the monotonic clock"]
