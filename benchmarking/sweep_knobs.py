"""The settings that a sweep can measure the values of, and how a value is said to the suite."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass

from benchmarking.modes.names import MODE_MIG, MODE_TIME_SLICING

# A value that has a part for each client is written with this, since commas part the values.
PART = "/"
# A flag of the jobs themselves, as in `job-flag=--batch-size`.
JOB_FLAG = "job-flag"
TIMESLICES = ("default", "short", "medium", "long")


@dataclass(frozen=True)
class Knob:
    """One setting.

    `flag` is the suite's for it, where it has one, `job_flag` the jobs' own: then each value is
    another job, with a baseline of its own. A knob with `card_mode` changes the card.
    """

    name: str
    about: str
    flag: str | None = None
    card_mode: str | None = None
    job_flag: str | None = None

    def suite_words(self, value: str) -> list[str]:
        """Return what the suite is told of a value."""
        if self.job_flag:
            return [f"--job-arguments={shlex.join([self.job_flag, value])}"]
        return [self.flag, value.replace(PART, ",")] if self.flag else []

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
        Knob("mig-layout", "instances such as 2g.20gb/1g.10gb; changes the card", "--mig-layout",
             MODE_MIG),
        Knob("timeslice", f"{', '.join(TIMESLICES)}; changes the card", None, MODE_TIME_SLICING),
    )
}  # fmt: skip


def knob(text: str) -> Knob:
    """Argument type: the name of a knob, any flag of the jobs among them."""
    kind, _, flag = text.partition("=")
    if kind == JOB_FLAG and re.fullmatch(r"--[a-z][a-z0-9-]*", flag):
        return Knob(flag[2:], "a flag of the jobs", job_flag=flag)
    if text not in KNOBS:
        known = ", ".join([*KNOBS, f"{JOB_FLAG}=--FLAG"])
        raise argparse.ArgumentTypeError(f"{text!r} is none of the knobs: {known}")
    return KNOBS[text]


def values(text: str) -> list[str]:
    """Argument type: values with commas between them, each once."""
    found = [value.strip() for value in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: give each value once, with commas between")
    return found
