"""What may be said of the best mode beside the others, and in which words.

A difference is claimed only when each side has at least three repeats, their intervals do not
overlap, and it is larger than the noise floor (the same mode taken twice). Of overlapping ones no
difference is shown; of one or two co-runs it is said what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarking.analysis.noise import NO_FLOOR, SameTwice, is_inside, is_shown
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM, Estimate
from benchmarking.metrics.number_text import joined


@dataclass(frozen=True)
class Candidate:
    """A mode beside the best one: its figure, and whether it reads like the best one's."""

    name: str
    found: Estimate
    reads_like_best: bool


@dataclass(frozen=True)
class Standing:
    """The other modes by what may be said of them, beside the best one.

    `shown` differ beyond the spreads, `overlapping` do not, `in_noise` differ by no more than
    `noise_percent`, of `single` a side ran once or twice only; `is_tie` when no single one's figure
    differs from the best's as it is printed.
    """

    shown: list[str]
    overlapping: list[str]
    in_noise: list[str]
    single: list[str]
    is_tie: bool
    noise_percent: float | None

    @property
    def names_best(self) -> bool:
        """Whether the verdict says which one the best figure belongs to."""
        return not self.overlapping and not self.in_noise

    @property
    def doubt(self) -> str:
        """What a claim lacks; empty where nothing is claimed, or an A/A stands behind it."""
        return NO_FLOOR if self.shown and self.noise_percent is None else ""


@dataclass(frozen=True)
class Words:
    """How a verdict is worded: a choice; more than (the shown ones); what single runs gave."""

    choose: str
    surpasses: str
    seen_best: str
    seen_better: str
    seen_above: str
    seen_tie: str


def stand(best: Estimate, others: Sequence[Candidate], noise: SameTwice | None) -> Standing:
    """Sort the others by what may be said of them."""
    shown, overlapping, in_noise, single = [], [], [], []
    for other in others:
        if is_inside(best.mean, other.found.mean, noise):
            in_noise.append(other)
        elif is_shown(best, other.found, noise):
            shown.append(other)
        elif best.overlaps(other.found):
            overlapping.append(other)
        else:
            single.append(other)
    return Standing(
        *([other.name for other in kind] for kind in (shown, overlapping, in_noise, single)),
        is_tie=all(other.reads_like_best for other in single),
        noise_percent=None if noise is None else noise.percent,
    )


def verdict(best: str, standing: Standing, words: Words, *, with_reason: bool = True) -> str:
    """The standing in words; `with_reason` adds why no difference is shown."""
    parts = []
    if standing.shown and standing.names_best and not standing.single:
        return words.choose
    if standing.shown:
        parts.append(f"{words.surpasses} {joined(standing.shown)}")
    if standing.overlapping:
        reason = " (their spreads overlap)" if with_reason else ""
        parts.append(
            f"no difference shown between {best} and {joined(standing.overlapping)}{reason}"
        )
    if standing.in_noise:
        floor = f" of {standing.noise_percent:.1f} %" if with_reason else ""
        parts.append(
            f"the difference between {best} and {joined(standing.in_noise)} is inside the noise "
            f"floor{floor}"
        )
    if standing.single:
        parts.append(f"in these runs {_seen(best, standing, words, is_alone=not parts)}")
    return "; ".join(parts)


def _seen(best: str, standing: Standing, words: Words, *, is_alone: bool) -> str:
    if standing.is_tie:
        return f"{words.seen_tie} {joined([best, *standing.single])}"
    if not is_alone:
        return f"{words.seen_above} {joined(standing.single)}"
    return words.seen_best if len(standing.single) > 1 else words.seen_better


def repeats_text(found: Sequence[Estimate]) -> str:
    """`n = 1` where all have one; else each one's own count, `n = 3 and 1`."""
    counts = [str(estimate.repeats) for estimate in found]
    return f"n = {counts[0] if len(set(counts)) == 1 else joined(counts)}"


def single_caveat(names: Sequence[str], found: Sequence[Estimate], *, ran_out_of_time: bool) -> str:
    """Why a figure of one or two co-runs is no claim, and what to do about it."""
    few = [
        (name, estimate)
        for name, estimate in zip(names, found, strict=True)
        if estimate.repeats < MIN_REPEATS_FOR_CLAIM
    ]
    counts = {estimate.repeats for _, estimate in few}
    listed = joined([name for name, _ in few])
    if counts == {1} and len(few) == len(found):
        lead = " One co-run each, so their spread is unknown"
    elif counts == {1}:
        lead = f" One co-run only under {listed}: its spread is unknown"
    else:
        lead = f" Under {listed} there are fewer than three co-runs: too few for an interval"
    if ran_out_of_time:
        return (
            f"{lead}. The time budget allowed no more: repeat with a larger one "
            "(`--phase-minutes`, `--budget-minutes`) before relying on it."
        )
    return f"{lead}: repeat (`--repeats 3`) before relying on it."
