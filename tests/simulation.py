"""A card shared by simulated clients, event by event, where the truth is known.

A client does units of work with pauses between them and a gap before it starts its job again. The
card serves those that have work at the moment: one that slices gives n of them 1/n each, one that
overlaps delivers up to `capacity` seconds of alone-work a second, never more than 1 to a client.
What a run would measure is read from the units by the project's own figures; what is true is read
from the card.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# A unit of work (its kind, seconds alone), or a pause (None, seconds).
Step = tuple[str | None, float]
Job = Callable[[random.Random], Iterator[Step]]


@dataclass
class SimulatedClient:
    """One client: its job, repeated; what it finished: units as (kind, start, end), whole jobs.

    `now` is the card's clock.
    """

    job: Job
    seed: int
    restart_seconds: float = 0.01
    delay_seconds: float = 0.0  # before its first job
    units: list[tuple[str, float, float]] = field(default_factory=list)
    jobs: list[tuple[float, float]] = field(default_factory=list)
    now: float = 0.0

    def steps(self) -> Iterator[Step]:
        """The steps of one job after the other, without an end."""
        generator = random.Random(self.seed)
        yield None, self.delay_seconds
        while True:
            begun = self.now
            yield from self.job(generator)
            self.jobs.append((begun, self.now))
            yield None, self.restart_seconds


@dataclass
class SimulatedCard:
    """A card that delivers `capacity` seconds of alone-work a second to those who want some."""

    capacity: float = 1.0
    # (time, seconds of alone-work delivered until then), at every event
    _delivered: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])

    def run(self, clients: list[SimulatedClient], seconds: float) -> None:
        """Serve these clients for so many seconds, all of them there from 0 on."""
        plans = [client.steps() for client in clients]
        kinds: list[str | None] = [None] * len(clients)
        left = [0.0] * len(clients)  # of a unit in seconds alone, of a pause in seconds
        begun = [0.0] * len(clients)
        now = work = 0.0
        while now < seconds:
            for index, plan in enumerate(plans):
                while left[index] <= 0.0:  # a pause of no length, too
                    clients[index].now = now
                    kinds[index], left[index] = next(plan)
                    begun[index] = now
            active = sum(kind is not None for kind in kinds)
            rate = min(1.0, self.capacity / active) if active else 0.0
            rates = [1.0 if kind is None else rate for kind in kinds]
            first = min(range(len(clients)), key=lambda index: left[index] / rates[index])
            step = left[first] / rates[first]
            now += step
            work += step * rate * active
            self._delivered.append((now, work))
            for index, speed in enumerate(rates):
                left[index] -= step * speed
            left[first] = 0.0
            if kinds[first] is not None:
                clients[first].units.append((kinds[first], begun[first], now))

    def delivered(self, start: float, end: float) -> float:
        """Seconds of alone-work that were done between two moments: the truth."""
        return self._until(end) - self._until(start)

    def _until(self, moment: float) -> float:
        before = (0.0, 0.0)
        for time, work in self._delivered:
            if time >= moment:
                share = (moment - before[0]) / (time - before[0]) if time > before[0] else 1.0
                return before[1] + share * (work - before[1])
            before = (time, work)
        return before[1]


def steady(*parts: tuple[str, int, float]) -> Job:
    """A job that never pauses: (kind, how many, seconds alone of each), in turn."""

    def job(generator: random.Random) -> Iterator[Step]:
        for kind, count, seconds in parts:
            for _ in range(count):
                yield kind, seconds * math.exp(generator.gauss(0.0, 0.01))

    return job


def notebook(cells: int, cell_seconds: float, idle: tuple[float, float]) -> Job:
    """A session: cells of several kinds in an order of its own, and a pause after each."""

    def job(generator: random.Random) -> Iterator[Step]:
        kinds = [f"cell {number % 4}" for number in range(cells)]
        generator.shuffle(kinds)
        for kind in kinds:
            yield kind, cell_seconds * (1 + 0.1 * int(kind[-1]))
            yield None, generator.uniform(*idle)

    return job


# The mixed mix of small jobs: unit times alone as recorded on an H100, rounded; the shortest units
# are drawn together by ten, which changes no figure and saves the simulation's time.
RESNET = steady(("train_step", 100, 0.0094), ("test_step", 6, 0.005), ("part", 1, 0.002))
INFERENCE = steady(("batch", 10, 0.0163))
BERT = steady(("train_step", 63, 0.0077), ("held_out", 10, 0.003))
NOTEBOOK = notebook(8, 0.4, (0.25, 0.625))
TOKENS = steady(("prefill", 1, 0.035), ("tokens", 26, 0.0135))
# What a server does at a fixed rate is no work: its neighbors are what counts.
MIXES = {
    "mixed": (RESNET, INFERENCE, NOTEBOOK, BERT),
    "llm": (TOKENS, RESNET, INFERENCE, NOTEBOOK),
    "serving": (RESNET,) * 3,
    "training": (RESNET,) * 4,
    "inference": (INFERENCE,) * 4,
    "interactive": (NOTEBOOK,) * 4,
}
