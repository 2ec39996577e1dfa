"""A report document as one self-contained HTML file: no script, no network, charts as SVG inside.

The template escapes every text; only the charts' SVG, which matplotlib wrote, goes in as it is.
jinja2 is imported by the function that renders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarking.analysis.document import Document, spans

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
_TAGS = {"code": "code", "strong": "strong", "emphasis": "em"}


def render(document: Document) -> str:
    """The document as HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline
    environment.filters["drawing"] = Markup
    return environment.get_template("report.html").render(document=document)


def inline(text: str) -> Markup:
    """A text with its markup as HTML, everything else escaped."""
    from markupsafe import Markup, escape

    parts = []
    for span in spans(text):
        tag = _TAGS.get(span.kind)
        inner = inline(span.text) if span.may_nest else escape(span.text)
        parts.append(Markup("<{0}>{1}</{0}>").format(Markup(tag), inner) if tag else inner)
    return Markup("").join(parts)
