"""The report of a fleet: cards x modes, the decision for each model of card, and the odd cards.

Each unit's figures are those of its own report, `comparison.json`. Cards are averaged only where
runs would be merged: same model, driver, versions, engines and job size, same code, same cores; and
only those whose health is that of their model.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MODE_NOT_IN_FORCE,
    EXIT_NO_GPU,
    EXIT_USAGE,
    SuiteError,
)
from benchmarking.drivers.fleet_unit import UnitRecord
from benchmarking.drivers.program import write_report
from benchmarking.metrics import scores
from benchmarking.records.run_folder import utc_now
from benchmarking.report import claims, render
from benchmarking.report.export import finite
from benchmarking.report.foreign import cleaned, read_struct

SCHEMA_VERSION = 1
NAME = "fleet"
# A card that much under the median of its model is flagged; one that far off it is an outlier.
PERCENT = 3.0
RATES = {"copy_bytes_per_second": "copy rate", "matrix_operations_per_second": "bf16 rate"}
BROKEN_CLOCKS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
                 "sw_thermal_slowdown")  # fmt: skip
# What a program did wrong: a fault of its own, not of the card's.
XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45})
# By exit code; any other is a failure. None: the unit was killed, or is still at work.
OUTCOMES: dict[int | None, str] = {
    EXIT_COMPLETE: "measured",
    **dict.fromkeys((EXIT_USAGE, EXIT_NO_GPU, EXIT_MODE_NOT_IN_FORCE), "refused"),
    **dict.fromkeys((EXIT_INTERRUPTED, 129, 143), "interrupted"),
    None: "cut off",
}
MEASURED = OUTCOMES[EXIT_COMPLETE]
FIGURES = ("work_delivered", "worst_slowdown", "p99_ms", "joules_per_job", "energy_ratio")

Row = dict[str, Any]


def write(folder: Path, without_record: Sequence[Row]) -> int:
    """Write fleet.json and fleet.md, print the latter; return the fleet's exit code.

    Args:
        folder: The fleet's.
        without_record: `host` and `reason` of each card that has no record of its own.

    A card whose record cannot be read stands among these.

    Raises `SuiteError` where there is nothing to report.
    """
    cards, missed = [], cleaned(list(without_record))
    for path in sorted(folder.glob("*/GPU-*.json")):
        try:
            cards.append(read_card(path))
        except ValueError as error:
            reason = f"{path.name}, or its comparison.json, cannot be read ({error})"
            missed.append(cleaned({"host": path.parent.name, "reason": reason}))
    if not cards and not missed:
        raise SuiteError(f"{folder} holds no unit of a fleet: name another by --output", EXIT_USAGE)
    flag_repeated(cards)
    flag(cards)
    found = {
        "schema_version": SCHEMA_VERSION,
        "created_at": utc_now(),
        "cards": cards,
        "without_record": missed,
        "models": merge(cards),
    }
    text = markdown(found)
    write_report(folder, NAME, finite(found), text)
    print(f"\n{text}\nreport: {folder / NAME}.md", flush=True)
    is_complete = all(card["outcome"] == MEASURED for card in cards)
    return EXIT_COMPLETE if is_complete and not missed else EXIT_FAILED


# --- what there is -------------------------------------------------------------------------------


class Value(msgspec.Struct):
    """An estimate of a comparison."""

    mean: float | None


class Client(msgspec.Struct):
    """A client's row in a comparison."""

    label: str
    slowdown: Value | None = None
    p99_ms: Value | None = None
    service: dict[str, Any] | None = None
    responses: int = 0
    missed: int = 0

    @property
    def tail_ms(self) -> float | None:
        """Its p99; infinite where enough requests were asked for one, and too many missed."""
        known = _mean(self.p99_ms)
        is_late = self.missed and self.responses + self.missed >= scores.FEWEST_FOR_A_TAIL
        return math.inf if known is None and is_late else known


class Group(msgspec.Struct, kw_only=True):
    """A mode's row in a comparison."""

    variant: str
    mode: str
    mix: str
    clients: int
    outcome: str
    invalid: str | None = None
    stp: Value | None = None
    joules_per_job: Value | None = None
    energy_ratio: Value | None = None
    client_rows: list[Client] = []

    @property
    def figures(self) -> Row:
        """What the table shows of a mode; `None` is unknown.

        A count that failed in some round, or has a disturbed baseline, has no figure.
        """
        if self.outcome != "ok" or self.invalid:
            return {"outcome": self.outcome, **dict.fromkeys((*FIGURES, "worst_job"))}
        known = [(felt, row.label) for row in self.client_rows
                 if row.service is None and (felt := _mean(row.slowdown)) is not None]  # fmt: skip
        worst_slowdown, worst_job = max(known, default=(None, None))
        tails = [row.tail_ms for row in self.client_rows]
        return {
            "outcome": self.outcome,
            "work_delivered": _mean(self.stp),
            "worst_slowdown": worst_slowdown,
            "worst_job": worst_job,
            "p99_ms": max((tail for tail in tails if tail is not None), default=None),
            "joules_per_job": _mean(self.joules_per_job),
            "energy_ratio": _mean(self.energy_ratio),
        }


class Conclusion(msgspec.Struct):
    """A conclusion of a comparison."""

    mix: str
    clients: int
    subject: str
    verdict: str | None
    best: str | None


class Section(msgspec.Struct):
    """A section of a comparison, which the newest comes first of."""

    environment: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    groups: list[Group] = []
    conclusions: list[Conclusion] = []


class Comparison(msgspec.Struct):
    """A card's comparison.json, as far as a fleet's report reads it."""

    schema_version: Literal[5]  # comparison.SCHEMA_VERSION
    sections: list[Section]


def read_card(path: Path) -> Row:
    """Return a unit's record with the figures of its comparison, by mode.

    Raises `ValueError`, which says why, where one of them cannot be read.
    """
    record = read_struct(path, UnitRecord)
    compared = path.with_suffix("") / "comparison.json"
    sections = read_struct(compared, Comparison).sections if os.path.lexists(compared) else []
    section = sections[0] if sections else Section()
    groups = _compared_groups(section)
    return {
        "host": record.host,
        "uuid": record.gpu.uuid,
        "model": record.gpu.name,
        "outcome": OUTCOMES.get(record.exit_code, "failed"),
        "reason": record.reason,
        "started_at": record.started_at,
        "health": record.health and msgspec.to_builtins(record.health),
        "flags": [record.health_failure] if record.health_failure else [],
        "modes": {group.variant: group.figures for group in groups},
        "best_mode": _best_mode(section, groups),
        # Cards merge only where this is alike, as runs do.
        "environment": {
            **section.environment, "versions": section.versions, "engines": section.engines,
            "driver_version": record.gpu.driver_version, "commit": record.commit,
            "plan": record.plan, "host_cores": record.host_cores,
        },
    }  # fmt: skip


def _compared_groups(section: Section) -> list[Group]:
    """Return the rows of clients together, at the mix and count where most modes worked."""
    by_load: dict[tuple[str, int], list[Group]] = {}
    for group in section.groups:
        if group.clients > 1 and group.mode != "exclusive":
            by_load.setdefault((group.mix, group.clients), []).append(group)
    return max(by_load.values(), default=[],
               key=lambda groups: (sum(map(_worked, groups)), groups[0].clients))  # fmt: skip


def _worked(group: Group) -> bool:
    return group.outcome == "ok" and group.stp is not None


def _mean(found: Value | None) -> float | None:
    return None if found is None else found.mean


def _best_mode(section: Section, groups: Sequence[Group]) -> str | None:
    """Return the mode that surely delivers most on a card, `None` where that cannot be told."""
    compared = {(group.mix, group.clients) for group in groups}
    for one in section.conclusions:
        is_ours = (one.mix, one.clients) in compared
        if is_ours and one.subject == claims.WHOLE_CARD and one.verdict == claims.SURE:
            return one.best
    return None


# --- what they say together ----------------------------------------------------------------------


def flag_repeated(cards: Sequence[Row]) -> None:
    """Flag a card's earlier measurement where it was measured again under another host's name."""
    latest: dict[str, Row] = {}
    for card in sorted(cards, key=lambda card: card["started_at"] or ""):
        if card["outcome"] == MEASURED:
            earlier = latest.setdefault(card["uuid"], card)
            if earlier is not card:
                earlier["flags"].append(f"the card that {card['host']} measured again later")
                latest[card["uuid"]] = card


def flag(cards: Sequence[Row]) -> None:
    """Add to each card's `flags` what its health check has against it."""
    for card in cards:
        health = card["health"]
        if health is None:
            continue
        peers = [one["health"] for one in cards if one["health"] and one["model"] == card["model"]]
        for rate, name in RATES.items():
            under = -_percent_off(health.get(rate), [peer.get(rate) for peer in peers])
            if under > PERCENT:
                card["flags"].append(f"{name} {under:.1f} % under the median of its model")
        limits = Counter(peer.get("power_limit_watts") for peer in peers)
        del limits[None]  # a limit that could not be asked for is no other one
        limit = health.get("power_limit_watts")
        usual = limits.most_common(1)[0][0] if limits else None
        if limit is not None and limits[limit] < limits[usual]:
            card["flags"].append(f"power limit {limit} W, of others {usual} W")
        slowed = sorted(set(BROKEN_CLOCKS).intersection(health.get("throttle_reasons") or []))
        errors = health.get("ecc_uncorrected_errors")
        xids = sorted(set(health.get("xids") or []) - XIDS_OF_PROGRAMS)
        card["flags"] += [f"clock lowered by {', '.join(slowed)}"] if slowed else []
        card["flags"] += [f"{errors:g} uncorrected ECC errors"] if errors else []
        card["flags"] += [f"Xid {', '.join(map(str, xids))}"] if xids else []


def _percent_off(value: float | None, all_values: Sequence[float | None]) -> float:
    """Return how far a value lies off the median, in percent of it; 0 where that is unknown."""
    known = [one for one in all_values if one]
    if value is None or not known:
        return 0.0
    return scores.difference_percent(statistics.median(known), value)


def merge(cards: Sequence[Row]) -> list[Row]:
    """Return a row for each kind of card: its decision, its figures by mode, its outliers."""
    kinds: dict[str, list[Row]] = {}
    for card in cards:
        if card["outcome"] == MEASURED:
            kinds.setdefault(json.dumps(card["environment"], sort_keys=True), []).append(card)
    return [_kind(alike, cards) for alike in kinds.values()]


def _kind(alike: Sequence[Row], cards: Sequence[Row]) -> Row:
    model = alike[0]["model"]
    averaged = [card for card in alike if not card["flags"]]
    modes = {}
    for mode in dict.fromkeys(mode for card in averaged for mode in card["modes"]):
        rows = [card["modes"][mode] for card in averaged if mode in card["modes"]]
        modes[mode] = {name: scores.mean(row[name] for row in rows) for name in FIGURES}
    votes = Counter(card["best_mode"] for card in averaged)
    decision, agreeing = votes.most_common(1)[0] if votes else (None, 0)
    if 2 * agreeing <= len(averaged):
        decision = None  # which of several came first decides nothing
    outliers = {}
    for card in alike:
        reasons = [*card["flags"], *_far_off(card, averaged)]
        if card in averaged and card["best_mode"] != decision:
            reasons.append(f"decides for {card['best_mode'] or 'no mode'}")
        if reasons:
            outliers[f"{card['host']} {card['uuid']}"] = reasons
    of_model = {card["uuid"] for card in cards if card["model"] == model}
    return {
        "model": model, "environment": alike[0]["environment"], "cards": len(of_model),
        "averaged": len(averaged),
        "decision": decision, "agreeing": agreeing, "modes": modes, "outliers": outliers,
    }  # fmt: skip


def _far_off(card: Row, averaged: Sequence[Row]) -> list[str]:
    """Return in which modes a card delivers other work than the median of those averaged."""
    found = []
    for mode, figures in card["modes"].items():
        others = [one["modes"].get(mode, {}).get("work_delivered") for one in averaged]
        off = _percent_off(figures["work_delivered"], others)
        if abs(off) > PERCENT:
            found.append(f"delivers {abs(off):.1f} % {'less' if off < 0 else 'more'} under {mode}")
    return found


# --- as people read it ---------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    kinds = [
        {
            **kind,
            "what": _what(kind, found["models"]),
            "odd": [f"odd: {card}: {'; '.join(why)}" for card, why in kind["outliers"].items()],
        }
        for kind in found["models"]
    ]
    unknown = dict.fromkeys((*FIGURES, "worst_job"))
    rows = [
        {**unknown, **figures, "card": card, "mode": mode}
        for card in found["cards"]
        for mode, figures in (card["modes"] or {"": {}}).items()
    ]
    for missed in found["without_record"]:
        reason = f"not measured: {missed['reason']}"
        card = {"host": missed["host"], "uuid": "", "outcome": reason, "reason": "", "flags": []}
        rows.append({**unknown, "card": card, "mode": ""})
    by_mode = [
        {**unknown, **figures, "kind": kind, "mode": mode}
        for kind in kinds
        for mode, figures in kind["modes"].items()
    ]
    unfit = [one for one in found["cards"] if one["flags"] and one["outcome"] != MEASURED]
    values = {"kinds": kinds, "by_mode": by_mode, "unfit": unfit, "rows": rows}
    return render.render_page("md", "fleet.j2", "Fleet", values)


def _what(kind: Row, kinds: Sequence[Row]) -> str:
    """Name a kind of card with what sets it apart from other cards of the model."""
    environment = kind["environment"]
    said = f"{kind['model']}, driver {environment['driver_version']}"
    others = [one["environment"] for one in kinds if one["model"] == kind["model"]]
    for name in sorted(environment.keys() - {"driver_version"}):
        if any(environment[name] != other.get(name) for other in others):
            said += f", {name} {environment[name]}"
    return said
