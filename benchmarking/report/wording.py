"""Names and figures as people read them: in tables, in charts and in the sentences of templates."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarking.metrics.number_text import duration, durations, significant

Record = Mapping[str, Any]

UNKNOWN = "–"
NO_SLICE = "not measured: no MIG"  # why it is unknown when a slice of its own pays
MODE_NAMES = {
    "time-slicing": "time slicing",
    "mps": "MPS",
    "mig": "MIG",
    "exclusive": "exclusive",
    "cpu-demo": "CPU demo",
}
PRESSED = {"hbm": "the card's memory", "sm": "the card's multiprocessors", "pcie": "the bus"}
KIND_NAMES = {"ttft": "first token"}
FIGURE_NAMES = {
    "work": "work delivered",
    "slowdown": "times as long",
    "median_ms": "median response",
    "energy_joules_per_work": "joules a second of work",
}

# --- names ----------------------------------------------------------------------------------------


def mode_name(mode: str, settings: str = "") -> str:
    """The mode with what it was set to: `MPS (50/25 %)`, `MIG (4 x 1g.10gb)`."""
    name = MODE_NAMES.get(mode, mode)
    if settings in ("even", "static partitions"):
        return f"{name} with {'even shares' if settings == 'even' else settings}"
    if mode == "mig":
        settings = ", ".join(_with_counts(settings.split(", ")))
    return f"{name} ({settings})" if settings else name


def group_name(record: Record) -> str:
    """The mode of a group, a run or a matrix, with its settings."""
    return mode_name(record["mode"], record["settings"])


def variant_name(variant: str, record: Record) -> str:
    """A variant's name among the modes of a conclusion; `alone` and the like stay as they are."""
    names = {mode["variant"]: group_name(mode) for mode in record["modes"]}
    return names.get(variant, variant)


def mode_order(mode: str) -> int:
    """Sort key of modes: the guide's order."""
    return list(MODE_NAMES).index(mode)


def section_title(environment: Record) -> str:
    """GPU, driver and job size of a section in a few words."""
    names = ("gpu_name", "driver_version", "job_size")
    card, driver, size = (environment[name] or "unknown" for name in names)
    if environment["is_cpu_demo"]:
        return f"CPU demonstration (job size {size})"
    return f"{'GPU ' * (card == 'unknown')}{card}, driver {driver}, job size {size}"


def clients_text(clients: int) -> str:
    """`1 client`, `4 clients`."""
    return f"{clients} client{'' if clients == 1 else 's'}"


def subject_text(conclusion: Record) -> str:
    """A job, with how many copies of it there are; or the whole card."""
    copies = conclusion["copies"] or 1
    return conclusion["subject"] + (f" (x {copies})" if copies > 1 else "")


def figure_name(conclusion: Record) -> str:
    """A conclusion's figure in plain words."""
    percent = conclusion.get("percent")
    tail = f"p{percent:g} response" if percent else "response"
    return FIGURE_NAMES.get(conclusion["figure"], tail)


def listed(names: Iterable[str], last: str = "and") -> str:
    """Names as a sentence lists them: `MPS, MIG and time slicing`; of over 20 the first ten."""
    every = [*names]
    shown = every if len(every) <= 20 else [*every[:10], f"{len(every) - 10} more"]
    *first, end = shown
    return f"{', '.join(first)} {last} {end}" if first else end


def counted(labels: Sequence[str]) -> str:
    """Jobs as a sentence lists them, copies together: `6 x Batch inference and BERT`."""
    return listed(_with_counts(labels))


def _with_counts(names: Sequence[str]) -> list[str]:
    return [f"{count} x {one}" if count > 1 else one for one, count in Counter(names).items()]


def once(rounds: int) -> str:
    """`once`, `twice`: how often something was seen that is no claim."""
    return {1: "once", 2: "twice"}.get(rounds, f"{rounds} times")


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def shell_words(command: Sequence[Any] | None) -> str | None:
    """A command as a shell takes it; `None` where none is known."""
    return shlex.join(map(str, command or ())) or None


# --- figures --------------------------------------------------------------------------------------


def number(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """A number for a table cell, an en dash when it is unknown."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return significant(value)
    rounded = round(value, decimals) + 0.0  # no "-0"
    return f"{rounded:,.{decimals}f}{' ' + unit if unit else ''}"


def digits(value: float | None) -> str:
    """A number to three significant digits."""
    return UNKNOWN if value is None else significant(value)


def milliseconds(value: float | None) -> str:
    """A duration in ms or s to three significant digits."""
    return UNKNOWN if value is None else duration(value)


def spread(found: Record | None, decimals: int = 2, write: Callable[..., str] | None = None) -> str:
    """An estimate for a table cell: `1.95 [1.90, 2.00]`, or the value alone from one round.

    `write` writes values of another kind, such as `milliseconds`.
    """
    if found is None:
        return UNKNOWN
    parts = (found["mean"], found["low"], found["high"])
    mean, low, high = (write(one) if write else number(one, decimals) for one in parts)
    return mean if len(found["values"]) < 2 else f"{mean} [{low}, {high}]"


def figure_text(conclusion: Record, found: Record | None, with_spread: bool = False) -> str:
    """A figure of a conclusion in its own unit."""
    write = milliseconds if conclusion["figure"].endswith("_ms") else None
    decimals = 0 if conclusion["figure"].startswith("energy") else 2
    if with_spread:
        return spread(found, decimals, write)
    mean = found["mean"] if found else None
    return write(mean) if write else number(mean, decimals)


def interval_text(pair: Record) -> str:
    """The difference of two modes in percent: `16.9 [16.5, 17.3]`."""
    percent, low, high = (number(pair[part], 1) for part in ("percent", "low", "high"))
    return percent if pair["low"] is None else f"{percent} [{low}, {high}]"


def p_text(value: float | None) -> str:
    """A probability to three decimals."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def latency_text(row: Record) -> str | None:
    """p50, p95 and p99 of the raw values, an en dash for each that too few cannot tell."""
    if row["latency"] is None:
        return None
    found = [row["latency"][f"p{percent}"] for percent in (50, 95, 99)]
    if None not in found:
        return durations(found)
    return f"{' / '.join(map(milliseconds, found))} (n = {row['responses'] + row['missed']})"


def apart_text(row: Record) -> str | None:
    """The percentiles of each kind of wait that stands apart: `first token: 42.8 / 70 / 78 ms`."""
    return "; ".join(
        f"{KIND_NAMES.get(kind, kind)}: "
        f"{' / '.join(milliseconds(found[part]) for part in ('p50', 'p95', 'p99'))}"
        for kind, found in (row["apart_latency"] or {}).items()
    ) or None  # fmt: skip


def tails_text(row: Record) -> str | None:
    """The same percentiles over those alone."""
    tails = row["tail_slowdown"].values()
    return " / ".join(map(number, tails)) if any(tails) else None


def slo_text(row: Record) -> str | None:
    """`98.5 % in 50.0 ms`."""
    slo = row["slo"]
    return slo and f"{slo['percent']:.1f} % in {duration(slo['bound_ms'])}"


def activity_text(gpu: Record) -> str | None:
    """Activity in percent with its source: SM activity, else utilization, else the host CPU."""
    sources = {
        "sm_activity_percent": "SM",
        "utilization_gpu_percent": gpu.get("utilization_source") or "",
        "host_cpu_percent": "host CPU",
    }
    known = (name for name in sources if gpu.get(name) is not None)
    return next((f"{gpu[name]:.0f} % {sources[name]}".strip() for name in known), None)


def bounds_text(bounds: Record) -> str:
    """The bounds that a ramp was given."""
    return ", ".join(f"{name} {value:g}" for name, value in bounds.items()) or "none"


def evidence_text(evidence: Record) -> str:
    """What showed that a mode was in force, and whether it did."""
    mark = "unknown" if evidence["ok"] is None else "ok" if evidence["ok"] else "NOT ok"
    return f"{evidence['check']}: {evidence['found']} ({mark})"


# What a template may write behind a value.
FILTERS = (
    activity_text, apart_text, bounds_text, clients_text, counted, digits, evidence_text,
    figure_name, figure_text, group_name, interval_text, latency_text, listed, milliseconds,
    mode_name, number, once, p_text, sentence, shell_words, slo_text, spread, subject_text,
    tails_text, variant_name,
)  # fmt: skip
