"""The decision in sentences, each with its numbers and its runs, and every doubt beside it.

A difference between modes is claimed only when each side has at least two repeats and their
intervals (three repeats or more) or ranges (two) do not overlap; else no difference is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from benchmarking.estimates import Estimate


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
    best, others = known[0], known[1:]
    head = f"`{best.mix}` with {clients_text(best.clients)}: "
    if best.throughput_clients is not None and best.throughput_clients < best.clients:
        head = head[:-2] + f" ({best.throughput_clients} throughput clients only): "
    best_text = f"STP {best.stp.text()} under {best.mode_name}{_caveat(best)}"
    if not others:
        claims.append(Claim(head + f"{best_text}; no other mode was measured.", _run_ids(known)))
    else:
        listed = ", ".join(f"{g.stp.text()} under {g.mode_name}{_caveat(g)}" for g in others)
        verdict = throughput_verdict(known, f"choose {best.mode_name} for throughput")
        claims.append(Claim(f"{head}{verdict}: {best_text}, {listed}.", _run_ids(known)))
    claims += [_against_one_after_another(group) for group in known]
    return claims


def throughput_verdict(
    ordered: Sequence[Group], if_all_shown: str, *, with_reason: bool = True
) -> str:
    """What may be said of the first of two or more groups with an STP, the highest first."""
    best, others = ordered[0], ordered[1:]
    return _verdict(
        if_all_shown,
        f"{best.mode_name} delivers more than",
        best.mode_name,
        [(group.mode_name, best.stp, group.stp) for group in others],
        with_reason=with_reason,
    )


def _verdict(
    all_shown: str,
    some_shown: str,
    best: str,
    others: Sequence[tuple[str, Estimate, Estimate]],
    *,
    with_reason: bool = True,
) -> str:
    """What may be said of the best mode against `others`: (mode, the best's spread, its own)."""
    shown = [mode for mode, ours, theirs in others if ours.shows_difference_from(theirs)]
    unshown = [other for other in others if other[0] not in shown]
    if not unshown:
        return all_shown
    single = any(min(ours.repeats, theirs.repeats) < 2 for _, ours, theirs in unshown)
    reason = "one co-run has no known spread: repeat it" if single else "their spreads overlap"
    names = " and ".join(mode for mode, _, _ in unshown)
    nothing = f"no difference shown between {best} and {names}"
    nothing += f" ({reason})" if with_reason else ""
    return f"{some_shown} {' and '.join(shown)}; {nothing}" if shown else nothing


def _against_one_after_another(group: Group) -> Claim:
    stp, overhead = group.stp, group.overhead_percent
    if stp.repeats >= 2 and stp.low > 1:
        verdict = "sharing beats running the jobs one after another"
    elif stp.repeats >= 2 and stp.high < 1:
        verdict = "running the jobs one after another would be faster"
    else:
        verdict = "no difference shown from running the jobs one after another"
    felt = f"; each job feels {group.antt.mean:.2f} times slower on average" if group.antt else ""
    return Claim(
        f"`{group.mix}` with {clients_text(group.clients)} under {group.mode_name}: {verdict}: "
        f"overhead {overhead.text(0, ' %')}{felt}.",
        (group.run.run_id,),
    )


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
        (best, best_row), rest = pairs[0], pairs[1:]
        listed = " against ".join(
            f"{row.latency['p99']:.4g} ms{_repeat_range(row.p99_ms)} under "
            f"{group.mode_name}{_caveat(group)}"
            for group, row in pairs
        )
        verdict = _verdict(
            f"choose {best.mode_name} where its p99 matters",
            f"its p99 under {best.mode_name} is under that of",
            best.mode_name,
            [(group.mode_name, best_row.p99_ms, row.p99_ms) for group, row in rest],
        )
        claims.append(
            Claim(
                f"{label} beside {best.clients - 1} others (`{best.mix}`): {verdict}: {listed}.",
                _run_ids(group for group, _ in pairs),
            )
        )
    return claims


def _repeat_range(p99_ms: Estimate) -> str:
    """How far the p99 of single repeats lies apart."""
    if p99_ms.repeats < 2:
        return " (n = 1)"
    return f" ({p99_ms.low:.4g} to {p99_ms.high:.4g} over {p99_ms.repeats} repeats)"


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
