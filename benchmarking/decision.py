"""The decision in sentences, each with its numbers and its runs, and every doubt beside it.

A difference between modes is claimed only when each side has at least three repeats and their
intervals do not overlap. Of overlapping ones it says that no difference is shown; of one or two
co-runs, what was seen and that it is to be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarking.comparison import (
    MODE_NAMES,
    Claim,
    ClientRow,
    Comparison,
    Group,
    Ramp,
    Section,
    clients_text,
    is_valid,
)
from benchmarking.estimates import MIN_REPEATS_FOR_CLAIM, Estimate
from benchmarking.number_text import duration, joined


def decide(compared: Comparison) -> Comparison:
    """Fill in the doubts and the claims of every section; returns the same comparison."""
    for section in compared.sections:
        section.doubts = _doubts(section)
        section.claims = _cpu_claims(section) if section.is_cpu_demo else _claims(section)
    return compared


def _doubts(section: Section) -> list[str]:
    """Everything invalid, unverified or failed, and every sign that a figure may mislead."""
    doubts = []
    for run in section.runs:
        if run.is_invalid:
            doubts.append(f"{run.run_id}: the run is invalid, none of its co-runs is compared")
        elif run.manifest.get("outcome") in ("running", "interrupted", "failed"):
            doubts.append(f"{run.run_id}: the run's outcome is {run.manifest['outcome']}")
        for co_run in run.co_runs("co_run"):
            if not is_valid(run, co_run):
                reason = co_run.get("reason") or "a client was not proved to run under the mode"
                doubts.append(f"{run.run_id}, {co_run['co_run']}: invalid, {reason}")
            elif co_run["outcome"] != "ok":
                reason = co_run.get("reason") or "no reason recorded"
                doubts.append(f"{run.run_id}, {co_run['co_run']}: {co_run['outcome']}, {reason}")
        for record in run.clients("baseline"):
            if record["status"] != "ok":
                doubts.append(
                    f"{run.run_id}: {record.get('label')} alone ended {record['status']}; without "
                    "it STP and overhead are unknown"
                )
    for group in section.groups:
        where = f"{group.run.run_id}, {clients_text(group.clients)}"
        if group.is_unverified and not section.is_cpu_demo:
            doubts.append(
                f"{where}: unverified, the clients could not be matched with the driver's lists"
            )
        if group.stp is None and group.outcome == "ok":
            doubts.append(f"{where}: no baseline for every job, so STP and overhead are unknown")
        warnings = {w for co_run in group.co_runs for w in co_run.get("warnings") or []}
        doubts += [f"{where}: {warning}" for warning in sorted(warnings)]
        if group.gpu["throttle_reasons"]:
            doubts.append(
                f"{where}: clocks were limited ({', '.join(group.gpu['throttle_reasons'])})"
            )
    return doubts


def _cpu_claims(section: Section) -> list[Claim]:
    claims = [
        Claim(
            "No GPU was used: this is a demonstration of the flow on the CPU and says nothing "
            "about time slicing, MPS or MIG.",
            tuple(run.run_id for run in section.runs),
        )
    ]
    for group in section.groups:
        figure = f"STP {group.stp.text()}" if group.stp else f"outcome {group.outcome}"
        claims.append(
            Claim(
                f"`{group.mix}` with {clients_text(group.clients)} on these CPU cores: {figure}.",
                (group.run.run_id,),
            )
        )
    return claims


def _claims(section: Section) -> list[Claim]:
    """The decision in sentences: throughput, felt latency, how many clients."""
    claims: list[Claim] = []
    for mix in dict.fromkeys(group.mix for group in section.groups):
        beside = [group for group in section.most_compared(mix) if group.mode != "exclusive"]
        if beside and beside[0].clients > 1:
            claims += _throughput_claims(beside)
            claims += _latency_claims(beside)
        claims += [claim for ramp in section.ramps if ramp.mix == mix
                   for claim in _ramp_claims(ramp)]  # fmt: skip
    return claims


def _caveat(group: Group) -> str:
    return " (mode unverified)" if group.is_unverified else ""


def _run_ids(groups: Iterable[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group.run.run_id for group in groups))


def _throughput_claims(groups: Sequence[Group]) -> list[Claim]:
    """Which mode delivers the most at one mix and count."""
    claims = [
        Claim(
            f"`{group.mix}` with {clients_text(group.clients)} does not work under "
            f"{group.mode_name}: {group.outcome}{', ' + group.reason if group.reason else ''}.",
            (group.run.run_id,),
        )
        for group in groups
        if group.outcome != "ok"
    ]
    known = sorted(
        (group for group in groups if group.stp is not None and group.outcome == "ok"),
        key=lambda group: group.stp.mean,
        reverse=True,
    )
    if not known:
        return claims
    if len(known) > 1:
        claims.append(_mode_claim(known))
    claims += [_against_one_after_another(group, is_only=len(groups) == 1) for group in known]
    return claims


def _head(group: Group) -> str:
    head = f"`{group.mix}` with {clients_text(group.clients)}"
    if group.throughput_clients is not None and group.throughput_clients < group.clients:
        head += f" ({group.throughput_clients} throughput clients only)"
    return head


def _mode_claim(ordered: Sequence[Group]) -> Claim:
    """The first of two or more groups with an STP, the highest first, against the others."""
    best, others = ordered[0], ordered[1:]
    standing = _throughput_standing(ordered)
    listed = joined([f"{_stp_text(group, ordered)} under {_name(group)}" for group in others])
    ours = _stp_text(best, ordered) + (f" under {_name(best)}" if standing.overlapping else "")
    caveat = _single_caveat(ordered) if standing.single else ""
    return Claim(
        f"{_head(best)}: {_verdict(_name(best), standing, _throughput_words(_name(best)))}: STP "
        f"{ours} against {listed} (1 = as much as one job after another).{caveat}",
        _run_ids(ordered),
    )


def throughput_headline(ordered: Sequence[Group]) -> str:
    """`_mode_claim` as a chart's title: the verdict and the figures, with n where it is 1."""
    best, others = ordered[0], ordered[1:]
    standing = _throughput_standing(ordered)
    words = _throughput_words(best.mode_name, f"{best.mode_name} delivers the most")
    verdict = _verdict(best.mode_name, standing, words, with_reason=False)
    once = f" ({_repeats_text([group.stp for group in ordered])})" if standing.single else ""
    listed = joined([f"{group.stp.mean:.2f} under {group.mode_name}" for group in others])
    ours = f"{best.stp.mean:.2f}" + (f" under {best.mode_name}" if standing.overlapping else "")
    return f"{verdict[0].upper()}{verdict[1:]}{once}: STP {ours} against {listed}"


def _throughput_standing(ordered: Sequence[Group]) -> _Standing:
    shown_as = {group.mode: f"{group.stp.mean:.2f}" for group in ordered}
    best = ordered[0]
    return _standing(
        best.stp,
        [(_name(group), group.stp, shown_as[group.mode] == shown_as[best.mode])
         for group in ordered[1:]],
    )  # fmt: skip


def _stp_text(group: Group, ordered: Sequence[Group]) -> str:
    """An STP with its spread, without where nobody has one: that is said once for all."""
    if all(other.stp.repeats == 1 for other in ordered):
        return f"{group.stp.mean:.2f}"
    return group.stp.text()


def _single_caveat(ordered: Sequence[Group]) -> str:
    """Why a figure of one or two co-runs is no claim, and what to do about it."""
    few = [group for group in ordered if group.stp.repeats < MIN_REPEATS_FOR_CLAIM]
    counts = {group.stp.repeats for group in few}
    if counts == {1} and len(few) == len(ordered):
        lead = " One co-run each, so their spread is unknown"
    elif counts == {1}:
        lead = f" One co-run only under {joined([_name(g) for g in few])}: its spread is unknown"
    else:
        names = joined([_name(group) for group in few])
        lead = f" Under {names} there are fewer than three co-runs: too few for an interval"
    if any(group.ran_out_of_time for group in few):
        return (
            f"{lead}. The time budget allowed no more: repeat with a larger one "
            "(`--phase-minutes`, `--budget-minutes`) before relying on it."
        )
    return f"{lead}: repeat (`--repeats 3`) before relying on it."


# --- what may be said of the best beside the others -----------------------------------------


@dataclass(frozen=True)
class _Standing:
    """The other modes by what may be said of them, beside the best one.

    `shown` differ beyond the spreads, `overlapping` do not, of `single` a side ran only once;
    `is_tie` when no single one's figure differs from the best's as it is printed.
    """

    shown: list[str]
    overlapping: list[str]
    single: list[str]
    is_tie: bool


@dataclass(frozen=True)
class _Words:
    """How a verdict is worded: a choice; more than (the shown ones); what single runs gave."""

    choose: str
    surpasses: str
    seen_best: str
    seen_better: str
    seen_above: str
    seen_tie: str


def _standing(best: Estimate, others: Sequence[tuple[str, Estimate, bool]]) -> _Standing:
    """Sort `others`: name, spread, and whether its figure reads like the best one's."""
    shown = [name for name, theirs, _ in others if best.shows_difference_from(theirs)]
    single = [
        name
        for name, theirs, _ in others
        if min(best.repeats, theirs.repeats) < MIN_REPEATS_FOR_CLAIM and not best.overlaps(theirs)
    ]
    overlapping = [name for name, _, _ in others if name not in shown and name not in single]
    return _Standing(
        shown, overlapping, single, all(tie for name, _, tie in others if name in single)
    )


def _verdict(best: str, standing: _Standing, words: _Words, *, with_reason: bool = True) -> str:
    parts = []
    if standing.shown and not standing.overlapping and not standing.single:
        return words.choose
    if standing.shown:
        parts.append(f"{words.surpasses} {joined(standing.shown)}")
    if standing.overlapping:
        reason = " (their spreads overlap)" if with_reason else ""
        others = joined(standing.overlapping)
        parts.append(f"no difference shown between {best} and {others}{reason}")
    if standing.single:
        if standing.is_tie:
            seen = f"{words.seen_tie} {joined([best, *standing.single])}"
        elif parts:
            seen = f"{words.seen_above} {joined(standing.single)}"
        else:
            seen = words.seen_best if len(standing.single) > 1 else words.seen_better
        parts.append(f"in these runs {seen}")
    return "; ".join(parts)


def _throughput_words(best: str, choose: str = "") -> _Words:
    return _Words(
        choose=choose or f"choose {best} for throughput",
        surpasses=f"{best} delivers more than",
        seen_best=f"{best} delivered the most",
        seen_better=f"{best} delivered more",
        seen_above=f"{best} delivered more than",
        seen_tie="the same was delivered by",
    )


def _p99_words(best: str) -> _Words:
    return _Words(
        choose=f"choose {best} where its p99 latency matters",
        surpasses=f"its p99 latency under {best} is below that under",
        seen_best=f"its p99 latency was the lowest under {best}",
        seen_better=f"its p99 latency was lower under {best}",
        seen_above=f"its p99 latency under {best} was below that under",
        seen_tie="its p99 latency was the same under",
    )


def _repeats_text(found: Sequence[Estimate]) -> str:
    """`n = 1` where all have one; else each one's own count, `n = 3 and 1`."""
    counts = [str(estimate.repeats) for estimate in found]
    return f"n = {counts[0] if len(set(counts)) == 1 else joined(counts)}"


def _name(group: Group) -> str:
    return f"{group.mode_name}{_caveat(group)}"


def _against_one_after_another(group: Group, *, is_only: bool) -> Claim:
    """Together against one after another; of the only mode measured, with its STP."""
    felt = (
        f"; each job took {group.antt.mean:.2f} times as long as alone, on average"
        if group.antt
        else ""
    )
    only = f"; STP {group.stp.text()}, no other mode was measured" if is_only else ""
    return Claim(
        f"{_head(group)} under {_name(group)}: {_time_text(group)}{felt}{only}.",
        (group.run.run_id,),
    )


def _time_text(group: Group) -> str:
    stp, overhead = group.stp, group.overhead_percent
    size = f"{abs(overhead.mean):.1f} %"
    difference = f"{size} {'less' if overhead.mean < 0 else 'more'} time"
    if stp.repeats < MIN_REPEATS_FOR_CLAIM:
        seen = f"in this run (n = {stp.repeats})"
        if size == "0.0 %":
            return f"together took as long as one after another {seen}"
        return f"together took {difference} than one after another {seen}"
    if stp.low <= 1 <= stp.high:
        return (
            "no difference shown from running the jobs one after another: overhead "
            f"{overhead.text(1, ' %')}"
        )
    low, high = sorted((abs(overhead.low), abs(overhead.high)))
    lead = (
        "sharing beats running the jobs one after another"
        if stp.low > 1
        else "running the jobs one after another would be faster"
    )
    spread = f"{low:.1f} to {high:.1f} %; {overhead.spread_name}"
    return f"{lead}: together took {difference} ({spread})"


def _latency_claims(groups: Sequence[Group]) -> list[Claim]:
    """p99 of each latency job, from raw latencies merged over repeats."""
    by_job: dict[tuple[int, str], list[tuple[Group, ClientRow]]] = {}
    for group in groups:
        for row in group.client_rows:
            if row.latency and row.p99_ms and group.outcome == "ok":
                by_job.setdefault((row.client, row.label), []).append((group, row))
    # Copies of one job would repeat the same sentence: the first stands for them.
    first_by_label: dict[str, list[tuple[Group, ClientRow]]] = {}
    for (_, label), pairs in by_job.items():
        first_by_label.setdefault(label, pairs)
    claims = []
    for label, pairs in first_by_label.items():
        if len(pairs) < 2:
            continue
        pairs.sort(key=lambda pair: pair[1].latency["p99"])
        claims.append(_p99_claim(label, pairs))
    return claims


def _p99_claim(label: str, pairs: Sequence[tuple[Group, ClientRow]]) -> Claim:
    """One job's p99 under two or more modes, the lowest first."""
    (best, best_row), rest = pairs[0], pairs[1:]
    spreads = [row.p99_ms for _, row in pairs]
    texts = [duration(row.latency["p99"]) for _, row in pairs]
    standing = _standing(
        best_row.p99_ms,
        [(_name(group), row.p99_ms, text == texts[0])
         for (group, row), text in zip(rest, texts[1:], strict=True)],
    )  # fmt: skip
    values = [
        f"{text}{_repeat_range(spread)} under {_name(group)}"
        for (group, _), text, spread in zip(pairs, texts, spreads, strict=True)
    ]
    if not standing.overlapping:  # then the verdict has named the best
        values[0] = texts[0] + _repeat_range(spreads[0])
    caveat = ""
    if standing.single:
        each = " each" if len({spread.repeats for spread in spreads}) == 1 else ""
        caveat = f" ({_repeats_text(spreads)}{each}: repeat before relying on it)"
    verdict = _verdict(_name(best), standing, _p99_words(_name(best)))
    return Claim(
        f"{label} beside {_others_text(best.clients - 1)} (`{best.mix}`): {verdict}: "
        f"{values[0]} against {joined(values[1:])}{caveat}.",
        _run_ids(group for group, _ in pairs),
    )


def _others_text(others: int) -> str:
    return f"{others} other{'' if others == 1 else 's'}"


def _repeat_range(p99_ms: Estimate) -> str:
    """How far the p99 of single repeats lies apart."""
    if p99_ms.repeats < 2:
        return ""
    low, high = duration(p99_ms.low), duration(p99_ms.high)
    return f" ({low} to {high} over {p99_ms.repeats} repeats)"


def _ramp_claims(ramp: Ramp) -> list[Claim]:
    """How many clients a mode bears, and from where on more gain nothing."""
    name = MODE_NAMES.get(ramp.mode, ramp.mode)
    run_ids = _run_ids(ramp.groups)
    point = ramp.breaking_point
    if point["clients"] is None:
        text = f"not reached by {point['highest_clients_tried']} clients"
    else:
        text = f"{point['clients']} clients ({point['criterion']}: {point['detail']})"
    claims = [Claim(f"Breaking point of `{ramp.mix}` under {name}: {text}.", run_ids)]
    known = [group for group in ramp.groups if group.stp and group.outcome == "ok"]
    if len(known) >= 2:
        best = max(known, key=lambda group: group.stp.mean)
        if ramp.saturation_clients is None:
            text = f"no saturation up to {clients_text(known[-1].clients)}"
        else:
            text = f"saturation at {ramp.saturation_clients} clients (STP under 95 % of the best)"
        claims.append(
            Claim(
                f"`{ramp.mix}` under {name}: {text}; the best STP is {best.stp.text()} with "
                f"{clients_text(best.clients)}.",
                run_ids,
            )
        )
    return claims
