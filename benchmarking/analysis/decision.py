"""The decision in sentences, each with its numbers, its spread and its runs.

Which mode delivers the most, which one is kind to a latency job, what the mode alone costs, how
many clients it bears. What may be called a difference is said in `verdicts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarking.analysis import interference_text, noise
from benchmarking.analysis.clients import ClientRow
from benchmarking.analysis.comparison import Claim, Comparison, Section
from benchmarking.analysis.doubts import find_doubts
from benchmarking.analysis.groups import Group
from benchmarking.analysis.ramps import Ramp
from benchmarking.analysis.runs import clients_text
from benchmarking.analysis.verdicts import (
    Candidate,
    Standing,
    Words,
    repeats_text,
    single_caveat,
    stand,
    verdict,
)
from benchmarking.command_line.number_text import duration, joined
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM, Estimate

Pairs = Sequence[noise.SameTwice]


def decide(compared: Comparison) -> Comparison:
    """Fill in the doubts and the claims of every section; returns the same comparison."""
    for section in compared.sections:
        section.doubts = find_doubts(section)
        section.claims = _cpu_claims(section) if section.is_cpu_demo else _claims(section)
        section.claims += [Claim(*said) for said in interference_text.worst_pairs(section.matrices)]
    return compared


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
        text = f"{_head(group)} on these CPU cores: {figure}."
        claims.append(Claim(text, group.run_ids))
    return claims


def _claims(section: Section) -> list[Claim]:
    """Throughput, felt latency, cost of the mode itself, how many clients, and the noise floor."""
    claims: list[Claim] = []
    pairs = section.same_twice
    for mix in section.mixes:
        beside = [group for group in section.most_compared(mix) if group.mode != "exclusive"]
        if beside and beside[0].clients > 1:
            claims += _throughput_claims(beside, pairs)
            claims += _latency_claims(beside, pairs)
        claims += [c for ramp in section.ramps if ramp.mix == mix for c in _ramp_claims(ramp)]
        claims += [
            _mechanism_claim(group)
            for group in section.groups
            if group.mix == mix and group.mechanism_overhead_percent is not None
        ]
        claims += _noise_claims(mix, pairs)
    return claims


def _name(group: Group) -> str:
    return f"{group.mode_name}{' (mode unverified)' if group.is_unverified else ''}"


def _run_ids(groups: Iterable[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run_id for group in groups for run_id in group.run_ids))


def _head(group: Group) -> str:
    head = f"`{group.mix}` with {clients_text(group.clients)}"
    if group.counts_in_part:
        head += f" ({group.throughput_clients} throughput clients only)"
    return head


# --- throughput -----------------------------------------------------------------------------


def _throughput_claims(groups: Sequence[Group], pairs: Pairs) -> list[Claim]:
    """Which mode delivers the most at one mix and count."""
    claims = [
        Claim(
            f"`{group.mix}` with {clients_text(group.clients)} does not work under "
            f"{group.mode_name}: {group.outcome}{', ' + group.reason if group.reason else ''}.",
            group.run_ids,
        )
        for group in groups
        if group.outcome != "ok"
    ]
    known = by_throughput(groups)
    if len(known) > 1:
        claims.append(_mode_claim(known, pairs))
    claims += [_against_one_after_another(group, is_only=len(groups) == 1) for group in known]
    return claims


def by_throughput(groups: Sequence[Group]) -> list[Group]:
    """The groups that worked and have an STP, the highest first."""
    known = [group for group in groups if group.stp is not None and group.outcome == "ok"]
    return sorted(known, key=lambda group: group.stp.mean, reverse=True)


def _mode_claim(ordered: Sequence[Group], pairs: Pairs) -> Claim:
    """The first of two or more groups with an STP, the highest first, against the others."""
    best, others = ordered[0], ordered[1:]
    standing = _throughput_standing(ordered, pairs)
    listed = joined([f"{_stp_text(group, ordered)} under {_name(group)}" for group in others])
    ours = _stp_text(best, ordered) + ("" if standing.names_best else f" under {_name(best)}")
    caveat = ""
    if standing.single:
        few = [group for group in ordered if group.stp.repeats < MIN_REPEATS_FOR_CLAIM]
        caveat = single_caveat(
            [_name(group) for group in ordered],
            [group.stp for group in ordered],
            ran_out_of_time=any(group.ran_out_of_time for group in few),
        )
    said = verdict(_name(best), standing, _throughput_words(_name(best)))
    return Claim(
        f"{_head(best)}: **{said}**: STP {ours} against {listed} "
        f"(1 = as much as one job after another).{caveat}",
        _run_ids(ordered),
    )


def throughput_headline(ordered: Sequence[Group], pairs: Pairs) -> str:
    """`_mode_claim` as a chart's title: the verdict and the figures, with n where it is 1."""
    best, others = ordered[0], ordered[1:]
    standing = _throughput_standing(ordered, pairs)
    words = _throughput_words(best.mode_name, f"{best.mode_name} delivers the most")
    said = verdict(best.mode_name, standing, words, with_reason=False)
    once = f" ({repeats_text([group.stp for group in ordered])})" if standing.single else ""
    listed = joined([f"{group.stp.mean:.2f} under {group.mode_name}" for group in others])
    ours = f"{best.stp.mean:.2f}" + ("" if standing.names_best else f" under {best.mode_name}")
    return f"{said[0].upper()}{said[1:]}{once}: STP {ours} against {listed}"


def _throughput_standing(ordered: Sequence[Group], pairs: Pairs) -> Standing:
    best = ordered[0]
    shown_as = f"{best.stp.mean:.2f}"
    others = [
        Candidate(_name(group), group.stp, f"{group.stp.mean:.2f}" == shown_as)
        for group in ordered[1:]
    ]
    return stand(best.stp, others, noise.noise_floor(pairs, best.mix, noise.STP))


def _throughput_words(best: str, choose: str = "") -> Words:
    return Words(
        choose=choose or f"choose {best} for throughput",
        surpasses=f"{best} delivers more than",
        seen_best=f"{best} delivered the most",
        seen_better=f"{best} delivered more",
        seen_above=f"{best} delivered more than",
        seen_tie="the same was delivered by",
    )


def _stp_text(group: Group, ordered: Sequence[Group]) -> str:
    """An STP with its spread, without where nobody has one: that is said once for all."""
    if all(other.stp.repeats == 1 for other in ordered):
        return f"{group.stp.mean:.2f}"
    return group.stp.text()


def _against_one_after_another(group: Group, *, is_only: bool) -> Claim:
    """Together against one after another; of the only mode measured, with its STP."""
    felt = (
        f"; each job took {group.antt.text()} times as long as alone, on average"
        if group.antt and group.antt.repeats > 1
        else f"; each job took {group.antt.mean:.2f} times as long as alone, on average"
        if group.antt
        else ""
    )
    only = f"; STP {group.stp.text()}, no other mode was measured" if is_only else ""
    return Claim(f"{_head(group)} under {_name(group)}: {_time_text(group)}{felt}{only}.",
                 group.run_ids)  # fmt: skip


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


# --- latency --------------------------------------------------------------------------------


def _latency_claims(groups: Sequence[Group], pairs: Pairs) -> list[Claim]:
    """p99 of each latency job, from raw latencies merged over repeats."""
    by_job: dict[tuple[int, str], list[tuple[Group, ClientRow]]] = {}
    for group in groups:
        for row in group.client_rows:
            if row.latency and row.p99_ms and group.outcome == "ok":
                by_job.setdefault((row.client, row.label), []).append((group, row))
    # Copies of one job would repeat the same sentence: the first stands for them.
    first_by_label: dict[str, list[tuple[Group, ClientRow]]] = {}
    for (_, label), found in by_job.items():
        first_by_label.setdefault(label, found)
    claims = []
    for label, found in first_by_label.items():
        if len(found) > 1:
            found.sort(key=lambda pair: pair[1].latency["p99"])
            claims.append(_p99_claim(label, found, pairs))
        claims += [_slo_claim(label, group, row) for group, row in found if row.slo is not None]
    return claims


def _p99_claim(label: str, found: Sequence[tuple[Group, ClientRow]], pairs: Pairs) -> Claim:
    """One job's p99 under two or more modes, the lowest first."""
    best, best_row = found[0]
    spreads = [row.p99_ms for _, row in found]
    texts = [duration(row.latency["p99"]) for _, row in found]
    others = [
        Candidate(_name(group), row.p99_ms, text == texts[0])
        for (group, row), text in zip(found[1:], texts[1:], strict=True)
    ]
    floor = noise.noise_floor(pairs, best.mix, noise.P99, label)
    standing = stand(best_row.p99_ms, others, floor)
    values = [
        f"{text}{_repeat_range(spread)} under {_name(group)}"
        for (group, _), text, spread in zip(found, texts, spreads, strict=True)
    ]
    if standing.names_best:
        values[0] = texts[0] + _repeat_range(spreads[0])
    caveat = ""
    if standing.single:
        each = " each" if len({spread.repeats for spread in spreads}) == 1 else ""
        caveat = f" ({repeats_text(spreads)}{each}: repeat before relying on it)"
    beside = f"{best.clients - 1} other{'' if best.clients == 2 else 's'}"
    said = verdict(_name(best), standing, _p99_words(_name(best)))
    return Claim(
        f"{label} beside {beside} (`{best.mix}`): **{said}**: "
        f"{values[0]} against {joined(values[1:])}{caveat}.",
        _run_ids(group for group, _ in found),
    )


def _p99_words(best: str) -> Words:
    return Words(
        choose=f"choose {best} where its p99 latency matters",
        surpasses=f"its p99 latency under {best} is below that under",
        seen_best=f"its p99 latency was the lowest under {best}",
        seen_better=f"its p99 latency was lower under {best}",
        seen_above=f"its p99 latency under {best} was below that under",
        seen_tie="its p99 latency was the same under",
    )


def _repeat_range(p99_ms: Estimate) -> str:
    """How far the p99 of single repeats lies apart."""
    if p99_ms.repeats < 2:
        return ""
    low, high = duration(p99_ms.low), duration(p99_ms.high)
    return f" ({low} to {high} over {p99_ms.repeats} repeats)"


def _slo_claim(label: str, group: Group, row: ClientRow) -> Claim:
    what, within = "responses", f"within {duration(row.slo.bound_ms)}"
    if row.service is not None:
        what = "requests"
        offered, goodput = row.service.offered_per_second, row.service.goodput_per_second
        if offered is not None and goodput is not None:
            within += f", a goodput of {goodput:.1f} of {offered:.1f} requests a second offered"
    return Claim(
        f"{label} under {_name(group)} (`{group.mix}`, {clients_text(group.clients)}): "
        f"{row.slo.percent:.1f} % of {what} {within} "
        f"(n = {row.p99_ms.repeats if row.p99_ms else len(group.co_runs)}).",
        group.run_ids,
    )


# --- the mode itself, many clients, noise ---------------------------------------------------


def _mechanism_claim(group: Group) -> Claim:
    """What the mode costs with nobody to share with."""
    found = group.antt
    percents = [
        f"{round(100 * (value - 1), 1) + 0.0:.1f} %"
        for value in (found.mean, found.low, found.high)
    ]
    spread = f"{percents[1]} to {percents[2]}; " if found.repeats > 1 else ""
    return Claim(
        f"One client alone under {_name(group)} (`{group.mix}`): {percents[0]} slower than on the "
        f"card without it ({spread}{found.spread_name}), the mechanism overhead.",
        group.run_ids,
    )


def _ramp_claims(ramp: Ramp) -> list[Claim]:
    """How many clients a mode bears, and from where on more gain nothing."""
    run_ids = _run_ids(ramp.groups)
    claims = [
        Claim(f"Breaking point of `{ramp.mix}` under {ramp.mode_name}: {ramp.end_text}.", run_ids)
    ]
    known = [group for group in ramp.groups if group.stp and group.outcome == "ok"]
    if len(known) < 2:
        return claims
    best = max(known, key=lambda group: group.stp.mean)
    if ramp.sufficient_clients < known[-1].clients:
        gain = "gain" if ramp.sufficient_clients > 1 else "gains"
        text = f"**more than {clients_text(ramp.sufficient_clients)} {gain} nothing**"
    else:
        text = f"{clients_text(known[-1].clients)} still gain"
    if ramp.saturation_clients is None:
        text += f", no saturation up to {clients_text(known[-1].clients)}"
    else:
        text += f", saturation at {ramp.saturation_clients} clients (STP under 95 % of the best)"
    claims.append(
        Claim(
            f"`{ramp.mix}` under {ramp.mode_name}: {text}; the best STP is {best.stp.text()} with "
            f"{clients_text(best.clients)}.",
            run_ids,
        )
    )
    return claims


def _noise_claims(mix: str, pairs: Pairs) -> list[Claim]:
    """How far the same mode lies from itself, where it was taken twice."""
    keys = dict.fromkeys((pair.figure, pair.label) for pair in pairs if pair.group.mix == mix)
    floors = [noise.noise_floor(pairs, mix, *key) for key in keys]
    if not floors:
        return []
    said = "; ".join(_noise_text(floor) for floor in floors)
    return [
        Claim(
            f"Noise floor of `{mix}` (the same mode taken in two calls; smaller differences "
            f"between modes are noise): {said}.",
            _run_ids(floor.group for floor in floors),
        )
    ]


def _noise_text(floor: noise.SameTwice) -> str:
    write = duration if floor.figure == noise.P99 else "{:.2f}".format
    what = f"{floor.label} {floor.figure}".strip()
    return (
        f"{what} {floor.percent:.1f} % ({joined([write(v) for v in floor.by_run])}, "
        f"{_name(floor.group)} with {clients_text(floor.group.clients)})"
    )
