#!/usr/bin/env python3
"""Print the speed of every workload under each engine, against eager fp32 and the card's floor.

    python3 benchmarking/speed_table.py
    python3 benchmarking/speed_table.py --only resnet50-batch32 --engines graph

Runs the workloads' own scripts by hand, one process at a time, with the guide's defaults. Each job
runs once as reference, with `--engine eager --precision fp32` (TF32 off), then under each engine
in its default precision. The table is written after each row, as `speed_table.json` and
`speed_table.md`; a run that fails is a row that says why. Run it on an idle GPU without a sharing
mode: what else was on the card is noted. Without a GPU it shows tiny sizes, eager only.

Exit codes: 0 all rows are there, 1 some failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.hardware import nvml
from benchmarking.records.run_folder import utc_now, write_json_atomic
from benchmarking.speed.jobs import (
    JOBS,
    SIZE_CPU,
    SIZE_GUIDE,
    SIZE_QUICK,
    UNIT_BATCH,
    SpeedJob,
    floor_seconds,
)
from benchmarking.speed.process_run import Interrupted, Processes, RunFailedError
from benchmarking.speed.text import markdown
from benchmarking.suite.cli import EXIT_USAGE, OneLineParser, positive_int
from benchmarking.suite.stop_signal import StopSignal

SCHEMA_VERSION = 1
EXIT_COMPLETE, EXIT_FAILED, EXIT_NO_GPU, EXIT_INTERRUPTED = 0, 1, 3, 130
EAGER, COMPILE = "eager", "compile"
ENGINES = ("graph", COMPILE)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Row = dict[str, Any]


def main() -> int:
    """Measure every row, write the table, print it; return the exit code."""
    options = parse_arguments()
    with StopSignal().watching() as stop_signal, compile_cache() as cache:
        table = SpeedTable(options, Processes(stop_signal, options.timeout), cache)
        try:
            code = table.measure()
        except Interrupted:
            code = EXIT_INTERRUPTED
            table.finish("interrupted")
    print(markdown(table.content))
    print(f"results: {options.output_dir}")
    return code


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = OneLineParser(
        description="Measure the speed of every workload under each engine, against eager fp32.",
        epilog=f"jobs: {', '.join(job.name for job in JOBS)}",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter epochs and fewer batches")
    add("--only", type=job_list, default=list(JOBS), metavar="NAME,...",
        help="only these jobs (default: all)")  # fmt: skip
    add("--engines", type=engine_list, default=list(ENGINES), metavar="NAME,...",
        help="engines beside the reference (default: graph,compile)")  # fmt: skip
    add("--repeats", type=positive_int, default=1, metavar="R",
        help="runs of each row; the median counts (default: 1)")  # fmt: skip
    add("--timeout", type=positive_int, default=1800, metavar="SECONDS",
        help="time limit of one run (default: 1800)")  # fmt: skip
    add("--output-dir", type=Path, default=Path("results/speed"),
        help="folder of the table (default: results/speed)")  # fmt: skip
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--dataset", help="of the ResNet50 training (see resnet_training.py --help)")
    add("--data-dir", metavar="DIR", help="folder of that dataset")
    options = parser.parse_args()
    if options.data_dir is not None and not Path(options.data_dir).is_dir():
        parser.error(f"--data-dir {options.data_dir} is no folder: name one that is there")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {options.output_dir}: {error.strerror}; name another folder")
    return options


class SpeedTable:
    """Measures row by row; `content` is the table so far, as it is written to disk."""

    def __init__(self, options: argparse.Namespace, processes: Processes, cache: Path) -> None:
        """Find the GPU and say what will be run."""
        self._options = options
        self._processes = processes
        self._cache = cache
        # What somebody filled before says nothing of a start from an empty cache.
        self._fills_cache = not any(cache.iterdir())
        self._noted_neighbors = ""
        gpu = find_gpu(options.gpu)
        self._selector = gpu["uuid"] if gpu else None
        size = SIZE_CPU if gpu is None else SIZE_QUICK if options.quick else SIZE_GUIDE
        self.content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created_at": utc_now(),
            "command": sys.argv,
            "outcome": "running",
            "job_size": size,
            "gpu": gpu,
            "card_rates": None,
            "versions": {},
            "rows": [],
            "notes": [],
        }

    def measure(self) -> int:
        """Measure the card, then every job under every engine; return the exit code."""
        self._measure_card()
        engines = self._options.engines if self._selector else []
        for job in self._options.only:
            reference = self._measure_row(job, EAGER, "fp32" if self._selector else None)
            work = self._count_work(job, reference)
            self._complete(reference, reference, job, work)
            for engine in engines:
                row = self._measure_row(job, engine, None)
                self._complete(row, reference, job, work or self._count_work(job, row))
        self.finish("complete")
        failed = any(row["status"] != "ok" for row in self.content["rows"])
        return EXIT_FAILED if failed else EXIT_COMPLETE

    def finish(self, outcome: str) -> None:
        """Say how it ended, in the files too."""
        self.content["outcome"] = outcome
        self._write()

    def _measure_card(self) -> None:
        if self._selector is None:
            self._note("no GPU: tiny sizes on the CPU, engine eager; floors are unknown")
            return
        self._note_neighbors("the card's rates")
        say("the card's copy bandwidth and matrix rate")
        try:
            self.content["card_rates"] = self._processes.run_for_json(
                "benchmarking/speed/card_rates.py", ["--gpu", self._selector]
            )
        except RunFailedError as error:
            self._note(f"the card's rates are unknown: {error}")

    def _measure_row(self, job: SpeedJob, engine: str, precision: str | None) -> Row:
        """Run one job under one engine and return its row, which is already in the table."""
        row: Row = {
            "name": job.name, "title": job.title, "engine": engine, "precision": precision,
            "batch_size": None, "unit": job.unit, "status": "ok", "reason": None,
            "is_reference": engine == EAGER, "seconds": None, "values": [],
            "samples_per_second": None, "train_samples": None, "speedup": None,
            "floor_seconds": None, "floor_fraction": None, "work": None,
            "startup_seconds": None, "cold_startup_seconds": None, "neighbors": [],
            "settings": None, "warnings": [],
        }  # fmt: skip
        name = f"{job.name}, engine {engine}"
        row["neighbors"] = self._note_neighbors(name)
        flags = self._flags(job, engine, precision)
        environment = {CACHE_VARIABLE: str(self._cache)} if engine == COMPILE else {}
        try:
            if engine == COMPILE and self._fills_cache:
                say(f"{name}: filling the cache")
                first = self._processes.run_workload(
                    job.script, [*flags, *job.prewarm], environment
                )
                row["cold_startup_seconds"] = first["figures"]["startup_seconds"]
            results = []
            for repeat in range(self._options.repeats):
                say(f"{name}: run {repeat + 1}/{self._options.repeats}")
                results.append(self._processes.run_workload(job.script, flags, environment))
            self._fill(row, job, results)
        except RunFailedError as error:
            row["status"], row["reason"] = "failed", str(error)
            say(f"{name}: failed: {error}")
        self.content["rows"].append(row)
        self._write()
        return row

    def _flags(self, job: SpeedJob, engine: str, precision: str | None) -> list[str]:
        flags = [*job.arguments[self.content["job_size"]], "--engine", engine]
        flags += ["--precision", precision] if precision else []
        flags += ["--gpu", self._selector] if self._selector else ["--device", "cpu"]
        if job.takes_images:
            dataset = self._options.dataset or (None if self._selector else "synthetic")
            flags += ["--dataset", dataset] if dataset else []
            flags += ["--data-dir", self._options.data_dir] if self._options.data_dir else []
        return flags

    def _fill(self, row: Row, job: SpeedJob, results: Sequence[Mapping[str, Any]]) -> None:
        """Take the figures of a row from the results of its runs."""
        last, settings = results[-1], results[-1]["settings"]
        row["values"] = [job.measure(result["figures"]) for result in results]
        row["seconds"] = statistics.median(row["values"])
        row["startup_seconds"] = statistics.median(
            result["figures"]["startup_seconds"] for result in results
        )
        row["engine"], row["precision"] = settings["engine"], settings["precision"]
        row["batch_size"] = settings["batch_size"]
        row["train_samples"] = settings.get("train_samples")
        samples = row["batch_size"] if job.unit == UNIT_BATCH else row["train_samples"]
        row["samples_per_second"] = samples / row["seconds"]
        row["settings"], row["warnings"] = settings, last["warnings"]
        versions = {name: text for name, text in last["identity"]["versions"].items() if text}
        self.content["versions"] = {**self.content["versions"], **versions}

    def _count_work(self, job: SpeedJob, row: Row) -> dict[str, Any] | None:
        """Count what one step of the job takes at least; unknown after a failure."""
        if row["settings"] is None:
            return None
        try:
            return self._processes.run_for_json(
                "workloads/work_count.py", job.work_flags(row["settings"])
            )
        except RunFailedError as error:
            self._note(f"{job.name}: the floor is unknown: {error}")
            return None

    def _complete(
        self, row: Row, reference: Row, job: SpeedJob, work: Mapping[str, Any] | None
    ) -> None:
        """Set a row against the reference and the floor."""
        if row["seconds"] is None:
            return
        if reference["seconds"] is not None:
            row["speedup"] = reference["seconds"] / row["seconds"]
        if work is not None:
            row["work"] = {key: value for key, value in work.items() if key != "operators"}
            row["floor_seconds"] = floor_seconds(
                work, self.content["card_rates"], job.steps(row["settings"])
            )
            if row["floor_seconds"] is not None:
                row["floor_fraction"] = row["floor_seconds"] / row["seconds"]
        self._write()

    def _note_neighbors(self, what: str) -> list[dict[str, Any]]:
        """Return what else is on the GPU just before a measurement, and note a change of it."""
        neighbors = (nvml.compute_processes(self._selector) or []) if self._selector else []
        pids = ", ".join(describe_process(process) for process in neighbors)
        if pids and pids != self._noted_neighbors:
            self._note(f"from {what} on, other processes were on the GPU: {pids}")
        elif self._noted_neighbors and not pids:
            self._note(f"from {what} on, the GPU was free of other processes")
        self._noted_neighbors = pids
        return neighbors

    def _note(self, text: str) -> None:
        say(text)
        self.content["notes"].append(text)

    def _write(self) -> None:
        folder = self._options.output_dir
        write_json_atomic(folder / "speed_table.json", self.content)
        (folder / "speed_table.md").write_text(markdown(self.content), encoding="utf-8")


def find_gpu(selector: str | None) -> dict[str, Any] | None:
    """Return the facts of the GPU to use, None where there is none.

    Ends the process with code 2 where a GPU was named that does not exist, with 3 where the driver
    cannot use it.
    """
    try:
        gpu = nvml.open_gpu(selector or nvml.visible_gpu(os.environ))
    except nvml.GpuHiddenError:
        return None
    except nvml.GpuNotFoundError as error:
        print(f"speed_table.py: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except nvml.GpuUnusableError as error:
        print(f"speed_table.py: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_NO_GPU) from None
    return gpu and gpu.describe()


def describe_process(process: Mapping[str, Any]) -> str:
    """Return a process of NVML's list in words; its name only where its pid is visible here."""
    try:
        name = Path(f"/proc/{process['pid']}/comm").read_text(errors="replace").strip()
    except OSError:
        name = "name unknown"
    return f"pid {process['pid']} ({name})"


@contextlib.contextmanager
def compile_cache() -> Iterator[Path]:
    """Yield the cache of torch.compile: the environment's own, else an empty one for this run."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="inductor-") as folder:
        yield Path(folder)


def job_list(text: str) -> list[SpeedJob]:
    """Argument type: names of jobs, with commas between them, in the table's order."""
    names = {part.strip() for part in text.split(",")}
    unknown = sorted(names - {job.name for job in JOBS})
    if unknown:
        known = ", ".join(job.name for job in JOBS)
        raise argparse.ArgumentTypeError(f"there is no job {', '.join(unknown)}; choose of {known}")
    return [job for job in JOBS if job.name in names]


def engine_list(text: str) -> list[str]:
    """Argument type: names of engines, with commas between them."""
    names = [part.strip() for part in text.split(",")]
    if any(name not in ENGINES for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: choose of {', '.join(ENGINES)}")
    return list(dict.fromkeys(names))


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[speed] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
