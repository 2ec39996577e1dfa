"""What all charts share: the looks of modes, a figure of the page's width, PNG file and inline SVG.

Narrow enough for a phone, readable in grey: modes differ by hatch, marker and line style as well as
by color. matplotlib is imported by the functions that draw, with the Agg backend: no display is
needed, whatever is inherited.
"""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.records.writing import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

WIDTH = (
    4.6  # inches: on a phone's 360 pixels its 9 point text is as large as the page's small print
)
DPI = 160
LABEL_CHARACTERS = 16

# Luminance differs too, by a tenth of the scale and more, so that a grey print tells them apart.
STYLES: Mapping[str, Mapping[str, str]] = {
    "time-slicing": {"color": "#23527c", "hatch": "", "marker": "o", "linestyle": "-"},
    "mps": {"color": "#e08e45", "hatch": "//", "marker": "s", "linestyle": "--"},
    "mig": {"color": "#a9cf8d", "hatch": "xx", "marker": "^", "linestyle": ":"},
    "exclusive": {"color": "#dddddd", "hatch": "--", "marker": "v", "linestyle": "-."},
    "cpu-demo": {"color": "#676767", "hatch": "..", "marker": "D", "linestyle": "-."},
}
OTHER_STYLE = {"color": "#a46f95", "hatch": "\\\\", "marker": "P", "linestyle": "-."}
# One mode under several settings keeps its color.
SETTINGS: Sequence[Mapping[str, str]] = (
    {},
    {"hatch": "..", "marker": "D", "linestyle": "-."},
    {"hatch": "oo", "marker": "v", "linestyle": ":"},
    {"hatch": "++", "marker": "P", "linestyle": "-"},
)
# Ids are unique in a document, and one document holds many charts.
SVG_IDS = re.compile(r'(\bid="|url\(#|href="#)')


@dataclass(frozen=True)
class Picture:
    """A chart: what it shows, the same for who cannot see it, its PNG's name and its SVG."""

    caption: str
    description: str
    file_name: str
    svg: str


def styles(modes: Iterable[tuple[str, str]]) -> dict[str, Mapping[str, str]]:
    """Styles by name of pairs of mode and name; names of one mode differ by all but the color."""
    found: dict[str, Mapping[str, str]] = {}
    before: Counter[str] = Counter()
    for mode, name in dict.fromkeys(modes):
        found[name] = {**STYLES.get(mode, OTHER_STYLE), **SETTINGS[before[mode] % len(SETTINGS)]}
        before[mode] += 1
    return found


def known(found: Record, part: str) -> float:
    """A part of an estimate, 0 where it is unknown or infinite and cannot be drawn."""
    value = found[part]
    return value if value is not None and math.isfinite(value) else 0.0


def error_bar(found: Record) -> list[list[float]] | None:
    """Distances below and above the mean, as matplotlib wants them; `None` for a single round."""
    mean, low, high = (known(found, part) for part in ("mean", "low", "high"))
    return (
        [[mean - low], [high - mean]] if len(found["values"]) > 1 and low <= mean <= high else None
    )


def spread_note(found: Sequence[Record]) -> str:
    """What the whiskers are."""
    rounds = sorted({len(one["values"]) for one in found})
    counts = "/".join(str(count) for count in rounds)
    if rounds[-1] < 2:
        return "no whiskers: one round"
    if all(one["is_interval"] for one in found):
        return f"whiskers: 95 % interval, {counts} rounds"
    return f"whiskers: range, from 3 rounds on 95 % interval; {counts} rounds"


def wrapped(label: str) -> str:
    """A label over as many lines as it needs, three at most."""
    return textwrap.fill(label, LABEL_CHARACTERS, max_lines=3)


def drawing_rules() -> AbstractContextManager[None]:
    """Settings under which charts are drawn and saved: text stays text, and `$` is no formula."""
    os.environ["MPLBACKEND"] = "Agg"  # a backend that is inherited may not exist
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "report",  # the same records give the same file
            "font.size": 9,
            "text.parse_math": False,
            "hatch.linewidth": 0.6,
        }
    )


def new_figure(height: float, panels: int = 1, **layout: object) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `panels` below each other, `height` inches in all, on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, **layout)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path, caption: str, description: str) -> Picture:
    """Write the PNG, whole or not at all and over no link, and return the chart with its SVG."""
    pixels, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(pixels, format="png")
    write_bytes_atomic(path, pixels.getvalue())
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(caption, description, path.name, inlined(drawing.getvalue(), path.stem))


def inlined(svg: str, name: str) -> str:
    """An SVG file's root element, with ids of its own, scaled by its place."""
    root = svg[svg.index("<svg") :]
    root = re.sub(r"<metadata>.*?</metadata>", "", root, flags=re.DOTALL)
    root = re.sub(r' (?:width|height)="[\d.]+pt"', "", root, count=2)
    root = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 'DejaVu Sans', sans-serif", root)
    prefix = re.sub(r"\W", "-", name)
    return SVG_IDS.sub(lambda match: f"{match.group(1)}{prefix}-", root)
