#!/usr/bin/env python3
"""Compare the runs of a results folder: table, decision, charts, Markdown report.

    python3 benchmarking/analyze_results.py --results-dir results

Finds every run at or below the folder and writes, into `--output` (default: the same folder),
`comparison.csv`, `comparison.json`, `report.md` and the charts as PNG. Exit codes: 0 done,
2 wrong usage or nothing to analyze.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarking import comparison, decision, report, run_store
from benchmarking.comparison import Comparison, RunView, Section

PHASES_FILE = "phases.jsonl"


class UsageError(Exception):
    """The arguments name nothing to analyze; the message is one sentence naming the fix."""


def main() -> int:
    """Read, compare, draw, write, print."""
    options = parse_arguments()
    try:
        folders, compared = read_and_compare(options.results_dir)
        charts = draw_charts(compared, folders, options.output)
        write_files(compared, charts, options.output)
    except UsageError as error:
        print(f"analyze_results.py: {error}", file=sys.stderr)
        return 2
    print(report.terminal_text(compared))
    print(f"report: {options.output / 'report.md'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the options; without `--output` the results folder is written to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), metavar="DIR",
        help="folder that holds the runs, at any depth (default: results)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where the report and the charts go (default: the results folder)",
    )  # fmt: skip
    options = parser.parse_args()
    options.output = options.output or options.results_dir
    return options


def read_and_compare(results_dir: Path) -> tuple[dict[str, Path], Comparison]:
    """Read every run below the folder and compare them; run folders by the runs' names.

    Raises `UsageError` when the folder is missing or holds no run.
    """
    if not results_dir.is_dir():
        raise UsageError(
            f"{results_dir} is not a folder: give the one that holds the runs by --results-dir"
        )
    folders = run_store.find_runs(results_dir)
    problems = unreadable_runs(results_dir, folders)
    if not folders:
        detail = f" ({problems[0]})" if problems else ""
        raise UsageError(
            f"no run in {results_dir}{detail}: make one with benchmarking/benchmark_suite.py first"
        )
    runs = named_runs(results_dir, [run_store.read_run(folder) for folder in folders])
    phases, torn = run_store.read_json_lines(results_dir / PHASES_FILE)
    views = [RunView.of(run, name) for name, run in runs.items()]
    compared = decision.decide(comparison.compare(views, phases, [*problems, *torn]))
    return {name: run.folder for name, run in runs.items()}, compared


def named_runs(results_dir: Path, runs: Sequence[run_store.Run]) -> dict[str, run_store.Run]:
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
    for manifest in sorted(results_dir.rglob(run_store.MANIFEST_FILE)):
        if manifest.parent not in readable:
            try:
                run_store.read_run(manifest.parent)
            except run_store.RunStoreError as error:
                problems.append(str(error))
    return problems


def draw_charts(compared: Comparison, folders: dict[str, Path], output: Path) -> list[list]:
    """Draw each section's charts into `output`; the charts by section."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {output} ({error.strerror}): choose another --output"
        ) from error
    several = len(compared.sections) > 1
    return [
        draw_section(section, folders, output, f"section{index}-" if several else "", compared)
        for index, section in enumerate(compared.sections, start=1)
    ]


def draw_section(
    section: Section, folders: dict[str, Path], output: Path, prefix: str, compared: Comparison
) -> list:
    """Draw one section: modes and slowdowns of each mix, ramps, a timeline of each run."""
    from benchmarking import figures

    charts = []
    for mix in dict.fromkeys(group.mix for group in section.groups):
        groups = section.most_compared(mix)
        name = f"{mix}-{groups[0].clients}.png"
        charts.append(figures.mode_comparison(groups, output / f"{prefix}mode_comparison-{name}"))
        charts.append(figures.slowdown_per_workload(groups, output / f"{prefix}slowdown-{name}"))
        ramps = [ramp for ramp in section.ramps if ramp.mix == mix]
        charts.append(figures.stress_scaling(ramps, output / f"{prefix}scaling-{mix}.png"))
    for run in section.compared_runs:
        samples, torn = run_store.read_samples(folders[run.run_id])
        compared.problems += torn
        path = output / f"{prefix}timeline-{run.run_id.replace('/', '-')}.png"
        charts.append(figures.utilization_timeline(run, samples, path))
    return [chart for chart in charts if chart is not None]


def write_files(compared: Comparison, charts: list[list], output: Path) -> None:
    """Write the report, the flat table and the JSON."""
    import pandas

    rows = report.flat_rows(compared)
    (output / "report.md").write_text(report.markdown(compared, charts), encoding="utf-8")
    (output / "comparison.json").write_text(report.json_text(compared), encoding="utf-8")
    # As objects: a column of counts with an unknown among them would become one of floats.
    frame = pandas.DataFrame(rows, columns=None if rows else ["section"], dtype=object)
    frame.to_csv(output / "comparison.csv", index=False)


if __name__ == "__main__":
    sys.exit(main())
