#!/usr/bin/env python3
"""Check a plan file of one's own jobs and show its clients; nothing is run.

    python3 benchmarking/check_plan.py examples/plans/own-commands.toml

Exit codes: 0 good, 2 not; each mistake is a sentence on standard error. The last line on standard
output is `clients: N`. The file's keys are described in benchmarking/suite/plan_file.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.suite.cli import EXIT_USAGE, OneLineParser
from benchmarking.suite.plan_file import PlanEntry, PlanFileError, read_plan_file


def main() -> int:
    """Check, show, count."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="FILE", help="the plan file")
    try:
        plan = read_plan_file(parser.parse_args().plan)
    except PlanFileError as error:
        for mistake in error.mistakes:
            print(f"{parser.prog}: error: {mistake}", file=sys.stderr)
        return EXIT_USAGE
    for entry in plan.entries:
        print(f"{entry.count} x {entry.label}: {what_runs(entry)}")
    print(f"clients: {len(plan.members)}")
    return 0


def what_runs(entry: PlanEntry) -> str:
    """Return a client's job as one line."""
    if entry.workload is not None:
        return shlex.join([entry.workload, *entry.arguments])
    return f"{entry.command} (in {entry.working_directory}{', by a shell' if entry.shell else ''})"


if __name__ == "__main__":
    sys.exit(main())
