"""Reports on made-up runs; the one place of the tests that names functions of the report.

`compare` gives what stands in comparison.json, `on_terminal` and `as_markdown` what people read.
The program itself takes seconds for its charts, which few tests look at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import synthetic_runs

from benchmarking.report import comparison, export, render, runs

SLICING, SHARING = [4.0, 4.02, 4.04, 4.02], [2.0, 2.01, 2.02, 2.01]


def compare(*made: dict, **options: Any) -> dict[str, Any]:
    """Compare the runs as they are read from a results folder.

    A run with an `experiment` lies in a folder of that name below it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for run in made:
            synthetic_runs.write(Path(folder) / run.get("experiment", "."), run)
        return comparison.compare(runs.read_results(Path(folder)), **options)[0]


def on_terminal(compared: dict, width: int = 100) -> str:
    """What is printed of it on a terminal of that width."""
    return render.render_terminal(compared, width)


def as_markdown(compared: dict) -> str:
    """The report.md of it, without charts."""
    return render.render_markdown(compared)


def as_page(compared: dict) -> str:
    """The report.html of it, without charts."""
    return render.render_html(compared)


def missed(required: str, compared: dict) -> list[str]:
    """What `--require` finds not to be met."""
    return export.Requirement.parse(required).missed(compared)


def section(*made: dict, **options: Any) -> dict[str, Any]:
    """The only section of the runs' comparison."""
    (found,) = compare(*made, **options)["sections"]
    return found


def conclusion(found: dict, subject: str = "whole card", figure: str | None = None) -> dict:
    """What is concluded on a subject: its claim, or what is said of one of its figures."""
    of_subject = [one for one in found["conclusions"] if one["subject"] == subject]
    (one,) = [one for one in of_subject
              if (one["figure"] == figure if figure else one["is_claim"])]  # fmt: skip
    return one


def change(made: dict, edit: Callable[[dict], None], **where: object) -> dict:
    """Edit every record of the made-up run whose fields are as named."""
    for record in made["records"]:
        if all(record.get(key) == value for key, value in where.items()):
            edit(record)
    return made


def slow(made: dict, factor: float, **where: object) -> dict:
    """Let these clients do so many times less in the same time."""

    def edit(record: dict) -> None:
        for unit in record["units"].values():
            unit["count"] /= factor

    return change(made, edit, record="client", **where)


def failed(made: dict, status: str = "oom", **where: object) -> dict:
    """Let co-runs fail for want of memory, by their second client."""
    change(made, lambda r: r.update(outcome="failed", reason="no memory"), record="co_run", **where)
    return change(made, lambda r: r.update(status=status), record="client", client=1, **where)


def time_slicing(slowdowns: list[float], run_id: str = "slicing", **more: object) -> dict:
    """Four clients under time slicing, slowed so in each repeat."""
    return synthetic_runs.run(run_id, "time-slicing", {4: slowdowns}, **more)


def mps(slowdowns: list[float], run_id: str = "mps", **more: object) -> dict:
    """Four clients under MPS, slowed so in each repeat."""
    return synthetic_runs.run(run_id, "mps", {4: slowdowns}, **more)


def ramp(slowdowns: dict[int, list[float]], mode: str = "mps", **more: object) -> dict:
    """Copies of one training job, ever more of them."""
    return synthetic_runs.run(f"{mode}-ramp", mode, slowdowns, mix="training", **more)


def mps_limits(*percentages: str) -> dict[str, list[str]]:
    """Limits of MPS clients as a manifest holds them."""
    return {"percentages": [*percentages], "memory_limits": [], "priorities": []}


def session(
    slicing: list[float], sharing: list[float], *, null: float = 1.0, drift: float = 1.0
) -> list[dict]:
    """What `run_experiments.sh` leaves: rounds of baselines, a null, time slicing and MPS.

    `null` is how much slower one client under time slicing is than alone, `drift` how much slower
    the last round's baselines are than the first's.
    """
    known = {"session": "session-1", "method": 2}
    rounds = len(slicing)
    alone = synthetic_runs.run("baseline", "exclusive", {}, **known)
    first = alone["records"]
    alone["records"] = []
    for number in range(rounds):
        again = [_of_round(record, number) for record in first]
        slower = drift ** (number / max(1, rounds - 1))
        alone["records"] += slow({"records": again}, slower)["records"]
        one = synthetic_runs.run("null", "time-slicing", {1: [null]}, mix="training")["records"]
        nulls = [_of_round(record, number) for record in one if record["phase"] == "co_run"]
        for record in nulls:
            record.update(phase="null", co_run=f"null-r{number}")
        alone["records"] += nulls
    modes = [time_slicing(slicing, baseline_run_id="baseline", **known),
             mps(sharing, baseline_run_id="baseline", **known)]  # fmt: skip
    for made in modes:
        made["records"] = [one for one in made["records"] if one["phase"] == "co_run"]
    return [alone, *modes]


def _of_round(record: dict, number: int) -> dict:
    """A copy of the record, of another round."""
    units = {kind: dict(unit) for kind, unit in record.get("units", {}).items()}
    copied = record | {"repeat": number, "co_run": f"{record['co_run']}-r{number}"}
    return copied | ({"units": units} if units else {})
