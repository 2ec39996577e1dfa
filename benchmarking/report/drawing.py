"""What all charts share: the looks of modes, a figure of the page's width, PNG and inline SVG.

Narrow enough for a phone, readable in grey: modes differ by hatch, marker and line style as well as
by color. matplotlib is imported by the functions that draw, with the Agg backend: no display is
needed, whatever is inherited.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

WIDTH = (
    4.6  # inches: on a phone's 360 pixels its 9 point text is as large as the page's small print
)
DPI = 160
MOST_INCHES = 80  # of height, far within what can be drawn: records name the number of rows
LABEL_CHARACTERS, LEGEND_CHARACTERS = 16, 32

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
    {"hatch": "||", "marker": "X", "linestyle": "-."},
    {"hatch": "**", "marker": "p", "linestyle": ":"},
)
# Ids are unique in a document, and one document holds many charts.
SVG_IDS = re.compile(r'(\bid="|url\(#|href="#)')


@dataclass(frozen=True)
class Picture:
    """A chart: what it shows, the same for who cannot see it, PNG with its name, SVG, its mix."""

    caption: str
    description: str
    file_name: str
    png: bytes
    svg: str
    mix: str = ""


def styles(modes: Iterable[tuple[str, str]]) -> dict[str, Mapping[str, str]]:
    """Styles by name of pairs of mode and name; names of one mode differ by all but the color."""
    found: dict[str, Mapping[str, str]] = {}
    before: Counter[str] = Counter()
    for mode, name in dict.fromkeys(modes):
        found[name] = {**STYLES.get(mode, OTHER_STYLE), **SETTINGS[before[mode] % len(SETTINGS)]}
        before[mode] += 1
    return found


def draw_legend(figure: Figure, looks: Mapping[str, Mapping[str, str]]) -> None:
    """Name the modes over the panel."""
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=look["color"], hatch=look["hatch"], edgecolor="black", label=shortened(name)
        )
        for name, look in looks.items()
    ]
    place_legend(figure, handles, 3)


def place_legend(figure: Figure, handles: Sequence[Any], most_columns: int) -> None:
    """Put a legend over the panels, in as many columns as fit."""
    for columns in range(most_columns, 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def known(found: Record, part: str) -> float:
    """A part of an estimate, 0 where it is unknown or infinite and cannot be drawn."""
    value = found[part]
    return value if value is not None and math.isfinite(value) else 0.0


def error_bar(found: Record) -> list[list[float]] | None:
    """Distances below and above the mean, as matplotlib wants them; `None` for a single round."""
    mean, low, high = (known(found, part) for part in ("mean", "low", "high"))
    is_drawn = len(found["values"]) > 1 and low <= mean <= high
    return [[mean - low], [high - mean]] if is_drawn else None


def spread_note(found: Sequence[Record]) -> str:
    """What the whiskers are."""
    rounds = sorted({len(one["values"]) for one in found})
    counts = "/".join(str(count) for count in rounds)
    if rounds[-1] < 2:
        return "no whiskers: one round"
    if all(one["is_interval"] for one in found):
        return f"whiskers: 95 % interval, {counts} rounds"
    return f"whiskers: range, from 3 rounds on 95 % interval; {counts} rounds"


def shortened(name: str) -> str:
    """A name as it fits a legend."""
    return name if len(name) <= LEGEND_CHARACTERS else f"{name[:LEGEND_CHARACTERS]}…"


def wrapped(label: str, beside: int = 3) -> str:
    """A label over as many lines as it needs, three at most; narrower, the more stand `beside`."""
    return textwrap.fill(label, max(6, min(LABEL_CHARACTERS, 50 // beside)), max_lines=3)


@functools.cache
def _import_matplotlib() -> ModuleType:
    """Import it with its own settings: those of a folder may be damaged, or a pipe."""
    # A backend that is inherited may not exist.
    os.environ.update(MPLBACKEND="Agg", MATPLOTLIBRC=os.devnull)
    here = os.open(".", os.O_PATH)
    try:
        os.chdir("/")  # the working folder's settings would come before those of the variable
        return importlib.import_module("matplotlib")
    finally:
        os.fchdir(here)
        os.close(here)


@contextlib.contextmanager
def drawing_rules() -> Iterator[None]:
    """Settings under which charts are drawn and saved: text stays text, and `$` is no formula."""
    rules = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same records give the same file
        "font.size": 9,
        "text.parse_math": False,
        "hatch.linewidth": 0.6,
    }
    with _import_matplotlib().rc_context(rules), warnings.catch_warnings():
        # In the page the reader's fonts have it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(heights: Sequence[float], rest: float) -> tuple[Figure, Sequence[Axes]]:
    """Panels of these heights below each other on the Agg canvas, over one x axis.

    `rest` is what titles and axes take; all in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(rest + sum(heights), MOST_INCHES)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
    axes: list[Axes] = list(grid[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, file_name: str, caption: str, description: str, mix: str = "") -> Picture:
    """The finished chart as PNG and SVG."""
    pixels, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(pixels, format="png")
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    svg = inlined(drawing.getvalue(), file_name.removesuffix(".png"))
    return Picture(caption, description, file_name, pixels.getvalue(), svg, mix)


def inlined(svg: str, name: str) -> str:
    """An SVG file's root element, with ids of its own, scaled by its place."""
    root = svg[svg.index("<svg") :]
    root = re.sub(r"<metadata>.*?</metadata>", "", root, flags=re.DOTALL)
    root = re.sub(r' (?:width|height)="[\d.]+pt"', "", root, count=2)
    root = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 'DejaVu Sans', sans-serif", root)
    prefix = re.sub(r"\W", "-", name)
    return SVG_IDS.sub(lambda match: f"{match.group(1)}{prefix}-", root)


# --- lines over one x axis, for ramps and for sweeps ----------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of one panel: its estimates (or `None`) at the places of the x axis."""

    name: str
    places: Sequence[float]
    found: Sequence[Record | None]
    look: Mapping[str, str]


def draw_lines(
    panels: Mapping[str, Sequence[Line]], ticks: Sequence[float], labels: Sequence[str],
    axis: str, file_name: str, caption: str, *, mix: str = "",
    marks: Iterable[tuple[float, str]] = (), notes: Iterable[tuple[float, str]] = (),
) -> Picture | None:  # fmt: skip
    """Panels of lines below each other over one x axis, with a grey line at 1 in each.

    `panels` holds lines by what the panel shows, `ticks` and `labels` what stands on the x axis.
    In the first panel `marks` are places of vertical lines and what they are, `notes` places
    without a figure and why. `None` where there is nothing to draw.
    """
    found = [one for lines in panels.values() for line in lines for one in line.found if one]
    if not any(known(one, "mean") for one in found):
        return None
    with drawing_rules():
        figure, axes = new_figure([1.6] * len(panels), 0.9)
        for panel, (title, lines) in zip(axes, panels.items(), strict=True):
            draw_panel(panel, title, lines)
        width, last = ticks[-1] - ticks[0], -math.inf
        shown = []  # a label too near to the one before it would lie on that
        for place, label in zip(ticks, labels, strict=True):
            is_apart = place - last >= 0.02 * width * (1 + len(label))
            shown.append(label if is_apart else "")
            last = place if is_apart else last
        for row, (place, text) in enumerate(marks):
            axes[0].axvline(place, color="0.3", linestyle=":", linewidth=1.5)
            axes[0].annotate(
                text, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, 3 + 11 * row),
                textcoords="offset points", va="bottom", fontsize=8,
                ha="right" if place - ticks[0] > width / 2 else "left",
            )  # fmt: skip
        for place, text in notes:
            axes[0].annotate(
                text, (place, 0.05), xycoords=("data", "axes fraction"), ha="center",
                style="italic", fontsize=8,
            )  # fmt: skip
        margin = 0.06 * width or 0.5
        axes[-1].set_xlim(ticks[0] - margin, ticks[-1] + margin)
        axes[-1].set_xticks(ticks, shown)
        axes[-1].set_xlabel(axis)
        handles = [handle for panel in axes for handle in panel.get_legend_handles_labels()[0]]
        named = {str(handle.get_label()): handle for handle in handles}
        if named:
            place_legend(figure, list(named.values()), 2)
        figure.supxlabel(f"grey: 1, as alone; {spread_note(found)}", fontsize=8)
        description = f"Lines of {', '.join(panels)} against {axis}.".replace("\n", " ")
        return save(figure, file_name, caption, description, mix)


def draw_panel(panel: Axes, title: str, lines: Sequence[Line]) -> None:
    """Draw the lines of one panel, with a gap where a place has no figure."""
    for line in lines:
        means, lows, highs = (
            [known(one, part) if one else math.nan for one in line.found]
            for part in ("mean", "low", "high")
        )
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        panel.errorbar(
            line.places, means, yerr=[below, above], capsize=3,
            label=shortened(line.name),
            markeredgecolor="black", color=line.look["color"], marker=line.look["marker"],
            linestyle=line.look["linestyle"],
        )  # fmt: skip
    highs = [known(one, "high") for line in lines for one in line.found if one]
    panel.axhline(1, color="0.5", linewidth=1)
    panel.set_ylim(0, 1.1 * max([1.0, *highs]))
    panel.set_ylabel(title)
    panel.grid(color="0.85")
