"""The knobs that a sweep can turn, and how each is handed to the suite. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarking.suite.plan import MODE_MIG, MODE_TIME_SLICING

# A value that has a part for each client is written with this, since commas part the values.
PART = "/"

# A flag of the jobs themselves, as in `job-flag=--batch-size`.
JOB_FLAG = "job-flag"

TIMESLICES = ("default", "short", "medium", "long")

# Flags of the suite that a job alone has no use for, and whether a value follows each.
_NOT_ALONE = {
    "--mps-percentage": True,
    "--mps-memory-limit": True,
    "--mps-priority": True,
    "--mig-layout": True,
    "--baseline": True,
    "--max-slowdown": True,
    "--bisect": False,
    "--until-break": False,
}


@dataclass(frozen=True)
class Knob:
    """One setting.

    `flag` is the suite's for it, where it has one, `job_flag` the jobs' own: then each value is
    another job, with a baseline of its own. A knob with `setup` changes the card: that script puts
    a value in force, `undo` takes it back, and `state` is the mode that both belong to.
    """

    name: str
    about: str
    flag: str | None = None
    setup: str | None = None
    undo: str | None = None
    state: str | None = None
    job_flag: str | None = None

    @property
    def changes_card(self) -> bool:
        """Whether its values are settings of the GPU."""
        return self.setup is not None

    def suite_words(self, value: str) -> list[str]:
        """Return what the suite is told of a value."""
        if self.job_flag:
            return [f"--job-arguments={shlex.join([self.job_flag, value])}"]
        return [self.flag, value.replace(PART, ",")] if self.flag else []

    def setup_words(self, value: str, clients: int) -> list[str]:
        """Return script and arguments that put a value in force on the card."""
        if self.state == MODE_TIME_SLICING:
            return [str(self.setup), str(clients), "--timeslice", value]
        return [str(self.setup), value.replace(PART, ",")]

    def slug(self, value: str) -> str:
        """Return the name of a value's run."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.name}-{value}")


KNOBS = {
    knob.name: knob
    for knob in (
        Knob("workloads", "clients at once", "--workloads"),
        Knob("mps-percentage", "even or N, each client's multiprocessors", "--mps-percentage"),
        Knob("mps-memory-limit", "SIZE, each client's memory", "--mps-memory-limit"),
        Knob("mps-priority", "normal or below-normal", "--mps-priority"),
        Knob(
            "mig-layout", "instances such as 2g.20gb/1g.10gb; changes the card", "--mig-layout",
            "setup_mig.sh", "disable_mig.sh", MODE_MIG,
        ),
        Knob(
            "timeslice", f"{', '.join(TIMESLICES)}; changes the card", None,
            "setup_time_slicing.sh", "reset_time_slicing.sh", MODE_TIME_SLICING,
        ),
    )
}  # fmt: skip


def knob_called(name: str) -> Knob:
    """Return the knob of that name, one for any flag of the jobs among them; or `ValueError`."""
    kind, _, flag = name.partition("=")
    if kind == JOB_FLAG and re.fullmatch(r"--[a-z][a-z0-9-]*", flag):
        return Knob(flag[2:], "a flag of the jobs", job_flag=flag)
    if name not in KNOBS:
        known = ", ".join([*KNOBS, f"{JOB_FLAG}=--FLAG"])
        raise ValueError(f"{name!r} is none of the knobs: {known}")
    return KNOBS[name]


def alone_words(words: Sequence[str]) -> list[str]:
    """Return the suite's flags without those that jobs alone have no use for."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in _NOT_ALONE:
            kept.append(word)
        elif _NOT_ALONE[name] and not equals:
            next(rest, None)
    return kept
