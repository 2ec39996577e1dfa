"""`--job`: command lines as a plan, without a file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarking.planning.plan_entries import script_of
from benchmarking.planning.plan_file import PlanFile, PlanFileError, parse_plan

# What stands for the file of jobs that were given on the command line.
JOBS_PLAN = "--job"
MOST_NAME_CHARACTERS = 40


def plan_of_jobs(lines: Sequence[str], folder: Path) -> PlanFile:
    """Return the plan that `--job` makes of command lines, each run in `folder`."""
    try:
        "".join(lines).encode()
    except UnicodeEncodeError:
        said = "holds a name that is no UTF-8: rename that file, or put the command into a script"
        raise PlanFileError([f"{JOBS_PLAN}: {said}"]) from None
    names = [_job_name(line) for line in lines]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(name).stem for name in names))
    tables = [f'name = "{name.strip(".-_")[:MOST_NAME_CHARACTERS] or "jobs"}"\n']
    # A JSON text is a TOML text, but for letters written as two halves.
    commands = (json.dumps(line, ensure_ascii=False) for line in lines)
    tables += (f"[[client]]\ncommand = {command}\n" for command in commands)
    return parse_plan("\n".join(tables), JOBS_PLAN, folder)


def _job_name(line: str) -> str:
    """What a command line is called: its script, or its program."""
    try:
        words = shlex.split(line) or ["job"]
    except ValueError:
        return "job"
    return Path(script_of(words) or words[0]).name
