"""The simulated card does what is known beforehand: it is a yardstick, and is held here itself."""

from __future__ import annotations

import statistics

import pytest
from simulation import BERT, INFERENCE, MIXES, NOTEBOOK, RESNET, Job, SimulatedCard, SimulatedClient

STEADY = {"training": RESNET, "inference": INFERENCE, "fine-tuning": BERT}


def unit_seconds(client: SimulatedClient) -> float:
    """Mean seconds of all units, whatever their kind."""
    return statistics.fmean(end - start for _, start, end in client.units)


@pytest.mark.parametrize("job", STEADY.values(), ids=STEADY)
@pytest.mark.parametrize(("capacity", "slowdown"), [(1.0, 4.0), (1.25, 3.2), (8.0, 1.0)])
def test_four_alike_that_never_pause_are_slowed_by_the_share_that_they_get(
    job: Job, capacity: float, slowdown: float
) -> None:
    alone = SimulatedClient(job, seed=1)
    SimulatedCard(capacity).run([alone], 60)
    together = [SimulatedClient(job, seed=seed) for seed in range(4)]
    SimulatedCard(capacity).run(together, 60)
    for client in together:
        # Restart gaps, in which one of them wants nothing, are a little relief.
        assert unit_seconds(client) / unit_seconds(alone) == pytest.approx(slowdown, rel=0.08)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("capacity", [1.0, 1.2])
def test_no_more_is_delivered_than_the_card_can_and_all_of_it_to_the_clients(
    mix: tuple[Job, ...], capacity: float
) -> None:
    card, clients = SimulatedCard(capacity), [SimulatedClient(job, n) for n, job in enumerate(mix)]
    card.run(clients, 40)
    delivered = card.delivered(5, 35) / 30
    assert delivered <= capacity * (1 + 1e-9)
    if mix[0] is not NOTEBOOK:  # somebody always wants the card
        assert delivered == pytest.approx(capacity, rel=0.02)


def test_a_notebook_pauses_as_its_range_says_and_two_have_lives_of_their_own() -> None:
    clients = [SimulatedClient(NOTEBOOK, seed) for seed in (1, 2)]
    for client in clients:
        SimulatedCard().run([client], 60)
    pauses = [
        [later[1] - earlier[2] for earlier, later in zip(c.units, c.units[1:], strict=False)]
        for c in clients
    ]
    assert all(0.25 <= pause <= 0.625 + 0.01 + 1e-9 for one in pauses for pause in one)
    assert pauses[0][:8] != pauses[1][:8]
    assert [kind for kind, *_ in clients[0].units[:8]] != [
        kind for kind, *_ in clients[1].units[:8]
    ]
