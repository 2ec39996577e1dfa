"""The speed table as people read it: Markdown for a file and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarking.metrics.number_text import duration, significant
from benchmarking.speed.jobs import SIZE_CPU, SIZE_QUICK, UNIT_EPOCH

Table = Mapping[str, Any]
UNKNOWN = "-"
COLUMNS = (
    "workload", "engine", "batch", "figure", "against eager fp32", "fraction of the card's floor",
    "start-up",
)  # fmt: skip


def markdown(table: Table) -> str:
    """Return the whole table with what it was taken on and how to read it."""
    lines = ["# Speed table", "", *_header(table), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in table["rows"]]
    lines += ["", *_explanation(table)]
    if table["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in table["notes"])]
    return "\n".join(lines) + "\n"


def _header(table: Table) -> list[str]:
    gpu, rates, versions = table["gpu"] or {}, table["card_rates"], table["versions"]
    where = gpu.get("name") or "CPU (no GPU in use; these figures say nothing about GPUs)"
    parts = [where]
    if gpu.get("driver_version"):
        parts.append(f"driver {gpu['driver_version']}")
    parts += [f"{name} {versions[name]}" for name in ("torch", "cuda") if versions.get(name)]
    parts.append(table["created_at"][:10])
    lines = [", ".join(parts) + "."]
    if rates is not None:
        bandwidth = significant(rates["copy_bytes_per_second"] / 1e12)
        rate = significant(rates["matrix_operations_per_second"] / 1e12)
        lines.append(
            f"Measured rates of the card: {bandwidth} TB/s (copy, read and written), {rate} "
            f"TFLOP/s (bf16 product of {rates['matrix_size']} x {rates['matrix_size']})."
        )
    if table["outcome"] != "complete":
        lines.append(f"**{table['outcome'].capitalize()}: rows are missing.**")
    return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
    engine = f"{row['engine']}, {row['precision']}" if row["precision"] else row["engine"]
    title, batch = row["title"], str(row["batch_size"] or UNKNOWN)
    if row["status"] != "ok":
        return [title, engine, batch, f"failed: {_escaped(row['reason'])}", *[UNKNOWN] * 3]
    startup = f"{row['startup_seconds']:.1f} s"
    if row["cold_startup_seconds"] is not None:
        startup += f" (cache empty: {row['cold_startup_seconds']:.1f} s)"
    return [
        title, engine, batch, _figure(row), _ratio(row["speedup"], row["is_reference"]),
        UNKNOWN if row["floor_fraction"] is None
        else f"{100 * row['floor_fraction']:.0f} % (floor {duration(1e3 * row['floor_seconds'])})",
        startup,
    ]  # fmt: skip


def _figure(row: Mapping[str, Any]) -> str:
    rate = f"{row['samples_per_second']:,.0f} samples/s"
    if row["unit"] == UNIT_EPOCH:
        return f"{duration(1e3 * row['seconds'])} an epoch of {row['train_samples']:,} ({rate})"
    return f"{duration(1e3 * row['seconds'])} a batch ({rate})"


def _ratio(speedup: float | None, is_reference: bool) -> str:
    if is_reference:
        return "1"
    return UNKNOWN if speedup is None else f"{significant(speedup)} x"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _explanation(table: Table) -> list[str]:
    lines = [
        "Figures are medians: of the epochs after the first (the only one where there is one), of "
        "all batches. fp32 is true fp32: TF32 is off. Tests after an epoch and the copy of inputs "
        "to the card are not in them. Start-up is everything before the first timed step: imports, "
        "data, model, warm-up, capture, compilation.",
    ]
    if any(row["engine"] == "compile" for row in table["rows"]):
        lines.append(
            "Engine compile starts from one prewarmed cache (TORCHINDUCTOR_CACHE_DIR); in brackets "
            "the start-up that filled it, where this run did."
        )
    if table["card_rates"] is not None:
        lines.append(
            "The floor of a job counts its convolutions, matrix products and attention, forward "
            "and backward, in bf16: each takes at least its operations over the card's matrix "
            "rate, or its bytes (inputs read once, outputs written once) over the card's "
            "bandwidth, whichever is longer. In training, parameters and optimizer state are read "
            "and written once in fp32, and gradients read once. Everything else is taken as free. "
            "Data that stays in the card's cache between operators may beat it. The fraction is "
            "the floor over the figure."
        )
    if table["job_size"] == SIZE_QUICK:
        lines.append("Taken with --quick: shorter epochs and fewer batches.")
    if table["job_size"] == SIZE_CPU:
        lines.append(
            "Tiny sizes, for want of a GPU: ResNet50 on 8 images in batches of 4, a BERT of 2 "
            "layers of 64 on 8 texts of 32 tokens, batches of one image in inference."
        )
    return [part for line in lines for part in (line, "")][:-1]
