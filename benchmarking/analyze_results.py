#!/usr/bin/env python3
"""Compare the runs of a results folder: decision, scorecard, charts, report.

    python3 benchmarking/analyze_results.py --results-dir results
    python3 benchmarking/analyze_results.py --results-dir results/RUN_ID      # one run's report

Finds every run at or below the folder and writes, into `--output` (default: the same folder),
`report.html` (one self-contained file), `report.md`, `comparison.csv`, `comparison.json` and the
charts as PNG; with `--each-run` also a `report.html` into every run's folder. Given one run, the
runs beside it lend the baselines that it reused. Exit codes: 0 done, 1 the report cannot be
written, 2 wrong usage or nothing to analyze, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec

from benchmarking.analysis import comparison, decision, export, report_content, terminal_report
from benchmarking.analysis.comparison import Comparison
from benchmarking.analysis.document import Document
from benchmarking.analysis.runs import RunView
from benchmarking.cli import EXIT_USAGE, OneLineParser
from benchmarking.records import run_folder
from benchmarking.records.writing import write_text_atomic

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class UsageError(Exception):
    """The arguments name nothing to analyze; the message is one sentence naming the fix."""


class CannotWriteError(Exception):
    """The report cannot be written; the message is one sentence naming the fix."""


def main() -> int:
    """Analyze and print; turn what goes wrong into one sentence and an exit code."""
    options = parse_arguments()
    try:
        compared = analyze(options)
    except UsageError as error:
        return complain(error, EXIT_USAGE)
    except CannotWriteError as error:
        return complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        print("analyze_results.py: interrupted, the report is not complete", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(terminal_report.render(compared))
    print(f"report: {options.output / 'report.html'} (and report.md)")
    return 0


def complain(error: Exception, code: int) -> int:
    """Say what went wrong, which a driver takes for its reason; return the exit code."""
    print(f"analyze_results.py: error: {error}", file=sys.stderr)
    return code


def analyze(options: argparse.Namespace) -> Comparison:
    """Read, compare, draw, write."""
    folders, compared = read_and_compare(options.results_dir, options.slo_ms)
    document = draw_and_build(compared, folders, options.output)
    with writing(options.output):
        write_files(compared, document, options.output)
    if options.each_run:
        write_run_reports(compared, folders, options.slo_ms)
    return compared


def parse_arguments() -> argparse.Namespace:
    """Return the options; without `--output` the results folder is written to."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), metavar="DIR",
        help="folder that holds the runs, at any depth, or one run's folder (default: results)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where the report and the charts go (default: the results folder)",
    )  # fmt: skip
    parser.add_argument(
        "--slo-ms", type=_positive, metavar="MS",
        help="say which share of the latency jobs' responses came within this bound "
        "(default: the bound that a run was given)",
    )  # fmt: skip
    parser.add_argument(
        "--each-run", action="store_true",
        help="also write each run's own report.html into its folder",
    )  # fmt: skip
    options = parser.parse_args()
    options.output = options.output or options.results_dir
    return options


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"give a number over 0, not {text!r}")
    return value


def read_and_compare(
    results_dir: Path, slo_ms: float | None = None
) -> tuple[dict[str, Path], Comparison]:
    """Read every run below the folder and compare them; run folders by the runs' names.

    Raises `UsageError` when the folder is missing or holds no run.
    """
    if not results_dir.is_dir():
        raise UsageError(
            f"{results_dir} is not a folder: give the one that holds the runs by --results-dir"
        )
    folders = run_folder.find_runs(results_dir)
    problems = unreadable_runs(results_dir, folders)
    refusals, bad_refusals = run_folder.read_refusals(results_dir)
    if not folders:
        said = [*problems, *(f"refused: {refusal.sentence}" for refusal in reversed(refusals))]
        detail = f" ({said[0]})" if said else ""
        raise UsageError(
            f"no run in {results_dir}{detail}: make one with benchmarking/benchmark_suite.py first"
        )
    runs = named_runs(results_dir, [run_folder.read_run(folder) for folder in folders])
    phases, bad_phases = run_folder.read_phases(results_dir)
    compared = comparison.compare(
        [RunView.of(run, name) for name, run in runs.items()],
        msgspec.to_builtins(phases),
        [*problems, *bad_phases, *bad_refusals],
        refusals=msgspec.to_builtins(refusals),
        references=lenders(results_dir, folders),
        slo_ms=slo_ms,
    )
    return {name: run.folder for name, run in runs.items()}, decision.decide(compared)


def lenders(results_dir: Path, folders: Sequence[Path]) -> list[RunView]:
    """Runs beside the one that the folder is, for the baselines that it may have reused."""
    if list(folders) != [results_dir]:
        return []
    beside = [folder.parent for folder in results_dir.resolve().parent.glob("*/manifest.json")]
    views = []
    for folder in beside:
        try:
            run = run_folder.read_run(folder)
        except run_folder.RunStoreError:
            continue
        if folder != results_dir.resolve():
            views.append(RunView.of(run, run.run_id))
    return views


def named_runs(results_dir: Path, runs: Sequence[run_folder.Run]) -> dict[str, run_folder.Run]:
    """Runs by run id; those that share one, as experiments do, by their path below the folder."""
    paths = [run.folder.relative_to(results_dir).as_posix() for run in runs]
    times = Counter(run.run_id for run in runs)
    names = [
        run.run_id if times[run.run_id] == 1 else path
        for run, path in zip(runs, paths, strict=True)
    ]
    if len(set(names)) < len(runs):  # a renamed folder bears another run's id
        names = paths
    return dict(zip(names, runs, strict=True))


def unreadable_runs(results_dir: Path, readable: Sequence[Path]) -> list[str]:
    """Say, a sentence each, why a folder with a manifest is not among the readable runs."""
    problems = []
    for manifest in sorted(results_dir.rglob(run_folder.MANIFEST_FILE)):
        if manifest.parent not in readable:
            try:
                run_folder.read_run(manifest.parent)
            except run_folder.RunStoreError as error:
                problems.append(str(error))
    return problems


def draw_and_build(compared: Comparison, folders: dict[str, Path], output: Path) -> Document:
    """Draw the charts into `output` and put the report together."""
    from benchmarking.analysis import drawing

    def samples_of(run: RunView) -> list[dict]:
        samples, bad_lines = run_folder.read_samples(folders[run.run_id])
        compared.problems += bad_lines
        return msgspec.to_builtins(samples)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {output} ({error.strerror}): choose another --output"
        ) from error
    with writing(output):
        charts = drawing.draw(compared, output, samples_of)
    return report_content.build(compared, charts)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk, or a folder that is shut or gone, does inside into one sentence."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"cannot write to {folder} ({error.strerror}): make room there or bring it back, or "
            "choose another --output"
        ) from error


def write_files(compared: Comparison, document: Document, output: Path) -> None:
    """Write the report twice, the flat table and the JSON; each whole, or the earlier one stays."""
    import pandas

    from benchmarking.analysis import html_report, markdown_report

    rows = export.flat_rows(compared)
    # As objects: a column of counts with an unknown among them would become one of floats.
    frame = pandas.DataFrame(rows, columns=None if rows else ["section"], dtype=object)
    texts = {
        "report.md": markdown_report.render(document),
        "report.html": html_report.render(document),
        "comparison.json": export.json_text(compared),
        "comparison.csv": frame.to_csv(index=False),
    }
    for name, text in texts.items():
        write_text_atomic(output / name, text)


def write_run_reports(compared: Comparison, folders: dict[str, Path], slo_ms: float | None) -> None:
    """Write each run's own page into its folder; the other runs lend the baselines it reused."""
    from benchmarking.analysis import html_report

    runs = [run for section in compared.sections for run in section.runs]
    for run in runs:
        others = [other for other in runs if other is not run]
        alone = decision.decide(comparison.compare([run], references=others, slo_ms=slo_ms))
        with tempfile.TemporaryDirectory() as charts:  # the page holds them as SVG
            document = draw_and_build(alone, folders, Path(charts))
        with writing(folders[run.run_id]):
            path = folders[run.run_id] / "report.html"
            write_text_atomic(path, html_report.render(document))


if __name__ == "__main__":
    sys.exit(main())
