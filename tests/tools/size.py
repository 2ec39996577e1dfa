#!/usr/bin/env python3
"""Prints how many lines and files each room of the project has, product and tests summed.

    python3 tests/tools/size.py                     # the working tree
    python3 tests/tools/size.py --against v1.0      # then -> now

Counts every line of every tracked text file that has one (untracked, binary and empty files do not
count). A room is a folder of CONTRIBUTING.md's house: a package of `workloads/` or
`benchmarking/`, the programs at their top, `gpu-configs`, `lib`, the scripts at the root.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SHELL_ROOM, PROJECT_ROOM = "shell scripts at the root", "project files at the root"
# What is neither product nor tests, and stands below the sums.
APART = ("examples", "docs", PROJECT_ROOM)


def count_lines(revision: str | None) -> dict[str, int]:
    """Return the lines of each text file of a revision, `None` for the working tree, by its path.

    Raises `subprocess.CalledProcessError` where git does not know the revision.
    """
    command = ["git", "grep", "-I", "-z", "--count", "", *([revision] if revision else [])]
    found = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    lines = (line.split("\0") for line in found.stdout.splitlines())
    return {path.removeprefix(f"{revision}:"): int(count) for path, count in lines}


def room_of(path: str) -> str:
    """Return the room of a file by its path from the project's folder."""
    top, *below = path.split("/")
    if not below:
        return SHELL_ROOM if path.endswith(".sh") else PROJECT_ROOM
    if top in ("workloads", "benchmarking"):
        return f"{top}/{below[0]}" if len(below) > 1 else f"{top}: programs"
    return PROJECT_ROOM if top.startswith(".") else top


def sum_rooms(lines: dict[str, int]) -> tuple[Counter[str], Counter[str]]:
    """Return lines and files by room, with the sum of the `product` among them."""
    total, files = Counter[str](), Counter[str]()
    for path, count in lines.items():
        room = room_of(path)
        for name in (room, *([] if room in ("tests", *APART) else ["product"])):
            total[name] += count
            files[name] += 1
    return total, files


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="REV", help="show what it was at this revision, too")
    options = parser.parse_args()
    try:
        states = [sum_rooms(count_lines(revision)) for revision in (options.against, None)]
    except subprocess.CalledProcessError as error:
        parser.error(f"git cannot count {options.against}: {error.stderr.splitlines()[0]}")
    rooms = set[str]().union(*(total for total, _ in states))
    last = [name for name in ("product", "tests", *APART) if name in rooms]
    print(f"{'room':28}{'lines':>17}{'files':>13}")
    for room in [*sorted(rooms.difference(last)), *last]:
        figures = [[f"{count[room]:,}" for count in counts] for counts in zip(*states, strict=True)]
        shown = (
            " -> ".join(pair if options.against and pair[0] != pair[1] else pair[1:])
            for pair in figures
        )
        print("{:28}{:>17}{:>13}".format(room, *shown))


if __name__ == "__main__":
    main()
