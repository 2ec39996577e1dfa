"""Comparisons of made-up runs, for tests of what is compared, claimed and said."""

from __future__ import annotations

from collections.abc import Callable

import synthetic_runs

from benchmarking.analysis import comparison, decision, markdown_report, report_content
from benchmarking.analysis.comparison import Comparison
from benchmarking.analysis.document import Document
from benchmarking.analysis.report_content import SectionCharts
from benchmarking.analysis.runs import RunView


def view(made: dict) -> RunView:
    """The made-up run as the analysis sees it after reading."""
    return RunView(made["manifest"]["run_id"], made["manifest"], made["records"])


def compare(*made: dict, **more: object) -> Comparison:
    """The runs compared and decided upon."""
    return decision.decide(comparison.compare([view(run) for run in made], **more))


def sentences(compared: Comparison, section: int = 0) -> str:
    """The decision, a line a sentence, without the marks of its verdicts."""
    return "\n".join(claim.text for claim in compared.sections[section].claims).replace("**", "")


def document(compared: Comparison) -> Document:
    """The report without charts."""
    return report_content.build(compared, [SectionCharts() for _ in compared.sections])


def markdown(compared: Comparison) -> str:
    """The report without charts, as Markdown."""
    return markdown_report.render(document(compared))


def change(made: dict, edit: Callable[[dict], None], **where: object) -> dict:
    """Edit every record of the made-up run whose fields are as named."""
    for record in made["records"]:
        if all(record.get(key) == value for key, value in where.items()):
            edit(record)
    return made


def time_slicing(slowdowns: list[float], **more: object) -> dict:
    """Four clients under time slicing, slowed so in each repeat."""
    return synthetic_runs.run("slicing", "time-slicing", {4: slowdowns}, **more)


def mps(slowdowns: list[float], **more: object) -> dict:
    """Four clients under MPS, slowed so in each repeat."""
    return synthetic_runs.run("mps", "mps", {4: slowdowns}, **more)
