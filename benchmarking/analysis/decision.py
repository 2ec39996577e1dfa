"""The decision in sentences, each with its numbers, its spread and its runs.

Which mode delivers the most, which one is kind to a latency job (`latency_claims`), how many
clients it bears (`ramp_claims`), what the mode alone costs. What may be called a difference is said
in `verdicts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarking.analysis import interference_text, noise
from benchmarking.analysis.comparison import Claim, Comparison, Section
from benchmarking.analysis.doubts import find_doubts
from benchmarking.analysis.groups import Group, run_ids_of
from benchmarking.analysis.latency_claims import latency_claims
from benchmarking.analysis.ramp_claims import ramp_claims
from benchmarking.analysis.verdicts import (
    Candidate,
    Standing,
    Words,
    repeats_text,
    single_caveat,
    stand,
    verdict,
)
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM, Estimate
from benchmarking.metrics.number_text import duration, joined

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
            claims += latency_claims(beside, pairs)
        claims += [c for ramp in section.ramps if ramp.mix == mix for c in ramp_claims(ramp)]
        claims += [
            _mechanism_claim(group, pairs)
            for group in section.groups
            if group.mix == mix and group.mechanism_overhead_percent is not None
        ]
        claims += _noise_claims(mix, pairs)
    return claims


def _subject(group: Group) -> str:
    """What ran, at the start of a sentence; a single client is no mix."""
    if group.clients == 1:
        return f"{group.who[0].upper()}{group.who[1:]} (`{group.mix}`)"
    return f"`{group.mix}` with {group.who}"


def _head(group: Group) -> str:
    head = _subject(group)
    if group.counts_in_part:
        head += f" ({group.throughput_clients} throughput clients only)"
    return head


# --- throughput -----------------------------------------------------------------------------


def _throughput_claims(groups: Sequence[Group], pairs: Pairs) -> list[Claim]:
    """Which mode delivers the most at one mix and count."""
    claims = [
        Claim(
            f"{_subject(group)} does not {_how_often(group)} under "
            f"{group.mode_name}: {group.outcome}{', ' + group.reason if group.reason else ''}.",
            group.run_ids,
        )
        for group in groups
        if group.outcome != "ok"
    ]
    known = by_throughput(groups)
    if len(known) > 1:
        claims.append(_mode_claim(known, pairs))
    claims += [
        _against_one_after_another(group, pairs, is_only=len(groups) == 1) for group in known
    ]
    return claims


def _how_often(group: Group) -> str:
    failed = sum(not co_run.is_ok for co_run in group.co_runs)
    if failed == len(group.co_runs):
        return "work"
    return f"always work (not in {failed} of {len(group.co_runs)} repeats)"


def by_throughput(groups: Sequence[Group]) -> list[Group]:
    """The groups that worked and have an STP, the highest first."""
    known = [group for group in groups if group.stp is not None and group.outcome == "ok"]
    return sorted(known, key=lambda group: group.stp.mean, reverse=True)


def _mode_claim(ordered: Sequence[Group], pairs: Pairs) -> Claim:
    """The first of two or more groups with an STP, the highest first, against the others."""
    best, others = ordered[0], ordered[1:]
    standing = _throughput_standing(ordered, pairs)
    listed = joined(
        [f"{_stp_text(group, ordered)} under {group.mode_in_claims}" for group in others]
    )
    ours = _stp_text(best, ordered) + (
        "" if standing.names_best else f" under {best.mode_in_claims}"
    )
    caveat = ""
    if standing.single:
        few = [group for group in ordered if group.stp.repeats < MIN_REPEATS_FOR_CLAIM]
        caveat = single_caveat(
            [group.mode_in_claims for group in ordered],
            [group.stp for group in ordered],
            ran_out_of_time=any(group.ran_out_of_time for group in few),
        )
    if standing.doubt:
        caveat += f" {standing.doubt[0].upper()}{standing.doubt[1:]}."
    said = verdict(best.mode_in_claims, standing, _throughput_words(best.mode_in_claims))
    return Claim(
        f"{_head(best)}: **{said}**: STP {ours} against {listed} "
        f"(1 = as much as one job after another).{caveat}",
        run_ids_of(ordered),
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
        Candidate(group.mode_in_claims, group.stp, f"{group.stp.mean:.2f}" == shown_as)
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


def _against_one_after_another(group: Group, pairs: Pairs, *, is_only: bool) -> Claim:
    """Together against one after another; of the only mode measured, with its STP."""
    felt = (
        f"; each job took {group.antt.text()} times as long as alone, on average"
        if group.antt and group.antt.repeats > 1
        else f"; each job took {group.antt.mean:.2f} times as long as alone, on average"
        if group.antt
        else ""
    )
    only = f"; STP {group.stp.text()}, no other mode was measured" if is_only else ""
    said, doubt = _time_text(group, noise.noise_floor(pairs, group.mix, noise.STP))
    text = f"{_head(group)} under {group.mode_in_claims}: {said}{felt}{only}{doubt}."
    return Claim(text, group.run_ids)


def _time_text(group: Group, floor: noise.SameTwice | None) -> tuple[str, str]:
    """Together against one after another, and what a claim of it lacks."""
    stp, overhead = group.stp, group.overhead_percent
    # The repeats' spread does not hold that of the jobs alone, which all of them share.
    once = ", against one baseline" if len(group.baseline_ids) == 1 else ""
    size = f"{abs(overhead.mean):.1f} %"
    difference = f"{size} {'less' if overhead.mean < 0 else 'more'} time"
    if stp.repeats < MIN_REPEATS_FOR_CLAIM:
        seen = f"in this run (n = {stp.repeats})"
        if size == "0.0 %":
            return f"together took as long as one after another {seen}", ""
        return f"together took {difference} than one after another {seen}", ""
    if stp.low <= 1 <= stp.high:
        return (
            "no difference shown from running the jobs one after another: overhead "
            f"{overhead.text(1, ' %')}{once}"
        ), ""
    if noise.is_inside(stp.mean, 1, floor):
        return (
            "the difference from running the jobs one after another is inside the noise floor of "
            f"{floor.percent:.1f} %: overhead {overhead.text(1, ' %')}{once}"
        ), ""
    low, high = sorted((abs(overhead.low), abs(overhead.high)))
    lead = (
        "sharing beats running the jobs one after another"
        if stp.low > 1
        else "running the jobs one after another would be faster"
    )
    spread = f"{low:.1f} to {high:.1f} %; {overhead.spread_name}"
    doubt = f"; {noise.NO_FLOOR}" if floor is None else ""
    return f"{lead}: together took {difference} ({spread}){once}", doubt


# --- the mode itself, many clients, noise ---------------------------------------------------


def _mechanism_claim(group: Group, pairs: Pairs) -> Claim:
    """What the mode costs with nobody to share with."""
    found = group.mechanism_overhead_percent
    share = f" on {group.share_text}" if group.share_text else ""
    floor = noise.noise_floor(pairs, group.mix, noise.STP)
    return Claim(
        f"{group.who[0].upper()}{group.who[1:]} alone under {group.mode_in_claims}{share} "
        f"(`{group.mix}`): {_mechanism_text(group, found, floor)}.",
        group.run_ids,
    )


def _mechanism_text(group: Group, found: Estimate, floor: noise.SameTwice | None) -> str:
    """One client under the mode against the card without it, by the rule of all claims."""
    against = "than on the card without it"
    cost = "the mechanism overhead"
    if found.repeats < MIN_REPEATS_FOR_CLAIM:
        return (
            f"in this run (n = {found.repeats}) {_slower(found.mean)} {against}, {cost}; "
            "repeat (`--repeats 3`) before relying on it"
        )
    spread = f"{_slower(found.low)} to {_slower(found.high)}; {found.spread_name}"
    once = ", against one baseline" if len(group.baseline_ids) == 1 else ""
    if found.low <= 0 <= found.high:
        return (
            f"no difference shown from the card without it ({spread}){once}: no mechanism overhead"
        )
    if noise.is_inside(1 + found.mean / 100, 1, floor):
        return (
            f"{_slower(found.mean)} {against}, inside the noise floor of "
            f"{floor.percent:.1f} % ({spread}){once}: no mechanism overhead"
        )
    return f"{_slower(found.mean)} {against} ({spread}){once}, {cost}"


def _slower(percent: float) -> str:
    return f"{abs(percent):.1f} % {'faster' if round(percent, 1) < 0 else 'slower'}"


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
            run_ids_of(floor.group for floor in floors),
        )
    ]


def _noise_text(floor: noise.SameTwice) -> str:
    write = duration if floor.figure in (noise.P99, noise.MEDIAN) else "{:.2f}".format
    what = f"{floor.label} {floor.figure}".strip()
    return (
        f"{what} {floor.percent:.1f} % ({joined([write(v) for v in floor.by_run])}, "
        f"{floor.group.mode_in_claims} with {floor.group.who})"
    )
