"""Names and figures as people read them: in tables, in charts and in the sentences of templates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarking.metrics.number_text import duration, durations, significant

Record = Mapping[str, Any]

UNKNOWN = "–"
MODE_NAMES = {
    "time-slicing": "time slicing",
    "mps": "MPS",
    "mig": "MIG",
    "exclusive": "exclusive",
    "cpu-demo": "CPU demo",
}
TAIL_PERCENTILES = (50, 95, 99)


def mode_name(mode: str, settings: str = "") -> str:
    """The mode with what it was set to: `MPS (50/25 %)`, `MIG (4 x 1g.10gb)`."""
    name = MODE_NAMES.get(mode, mode)
    if settings in ("even", "static partitions"):
        return f"{name} with {'even shares' if settings == 'even' else settings}"
    if mode == "mig":
        slices = Counter(settings.split(", "))
        settings = ", ".join(f"{n} x {one}" if n > 1 else one for one, n in slices.items())
    return f"{name} ({settings})" if settings else name


def mode_order(mode: str) -> tuple[int, str]:
    """Sort key of modes: the guide's order, then by name."""
    known = tuple(MODE_NAMES)
    return (known.index(mode) if mode in known else len(known), mode)


def clients_text(clients: int) -> str:
    """`1 client`, `4 clients`."""
    return f"{clients} client{'' if clients == 1 else 's'}"


def subject_text(conclusion: Record) -> str:
    """A job, with how many copies of it there are; or the whole card."""
    copies = conclusion["copies"] or 1
    return conclusion["subject"] + (f" (x {copies})" if copies > 1 else "")


def number(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """A number for a table cell, an en dash when it is unknown."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return significant(value)
    rounded = round(value, decimals) + 0.0  # no "-0"
    return f"{rounded:,.{decimals}f}{' ' + unit if unit else ''}"


def spread(found: Record | None, decimals: int = 2, write: Callable[..., str] | None = None) -> str:
    """An estimate for a table cell: `1.95 [1.90, 2.00]`, or the value alone from one round.

    `write` writes values of another kind, such as `milliseconds`.
    """
    if found is None:
        return UNKNOWN
    parts = (found["mean"], found["low"], found["high"])
    mean, low, high = (write(one) if write else number(one, decimals) for one in parts)
    return mean if len(found["values"]) < 2 else f"{mean} [{low}, {high}]"


def milliseconds(value: float | None) -> str:
    """A duration in ms or s to three significant digits."""
    return UNKNOWN if value is None else duration(value)


def digits(value: float | None) -> str:
    """A number to three significant digits."""
    return UNKNOWN if value is None else significant(value)


def figure_text(conclusion: Record, found: Record | None, with_spread: bool = False) -> str:
    """A figure of a conclusion in its own unit."""
    is_time = conclusion["figure"].endswith("_ms")
    decimals = 0 if conclusion["figure"].startswith("energy") else 2
    if with_spread:
        return spread(found, decimals, milliseconds if is_time else None)
    mean = found and found["mean"]
    return milliseconds(mean) if is_time else number(mean, decimals)


def figure_name(conclusion: Record) -> str:
    """A conclusion's figure in plain words."""
    names = {
        "work": "work delivered",
        "slowdown": "times as long",
        "median_ms": "median response",
        "energy_joules_per_work": "joules a second of work",
    }
    percent = conclusion.get("percent")
    return names.get(conclusion["figure"], f"p{percent:g} response" if percent else "response")


def latency(row: Record) -> str:
    """p50, p95 and p99 of the raw values, an en dash for each that too few cannot tell."""
    if row["latency"] is None:
        return UNKNOWN
    found = [row["latency"][f"p{percent}"] for percent in TAIL_PERCENTILES]
    if None not in found:
        return durations(found)
    text = " / ".join(milliseconds(value) for value in found)
    return f"{text} (n = {row['responses'] + row['missed']})"


def tail_slowdowns(row: Record) -> str:
    """The same percentiles over those alone."""
    tails = [row["tail_slowdown"][str(percent)] for percent in TAIL_PERCENTILES]
    return UNKNOWN if tails == [None] * len(tails) else " / ".join(map(number, tails))


def slo(row: Record) -> str:
    """`98.5 % in 50.0 ms`."""
    if row["slo"] is None:
        return UNKNOWN
    return f"{row['slo']['percent']:.1f} % in {duration(row['slo']['bound_ms'])}"


def evidence_text(evidence: Any) -> str:
    """What showed that a mode was in force, and whether it did."""
    if isinstance(evidence, Mapping):
        mark = {True: "ok", False: "NOT ok"}.get(evidence.get("ok"), "unknown")
        return f"{evidence.get('check')}: {evidence.get('found')} ({mark})"
    return str(evidence)


def once(rounds: int) -> str:
    """`once`, `twice`: how often something was seen that is no claim."""
    return {1: "once", 2: "twice"}.get(rounds, f"{rounds} times")


def listed(names: Iterable[str], last: str = "and") -> str:
    """Names as a sentence lists them: `MPS, MIG and time slicing`."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def counted(labels: Sequence[str]) -> str:
    """Jobs as a sentence lists them, copies together: `6 x Batch inference and BERT`."""
    counts = Counter(labels)
    return listed([f"{count} x {one}" if count > 1 else one for one, count in counts.items()])


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
