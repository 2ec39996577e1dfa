"""What is claimed of a ramp: how many clients a mode bears, and from where on more gain nothing."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarking.analysis.comparison import Claim
from benchmarking.analysis.groups import Group, run_ids_of
from benchmarking.analysis.noise import NO_FLOOR, is_shown
from benchmarking.analysis.ramps import Ramp
from benchmarking.analysis.runs import clients_text
from benchmarking.analysis.verdicts import repeats_text
from benchmarking.metrics.breaking_point import SATURATION_FRACTION
from benchmarking.metrics.estimates import MIN_REPEATS_FOR_CLAIM
from benchmarking.metrics.number_text import joined

# A gain up to this counts as none.
_NOTHING = f"{100 * (1 - SATURATION_FRACTION):.0f} %"


def ramp_claims(ramp: Ramp) -> list[Claim]:
    """Its breaking point, and the count from which on more gain nothing."""
    run_ids = run_ids_of(ramp.groups)
    claims = [
        Claim(f"Breaking point of `{ramp.mix}` under {ramp.mode_name}: {ramp.end_text}.", run_ids)
    ]
    known = ramp.known
    if len(known) > 1:
        claims.append(Claim(f"`{ramp.mix}` under {ramp.mode_name}: {_gain(ramp)}.", run_ids))
    return claims


def _gain(ramp: Ramp) -> str:
    """What more clients gain, with both STPs; a claim only of three repeats and more."""
    known, best = ramp.known, max(ramp.known, key=lambda group: group.stp.mean)
    enough = next(group for group in known if group.clients == ramp.sufficient_clients)
    is_claim = min(enough.stp.repeats, best.stp.repeats) >= MIN_REPEATS_FOR_CLAIM
    alike = _not_shown_apart(ramp, best) if enough is known[-1] else []
    if enough is known[-1]:
        text = f"{clients_text(enough.clients)} {_gained(alike, is_claim)}"
    elif is_claim and not _rules_out_a_gain(ramp, enough):
        text = f"no gain is shown past {clients_text(enough.clients)}, nor that there is none"
    else:
        verb = "gained" if not is_claim else "gains" if enough.clients == 1 else "gain"
        said = f"more than {clients_text(enough.clients)} {verb} nothing"
        text = f"{f'**{said}**' if is_claim else said} (up to {_NOTHING} counts as nothing)"
    text += f": STP {enough.stp.text()} with {clients_text(enough.clients)}"
    if enough is not best:
        text += f", the best STP {best.stp.text()} with {clients_text(best.clients)}"
    text += _saturation(ramp)
    if not is_claim:
        n = repeats_text(list(dict.fromkeys([enough.stp, best.stp])))
        return f"in these runs ({n}) {text}; repeat (`--repeats 3`) before relying on it"
    return f"{text}; {NO_FLOOR}" if ramp.noise_floor is None and not alike else text


def _rules_out_a_gain(ramp: Ramp, enough: Group) -> bool:
    """Whether no larger count can deliver more than counts as nothing, by both intervals."""
    larger = [group for group in ramp.known if group.clients > enough.clients]
    return all(group.stp.high * SATURATION_FRACTION <= enough.stp.low for group in larger)


def _not_shown_apart(ramp: Ramp, best: Group) -> list[Group]:
    """The smaller counts whose STP does not differ from the best by the claim rule."""
    others = [group for group in ramp.known if group is not best]
    return [group for group in others if not is_shown(best.stp, group.stp, ramp.noise_floor)]


def _gained(alike: Sequence[Group], is_claim: bool) -> str:
    """Of the largest count, when it alone delivers near the best STP."""
    if not is_claim:
        return "still gained"
    if not alike:
        return "still gain"
    counts = joined([str(group.clients) for group in alike])
    return f"delivered the most in these runs, no difference shown from {counts}"


def _saturation(ramp: Ramp) -> str:
    largest = clients_text(ramp.known[-1].clients)
    if ramp.saturation_clients is None:
        return f"; no saturation up to {largest}"
    percent = f"{100 * SATURATION_FRACTION:.0f} %"
    return f"; saturation at {ramp.saturation_clients} clients (STP under {percent} of the best)"
