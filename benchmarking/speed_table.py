#!/usr/bin/env python3
"""Print the speed of every workload under each engine, against eager fp32 and the card's floor.

    python3 benchmarking/speed_table.py
    python3 benchmarking/speed_table.py --only resnet50-batch32 --engines graph

Runs the workloads' own scripts by hand, one process at a time, with the guide's defaults. Each job
runs once as reference, with `--engine eager --precision fp32` (TF32 off), then under each engine
in its default precision. The table is written after each row, as `speed_table.json` and
`speed_table.md`; a run that fails is a row that says why. Run it on an idle GPU without a sharing
mode: what else was on the card is noted. Without a GPU it shows tiny sizes, eager only.

Exit codes: 0 all rows are there, 1 some failed or the table cannot be written, 2 usage, 3 no usable
GPU, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    PROJECT_ROOT,
    OneLineParser,
    RunEnded,
    count,
    positive_int,
)
from benchmarking.drivers.program import (
    claim_folder,
    exit_code_of,
    make_folder,
    write_report,
)
from benchmarking.hardware import nvml
from benchmarking.measuring import locks, proofs
from benchmarking.measuring.card import find_gpu
from benchmarking.measuring.jobs import ScriptFailedError, run_script
from benchmarking.measuring.progress import Progress
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.planning.request import Request
from benchmarking.planning.workloads import SIZE_CPU, SIZE_GUIDE, SIZE_QUICK
from benchmarking.records.run_folder import utc_now
from benchmarking.speed_jobs import BATCH, JOBS, RESNET, SpeedJob, floor_seconds
from benchmarking.speed_report import markdown

SCHEMA_VERSION = 1
EAGER, COMPILE = "eager", "compile"
ENGINES = ("graph", COMPILE)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

NO_NEIGHBORS = "the GPU was free of other processes"
say = Progress().say


def main() -> int:
    """Measure every row, write the table, print it; return the exit code."""
    options = parse_arguments()
    fix = "or name another --output-dir"
    return exit_code_of(lambda stop: measure(options, stop), options.output_dir, fix)


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    names = [job.name for job in JOBS]
    parser = OneLineParser(
        description="Measure the speed of every workload under each engine, against eager fp32.",
        epilog=f"jobs: {', '.join(names)}",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter epochs and fewer batches")
    add("--only", type=listed("job", names), default=names, metavar="NAME,...",
        help="only these jobs (default: all)")  # fmt: skip
    add("--engines", type=listed("engine", ENGINES), default=ENGINES, metavar="NAME,...",
        help="engines next to the reference (default: graph,compile)")  # fmt: skip
    add("--repeats", type=count, default=1, metavar="R",
        help="runs of each row; the median counts (default: 1)")  # fmt: skip
    add("--timeout", type=positive_int, default=1800, metavar="SECONDS",
        help="time limit of one run (default: 1800)")  # fmt: skip
    add("--output-dir", type=Path, default=Path("results/speed"),
        help="folder of the table (default: results/speed)")  # fmt: skip
    add("--gpu", metavar="INDEX_OR_UUID", help="which GPU (default: the first)")
    add("--dataset", help="of the ResNet50 training (see resnet_training.py --help)")
    add("--data-dir", metavar="DIR", help="folder of that dataset")
    options = parser.parse_args()
    if options.data_dir is not None and not os.path.isdir(options.data_dir):
        parser.error(f"--data-dir {options.data_dir} is no folder: name one that is there")
    return options


def listed(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """Argument type: some of the known names, with commas between them."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(part.strip() for part in text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"there is no {what} {', '.join(unknown)}; choose of {', '.join(known)}"
            )
        return names

    return parse


def measure(options: argparse.Namespace, stop: StopSignal) -> int:
    """Measure, write and print the table; return the exit code."""
    claim_folder("--output-dir", options.output_dir)
    with compile_cache() as cache:
        table = SpeedTable(options, stop, cache)
        with locks.hold_or_note(table.gpu_uuid, is_refused=False) as note:
            code = table.measure(note)
    print(markdown(table.content))
    print(f"results: {options.output_dir}")
    return code


@contextlib.contextmanager
def compile_cache() -> Iterator[Path]:
    """Yield the cache of torch.compile: the environment's own, else an empty one for this run."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        make_folder(CACHE_VARIABLE, Path(given))
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="inductor-") as folder:
        yield Path(folder)


@dataclass
class Row:
    """One job under one engine; `None` where it is not known, or not for this job."""

    name: str
    title: str
    engine: str
    precision: str | None
    unit: str
    is_reference: bool
    status: str = "ok"
    reason: str | None = None
    batch_size: int | None = None
    seconds: float | None = None
    values: list[float] = field(default_factory=list)
    samples_per_second: float | None = None
    train_samples: int | None = None
    speedup: float | None = None
    floor_seconds: float | None = None
    floor_fraction: float | None = None
    work: dict[str, Any] | None = None
    startup_seconds: float | None = None
    cold_startup_seconds: float | None = None
    neighbors: list[dict[str, Any]] | None = field(default_factory=list)
    settings: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


class SpeedTable:
    """Measures row by row; `content` is the table so far, as it is written to disk."""

    def __init__(self, options: argparse.Namespace, stop: StopSignal, cache: Path) -> None:
        """Find the GPU and say what will be run; raises `SuiteError` where it cannot be used."""
        self._options = options
        self._stop = stop
        self._cache = cache
        # What somebody filled before says nothing of a start from an empty cache.
        self._fills_cache = not any(cache.iterdir())
        self._noted_neighbors = NO_NEIGHBORS
        gpu, _ = find_gpu(Request(gpu=options.gpu), os.environ)
        self.gpu_uuid = gpu["uuid"] if gpu else None
        self._rows: list[Row] = []
        self.content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "created_at": utc_now(),
            "command": sys.argv,
            "outcome": "running",
            "job_size": SIZE_CPU if gpu is None else SIZE_QUICK if options.quick else SIZE_GUIDE,
            "gpu": gpu,
            "card_rates": None,
            "versions": {},
            "rows": [],
            "notes": [],
        }

    def measure(self, note: str | None) -> int:
        """Measure the card, then every job under every engine; return the exit code.

        The note is on who else is at work on the card.
        """
        try:
            if note is not None:
                self._note(note)
            self._measure_card()
            for job in JOBS:
                if job.name in self._options.only:
                    self._measure_job(job)
            self.content["outcome"] = "complete"
        except RunEnded:
            self.content["outcome"] = "interrupted"
        self._write()
        if self.content["outcome"] == "interrupted":
            return EXIT_INTERRUPTED
        return EXIT_FAILED if any(row.status != "ok" for row in self._rows) else EXIT_COMPLETE

    def _measure_card(self) -> None:
        if self.gpu_uuid is None:
            self._note("no GPU: tiny sizes on the CPU, engine eager; floors are unknown")
            return
        self._note_neighbors("the card's rates")
        say("the card's copy bandwidth and matrix rate")
        try:
            self.content["card_rates"] = self._answer_of(
                "benchmarking/hardware/card_rates.py", ["--gpu", self.gpu_uuid]
            )
        except ScriptFailedError as error:
            self._note(f"the card's rates are unknown: {error}")

    def _measure_job(self, job: SpeedJob) -> None:
        """Measure the job's reference, then its engines, each against reference and floor."""
        work = reference = None
        for engine in (EAGER, *(self._options.engines if self.gpu_uuid else ())):
            row = self._measure_row(job, engine)
            self._rows.append(row)
            reference = reference or row
            if row.settings is not None and row.seconds is not None:
                work = work or self._count_work(job, row.settings)
                row.speedup = reference.seconds and reference.seconds / row.seconds
                self._set_floor(row, row.seconds, row.settings, work)
            self._write()

    def _measure_row(self, job: SpeedJob, engine: str) -> Row:
        """Run one job under one engine, as often as was asked for."""
        precision = "fp32" if engine == EAGER and self.gpu_uuid else None
        row = Row(job.name, job.title, engine, precision, job.unit, is_reference=engine == EAGER)
        name = f"{job.name}, engine {engine}"
        row.neighbors = self._note_neighbors(name)
        flags = self._flags(job, engine, precision)
        environment = {CACHE_VARIABLE: str(self._cache)} if engine == COMPILE else {}
        try:
            if engine == COMPILE and self._fills_cache:
                say(f"{name}: filling the cache")
                first = self._result_of(job.script, [*flags, *job.prewarm.split()], environment)
                row.cold_startup_seconds = first["figures"]["startup_seconds"]
            results = []
            for repeat in range(self._options.repeats):
                say(f"{name}: run {repeat + 1}/{self._options.repeats}")
                results.append(self._result_of(job.script, flags, environment))
            self._fill(row, job, results)
        except ScriptFailedError as error:
            row.status, row.reason = "failed", str(error)
            say(f"{name}: failed: {error}")
        return row

    def _flags(self, job: SpeedJob, engine: str, precision: str | None) -> list[str]:
        smaller = {SIZE_QUICK: job.quick, SIZE_CPU: job.cpu}.get(self.content["job_size"], "")
        flags = [*job.guide.split(), *smaller.split(), "--engine", engine]
        flags += ["--precision", precision] if precision else []
        flags += ["--gpu", self.gpu_uuid] if self.gpu_uuid else ["--device", "cpu"]
        if job.script == RESNET:
            dataset = self._options.dataset or (None if self.gpu_uuid else "synthetic")
            flags += ["--dataset", dataset] if dataset else []
            flags += ["--data-dir", self._options.data_dir] if self._options.data_dir else []
        return flags

    def _fill(self, row: Row, job: SpeedJob, results: Sequence[Mapping[str, Any]]) -> None:
        """Take the figures of a row from the results of its runs."""
        settings, versions = results[-1]["settings"], results[-1]["identity"]["versions"]
        row.values = [job.seconds_of(result["figures"]) for result in results]
        row.seconds = statistics.median(row.values)
        startups = [result["figures"]["startup_seconds"] for result in results]
        row.startup_seconds = statistics.median(startups)
        row.engine, row.precision = settings["engine"], settings["precision"]
        row.batch_size = settings["batch_size"]
        row.train_samples = settings.get("train_samples")
        samples = settings["batch_size" if job.unit == BATCH else "train_samples"]
        row.samples_per_second = samples / row.seconds
        row.settings, row.warnings = settings, results[-1]["warnings"]
        self.content["versions"] |= {name: text for name, text in versions.items() if text}

    def _count_work(self, job: SpeedJob, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Count what one step of the job takes at least."""
        try:
            return self._answer_of("workloads/work_count.py", job.work_flags(settings))
        except ScriptFailedError as error:
            self._note(f"{job.name}: the floor is unknown: {error}")
            return None

    def _set_floor(
        self, row: Row, seconds: float, settings: Mapping[str, Any], work: Mapping[str, Any] | None
    ) -> None:
        if work is None:
            return
        row.work = {key: value for key, value in work.items() if key != "operators"}
        # An epoch's last batch may be a part of one.
        steps = 1.0 if row.unit == BATCH else settings["train_samples"] / settings["batch_size"]
        row.floor_seconds = floor_seconds(work, self.content["card_rates"], steps)
        row.floor_fraction = row.floor_seconds and row.floor_seconds / seconds

    def _note_neighbors(self, what: str) -> list[dict[str, Any]] | None:
        """Return what else is on the GPU just before a measurement, and note a change of it.

        `None` where that could not be asked.
        """
        neighbors = nvml.compute_processes(self.gpu_uuid) if self.gpu_uuid else []
        found = NO_NEIGHBORS
        if neighbors is None:
            found = "whether other processes were on the GPU could not be asked"
        elif neighbors:
            pids = proofs.describe_pids(process["pid"] for process in neighbors)
            found = f"other processes were on the GPU: {pids}"
        if found != self._noted_neighbors:
            self._note(f"from {what} on, {found}")
        self._noted_neighbors = found
        return neighbors

    def _note(self, text: str) -> None:
        say(text)
        self.content["notes"].append(text)

    def _write(self) -> None:
        self.content["rows"] = [dataclasses.asdict(row) for row in self._rows]
        write_report(self._options.output_dir, "speed_table", self.content, markdown(self.content))

    def _result_of(
        self, script: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Run a workload by hand and return its result file; raises what `run_script` raises."""
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            self._run([script, *arguments, "--results-dir", folder], environment)
            results = list(Path(folder).glob("*.json"))
            if len(results) != 1:
                raise ScriptFailedError(f"{script} wrote {len(results)} result files, not one")
            return json.loads(results[0].read_text(encoding="utf-8"))

    def _answer_of(self, script: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Run a program that prints one JSON object; raises what `run_script` raises."""
        answer = self._run([script, *arguments], {})
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ScriptFailedError(f"{script} printed no JSON: {answer[:200]!r}") from error

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> str:
        script, *arguments = command
        words = [sys.executable, str(PROJECT_ROOT / script), *arguments]
        variables = {**os.environ, **environment}
        return run_script(words, variables, self._stop, self._options.timeout)


if __name__ == "__main__":
    sys.exit(main())
