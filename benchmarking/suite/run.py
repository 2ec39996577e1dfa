"""A suite run from its first download to its last record: alone first, then together.

Every record is written as soon as it is known, since what comes later may fail.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from benchmarking.suite import occupancy, stop_reasons
from benchmarking.suite import plan as planning
from benchmarking.suite.baselines import (
    BaselineMismatchError,
    identity_differences,
    newest_reusable,
    require_reusable,
)
from benchmarking.suite.co_run_records import client_record, co_run_record
from benchmarking.suite.job_resolution import resolve
from benchmarking.suite.launcher import (
    OUTCOME_INTERRUPTED,
    OUTCOME_INVALID,
    OUTCOME_OK,
    Client,
    CoRunRefused,
    CoRunResult,
    FinishRule,
    Launcher,
    StopSignal,
    Timeouts,
    client_base_environment,
)
from benchmarking.suite.mps_knobs import PERCENTAGE_VARIABLE
from benchmarking.suite.plan import (
    COMMAND_WORKLOAD,
    MODE_MIG,
    SIZE_GUIDE,
    PlannedCoRun,
)
from benchmarking.suite.proofs import judge_clients, strangers_beside
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
from benchmarking.suite.wall_clock import WallClock

# A client of ours that cannot use the GPU leaves with this code.
CLIENT_EXIT_NO_GPU = 3

# The least measured seconds, alone and together: under these a figure is noise. What is measured
# alone stands behind every figure of the run, so there jobs are never fewer on a GPU.
GUIDE_MIN_SECONDS = 5.0
BASELINE_MIN_JOBS = 5
SMALL_MIN_SECONDS = 2.0


@dataclass
class _Reference:
    """Baselines by job: on the whole GPU, and on the client's own share where there is one."""

    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole_joules: dict[str, float | None] = field(default_factory=dict)
    share: dict[str, dict[str, Any]] = field(default_factory=dict)


class SuiteRun:
    """Carries out a setup, writing every record as soon as it is known."""

    def __init__(
        self,
        setup: Setup,
        writer: RunWriter,
        stop_signal: StopSignal,
        say: Callable[[str], None],
        *,
        timeouts: Timeouts | None = None,
        earlier: EarlierPart | None = None,
    ) -> None:
        """Take what to do, where to write it, whom to ask whether to stop, and whom to tell.

        `earlier` is what a run that goes on has of it already.
        """
        self._setup = setup
        self._earlier = earlier
        self._plan = setup.plan
        self._writer = writer
        self._stop_signal = stop_signal
        self._say = say
        self._launcher = Launcher(
            client_base_environment(os.environ),
            timeouts=timeouts or Timeouts(timeout=setup.request.timeout_seconds),
            stop_signal=stop_signal,
            say=say,
        )
        self._reference = _Reference()
        self._done: set[str] = set()
        self._added_arguments: dict[str, list[str]] = {}
        self._stop_reasons: dict[str, dict[str, Any] | None] = {}
        self._start_seconds = time.monotonic()
        # Why the run ended, where it did not come to its end, and the code for it.
        self.ending: str | None = None
        self._code = EXIT_FAILED
        self._min_seconds = setup.request.min_seconds or (
            GUIDE_MIN_SECONDS if setup.job_size == SIZE_GUIDE else SMALL_MIN_SECONDS
        )

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
        earlier = self._setup.baseline_run
        found = (earlier.manifest.get("resolved_arguments") if earlier else None) or {}
        for job_key, arguments in found.items():
            self._change_clients(job_key, arguments)
        jobs = self._plan.jobs()
        resolved: dict[str, list[str]] = {}
        self._say(f"resolving data and weights: {', '.join(c.label for c in jobs.values())}")
        # At the same time: each spends most of it importing torch, or waiting for a hub.
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda c: resolve(c, self._stop_signal), jobs.values()))
        if self._earlier:
            self._require_like_earlier(dict(zip(jobs, answers, strict=True)))
        for (job_key, client), answer in zip(jobs.items(), answers, strict=True):
            arguments = [str(argument) for argument in answer.get("arguments") or []]
            if arguments != found.get(job_key):
                self._change_clients(job_key, arguments)
            resolved[job_key] = arguments
            for note in answer.get("notes") or []:
                self._note(f"{client.label}: {note}")
            self._describe_environment(answer.get("environment") or {})
        self._writer.update_manifest(resolved_arguments=resolved)
        self._save_plan()

    def _require_like_earlier(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse to go on in another environment, or with other data; `answers` by job."""
        gpu = self._setup.gpu or {}
        known = {"gpu_name": gpu.get("name"), "gpu_uuid": gpu.get("uuid"),
                 "driver_version": gpu.get("driver_version"),
                 "timeslice": self._setup.timeslice,
                 "host_cores": self._setup.cores}  # fmt: skip
        for answer in answers.values():
            environment = answer.get("environment") or {}
            known |= {name: environment.get(name) for name in ("versions", "git_commit")}
        resolved = {
            job_key: [str(argument) for argument in answer.get("arguments") or []]
            for job_key, answer in answers.items()
        }
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

    def _change_clients(self, job_key: str, arguments: list[str]) -> None:
        """Give more flags to the clients of a job that have not run yet."""
        if arguments:
            self._added_arguments.setdefault(job_key, []).extend(arguments)
            self._plan = self._plan.map_clients(
                lambda client: (
                    client.with_arguments(arguments) if client.job_key == job_key else client
                ),
                skip=self._done,
            )

    def _save_plan(self) -> None:
        self._writer.update_manifest(plan=self._plan.to_dict())

    def _take_over_baselines(self) -> None:
        """Reuse another run's baselines where they were asked for, or where MIG needs them."""
        request, manifest = self._setup.request, self._writer.manifest
        jobs = list(self._plan.jobs())
        run = self._setup.baseline_run
        if run is not None:
            try:
                require_reusable(run, manifest, jobs)
            except BaselineMismatchError as error:
                raise SuiteError(str(error), EXIT_USAGE) from error
        elif self._setup.mode.name == MODE_MIG:
            run = newest_reusable(request.results_dir, manifest, jobs)
            if run is None:
                self._note(
                    "MIG is on and no matching whole-GPU baseline was found in "
                    f"{request.results_dir}: STP and overhead stay unknown (take one with --mode "
                    "exclusive before MIG is enabled)"
                )
        if run is None:
            return
        self._say(f"baselines are those of run {run.run_id}")
        self._reference.whole = run.baselines()
        self._reference.whole_joules = run.energy_alone_joules()
        self._writer.update_manifest(baseline_run_id=run.run_id)
        for job_key, record in self._reference.whole.items():
            self._change_clients(job_key, planning.carried_arguments(record["figures"]))
        self._save_plan()

    # --- alone and together ------------------------------------------------------------------

    def _run_baselines(self, sampler: Sampler) -> None:
        is_cpu = self._setup.is_cpu_demo
        least = self._setup.request.min_seconds or (
            SMALL_MIN_SECONDS if is_cpu else GUIDE_MIN_SECONDS
        )
        rule = FinishRule(
            min_seconds=least, min_jobs=1 if is_cpu else BASELINE_MIN_JOBS, long_job_seconds=least
        )
        total = len(self._plan.baseline)
        for number in range(total):
            planned = self._plan.baseline[number]
            client = planned.clients[0]
            where = "on its instance" if planned.phase == PHASE_SHARE_BASELINE else "alone"
            self._say(f"baseline {number + 1}/{total}: {client.label} {where}")
            record = self._run_one(planned, rule, sampler)[0]
            if planned.phase == PHASE_SHARE_BASELINE:
                self._reference.share[client.job_key] = record
            else:
                self._reference.whole[client.job_key] = record
            if planned.phase == PHASE_BASELINE or client.job_key not in self._reference.whole:
                self._change_clients(client.job_key, planning.carried_arguments(record["figures"]))
            self._save_plan()

    def _run_co_runs(self, sampler: Sampler) -> None:
        """Run the counts of the plan, and those beside them that the ramp asks for."""
        request = self._setup.request
        if request.is_pairs:
            self._run_pairs(sampler)
            return
        ramp = Ramp(
            sorted({len(run.clients) for run in self._plan.co_runs}),
            step=request.mix_size,
            bisect=request.bisect,
            until_break=request.until_break,
        )
        failure: RunEnded | None = None
        while (count := ramp.next_count()) is not None:
            try:
                holds = self._run_count(count, sampler)
            except RunEnded as end:
                if end.exit_code != EXIT_FAILED:
                    raise
                failure, holds = failure or end, False
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
                if end.exit_code != EXIT_FAILED:
                    raise
                failure = failure or end
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
        request = self._setup.request
        is_done = self._earlier and self._earlier.finished(planned.co_run)
        if planned.repeat > 0 and not is_done and not self._fits_budget(took):
            self._note(
                f"{planned.co_run} left out: the budget of {request.budget_minutes:g} minutes "
                "allows no further repeat"
            )
            return 0.0
        rule = FinishRule(min_seconds=self._min_seconds, window_seconds=request.window_seconds)
        self._say(f"co-run {planned.co_run}: {len(planned.clients)} clients under {planned.mode}")
        begin = time.monotonic()
        self._run_one(planned, rule, sampler)
        return time.monotonic() - begin

    def _co_runs_of(self, count: int) -> list[PlannedCoRun]:
        """The co-runs of one count; those that the ramp has asked for are added to the plan."""
        planned = [run for run in self._plan.co_runs if len(run.clients) == count]
        if not planned:
            added = self._setup.co_runs_of(count)
            self._plan = planning.Plan(
                self._plan.baseline, (*self._plan.co_runs, *map(self._with_added_arguments, added))
            )
            self._save_plan()
            planned = list(self._plan.co_runs[-len(added) :])
        return planned

    def _with_added_arguments(self, run: PlannedCoRun) -> PlannedCoRun:
        clients = (
            client.with_arguments(self._added_arguments.get(client.job_key, []))
            for client in run.clients
        )
        return dataclasses.replace(run, clients=tuple(clients))

    def _fits_budget(self, seconds: float) -> bool:
        budget = self._setup.request.budget_minutes
        elapsed = time.monotonic() - self._start_seconds
        return budget is None or elapsed + seconds <= 60 * budget

    def _run_one(
        self, planned: PlannedCoRun, rule: FinishRule, sampler: Sampler
    ) -> list[dict[str, Any]]:
        """Run one co-run, write its records, return those of its clients.

        Raises `RunEnded` when it did not end well, `SuiteError` when the clients were not what
        they should be: what follows would build on it.
        """
        if self._stop_signal.requested:
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

        clock = WallClock()
        seen = self._launcher.run(planned, self._writer.client_paths, rule, before_go)
        self._done.add(planned.co_run)
        samples = self._samples_of(seen, sampler)
        proofs = judge_clients(mode, seen, samples)
        clients = [
            client_record(seen, client, proof, self._reference.whole.get(client.planned.job_key))
            for client, proof in zip(seen.clients, proofs, strict=True)
        ]
        gpu_lost, mode_failure = _lost(mode)
        gpu = self._gpu_figures(seen, samples)
        clients = host_limit.judged(clients, gpu, self._reference.whole)
        record = self._co_run_record(seen, clients, gpu, gpu_lost, mode_failure)
        strangers = strangers_beside(seen, samples)
        record["warnings"] += [*clock.warnings(), *occupancy.warnings(strangers)]
        record["is_contended"] = bool(strangers)
        reason = self._stop_reason(record, seen, clients, gpu_lost)
        record["stop_reason"] = self._stop_reasons[planned.co_run] = reason
        for line in (*clients, record):
            self._writer.append_record(line)
        for warning in record["warnings"]:
            self._say(warning)
        if reason is not None:
            self._say(f"{planned.co_run} does not hold: {stop_reasons.describe(reason)}")
        if refusal is not None:
            raise refusal
        if gpu_lost and record["outcome"] != OUTCOME_INTERRUPTED:
            # What follows would only meet the same.
            outcome = "invalid" if record["outcome"] == OUTCOME_INVALID else "failed"
            raise RunEnded(outcome, EXIT_NO_GPU, f"{planned.co_run}: {record['reason']}")
        _raise_unless_well(record, clients)
        return clients

    def _take_from_record(
        self, record: dict[str, Any], clients: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Do as if a co-run of the earlier part had been run just now."""
        self._say(f"{record['co_run']} is done already")
        self._done.add(record["co_run"])
        self._stop_reasons[record["co_run"]] = record.get("stop_reason")
        if record["phase"] == PHASE_BASELINE:
            joules = (record["gpu"] or {}).get("energy_joules")
            self._reference.whole_joules[clients[0]["job_key"]] = joules
        _raise_unless_well(record, clients)
        return clients

    def _stop_reason(
        self,
        record: dict[str, Any],
        seen: CoRunResult,
        clients: list[dict[str, Any]],
        gpu_lost: str | None,
    ) -> dict[str, Any] | None:
        """Why a co-run did not hold; the bounds are for jobs that share the GPU."""
        request, bounds = self._setup.request, {}
        if seen.planned.phase == PHASE_CO_RUN:
            bounds = {"max_slowdown": request.max_slowdown, "max_p99_ms": request.slo_ms}
        return stop_reasons.stop_reason(record, seen.clients, clients, **bounds, gpu_lost=gpu_lost)

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
            versions = first.get("versions") or {}
            # A client with a part of the multiprocessors is shown no others.
            is_limited = PERCENTAGE_VARIABLE in clients[0].planned.environment
            seen = None if is_limited else first.get("multiprocessor_count")
            self._describe_environment({"multiprocessor_count": seen, "versions": versions})

    def _samples_of(self, seen: CoRunResult, sampler: Sampler) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        if seen.window_end_seconds is not None and not sampler.failure:
            samples = list(sampler.samples_past(seen.window_end_seconds))
            self._note(sampler.failure)
        for complaint in sampler.complaints():
            self._note(complaint)
        return samples

    def _co_run_record(
        self,
        seen: CoRunResult,
        clients: list[dict[str, Any]],
        gpu: dict[str, Any] | None,
        gpu_lost: str | None,
        mode_failure: str | None,
    ) -> dict[str, Any]:
        baselines, joules = dict(self._reference.whole), dict(self._reference.whole_joules)
        if seen.planned.phase == PHASE_BASELINE and clients[0]["status"] == "ok":
            job_key = clients[0]["job_key"]
            baselines[job_key] = clients[0]
            joules[job_key] = self._reference.whole_joules[job_key] = (gpu or {}).get(
                "energy_joules"
            )
        is_mig = seen.planned.mode == MODE_MIG
        return co_run_record(
            seen,
            clients,
            gpu,
            mode_failure=mode_failure,
            gpu_lost=gpu_lost,
            baselines=baselines,
            energy_alone_joules=joules,
            share_baselines=self._reference.share if is_mig else None,
            host_cores=self._setup.cores,
        )

    def _gpu_figures(
        self, seen: CoRunResult, samples: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
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


def _raise_unless_well(record: Mapping[str, Any], clients: list[dict[str, Any]]) -> None:
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
