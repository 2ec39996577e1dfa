"""The counting window on a simulated card whose truth is known: no figure of it is biased."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from simulation import MIXES, NOTEBOOK, Job, SimulatedCard, SimulatedClient

from benchmarking.measuring.event_log import units_in_window
from benchmarking.metrics import scores
from benchmarking.records.types import Units

# As run_experiments.sh measures by default, in seconds.
SETTLE, ALONE, TOGETHER = 3.0, 7.0, 14.0
# So long that what happens at the edges no longer matters.
LONG = 200.0
# Jobs that never pause and are all alike give one answer, whichever they are.
UNLIKE = {name: MIXES[name] for name in ("mixed", "llm", "training", "interactive")}


def events_of(client: SimulatedClient) -> list[dict[str, Any]]:
    return [
        {"event": "units", "kind": kind, "latency": False, "start_seconds": [start],
         "duration_seconds": [end - start]}
        for kind, start, end in client.units
    ]  # fmt: skip


def counted(client: SimulatedClient, end: float) -> dict[str, Units]:
    return units_in_window(events_of(client), SETTLE, end)[0]


def measured_alone(job: Job, seed: int) -> dict[str, float]:
    """Seconds of a unit by kind, from the window that holds a whole job."""
    client = SimulatedClient(job, seed)
    SimulatedCard().run([client], SETTLE + ALONE + 30)
    whole = min(end for begun, end in client.jobs if begun >= SETTLE)
    return scores.unit_seconds(counted(client, max(SETTLE + ALONE, whole)))


def slowdowns(clients: Sequence[SimulatedClient], end: float, seed: int) -> list[float]:
    return [
        1 / scores.normalized_progress(counted(client, end), measured_alone(client.job, seed))
        for client in clients
    ]


def run_together(
    jobs: Sequence[Job], capacity: float, seconds: float, seed: int
) -> tuple[SimulatedCard, list[SimulatedClient]]:
    card = SimulatedCard(capacity)
    clients = [SimulatedClient(job, seed + index) for index, job in enumerate(jobs)]
    for client in clients[1:]:
        if client.job is NOTEBOOK:  # as jupyter_simulation.py does, up to two mean pauses
            client.delay_seconds = random.Random(client.seed).uniform(0, 0.875)
    card.run(clients, seconds)
    return card, clients


def seeds_of(jobs: Sequence[Job], few: int, many: int) -> range:
    """Notebooks alone meet by chance, so it takes many of them to see a bias of one percent."""
    return range(0, 10 * (many if set(jobs) == {NOTEBOOK} else few), 10)


def true_slowdowns(jobs: Sequence[Job], capacity: float) -> list[float]:
    found = []
    for seed in seeds_of(jobs, few=1, many=30):
        _, clients = run_together(jobs, capacity, LONG, seed)
        found.append(slowdowns(clients, LONG - 2, seed))
    return [statistics.fmean(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize("mix", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("capacity", [1.0, 1.25])
def test_work_delivered_and_slowdowns_are_right_within_one_percent(
    mix: tuple[Job, ...], capacity: float
) -> None:
    end = SETTLE + TOGETHER
    work_ratios, found = [], []
    for seed in seeds_of(mix, few=6, many=200):
        card, clients = run_together(mix, capacity, end + 2, seed)
        work = sum(
            scores.work_seconds(counted(client, end), measured_alone(client.job, seed))
            for client in clients
        )
        work_ratios.append(work / card.delivered(SETTLE, end))
        found.append(slowdowns(clients, end, seed))
    assert statistics.fmean(work_ratios) == pytest.approx(1.0, rel=0.01)
    measured = [statistics.fmean(values) for values in zip(*found, strict=True)]
    if set(mix) == {NOTEBOOK}:  # each by itself meets the others by chance
        measured = [statistics.fmean(measured)]
        assert measured == [
            pytest.approx(statistics.fmean(true_slowdowns(mix, capacity)), rel=0.01)
        ]
    else:
        assert measured == pytest.approx(true_slowdowns(mix, capacity), rel=0.01)


@pytest.mark.parametrize("count", [2, 8])
def test_notebooks_with_lives_of_their_own_come_out_at_their_true_slowdown(count: int) -> None:
    jobs, end = (NOTEBOOK,) * count, SETTLE + TOGETHER
    found = []
    for seed in seeds_of(jobs, few=0, many=400):
        _, clients = run_together(jobs, 1.0, end + 2, seed)
        found.append(statistics.fmean(slowdowns(clients, end, seed)))
    truth = statistics.fmean(true_slowdowns(jobs, 1.0))
    assert 1.05 < truth < count
    assert statistics.fmean(found) == pytest.approx(truth, rel=0.01)
