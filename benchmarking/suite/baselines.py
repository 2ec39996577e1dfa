"""Which baselines of another run may stand in for one's own: same card, versions, jobs and data.

A baseline from an unlike environment would turn every ratio into a comparison of environments, so
it is refused, and the refusal names the field that differs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.records import run_folder
from benchmarking.records.run_folder import Run, RunStoreError
from benchmarking.suite.plan import MODE_CPU_DEMO

COMPARED_FIELDS = ("gpu_name", "driver_version")
COMPARED_VERSIONS = ("python", "torch", "torchvision", "transformers")
COMPARED_IDENTITY_FIELDS = ("device", "engine", "precision", "batch_size")


class BaselineMismatchError(Exception):
    """A baseline was taken under other conditions; the message names the differing field."""


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Say in what the manifest `theirs` of a baseline's run differs from our manifest `ours`.

    Empty when its baselines may be reused, the jobs apart.
    """
    found = [
        _difference(field, theirs["environment"].get(field), ours["environment"].get(field))
        for field in COMPARED_FIELDS
    ]
    their_versions = theirs["environment"].get("versions") or {}
    our_versions = ours["environment"].get("versions") or {}
    found += [
        _difference(f"version of {name}", their_versions.get(name), our_versions.get(name))
        for name in COMPARED_VERSIONS
    ]
    found.append(_difference("job size", theirs.get("job_size"), ours.get("job_size")))
    on_cpu = [manifest.get("effective_mode") == MODE_CPU_DEMO for manifest in (theirs, ours)]
    if any(on_cpu):
        found.append(_difference("cpu-demo", *on_cpu))
        cores = [manifest["environment"].get("host_cores") for manifest in (theirs, ours)]
        found.append(_difference("host cores", *cores))
    return [difference for difference in found if difference]


def missing_jobs(run: Run, job_keys: Iterable[str]) -> list[str]:
    """Return the jobs of which a run has no successful baseline."""
    available = run.baselines()
    return [key for key in job_keys if key not in available]


def identity_differences(
    baseline: Mapping[str, Any] | None, identity: Mapping[str, Any] | None
) -> list[str]:
    """Say in what a client differs from the one that took its job's baseline."""
    theirs = (baseline or {}).get("identity")
    if not theirs or not identity:
        return []
    pairs = (
        _difference(field, theirs.get(field), identity.get(field))
        for field in COMPARED_IDENTITY_FIELDS
    )
    return [difference for difference in pairs if difference]


def data_differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], job_keys: Iterable[str]
) -> list[str]:
    """Say which jobs found other data or weights in the run of manifest `theirs` than in ours.

    A run that did not note what its jobs found is taken at its word.
    """
    found, found_now = (
        manifest.get("resolved_arguments") or {} for manifest in (theirs, ours)
    )  # fmt: skip
    return [
        f"data of {key.split()[0]} was {_words(found[key])}, now it is {_words(found_now[key])}"
        for key in job_keys
        if key in found and key in found_now and list(found[key]) != list(found_now[key])
    ]


def _words(arguments: Sequence[str]) -> str:
    return f"`{shlex.join(arguments)}`" if arguments else "without flags"


def require_reusable(run: Run, ours: Mapping[str, Any], job_keys: Sequence[str]) -> None:
    """Raise `BaselineMismatchError` unless `run`'s baselines fit our manifest and jobs."""
    found = [*differences(run.manifest, ours), *data_differences(run.manifest, ours, job_keys)]
    if found:
        raise BaselineMismatchError(
            f"the baseline of run {run.run_id} cannot be reused: {'; '.join(found)}"
        )
    missing = missing_jobs(run, job_keys)
    if missing:
        raise BaselineMismatchError(
            f"run {run.run_id} has no baseline of this job: {missing[0]} "
            "(take one with --mode exclusive and the same flags)"
        )


def newest_reusable(
    results_dir: Path, ours: Mapping[str, Any], job_keys: Sequence[str]
) -> Run | None:
    """Return the newest run below `results_dir` whose whole-GPU baselines fit, if there is one."""
    for folder in reversed(run_folder.find_runs(results_dir)):
        try:
            run = run_folder.read_run(folder)
            require_reusable(run, ours, job_keys)
        except (RunStoreError, BaselineMismatchError):
            continue
        return run
    return None


def _difference(name: str, theirs: Any, ours: Any) -> str | None:
    return None if theirs == ours else f"{name} was {theirs}, now it is {ours}"
