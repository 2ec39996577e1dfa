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
REPORTS = 1500


def report(
    rng: random.Random,
    rounds: int,
    noise: Mapping[str, float],
    *,
    truth: Mapping[str, float] | None = None,
    drift: float = 0.0,
) -> list[claims.Figure]:
    """Simulate one report; `truth` are the factors by which modes differ in every figure."""
    values = [{name: [] for name in (*MODES, "alone")} for _ in range(FIGURES)]
    slots = rounds * (len(MODES) + 1)
    slot = 0
    for number in range(rounds):
        order = ("alone", *(MODES if number % 2 == 0 else reversed(MODES)))
        for name in order:
            slower = drift * slot / (slots - 1)
            slot += 1
            for figure in values:
                level = (truth or {}).get(name, 1.0) * (1 + slower)
                figure[name].append(level * math.exp(rng.gauss(0, noise[name])))
    return [claims.Figure(figure, is_higher_better=False) for figure in values]


def false_claims(figures: Sequence[claims.Figure]) -> int:
    """How many differences are claimed where there are none."""
    return sum(pair["verdict"] == claims.SURE for pairs in claims.judge(figures) for pair in pairs)


def noises(ratio: float) -> dict[str, float]:
    """One mode that many times as noisy as another, the third between them."""
    return {"time-slicing": 0.005, "mps": 0.005 * ratio, "mps:even": 0.005 * math.sqrt(ratio),
            "alone": 0.005}  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "allowed", "drift", "rounds"),
    [
        (1, 0.06, 0.0, 3),
        (3, 0.06, 0.0, 3),
        (10, 0.11, 0.0, 3),
        (1, 0.06, 0.0, 4),
        (3, 0.06, 0.0, 4),
        (10, 0.11, 0.0, 4),
        (1, 0.06, 0.02, 4),
        (3, 0.06, 0.02, 4),
        (10, 0.11, 0.02, 4),
    ],
)
def test_few_reports_claim_a_difference_that_is_none(ratio, allowed, drift, rounds):
    rng = random.Random(1000 * ratio + rounds)
    reports = (report(rng, rounds, noises(ratio), drift=drift) for _ in range(REPORTS))
    assert sum(false_claims(figures) > 0 for figures in reports) <= allowed * REPORTS


def test_few_reports_claim_that_a_difference_does_not_matter_which_does():
    rng = random.Random(7)
    wrong = 0
    for _ in range(REPORTS):
        figures = report(rng, 4, noises(1), truth={"mps": 1.021, "mps:even": 1.021})
        verdicts = [
            pair["verdict"]
            for pairs in claims.judge(figures)
            for pair in pairs
            if "time-slicing" in (pair["one"], pair["other"]) and "alone" not in pair.values()
        ]
        wrong += claims.NO_DIFFERENCE in verdicts
    assert wrong <= 0.11 * REPORTS


def test_a_difference_of_five_percent_in_all_figures_is_found_with_four_rounds():
    rng = random.Random(5)
    found = 0
    for _ in range(REPORTS):
        figures = report(rng, 4, noises(1), truth={"mps": 1.05})
        pairs = [pair for pairs in claims.judge(figures) for pair in pairs
                 if {pair["one"], pair["other"]} == {"time-slicing", "mps"}]  # fmt: skip
        found += all(pair["better"] == "time-slicing" for pair in pairs)
    assert found >= 0.95 * REPORTS


def judged(one: Sequence[float], other: Sequence[float], **more: float) -> dict:
    """The only pair of a report with one figure."""
    ((pair,),) = claims.judge([claims.Figure({"a": one, "b": other}, True)], **more)
    return pair


def test_a_pair_is_judged_by_its_interval_and_what_matters():
    close = judged([1.000, 1.001, 0.999, 1.000], [1.001, 1.002, 1.000, 1.001])
    assert close["verdict"] == claims.NO_DIFFERENCE
    assert -0.5 < close["low"] < close["percent"] < close["high"] < 0.5
    noisy = judged([1.0, 1.2, 0.9, 1.1], [1.1, 1.0, 1.3, 0.9])
    assert noisy["verdict"] == claims.CANNOT_TELL
    assert noisy["smallest_shown_percent"] > 20
    apart = judged([1.00, 1.01, 0.99, 1.00], [1.10, 1.11, 1.09, 1.10])
    assert (apart["verdict"], apart["better"]) == (claims.SURE, "b")
    assert judged([1.00, 1.01, 0.99], [1.10, 1.11, 1.09], matters_percent=20)["verdict"] == (
        claims.NO_DIFFERENCE
    )


def test_under_three_rounds_or_of_what_has_no_end_nothing_is_claimed():
    assert judged([1.0, 1.0], [2.0, 2.0, 2.0])["verdict"] == claims.TOO_FEW
    assert judged([1.0, math.inf, 1.0], [2.0, 2.0, 2.0])["verdict"] == claims.CANNOT_TELL


def test_equal_rounds_leave_no_spread_and_no_error():
    assert judged([1.0] * 3, [1.0] * 3)["verdict"] == claims.NO_DIFFERENCE
    assert judged([1.0] * 3, [2.0] * 3)["verdict"] == claims.SURE


def test_holm_adjusts_over_the_whole_family():
    """Two figures, whose p-values are then twice and once the raw ones."""
    far = {"a": [1.0, 1.01, 0.99], "b": [1.2, 1.21, 1.19]}
    near = {"a": [1.0, 1.01, 0.99], "b": [1.03, 1.04, 1.02]}
    ((first,), (second,)) = claims.judge([claims.Figure(far, True), claims.Figure(near, True)])
    assert first["adjusted_p_value"] == pytest.approx(2 * first["p_value"])
    assert second["adjusted_p_value"] == pytest.approx(second["p_value"])


def test_the_verdict_on_the_best_of_several_names_those_that_are_not_surely_worse():
    figure = claims.Figure(
        {
            "time-slicing": [4.0, 4.01, 3.99, 4.0],
            "mps": [2.0, 2.002, 1.998, 2.0],
            "mps:even": [2.001, 2.003, 1.999, 2.001],
        },
        is_higher_better=False,
    )
    (pairs,) = claims.judge([figure])
    assert claims.verdict_of("mps", ["mps:even", "time-slicing"], pairs) == (
        claims.NO_DIFFERENCE, ["mps:even"],
    )  # fmt: skip
    assert claims.verdict_of("mps", ["time-slicing"], pairs) == (claims.SURE, [])
