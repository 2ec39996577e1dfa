"""The phases of run_experiments.py: what became of each, kept line by line for --resume."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.cli import EXIT_FAILED, SuiteError
from benchmarking.drivers.driver import Driver, say
from benchmarking.records.writing import append_text, one_line

PHASES_FILE = "phases.jsonl"


@dataclass
class Phase:
    """A phase, and what became of it, as a line of phases.jsonl has it.

    `name` is the mode with its limits; `rounds` are those that it has done.
    """

    phase: int
    name: str
    status: str = "ok"
    reason: str = ""  # also what is to be known of one that went well
    run_folder: str = ""
    seconds: float = 0.0
    rounds: int = 0
    was_done_before: bool = False
    is_noted: bool = False  # in phases.jsonl, as it is now
    notes: list[str] = field(default_factory=list)

    @property
    def mode(self) -> str:
        """The mode, its limits apart."""
        return self.name.partition(":")[0]

    @property
    def is_open(self) -> bool:
        """Whether there is something left to measure."""
        return self.status == "ok" and not self.was_done_before and not self.is_noted

    def end(self, status: str, reason: str) -> None:
        """Say that it failed or was skipped, and why."""
        self.status, self.reason, self.is_noted = status, reason, False

    def row(self) -> dict[str, Any]:
        """Return the line of phases.jsonl."""
        reason = one_line("; ".join(dict.fromkeys(filter(None, [self.reason, *self.notes]))))
        return {
            "phase": self.phase, "name": self.name, "status": self.status, "reason": reason,
            "run_folder": self.run_folder, "seconds": int(self.seconds),
        }  # fmt: skip


class Phases:
    """What the phases of a driver's folder have come to; `failed` counts those of this call."""

    def __init__(self, driver: Driver) -> None:
        """Read the phases of a run that goes on; of each the last whole line counts."""
        self._driver = driver
        self._done_before: dict[tuple[int, str], bool] = {}
        self.failed = 0
        if not driver.options.resumed:
            return
        with contextlib.suppress(OSError):
            text = Path(driver.output, PHASES_FILE).read_text(errors="replace")
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    row = json.loads(line)
                    self._done_before[row["phase"], row["name"]] = row["status"] == "ok"

    def take(self, number: int, name: str) -> Phase:
        """Return a phase, as it was left before."""
        return Phase(number, name, was_done_before=self._done_before.get((number, name), False))

    def finish(self, phase: Phase) -> None:
        """Say what became of a phase and keep it, once; raises `SuiteError`."""
        if phase.is_noted:
            return
        phase.is_noted = True
        if phase.was_done_before:
            say(f"Phase {phase.phase}: {phase.name}: done before")
            return
        self.failed += phase.status == "failed"
        row, is_dry_run = phase.row(), self._driver.options.dry_run
        if not is_dry_run or phase.status != "ok":
            why = f" ({row['reason']})" if row["reason"] else ""
            say(f"Phase {phase.phase}: {phase.name}: {phase.status}{why}")
        if is_dry_run:
            return
        output = self._driver.output
        if not os.path.exists(os.path.join(output, phase.run_folder)):
            row["run_folder"] = ""
        try:
            append_text(Path(output, PHASES_FILE), json.dumps(row, separators=(",", ":")))
        except OSError:
            raise SuiteError(
                f"cannot write {output}/{PHASES_FILE}; make room or bring it back, then "
                f"{self._driver.resume_command()}", EXIT_FAILED,
            ) from None  # fmt: skip
