"""A user's own jobs: as a plan without a file, and as the clients that a plan asks for."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarking.planning import limits
from benchmarking.planning.plan import JobOptions, PlannedClient, planned_client
from benchmarking.planning.plan_file import PlanEntry, PlanFile, parse_plan, script_of
from benchmarking.planning.redaction import Secrets
from benchmarking.planning.workloads import COMMAND_SCRIPT, COMMAND_WORKLOAD

# What stands for the file of jobs that were given on the command line.
JOBS_PLAN = "--job"
MOST_NAME_CHARACTERS = 40


def plan_of_jobs(lines: Sequence[str], folder: Path) -> PlanFile:
    """Return the plan that `--job` makes of command lines, each run in `folder`."""
    names = [_job_name(line) for line in lines]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(name).stem for name in names))
    tables = [f'name = "{name.strip(".-_")[:MOST_NAME_CHARACTERS] or "jobs"}"\n']
    for number, (line, label) in enumerate(zip(lines, names, strict=True)):
        others = [job for job in dict.fromkeys(lines[:number]) if _job_name(job) == label]
        shown = f"{label} ({len(others) + 1})" if others and line not in others else label
        # A JSON text is a TOML text.
        tables.append(f"[[client]]\ncommand = {json.dumps(line)}\nlabel = {json.dumps(shown)}\n")
    return parse_plan("\n".join(tables), JOBS_PLAN, folder)


def _job_name(line: str) -> str:
    """What a command line is called: its script, or its program."""
    try:
        words = shlex.split(line) or ["job"]
    except ValueError:
        return "job"
    return Path(script_of(words) or words[0]).name


def plan_clients(plan: PlanFile, count: int, options: JobOptions) -> tuple[PlannedClient, ...]:
    """Return `count` clients of a plan: its clients in order, starting over after the last."""
    members = plan.members
    return tuple(
        _planned(i, members[i % len(members)], plan.secrets, options) for i in range(count)
    )


def _planned(client: int, entry: PlanEntry, hidden: Secrets, options: JobOptions) -> PlannedClient:
    if entry.workload is not None:
        made = planned_client(client, entry.workload, options, entry.arguments)
    else:
        made = _command_client(client, entry, options)
    # What is in the environment can be part of the work; who may read a model is not.
    variables = [
        name if name in entry.inherit else f"{name}={value}"
        for name, value in entry.environment.items()
    ]
    key = f"{made.job_key} {shlex.join(variables)}" if variables else made.job_key
    knobs = {name.removeprefix("mps_"): value for name, value in entry.knobs.items()}
    environment = {**entry.environment, **limits.variables(**knobs)}
    return dataclasses.replace(
        made, label=entry.label, job_key=hidden.name(key), environment=environment
    )


def _command_client(client: int, entry: PlanEntry, options: JobOptions) -> PlannedClient:
    job = ["--command", str(entry.command), "--working-directory", entry.working_directory]
    job += ["--shell"] if entry.shell else []
    job += ["--latency"] if entry.latency else []
    return PlannedClient(
        client=client,
        workload=COMMAND_WORKLOAD,
        label=entry.label,
        job_key=shlex.join([COMMAND_WORKLOAD, *job]),
        command=(options.python, f"{options.root}/{COMMAND_SCRIPT}", *job),
    )
