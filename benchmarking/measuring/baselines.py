"""Which baselines of another run may stand in for one's own: same card, versions, jobs and data.

A baseline from an unlike environment would turn every ratio into a comparison of environments, so
it is refused, and the refusal names the field that differs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.cli import SuiteError
from benchmarking.metrics import scores
from benchmarking.modes.names import MODE_CPU_DEMO
from benchmarking.records import run_folder
from benchmarking.records.run_folder import Run, RunStoreError
from benchmarking.records.types import ClientRecord, Manifest

COMPARED_FIELDS = ("gpu_name", "driver_version")
COMPARED_VERSIONS = ("python", "torch", "torchvision", "transformers")
COMPARED_IDENTITY_FIELDS = ("device", "engine", "precision", "batch_size")

# Repeats of a baseline differ by 0.4 to 0.6 % within a quarter of an hour; past this they were
# disturbed, and nobody is faster together than alone by as much.
TOLERATED_FRACTION = 0.02
MOST_CPU_WAIT_FRACTION = 0.05


class BaselineMismatchError(SuiteError):
    """A baseline was taken under other conditions; the message names the differing field."""


def differences(theirs: Manifest, ours: Manifest) -> list[str]:
    """Say in what the manifest `theirs` of a baseline's run differs from our manifest `ours`.

    Empty when its baselines may be reused, the jobs apart.
    """
    then, now = theirs.environment, ours.environment
    pairs = {name: (getattr(then, name), getattr(now, name)) for name in COMPARED_FIELDS}
    for name in COMPARED_VERSIONS:
        pairs[f"version of {name}"] = (then.versions.get(name), now.versions.get(name))
    pairs["job size"] = (theirs.job_size, ours.job_size)
    on_cpu = (theirs.effective_mode == MODE_CPU_DEMO, ours.effective_mode == MODE_CPU_DEMO)
    if any(on_cpu):
        pairs |= {"cpu-demo": on_cpu, "host cores": (then.host_cores, now.host_cores)}
    return unlike(pairs)


def impossible_speed(client: ClientRecord) -> str | None:
    """Say by how much a client was faster together than alone, `None` where it was not.

    Nobody is: the baseline was disturbed.
    """
    if client.slowdown is None or client.slowdown >= 1 - TOLERATED_FRACTION:
        return None
    return f"{100 * (1 - client.slowdown):.1f} % faster together than alone"


def disturbed(repeats: Mapping[str, ClientRecord]) -> tuple[str, str] | None:
    """Return which of a job's baselines was disturbed, and how one can tell; `None` if none was.

    `repeats` are they by co-run, the newest last: in it the job may have been short of a core, and
    the slowest of all may be slower than the fastest by more than repeats ever are.
    """
    newest = list(repeats)[-1]
    wait = repeats[newest].cpu_wait_fraction or 0.0
    if wait > MOST_CPU_WAIT_FRACTION:
        return newest, f"a thread of it waited for a core for {100 * wait:.0f} % of the time"
    progress = {
        name: scores.normalized_progress(record.units, scores.unit_seconds(repeats[newest].units))
        for name, record in repeats.items()
    }
    known = {name: value for name, value in progress.items() if value}
    if not known:
        return None
    slowest = min(known, key=known.__getitem__)
    excess = max(known.values()) / known[slowest] - 1
    if excess <= TOLERATED_FRACTION:
        return None
    return slowest, f"{100 * excess:.1f} % slower than in another round"


def identity_differences(
    baseline: ClientRecord | None,
    identity: Mapping[str, Any] | None,
    names: Iterable[str] = COMPARED_IDENTITY_FIELDS,
) -> list[str]:
    """Say in what a client differs from the one that took its job's baseline."""
    theirs = baseline and baseline.identity
    if not theirs or not identity:
        return []
    return unlike({name: (theirs.get(name), identity.get(name)) for name in names})


def unlike(pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Say of each pair, then and now, by its name, how it differs."""
    return [f"{name} was {then}, now it is {now}" for name, (then, now) in pairs.items()
            if then != now]  # fmt: skip


def data_differences(
    theirs: Mapping[str, Sequence[str]] | None,
    ours: Mapping[str, Sequence[str]] | None,
    job_keys: Iterable[str],
) -> list[str]:
    """Say which jobs found other data or weights in another run than in ours.

    Both are the `resolved_arguments` of a manifest. A run that did not note what its jobs found is
    taken at its word.
    """
    then, now = theirs or {}, ours or {}
    return [
        f"data of {key.split()[0]} was {_describe(then[key])}, now it is {_describe(now[key])}"
        for key in job_keys
        if key in then and key in now and list(then[key]) != list(now[key])
    ]


def _describe(arguments: Sequence[str]) -> str:
    return f"`{shlex.join(arguments)}`" if arguments else "without flags"


def require_reusable(run: Run, ours: Manifest, job_keys: Sequence[str]) -> None:
    """Raise `BaselineMismatchError` unless `run`'s baselines fit our manifest and jobs."""
    theirs = run.manifest
    found = [
        *differences(theirs, ours),
        *data_differences(theirs.resolved_arguments, ours.resolved_arguments, job_keys),
    ]
    if found:
        raise BaselineMismatchError(
            f"the baseline of run {run.run_id} cannot be reused: {'; '.join(found)}"
        )
    available = run.baselines()
    for key in job_keys:
        if key not in available:
            raise BaselineMismatchError(
                f"run {run.run_id} has no baseline of this job: {key} "
                "(take one with --mode exclusive and the same flags)"
            )


def newest_reusable(results_dir: Path, ours: Manifest, job_keys: Sequence[str]) -> Run | None:
    """Return the newest run below `results_dir` whose whole-GPU baselines fit, if there is one."""
    for folder in reversed(run_folder.find_runs(results_dir)):
        try:
            run = run_folder.read_run(folder)
            require_reusable(run, ours, job_keys)
        except (RunStoreError, BaselineMismatchError):
            continue
        return run
    return None
