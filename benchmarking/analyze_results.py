#!/usr/bin/env python3
"""Compare the runs of a results folder: decision, table, charts, report.

    python3 benchmarking/analyze_results.py --results-dir results
    python3 benchmarking/analyze_results.py --results-dir results/RUN_ID      # one run's report
    python3 benchmarking/analyze_results.py --results-dir results --require 'mps:p99<50ms'

Finds every run at or below the folder and writes, into `--output` (default: the same folder),
`report.html` (one self-contained file), `report.md`, `comparison.csv`, `comparison.json` and the
charts as PNG; with `--each-run` also a `report.html` into every run's folder. Given one run, the
runs beside it lend the baselines that it reused. Exit codes: 0 done, 1 the report cannot be
written, 2 wrong usage, nothing to analyze, or an `--output` that cannot be made, 7 a requirement
is not met, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarking.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    OneLineParser,
    SuiteError,
    drop_output,
    positive_float,
)
from benchmarking.records.writing import write_bytes_atomic, write_text_atomic
from benchmarking.report import charts, comparison, export, render, runs
from benchmarking.report.claims import MATTERS_PERCENT
from benchmarking.report.groups import CoRun

EXIT_REQUIREMENT = 7


def main() -> int:
    """Analyze and print; turn what goes wrong into one sentence and an exit code."""
    options = parse_arguments()
    try:
        compared = analyze(options)
        width = shutil.get_terminal_size((100, 24)).columns
        with writing("standard output"):
            print(render.render_terminal(compared, width))
            print(f"report: {options.output / 'report.html'} (and report.md)", flush=True)
    except SuiteError as error:
        drop_output()
        return complain(error, error.exit_code)
    except BrokenPipeError:  # `| head` has read enough; what is required is still looked at
        drop_output()
    except KeyboardInterrupt:
        return complain("interrupted, the report is not complete", EXIT_INTERRUPTED)
    return check_requirements(options.require, compared)


def complain(what: object, code: int) -> int:
    """Say what went wrong, which a driver takes for its reason; return the exit code."""
    kind = "" if code == EXIT_INTERRUPTED else "error: "
    print(f"analyze_results.py: {kind}{what}", file=sys.stderr)
    return code


def parse_arguments() -> argparse.Namespace:
    """Return the options; without `--output` the results folder is written to."""
    parser = OneLineParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), metavar="DIR",
        help="folder that holds the runs, at any depth, or one run's folder (default: results)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where the report and the charts go (default: the results folder)",
    )  # fmt: skip
    parser.add_argument(
        "--slo-ms", type=positive_float, metavar="MS",
        help="say which share of the latency jobs' responses came within this bound "
        "(default: the bound that a run was given)",
    )  # fmt: skip
    parser.add_argument(
        "--matters", type=positive_float, default=MATTERS_PERCENT, metavar="PERCENT",
        help="differences within it do not matter (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--require", type=export.Requirement.parse, action="append", default=[],
        metavar="[MODE:][JOB:]FIGURE OP VALUE",
        help="end with exit code 7 when a figure does not meet this, such as "
        "'mps:batch_inference:p99<50ms' or 'work>1.1'; without MODE every mode must, without JOB "
        f"every job; figures: {', '.join(export.FIGURES)}; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-price", type=positive_float, metavar="PRICE",
        help="price of the GPU an hour: adds what 1,000 seconds of work cost",
    )  # fmt: skip
    parser.add_argument(
        "--kwh-price", type=positive_float, metavar="PRICE",
        help="price of a kilowatt-hour: adds what the energy of 1,000 seconds of work costs",
    )  # fmt: skip
    parser.add_argument(
        "--each-run", action="store_true",
        help="also write each run's own report.html into its folder",
    )  # fmt: skip
    options = parser.parse_args()
    options.output = options.output or options.results_dir
    return options


def analyze(options: argparse.Namespace) -> dict[str, Any]:
    """Read, compare, draw, write."""
    results = runs.read_results(options.results_dir)
    compare = functools.partial(
        comparison.compare, slo_ms=options.slo_ms, matters_percent=options.matters,
        gpu_price_per_hour=options.gpu_price, kwh_price=options.kwh_price,
    )  # fmt: skip
    compared, co_runs = compare(results)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuiteError(
            f"cannot write to {options.output} ({error.strerror}): choose another --output"
        ) from error
    with writing(options.output):
        write_reports(compared, co_runs, options.output)
    for run in results.runs if options.each_run else ():
        write_run_report(run, results, compare)
    return compared


@contextlib.contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Turn what a full disk, or a folder that is shut or gone, does inside into one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SuiteError(
            f"cannot write to {where} ({error.strerror}): make room there or bring it back, or "
            "choose another --output", EXIT_FAILED,
        ) from error  # fmt: skip


def draw(compared: dict[str, Any], co_runs: Mapping[str, CoRun]) -> list[charts.Charts]:
    """Draw the charts; what is wrong with the samples becomes a problem of the comparison."""

    @functools.cache  # a run has many timelines
    def samples_of(run: Path) -> list[dict[str, Any]]:
        samples, problems = runs.read_samples(run)
        compared["problems"] += problems
        return samples

    return charts.draw(compared, co_runs, samples_of)


def write_reports(compared: dict[str, Any], co_runs: Mapping[str, CoRun], output: Path) -> None:
    """Write charts, both reports, table and JSON; each whole, or the earlier one stays."""
    drawn = draw(compared, co_runs)
    for picture in (one for section in drawn for kind in section.values() for one in kind):
        write_bytes_atomic(output / picture.file_name, picture.png)
    for name, text in {
        "report.md": render.render_markdown(compared, drawn),
        "report.html": render.render_html(compared, drawn),
        "comparison.json": export.json_text(compared),
        "comparison.csv": export.csv_text(compared),
    }.items():
        write_text_atomic(output / name, text)


def write_run_report(
    run: runs.MeasuredRun,
    results: runs.Results,
    compare: Callable[[runs.Results], tuple[dict[str, Any], dict[str, CoRun]]],
) -> None:
    """Write a run's own page into its folder; the other runs lend the baselines it reused."""
    others = [other for other in results.runs if other is not run]
    compared, co_runs = compare(runs.Results([run], [*others, *results.references]))
    page = render.render_html(compared, draw(compared, co_runs))
    with writing(run.folder):
        write_text_atomic(run.folder / "report.html", page)


def check_requirements(required: list[export.Requirement], compared: dict[str, Any]) -> int:
    """Say what is not met; return the exit code."""
    missed = [sentence for one in required for sentence in one.missed(compared)]
    for sentence in missed:
        print(f"analyze_results.py: requirement {sentence}", file=sys.stderr)
    return EXIT_REQUIREMENT if missed else 0


if __name__ == "__main__":
    sys.exit(main())
