"""The report of a comparison, built once: the decision first, then figures, charts, evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarking.analysis import (
    evidence,
    guide_tables,
    interference_text,
    scorecard,
    service_text,
)
from benchmarking.analysis.comparison import Claim, Comparison, Section
from benchmarking.analysis.document import (
    Bullets,
    Chapter,
    Document,
    Gallery,
    Paragraph,
    Picture,
    code,
)
from benchmarking.metrics.scores import FEWEST_FOR_A_TAIL

CPU_DEMO_NOTICE = (
    "CPU demonstration: no GPU was used. These figures say nothing about GPU sharing modes "
    "(time slicing, MPS, MIG); they show only that the whole flow works."
)

HOW_TO_READ = (
    "**slowdown**: seconds a unit of work takes beside the others, over seconds alone.",
    "**STP**: sum of the inverse slowdowns, in GPUs' worth of work; over 1, sharing beats running "
    "the jobs one after another.",
    "**ANTT**: mean slowdown, what users feel on average.",
    "**overhead**: 1 / STP - 1; negative when sharing wins. Under MIG the guide's 0 % is "
    "**interference overhead**: against the same job alone on its own instance.",
    "**mechanism overhead**: one client under the mode against alone.",
    "**fairness**: Jain's index; 1 = all equally slowed.",
    "**energy ratio**: joules together over joules one after another; under 1 saves. **J a job** "
    "is given only where all clients run the same job: no card tells whose joules they are.",
    "**GPU utilization** says that some kernel ran; **SM activity**, where the GPU has it, how "
    "much of the GPU worked.",
    "A difference is claimed only where each side has three or more repeats, their 95 % intervals "
    "do not overlap, and it is larger than the noise floor: how far the same mode, taken in two "
    "calls (A/A), lies from itself. Of one or two co-runs only what was seen is said.",
    "**p99**: of a claim, the geometric mean over the repeats' p99s. Of fewer than "
    f"{FEWEST_FOR_A_TAIL} responses there is none, and a request that was missed counts as "
    "infinitely late (∞).",
)


@dataclass
class SectionCharts:
    """A section's charts: the modes compared, heat maps of pairs, a timeline of each co-run."""

    compared: list[Picture] = field(default_factory=list)
    pairs: list[Picture] = field(default_factory=list)
    timelines: list[Picture] = field(default_factory=list)
    timelines_note: str = ""


def build(compared: Comparison, charts: Sequence[SectionCharts]) -> Document:
    """The whole report; `charts` in the order of the sections."""
    several = len(compared.sections) > 1
    chapters = _decision(compared)
    for number, (section, drawn) in enumerate(zip(compared.sections, charts, strict=True), 1):
        title = f"{number}. {section.title}" if several else section.title
        opening = [Paragraph(CPU_DEMO_NOTICE, is_notice=True)] if section.is_cpu_demo else []
        found = [
            Chapter(title, opening, level=2),
            scorecard.scorecard(section),
            _charts(drawn),
            scorecard.clients(section),
            service_text.chapter(section),
            scorecard.limits(section),
            interference_text.chapter(section.matrices, drawn.pairs),
            _timelines(drawn),
            scorecard.alone(section),
            evidence.environment(section),
            evidence.doubts(section),
            guide_tables.guide_ranges(section),
            evidence.proof(section),
        ]
        chapters += [chapter for chapter in found if chapter is not None]
    beside = (evidence.phases(compared.phases), evidence.refusals(compared.refusals))
    chapters += [chapter for chapter in beside if chapter is not None]
    if compared.problems:
        chapters.append(Chapter("Problems while reading", [Bullets.of(compared.problems)], level=2))
    chapters.append(Chapter("How to read the figures", [Bullets.of(HOW_TO_READ)], level=2))
    return Document("GPU sharing: what was found", chapters)


def claims_of(section: Section) -> list[Claim]:
    """The section's claims, or that there are none."""
    if section.claims:
        return section.claims
    ids = tuple(run.run_id for run in section.runs)
    return [Claim("No co-run here supports a statement about modes.", ids)]


def _decision(compared: Comparison) -> list[Chapter]:
    first = Chapter("Decision", level=2, is_decision=True)
    if len(compared.sections) == 1:
        first.blocks += _sentences(compared.sections[0])
        return [first]
    first.blocks.append(
        Paragraph(
            f"The runs come from {len(compared.sections)} unlike environments. They stand in "
            "separate sections and are not compared with each other. They differ in:"
        )
    )
    first.blocks.append(Bullets.of(compared.differences()))
    return [
        first,
        *(
            Chapter(f"{number}. {section.title}", _sentences(section), is_decision=True)
            for number, section in enumerate(compared.sections, start=1)
        ),
    ]


def _sentences(section: Section) -> list[Paragraph | Bullets]:
    notice = [Paragraph(CPU_DEMO_NOTICE, is_notice=True)] if section.is_cpu_demo else []
    said = (f"{claim.text} *({_runs_text(claim)})*" for claim in claims_of(section))
    return [*notice, Bullets.of(said)]


def _runs_text(claim: Claim) -> str:
    return f"run{'s' if len(claim.run_ids) > 1 else ''} {', '.join(map(code, claim.run_ids))}"


def _charts(drawn: SectionCharts) -> Chapter | None:
    return Chapter("Charts", [Gallery(drawn.compared)]) if drawn.compared else None


def _timelines(drawn: SectionCharts) -> Chapter | None:
    if not drawn.timelines:
        return None
    text = (
        "A bar is one job; white, cut by the end of the window; one long bar, jobs too many to be "
        f"told apart. Between the black lines everyone runs.{drawn.timelines_note}"
    )
    return Chapter("Timelines", [Paragraph(text), Gallery(drawn.timelines)])
