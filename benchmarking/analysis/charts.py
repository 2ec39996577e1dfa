"""What the report's charts share: narrow enough for a phone, readable in grey, PNG and SVG alike.

Modes differ by hatch, marker and line style as well as by color. matplotlib is imported by the
functions that draw, with the Agg backend: no display is needed and `--help` stays fast.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarking.analysis.document import Picture
from benchmarking.metrics.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6  # inches: on a phone's 360 pixels its 9 point text is still legible
_DPI = 120
_PNG_COLORS = 64  # a third of the file's size, and no difference to the eye

# Luminance differs too, by a tenth of the scale and more, so that a grey print tells them apart.
_STYLES: Mapping[str, Mapping[str, str]] = {
    "time-slicing": {"color": "#23527c", "hatch": "", "marker": "o", "linestyle": "-"},
    "mps": {"color": "#e08e45", "hatch": "//", "marker": "s", "linestyle": "--"},
    "mig": {"color": "#a9cf8d", "hatch": "xx", "marker": "^", "linestyle": ":"},
    "exclusive": {"color": "#dddddd", "hatch": "--", "marker": "v", "linestyle": "-."},
    "cpu-demo": {"color": "#676767", "hatch": "..", "marker": "D", "linestyle": "-."},
}
_OTHER_STYLE = {"color": "#a46f95", "hatch": "\\\\", "marker": "P", "linestyle": "-."}

# One mode under several settings keeps its color.
_SETTINGS: Sequence[Mapping[str, str]] = (
    {},
    {"hatch": "..", "marker": "D", "linestyle": "-."},
    {"hatch": "oo", "marker": "v", "linestyle": ":"},
    {"hatch": "++", "marker": "P", "linestyle": "-"},
)

# Ids are unique in a document, and one document holds many charts.
_SVG_IDS = re.compile(r'(\bid="|url\(#|href="#)')


def style(mode: str) -> Mapping[str, str]:
    """Color, hatch, marker and line style of a mode."""
    return _STYLES.get(mode, _OTHER_STYLE)


def styles(modes: Iterable[tuple[str, str]]) -> dict[str, Mapping[str, str]]:
    """Styles by name of pairs of mode and name; names of one mode differ by all but the color."""
    found: dict[str, Mapping[str, str]] = {}
    before: Counter[str] = Counter()
    for mode, name in dict.fromkeys(modes):
        found[name] = {**style(mode), **_SETTINGS[before[mode] % len(_SETTINGS)]}
        before[mode] += 1
    return found


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

    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, **layout)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path, message: str, description: str) -> Picture:
    """Write the PNG and return the chart with its SVG; the message stands over it in the report."""
    from PIL import Image

    pixels, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(pixels, format="png")
    with Image.open(pixels) as picture:
        picture.convert("RGB").quantize(_PNG_COLORS, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(message, description, path.name, _inlined(drawing.getvalue(), path.stem))


def _inlined(svg: str, name: str) -> str:
    """An SVG file's root element, with ids of its own, scaled by its place."""
    root = svg[svg.index("<svg") :]
    root = re.sub(r"<metadata>.*?</metadata>", "", root, flags=re.DOTALL)
    root = re.sub(r' (?:width|height)="[\d.]+pt"', "", root, count=2)
    root = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 'DejaVu Sans', sans-serif", root)
    prefix = re.sub(r"\W", "-", name)
    return _SVG_IDS.sub(lambda match: f"{match.group(1)}{prefix}-", root)


def error_bar(found: Estimate) -> list[list[float]] | None:
    """Distances below and above the mean, as matplotlib wants them; `None` for a single repeat."""
    if found.repeats < 2:
        return None
    return [[found.mean - found.low], [found.high - found.mean]]


def spread_note(found: Sequence[Estimate]) -> str:
    """What the whiskers are."""
    repeats = sorted({estimate.repeats for estimate in found})
    counts = "/".join(str(count) for count in repeats)
    if repeats[-1] < 2:
        return "no whiskers: one co-run each"
    if repeats[0] >= 3:
        return f"whiskers: 95 % interval of n = {counts} repeats"
    return f"whiskers: range (n = 2) or 95 % interval (n >= 3); n = {counts}"
