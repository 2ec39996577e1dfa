"""What is claimed of jobs that answer: p99 latency, or what so few answers can tell, and bounds.

The worst copy of a job stands for all of its copies, and a request that was missed counts as
infinitely late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarking.analysis import noise
from benchmarking.analysis.clients import ClientRow, copies_by_label, worst_copy
from benchmarking.analysis.comparison import Claim
from benchmarking.analysis.groups import Group, run_ids_of
from benchmarking.analysis.verdicts import Candidate, Words, repeats_text, stand, verdict
from benchmarking.metrics.estimates import Estimate
from benchmarking.metrics.number_text import duration, joined
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL


@dataclass(frozen=True)
class _Figure:
    """What a job is judged by; `name` is the noise floor's too."""

    name: str
    of: Callable[[ClientRow], Estimate | None]
    write: Callable[[float], str]
    words: Callable[[str], Words]


def latency_claims(groups: Sequence[Group], pairs: Sequence[noise.SameTwice]) -> list[Claim]:
    """Each latency job under the modes, then its share of responses within a bound."""
    by_label: dict[str, list[tuple[Group, list[ClientRow]]]] = {}
    for group in groups:
        asked = [row for row in group.client_rows if row.responses or row.missed]
        for label, copies in copies_by_label(asked if group.outcome == "ok" else []).items():
            by_label.setdefault(label, []).append((group, copies))
    claims = []
    for label, found in by_label.items():
        figure = _figure_for([row for _, copies in found for row in copies])
        if len(found) > 1 and figure is not None:
            claims.append(_comparison(label, figure, found, pairs))
        claims += [
            _slo_claim(label, group, copies)
            for group, copies in found
            if any(row.slo is not None for row in copies)
        ]
    return claims


def _figure_for(rows: Sequence[ClientRow]) -> _Figure | None:
    """p99 where all have enough responses; else the slowdown, of a service the median latency."""
    if all(row.p99_ms for row in rows):
        return _P99
    if all(row.slowdown and row.service is None for row in rows):
        return _SLOWDOWN
    return _MEDIAN if all(row.median_ms for row in rows) else None


def _comparison(
    label: str,
    figure: _Figure,
    found: Sequence[tuple[Group, list[ClientRow]]],
    pairs: Sequence[noise.SameTwice],
) -> Claim:
    """One job under two or more modes, the lowest figure first."""
    worst = [
        (group, worst_copy(copies, lambda row: figure.of(row).mean)) for group, copies in found
    ]
    worst.sort(key=lambda pair: figure.of(pair[1]).mean)
    best = worst[0][0]
    estimates = [figure.of(row) for _, row in worst]
    texts = [figure.write(estimate.mean) for estimate in estimates]
    others = [
        Candidate(group.mode_in_claims, estimate, text == texts[0])
        for (group, _), estimate, text in zip(worst[1:], estimates[1:], texts[1:], strict=True)
    ]
    floor = noise.noise_floor(pairs, best.mix, figure.name, label)
    standing = stand(estimates[0], others, floor)
    values = [
        f"{text}{_spread(figure, row)} under {group.mode_in_claims}"
        for (group, row), text in zip(worst, texts, strict=True)
    ]
    if standing.names_best:
        values[0] = texts[0] + _spread(figure, worst[0][1])
    notes = []
    if figure is not _P99:
        few = [row.responses + row.missed for _, row in worst if row.p99_ms is None]
        counts = joined(list(dict.fromkeys(map(str, few))))
        notes.append(
            f"{counts} responses, under {FEWEST_FOR_A_TAIL} in a repeat: too few for a p99"
        )
    if standing.single:
        each = " each" if len({estimate.repeats for estimate in estimates}) == 1 else ""
        notes.append(f"{repeats_text(estimates)}{each}: repeat before relying on it")
    caveat = f" ({'; '.join(notes)})" if notes else ""
    doubt = f"; {standing.doubt}" if standing.doubt else ""
    beside = f"{best.clients - 1} other{'' if best.clients == 2 else 's'}"
    said = verdict(best.mode_in_claims, standing, figure.words(best.mode_in_claims))
    copies = max(len(copies) for _, copies in found)
    which = f", the worst of {copies} copies," if copies > 1 else ""
    return Claim(
        f"{label}{which} beside {beside} (`{best.mix}`): **{said}**: "
        f"{values[0]} against {joined(values[1:])}{caveat}{doubt}.",
        run_ids_of(group for group, _ in worst),
    )


def _spread(figure: _Figure, row: ClientRow) -> str:
    """What lies behind a figure: its interval or range over repeats, and what was missed."""
    found = figure.of(row)
    parts = [found.spread_text(figure.write)] if found.repeats > 1 else []
    if row.missed:
        parts.append(f"{row.missed_percent:.1f} % missed")
    return f" ({'; '.join(parts)})" if parts else ""


def _latency_words(what: str) -> Callable[[str], Words]:
    return lambda best: Words(
        choose=f"choose {best} where its {what} matters",
        surpasses=f"its {what} under {best} is below that under",
        seen_best=f"its {what} was the lowest under {best}",
        seen_better=f"its {what} was lower under {best}",
        seen_above=f"its {what} under {best} was below that under",
        seen_tie=f"its {what} was the same under",
    )


_P99 = _Figure(noise.P99, lambda row: row.p99_ms, duration, _latency_words(noise.P99))
_MEDIAN = _Figure(noise.MEDIAN, lambda row: row.median_ms, duration, _latency_words(noise.MEDIAN))
_SLOWDOWN = _Figure(
    noise.SLOWDOWN, lambda row: row.slowdown, "{:.2f}".format, _latency_words(noise.SLOWDOWN)
)


def _slo_claim(label: str, group: Group, copies: Sequence[ClientRow]) -> Claim:
    """The share of responses within the bound; of copies the lowest."""
    row = worst_copy(copies, lambda row: None if row.slo is None else -row.slo.percent)
    what, within = "responses", f"within {duration(row.slo.bound_ms)}"
    if row.service is not None:
        what = "requests"
        offered, goodput = row.service.offered_per_second, row.service.goodput_per_second
        if offered is not None and goodput is not None:
            within += f", a goodput of {goodput:.1f} of {offered:.1f} requests a second offered"
    which = f", the worst of {len(copies)} copies," if len(copies) > 1 else ""
    return Claim(
        f"{label}{which} under {group.mode_in_claims} (`{group.mix}`, {group.who}): "
        f"{row.slo.percent:.1f} % of {what} {within} "
        f"(n = {sum(status == 'ok' for status in row.statuses)}).",
        group.run_ids,
    )
