"""Which MIG instance each client gets where instances differ in size: `2g.20gb,1g.10gb,1g.10gb`.

Client i runs on an instance of profile i of the layout. Pure; the instances are made beforehand,
by `gpu-configs/setup_mig.sh LAYOUT`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.records.run_folder import PHASE_SHARE_BASELINE
from benchmarking.suite.plan import Plan, PlannedClient

Instance = Mapping[str, Any]

_PROFILE = re.compile(r"[1-9]g\.[1-9][0-9]*gb(?:[+-][a-z.]+)*")


def profile(text: str) -> str:
    """Return a profile's name as it was written, or raise `ValueError`."""
    if not _PROFILE.fullmatch(text):
        raise ValueError(f"{text!r} is no MIG profile; one is written like 1g.10gb")
    return text


def in_order(layout: Sequence[str], instances: Sequence[Instance]) -> list[Instance]:
    """Return one instance for each profile of the layout, in its order.

    `instances` are a card's as NVML describes them, each with its `profile`. Ends before the first
    profile that no unused instance has: what follows would belong to other clients.
    """
    unused = list(instances)
    ordered: list[Instance] = []
    for wanted in layout:
        found = next((one for one in unused if one.get("profile") == wanted), None)
        if found is None:
            return ordered
        unused.remove(found)
        ordered.append(found)
    return ordered


def without_unlike_shares(plan: Plan, layout: Sequence[str]) -> tuple[Plan, list[str]]:
    """Leave out the baselines on one's own instance of jobs that run on instances of unlike size.

    Returns the plan, and the labels of these jobs: one instance's time alone says nothing of
    another's, so their interference stays unknown.
    """
    profiles: dict[str, set[str]] = {}
    labels: dict[str, str] = {}
    for run in plan.co_runs:
        for client in run.clients:
            profiles.setdefault(client.job_key, set()).add(_profile_of(client, layout))
            labels[client.job_key] = client.label
    unlike = {job_key for job_key, names in profiles.items() if len(names) > 1}
    kept = tuple(
        run
        for run in plan.baseline
        if run.phase != PHASE_SHARE_BASELINE or run.clients[0].job_key not in unlike
    )
    return Plan(kept, plan.co_runs), [labels[job_key] for job_key in unlike]


def _profile_of(client: PlannedClient, layout: Sequence[str]) -> str:
    return layout[client.client]
