"""What is claimed of simulated reports whose truth is known.

A report has three modes and the whole card with four jobs, measured in rounds: each round has every
job alone, then the modes in an order that alternates. Noise is log-normal; a drift of the card is
linear over the session and slows whatever runs then.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from benchmarking.report import claims

MODES = ("time-slicing", "mps", "mps:even")
FIGURES = 5  # the whole card, four jobs
REPORTS = 600


def report(
    rng: random.Random, rounds: int, noise: Mapping[str, float], drift: float = 0.0,
    **truth: float,
) -> list[claims.Figure]:  # fmt: skip
    """Simulate one report; `truth` are the factors by which modes differ in every figure."""
    values = [{name: [] for name in (*MODES, "alone")} for _ in range(FIGURES)]
    slots = rounds * (len(MODES) + 1)
    for slot in range(slots):
        number, place = divmod(slot, len(MODES) + 1)
        order = ("alone", *(MODES if number % 2 == 0 else reversed(MODES)))
        name = order[place]
        level = truth.get(name, 1.0) * (1 + drift * slot / (slots - 1))
        for figure in values:
            figure[name].append(level * math.exp(rng.gauss(0, noise[name])))
    return [claims.Figure(figure, is_higher_better=False) for figure in values]


def pairs_of(figures: Sequence[claims.Figure], *names: str) -> list[dict]:
    """What is said of two modes in every figure; of every two without names."""
    return [pair for pairs in claims.judge(figures) for pair in pairs
            if not names or {pair["one"], pair["other"]} == set(names)]  # fmt: skip


def noises(ratio: float) -> dict[str, float]:
    """One mode that many times as noisy as another, the third between them."""
    return {"time-slicing": 0.005, "mps": 0.005 * ratio, "mps:even": 0.005 * math.sqrt(ratio),
            "alone": 0.005}  # fmt: skip


@pytest.mark.parametrize(("rounds", "drift"), [(3, 0.0), (4, 0.02)])
@pytest.mark.parametrize(("ratio", "allowed"), [(1, 0.06), (3, 0.06), (10, 0.11)])
def test_few_reports_claim_a_difference_that_is_none(ratio, allowed, rounds, drift):
    rng = random.Random(1000 * ratio + rounds)
    reports = (report(rng, rounds, noises(ratio), drift) for _ in range(REPORTS))
    wrong = [any(pair["verdict"] == claims.SURE for pair in pairs_of(one)) for one in reports]
    assert sum(wrong) <= allowed * REPORTS


def test_few_reports_claim_that_a_difference_does_not_matter_which_does():
    rng = random.Random(7)
    truth = {"mps": 1.021, "mps:even": 1.021}
    wrong = 0
    for _ in range(REPORTS):
        figures = report(rng, 4, noises(1), **truth)
        said = [pair["verdict"] for other in truth
                for pair in pairs_of(figures, "time-slicing", other)]  # fmt: skip
        wrong += claims.NO_DIFFERENCE in said
    assert wrong <= 0.11 * REPORTS


def test_a_difference_of_five_percent_in_all_figures_is_found_with_four_rounds():
    rng = random.Random(5)
    reports = (report(rng, 4, noises(1), mps=1.05) for _ in range(REPORTS))
    found = [all(pair["better"] == "time-slicing" for pair in pairs_of(one, "time-slicing", "mps"))
             for one in reports]  # fmt: skip
    assert sum(found) >= 0.95 * REPORTS


NEAR = [1.00, 1.01, 0.99]


@pytest.mark.parametrize(
    ("one", "other", "matters", "verdict"),
    [
        ([1.000, 1.001, 0.999, 1.000], [1.001, 1.002, 1.000, 1.001], 2, claims.NO_DIFFERENCE),
        ([1.0, 1.2, 0.9, 1.1], [1.1, 1.0, 1.3, 0.9], 2, claims.CANNOT_TELL),
        (NEAR, [1.10, 1.11, 1.09], 2, claims.SURE),
        (NEAR, [1.10, 1.11, 1.09], 20, claims.NO_DIFFERENCE),
        ([1.0, 1.0], [2.0] * 3, 2, claims.TOO_FEW),
        ([1.0, math.inf, 1.0], [2.0] * 3, 2, claims.CANNOT_TELL),
        # Equal rounds leave no spread, and no error.
        ([1.0] * 3, [1.0] * 3, 2, claims.NO_DIFFERENCE),
        ([1.0] * 3, [2.0] * 3, 2, claims.SURE),
    ],
)
def test_a_pair_is_judged_by_its_interval_and_what_matters(one, other, matters, verdict):
    ((pair,),) = claims.judge([claims.Figure({"a": one, "b": other}, True)], matters)
    assert pair["verdict"] == verdict
    assert pair["better"] == ("b" if verdict == claims.SURE else None)
    if None not in (pair["low"], pair["high"]):
        assert pair["low"] <= pair["percent"] <= pair["high"]
    if one[1] == 1.2:
        assert pair["smallest_shown_percent"] > 20


def test_holm_adjusts_over_the_whole_family():
    """Two figures, whose p-values are then twice and once the raw ones."""
    figures = [claims.Figure({"a": NEAR, "b": [factor * value for value in NEAR]}, True)
               for factor in (1.2, 1.03)]  # fmt: skip
    ((first,), (second,)) = claims.judge(figures)
    assert first["adjusted_p_value"] == pytest.approx(2 * first["p_value"])
    assert second["adjusted_p_value"] == pytest.approx(second["p_value"])


def test_the_verdict_on_the_best_of_several_names_those_that_are_not_surely_worse():
    values = {"time-slicing": 4.0, "mps": 2.0, "mps:even": 2.001}
    rounds = (1.0, 1.001, 0.999, 1.0)
    figure = claims.Figure(
        {name: [value * one for one in rounds] for name, value in values.items()},
        is_higher_better=False,
    )
    (pairs,) = claims.judge([figure])
    assert claims.verdict_of("mps", ["mps:even", "time-slicing"], pairs) == (
        claims.NO_DIFFERENCE, ["mps:even"],
    )  # fmt: skip
    assert claims.verdict_of("mps", ["time-slicing"], pairs) == (claims.SURE, [])
