"""What speaks for and against a client having run under its sharing mode, and the verdict.

Pure: the process lists are the sampler's, the identity is the client's own word. A client that is a
command says nothing of itself; its identity holds `processes`, the pids that it started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERIFIED, INVALID, UNVERIFIED = "verified", "invalid", "unverified"
NOT_APPLICABLE = "not_applicable"

Identity = Mapping[str, Any]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """One thing that was looked at: what, what was found, and whether it speaks for the mode.

    `ok` is `None` where it could not be told. `fix` is the command that mends it.
    """

    check: str
    found: str
    ok: bool | None
    fix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the record."""
        return {"check": self.check, "found": self.found, "ok": self.ok}


@dataclass(frozen=True)
class Proof:
    """Whether one client ran under the mode, and why that is believed."""

    verdict: str
    evidence: tuple[Evidence, ...]

    @property
    def reason(self) -> str:
        """The first evidence that spoke against the client, or could not be told."""
        wanted = False if self.verdict == INVALID else None
        against = [item for item in self.evidence if item.ok is wanted]
        return f"{against[0].check}: {against[0].found}" if against else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the record."""
        return {"verdict": self.verdict, "evidence": [item.to_dict() for item in self.evidence]}


@dataclass(frozen=True)
class ProcessLists:
    """Pids that NVML listed on the GPU over a span of time; `None` where it gave no list."""

    compute: frozenset[int] | None
    mps: frozenset[int] | None

    @property
    def all(self) -> frozenset[int]:
        """Every pid that NVML listed."""
        return (self.compute or frozenset()) | (self.mps or frozenset())

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], start_seconds: float, end_seconds: float
    ) -> ProcessLists:
        """Unite the lists of all samples between two times (CLOCK_MONOTONIC)."""
        span = [s for s in samples if start_seconds <= s["time_seconds"] <= end_seconds]
        return cls(_united(span, "compute_pids"), _united(span, "mps_pids"))


def _united(samples: Sequence[Sample], key: str) -> frozenset[int] | None:
    lists = [sample[key] for sample in samples if sample.get(key) is not None]
    if not lists:
        return None
    entries = [entry for listed in lists for entry in listed]
    return frozenset(entry["pid"] if isinstance(entry, Mapping) else entry for entry in entries)


def own_pids(identity: Identity) -> frozenset[int]:
    """Pids under which a client may use the GPU: its own, or those that its command started."""
    if is_command(identity):
        return frozenset(identity["processes"])
    return frozenset([identity["pid"]] if "pid" in identity else [])


def is_command(identity: Identity) -> bool:
    """Whether a client is a command, which says nothing of itself."""
    return "processes" in identity


def listed_evidence(
    check: str, identity: Identity, listed: frozenset[int] | None, *, can_match: bool
) -> Evidence:
    """Whether a client is in a list that it must be in.

    A command that is not listed may have left the GPU alone, or used it for less than the second
    between two lists, so that speaks neither for nor against it.
    """
    if listed is None:
        return Evidence(check, "no process list was given", None)
    own = own_pids(identity)
    if own & listed:
        return Evidence(check, f"pid {min(own & listed)} is listed", True)
    if is_command(identity):
        return Evidence(check, f"none of its {len(own)} processes is listed", None)
    pid = identity.get("pid")
    if not can_match:
        return Evidence(check, f"pid {pid} cannot be matched with {sorted(listed)}", None)
    return Evidence(check, f"pid {pid} is not among {sorted(listed)}", False)


def without_mps_evidence(identity: Identity, mps: frozenset[int] | None) -> Evidence:
    """Whether a client that is to run without MPS does so."""
    check = "it is no MPS client"
    if mps is None:
        return Evidence(check, "unknown; its MPS pipe directory is empty", True)
    is_one = bool(own_pids(identity) & mps)
    return Evidence(check, "it is one" if is_one else "it is none", not is_one)


def past_mps_evidence(identity: Identity, lists: ProcessLists) -> list[Evidence]:
    """What speaks against a command under MPS: the driver lists it, but never as an MPS client.

    One pid that is in only one of the lists means nothing: they are asked for one after the other,
    and a command's processes come and go. Nor does an MPS list without any entry: not every driver
    fills it.
    """
    own = own_pids(identity)
    listed = own & (lists.compute or frozenset())
    if not is_command(identity) or not lists.mps or own & lists.mps or not listed:
        return []
    return [Evidence("it runs under MPS", f"pid {min(listed)} runs without", False)]


def verdict_of(evidence: Sequence[Evidence]) -> Proof:
    """One thing against the mode is enough; one unknown leaves it unverified."""
    if any(item.ok is False for item in evidence):
        return Proof(INVALID, tuple(evidence))
    unknown = any(item.ok is None for item in evidence)
    return Proof(UNVERIFIED if unknown else VERIFIED, tuple(evidence))


def device_evidence(
    identity: Identity, wanted: str | None, card_uuid: str | None = None
) -> list[Evidence]:
    """Whether CUDA sees the device that the client was given; nothing is known of a command.

    A command is on this card if the driver lists it there, but on which instance stays open.
    """
    if not is_command(identity):
        return [_seen_device(identity, wanted, card_uuid)]
    if card_uuid is None:
        return []
    return [Evidence(f"CUDA sees {wanted}", "a command does not say what it sees", None)]


def _seen_device(identity: Identity, wanted: str | None, card_uuid: str | None) -> Evidence:
    """Whether the device that the client names is the one that it was given.

    UUIDs are compared without their prefix, which CUDA does not tell. A driver that answers the
    card's UUID for an instance leaves it open which instance it is.
    """
    check, seen = f"CUDA sees {wanted}", identity.get("gpu_uuid")
    if identity.get("device") != "cuda":
        return Evidence(check, f"it ran on {identity.get('device')}", False)
    if seen is None or wanted is None:
        return Evidence(check, f"it says {seen}", None)
    if _bare_uuid(seen) == _bare_uuid(wanted):
        return Evidence(check, "yes", True)
    is_card = card_uuid is not None and _bare_uuid(seen) == _bare_uuid(card_uuid)
    return Evidence(check, f"it sees {seen}", None if is_card else False)


def _bare_uuid(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()
