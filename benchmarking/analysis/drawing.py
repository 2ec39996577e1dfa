"""Which charts a section gets: the modes of each mix, its ramps, a timeline of each co-run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarking.analysis import heat_maps, mode_charts, ramp_chart, timeline_chart
from benchmarking.analysis.comparison import Comparison, Section
from benchmarking.analysis.report_content import SectionCharts
from benchmarking.analysis.runs import CoRun, RunView
from benchmarking.analysis.timeline_chart import Sample

# Past that many, repeats of a count look alike and make the report long: the first stands for them.
MOST_TIMELINES = 6

ReadSamples = Callable[[RunView], Sequence[Sample]]


def draw(compared: Comparison, output: Path, samples_of: ReadSamples) -> list[SectionCharts]:
    """Draw the charts of every section as PNG into `output`, which is there already."""
    several = len(compared.sections) > 1
    return [
        _draw_section(section, output, f"section{index}-" if several else "", samples_of)
        for index, section in enumerate(compared.sections, start=1)
    ]


def _draw_section(
    section: Section, output: Path, prefix: str, samples_of: ReadSamples
) -> SectionCharts:
    charts = SectionCharts()
    for mix in section.mixes:
        groups = section.most_compared(mix)
        name = f"{mix}-{groups[0].clients}.png"
        ramps = [ramp for ramp in section.ramps if ramp.mix == mix]
        found = [
            mode_charts.throughput(
                groups, section.same_twice, output / f"{prefix}throughput-{name}"
            ),
            mode_charts.slowdown(groups, output / f"{prefix}slowdown-{name}"),
            mode_charts.tail(groups, output / f"{prefix}tail-{name}"),
            ramp_chart.scaling(ramps, output / f"{prefix}scaling-{mix}.png"),
        ]
        charts.compared += [picture for picture in found if picture is not None]
    for matrix in section.matrices:
        name = re.sub(r"[^\w.-]+", "-", f"{matrix.mode} {matrix.settings}").strip("-")
        name += f"-{matrix.mix}.png"
        maps = [
            heat_maps.slowdowns(matrix, section.matrices, output / f"{prefix}slowdowns-{name}"),
            heat_maps.tails(matrix, section.matrices, output / f"{prefix}tails-{name}"),
        ]
        charts.pairs += [picture for picture in maps if picture is not None]
    shown, charts.timelines_note = _shown_timelines(section)
    samples: dict[str, Sequence[Sample]] = {}
    for co_run in shown:
        run = co_run.run
        if run.run_id not in samples:
            samples[run.run_id] = samples_of(run)
        name = re.sub(r"[^\w.-]+", "-", f"{prefix}timeline-{run.run_id}-{co_run.name}.png")
        picture = timeline_chart.timeline(co_run, samples[run.run_id], output / name)
        if picture is not None:
            charts.timelines.append(picture)
    return charts


def _shown_timelines(section: Section) -> tuple[list[CoRun], str]:
    """The co-runs to draw, and what to say of those that are not."""
    every = [co_run for group in section.groups for co_run in group.co_runs]
    if len(every) <= MOST_TIMELINES:
        return every, ""
    first = [group.co_runs[0] for group in section.groups]
    return first, f" Of {len(every)} co-runs the first of each mode, mix and count is shown."
