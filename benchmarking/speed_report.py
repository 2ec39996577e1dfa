"""The speed table as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarking.drivers.program import markdown_table
from benchmarking.metrics.number_text import duration, significant
from benchmarking.planning.workloads import SIZE_CPU, SIZE_QUICK
from benchmarking.speed_jobs import EPOCH

UNKNOWN = "-"
COLUMNS = (
    "workload", "engine", "batch", "figure", "against eager fp32", "fraction of the card's floor",
    "start-up",
)  # fmt: skip

FIGURES = (
    "Figures are medians: of the epochs after the first (the only one where there is one), of "
    "all batches. fp32 is true fp32: TF32 is off. Tests after an epoch and the copy of inputs "
    "to the card are not in them. Start-up is everything before the first timed step: imports, "
    "data, model, warm-up, capture, compilation."
)
COMPILED = (
    "Engine compile starts from one prewarmed cache (TORCHINDUCTOR_CACHE_DIR); in brackets "
    "the start-up that filled it, where this run did."
)
FLOOR = (
    "The floor of a job counts its convolutions, matrix products and attention, forward "
    "and backward, in bf16: each takes at least its operations over the card's matrix "
    "rate, or its bytes (inputs read once, outputs written once) over the card's "
    "bandwidth, whichever is longer. In training, parameters and optimizer state are read "
    "and written once in fp32, and gradients read once. Everything else is taken as free. "
    "Data that stays in the card's cache between operators may beat it. The fraction is "
    "the floor over the figure."
)
QUICK = "Taken with --quick: shorter epochs and fewer batches."
TINY = (
    "Tiny sizes, for want of a GPU: ResNet50 on 8 images in batches of 4, a BERT of 2 "
    "layers of 64 on 8 texts of 32 tokens, batches of one image in inference."
)


def markdown(table: Mapping[str, Any]) -> str:
    """Return the whole table, as `speed_table.json` holds it, with how to read it."""
    is_compiled = any(row["engine"] == "compile" for row in table["rows"])
    explanations = {
        FIGURES: True,
        COMPILED: is_compiled,
        FLOOR: table["card_rates"] is not None,
        QUICK: table["job_size"] == SIZE_QUICK,
        TINY: table["job_size"] == SIZE_CPU,
    }
    lines = ["# Speed table", "", *header(table), ""]
    lines += markdown_table(COLUMNS, map(cells, table["rows"]))
    for text, applies in explanations.items():
        lines += ["", text] if applies else []
    if table["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in table["notes"])]
    return "\n".join(lines) + "\n"


def header(table: Mapping[str, Any]) -> list[str]:
    """Return what the table was taken on."""
    gpu, rates, versions = table["gpu"] or {}, table["card_rates"], table["versions"]
    parts = [gpu.get("name") or "CPU (no GPU in use; these figures say nothing about GPUs)"]
    parts += [f"driver {gpu['driver_version']}"] if gpu.get("driver_version") else []
    parts += [f"{name} {versions[name]}" for name in ("torch", "cuda") if versions.get(name)]
    lines = [f"{', '.join([*parts, table['created_at'][:10]])}."]
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


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row as it stands under `COLUMNS`."""
    engine = f"{row['engine']}, {row['precision']}" if row["precision"] else row["engine"]
    head = [row["title"], engine, str(row["batch_size"] or UNKNOWN)]
    if row["status"] != "ok":
        return [*head, f"failed: {row['reason']}", UNKNOWN, UNKNOWN, UNKNOWN]
    speedup = floor = UNKNOWN
    if row["is_reference"]:
        speedup = "1"
    elif row["speedup"] is not None:
        speedup = f"{significant(row['speedup'])} x"
    if row["floor_fraction"] is not None:
        least = duration(1e3 * row["floor_seconds"])
        floor = f"{100 * row['floor_fraction']:.0f} % (floor {least})"
    startup = f"{row['startup_seconds']:.1f} s"
    if row["cold_startup_seconds"] is not None:
        startup += f" (cache empty: {row['cold_startup_seconds']:.1f} s)"
    what = f"an epoch of {row['train_samples']:,}" if row["unit"] == EPOCH else "a batch"
    rate = f"{row['samples_per_second']:,.0f} samples/s"
    return [*head, f"{duration(1e3 * row['seconds'])} {what} ({rate})", speedup, floor, startup]
