"""The comparison for programs: comparison.json, comparison.csv, and requirements on its figures.

Schema history of comparison.json:
    1  first version.
    2  a group names several runs (`run_ids`, `gpu_uuids`); joules a job, SLO attainment, noise.
    3  `interference`: runs of pairs stand there, and no longer among the groups.
    4  `settings` beside `mode`: rows of one mode and mix can differ in nothing but these.
    5  `conclusions` in place of `claims`; STP is work delivered, figures against the jobs alone are
       taken with the baselines of all rounds; p99 from 500 responses on, of all rounds together.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.modes.names import MODE_MIG, MODE_MPS, MODE_TIME_SLICING

Record = Mapping[str, Any]

# The columns of a row in comparison.csv: of its section's environment, of itself, estimates (a
# column each for mean, low and high), plain figures, and the card's figures, which come last.
_OF_SECTION = ("gpu_name", "driver_version", "job_size")
_KEYS = ("mode", "settings", "variant", "mix", "clients")
_ESTIMATES = (
    "stp", "antt", "overhead_percent", "interference_overhead_percent",
    "mechanism_overhead_percent", "fairness", "energy_ratio", "joules_per_job", "joules_per_work",
)  # fmt: skip
_FIGURES = (
    "stp_per_multiprocessor", "success_rate_percent", "average_duration_seconds",
    "total_gpu_time_seconds", "throughput_clients", "cost_per_1000_work",
    "energy_cost_per_1000_work",
)  # fmt: skip
# A cell that begins so is run as a formula by a spreadsheet.
_FORMULA = ("=", "+", "-", "@")


def json_text(comparison: Record) -> str:
    """The comparison as JSON; what is infinite is null."""
    return json.dumps(finite(comparison), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same plain data with `None` for what is infinite or no number, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(comparison: Record) -> str:
    """One row for each mode, mix and count of clients."""
    import pandas

    rows = [
        {"section": number, **_flat(section["environment"], group)}
        for number, section in enumerate(comparison["sections"], start=1)
        for group in section["groups"]
    ]
    # As objects: a column of counts with an unknown among them would become one of floats.
    frame = pandas.DataFrame(rows, columns=None if rows else ["section"], dtype=object)
    return frame.to_csv(index=False)


def _flat(environment: Record, group: Record) -> dict[str, Any]:
    row = {
        **{name: environment[name] for name in _OF_SECTION},
        "run_id": " ".join(group["run_ids"]),
        "gpu_uuid": " ".join(group["gpu_uuids"]),
        **{name: group[name] for name in _KEYS},
        "repeats": len(group["co_runs"]),
        "outcome": group["outcome"],
        "unverified": group["is_unverified"],
        **{
            f"{name}_{part}": group[name] and group[name][part]
            for name in _ESTIMATES
            for part in ("mean", "low", "high")
        },
        **{name: group[name] for name in _FIGURES},
        **group["gpu"],
        "throttle_reasons": " ".join(group["gpu"]["throttle_reasons"] or ()),
    }
    return {
        name: f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
        for name, value in row.items()
    }


# --- requirements -----------------------------------------------------------------------------

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_REQUIREMENT = re.compile(
    r"(?P<scope>(?:[^<>]*:)?)(?P<figure>\w+)\s*(?P<operator><=|>=|<|>)\s*"
    r"(?P<value>-?\d+(?:\.\d+)?)\s*(?P<unit>ms|s|x|%|J|j)?"
)
# What the figures are called in a group's row and in a client's.
_OF_GROUP = {
    "work": "stp",
    "antt": "antt",
    "overhead": "overhead_percent",
    "fairness": "fairness",
    "energy": "joules_per_work",
    "energy_ratio": "energy_ratio",
    "success": "success_rate_percent",
    "cost": "cost_per_1000_work",
}
_LATENCIES = ("p50", "p95", "p99", "mean")
FIGURES = (*_OF_GROUP, "slowdown", *_LATENCIES, "slo")
# The units that may stand behind a figure's value, and what they are in the figure's own.
_UNITS: Mapping[str, Mapping[str, float]] = {
    **{figure: {"ms": 1.0, "s": 1000.0} for figure in _LATENCIES},
    **{figure: {"%": 1.0} for figure in ("overhead", "success", "slo")},
    **{figure: {"x": 1.0} for figure in ("work", "antt", "energy_ratio", "slowdown")},
    "energy": {"j": 1.0},
}
_AGAINST_BASELINE = frozenset(_OF_GROUP) - {"success"} | {"slowdown"}
_MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG)


def _without_groups(comparison: Record) -> list[Record]:
    """One run of each variant that was tried in a compared mix, and of which no co-run counts."""
    found: dict[tuple[str, str], Record] = {}
    for section in comparison["sections"]:
        compared = {one["mix"] for one in section["conclusions"]}
        shown = {(one["variant"], one["mix"]) for one in section["groups"]}
        tried = {(run["variant"], run["mix"]): run for run in section["runs"]
                 if run["mix"] in compared
                 and any(one["phase"] == "co_run" for one in run["co_runs"])}  # fmt: skip
        found |= {kind: run for kind, run in sorted(tried.items()) if kind not in shown}
    return list(found.values())


@dataclass(frozen=True)
class Requirement:
    """`[MODE:][JOB:]FIGURE OP VALUE`: what a figure must meet, under every mode if none is named.

    It speaks of each mix at the count that its modes are compared at. `scope` holds the words
    before the figure, of which one names a mode and one a job.
    """

    text: str
    scope: str
    figure: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Argument type: a requirement such as `mps:batch_inference:p99<50ms`."""
        match = _REQUIREMENT.fullmatch(text.strip())
        if match is None or match["figure"] not in FIGURES:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not [MODE:][JOB:]FIGURE OP VALUE, such as mps:p99<50ms or work>1.1; "
                f"figures are {', '.join(FIGURES)}"
            )
        units = {"": 1.0, **_UNITS.get(match["figure"], {})}
        scale = units.get((match["unit"] or "").lower())
        if scale is None:
            known = " or ".join(filter(None, units)) or "no unit"
            raise argparse.ArgumentTypeError(
                f"{text!r}: {match['figure']} is in {known}, not in {match['unit']}"
            )
        scope = match["scope"].removesuffix(":").strip()
        return cls(text, scope, match["figure"], match["operator"], scale * float(match["value"]))

    def missed(self, comparison: Record) -> list[str]:
        """Say, a sentence each, where it is not met; what was not measured does not meet it."""
        groups: list[Record] = []
        alone: list[Record] = []
        for section in comparison["sections"]:
            compared = {(one["mix"], one["clients"]) for one in section["conclusions"]}
            these = [one for one in section["groups"] if (one["mix"], one["clients"]) in compared]
            groups += these
            for one in these:
                labels = {row["label"] for row in one["client_rows"]}
                own = [row for row in section["alone"] if row["label"] in labels]
                alone.append({**one, "client_rows": own})
        variants = {group["variant"] for group in groups}
        mode, job = self._mode_and_job(variants)
        # A variant that was measured is meant exactly; else every variant of the mode.
        name = "variant" if mode in variants else "mode"
        # What some mode has a value of, or the job alone, is there under all, known or not.
        there = {
            (group["mix"], what)
            for group in (*groups, *alone)
            for what, value in self._values(group, job) if value is not None
        }  # fmt: skip
        found, is_checked = [], False
        for group in groups:
            if mode not in (None, group[name]):
                continue
            void = group["invalid"] if self.figure in _AGAINST_BASELINE else None
            # How many succeeded is known where some failed, too.
            is_broken = group["outcome"] != "ok" and self.figure != "success"
            reason = group["outcome"] if is_broken else void
            values = [] if reason else [
                (what, value) for what, value in self._values(group, job)
                if (group["mix"], what) in there
            ]  # fmt: skip
            is_checked |= bool(reason or values)
            said = [reason] if reason else [
                f"{what} is {'unknown' if value is None else f'{value:.4g}'}"
                for what, value in values if value is None or not self._is_met(value)
            ]  # fmt: skip
            where = f"{group['variant']}, {group['mix']} with {group['clients']} clients"
            found += [f"{self.text}: not met under {where}: {what}" for what in said]
        # A mix without the figure or the job is not spoken of.
        mixes = {mix for mix, _ in there}
        found += [f"{self.text}: not met under {run['variant']}, {run['mix']}: no co-run can be "
                  "compared" for run in _without_groups(comparison)
                  if run["mix"] in mixes and mode in (None, run[name])]  # fmt: skip
        if not is_checked and not found:
            return [f"{self.text}: nothing was measured that it speaks of"]
        return found

    def _is_met(self, value: float) -> bool:
        return _OPERATORS[self.operator](value, self.value)

    def _mode_and_job(self, variants: Iterable[str]) -> tuple[str | None, str | None]:
        """Tell a mode from a job: variants hold a colon themselves (`mps:even`)."""
        names = {*_MODES, *variants}
        known = [name for name in names if f"{self.scope}:".startswith(f"{name}:")]
        if not known:
            return None, self.scope or None
        mode = max(known, key=len)
        return mode, self.scope[len(mode) + 1 :] or None

    def _values(self, group: Record, job: str | None) -> Sequence[tuple[str, float | None]]:
        if self.figure in _OF_GROUP:
            return [(self.figure, _mean(group[_OF_GROUP[self.figure]]))] if job is None else []
        return [
            (f"{self.figure} of {row['label']}", self._of_client(row))
            for row in group["client_rows"]
            if job in (None, row["workload"], row["label"])
        ]

    def _of_client(self, row: Record) -> float | None:
        if self.figure in _LATENCIES:
            # Of a client all of whose requests failed, every answer is infinitely late.
            none_answered = math.inf if row["missed"] else None
            return row["latency"][self.figure] if row["latency"] else none_answered
        if self.figure == "slo":
            return row["slo"] and row["slo"]["percent"]
        return _mean(row["slowdown"])


def _mean(found: Any) -> float | None:
    return found["mean"] if isinstance(found, Mapping) else found
