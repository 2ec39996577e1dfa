"""One mode and mix over several counts of clients: where it breaks, where more gain nothing.

Counts stand in one ramp only where their jobs are so many copies of each other's: one and four
clients of a mix of four jobs are other jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarking.analysis import noise
from benchmarking.analysis.groups import Group
from benchmarking.metrics.breaking_point import breaking_point, saturation_count, sufficient_count
from benchmarking.records.types import ClientRecord, CoRunRecord


@dataclass
class Ramp:
    """One mode and mix over several counts of clients.

    `bounds` are those that the runs were asked to keep: `max_slowdown`, `max_p99_ms`.
    `sufficient_clients` is the fewest whose STP is near the best and not shown to differ from it.
    """

    mode: str
    mix: str
    groups: list[Group]
    bounds: Mapping[str, float]
    breaking_point: dict[str, Any]
    saturation_clients: int | None
    sufficient_clients: int | None
    noise_floor: noise.SameTwice | None

    @property
    def mode_name(self) -> str:
        """The mode and its settings as they are written in sentences."""
        return self.groups[0].mode_name

    @property
    def end_text(self) -> str:
        """Where it breaks, or up to where it does not: `8 clients (oom: ...)`."""
        point = self.breaking_point
        if point["clients"] is None:
            return f"not reached by {point['highest_clients_tried']} clients"
        broken, judged = point["broken_repeats"], point["judged_repeats"]
        some = f"; in {broken} of {judged} repeats" if broken < judged else ""
        return f"{point['clients']} clients ({point['criterion']}: {point['detail']}{some})"

    @property
    def known(self) -> list[Group]:
        """The counts that worked and have an STP, the smallest first."""
        return [group for group in self.groups if group.stp and group.outcome == "ok"]


def find_ramps(groups: Sequence[Group], same_twice: Sequence[noise.SameTwice]) -> list[Ramp]:
    """Every mode and mix that was measured at several counts of clients, copies of one another."""
    by_kind: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        key = (group.mode, group.settings, group.mix, group.proportions)
        by_kind.setdefault(key, []).append(group)
    return [
        _ramp(
            mode,
            mix,
            sorted(members, key=lambda group: group.clients),
            noise.noise_floor(same_twice, mix, noise.STP),
        )
        for (mode, _, mix, _), members in by_kind.items()
        if len(members) > 1
    ]


def _ramp(mode: str, mix: str, groups: list[Group], floor: noise.SameTwice | None) -> Ramp:
    co_runs, clients = [], []
    for group in groups:
        for co_run in group.co_runs:
            name = f"{co_run.run.run_id}/{co_run.name}"  # two runs may name a co-run alike
            co_runs.append({**co_run.record, "co_run": name})
            clients += [{**record, "co_run": name} for record in co_run.clients]
    bounds = _bounds(groups)
    stp = {
        group.clients: group.stp.mean if group.stp and group.outcome == "ok" else None
        for group in groups
    }
    point = breaking_point(
        msgspec.convert(co_runs, list[CoRunRecord]),
        msgspec.convert(clients, list[ClientRecord]),
        max_slowdown=bounds.get("max_slowdown"),
        max_p99_ms=bounds.get("max_p99_ms"),
    )
    recorded = _recorded_reason(co_runs, point["clients"])
    return Ramp(
        mode,
        mix,
        groups,
        bounds,
        point | recorded,
        saturation_count(stp),
        _sufficient(groups, stp, floor),
        floor,
    )


def _sufficient(
    groups: Sequence[Group], stp: Mapping[int, float | None], floor: noise.SameTwice | None
) -> int | None:
    """The fewest clients that deliver near the best STP; a count shown to differ from it is out."""
    known = {group.clients: group.stp for group in groups if stp[group.clients] is not None}
    best = max(known.values(), key=lambda found: found.mean, default=None)
    near = {
        clients: None if noise.is_shown(best, found, floor) else found.mean
        for clients, found in known.items()
    }
    return sufficient_count(near)


def _recorded_reason(co_runs: Sequence[Mapping[str, Any]], clients: int | None) -> dict[str, Any]:
    """What the run itself found to be the cause at that count; it saw more than the records hold.

    It tells a crash from a neighbor that was only taken along.
    """
    for co_run in co_runs:
        reason = co_run.get("stop_reason")
        if reason and co_run["clients"] == clients:
            return {"criterion": reason["kind"].replace("_", " "), "detail": reason["detail"]}
    return {}


def _bounds(groups: Sequence[Group]) -> dict[str, float]:
    """The bounds in the manifest of the newest run that was given any."""
    runs = sorted((run for group in groups for run in group.runs), key=lambda run: run.age)
    for run in reversed(runs):
        given = run.manifest.get("bounds") or {}
        known = {name: value for name, value in given.items() if value is not None}
        if known:
            return known
    return {}
