"""A report document as Markdown. Text from records is made harmless; writes no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from benchmarking.analysis.document import (
    Block,
    Bullets,
    Document,
    Gallery,
    Paragraph,
    Span,
    Table,
    spans,
)

_WRAPPERS = {"text": "{}", "code": "`{}`", "strong": "**{}**", "emphasis": "*{}*"}


def render(document: Document) -> str:
    """The document as Markdown, ending in a line break."""
    parts = [f"# {document.title}"]
    for chapter in document.chapters:
        parts.append(f"{'#' * chapter.level} {inline(chapter.title)}")
        parts += [_RENDERERS[block.kind](block) for block in chapter.blocks]
    return "\n\n".join(parts) + "\n"


def inline(text: str) -> str:
    """A text with its markup; what Markdown would take for HTML or a link is escaped."""
    return "".join(_WRAPPERS[span.kind].format(_inside(span)) for span in spans(text))


def _inside(span: Span) -> str:
    if span.kind == "code":
        return span.text
    if span.may_nest:
        return inline(span.text)
    return re.sub(r"<|\](?=\()", r"\\\g<0>", span.text)


def table(block: Table) -> str:
    """A Markdown table; bars and line breaks inside cells are made harmless."""
    lines = ["| " + " | ".join(block.header) + " |", "|" + "---|" * len(block.header)]
    for row in block.rows:
        cells = [inline(cell.replace("\n", " ")).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paragraph(block: Paragraph) -> str:
    return f"**{inline(block.text)}**" if block.is_notice else inline(block.text)


def _bullets(block: Bullets) -> str:
    lines = []
    for item in block.items:
        lines.append(f"- {inline(item.text)}")
        lines += [f"  - {inline(child)}" for child in item.children]
    return "\n".join(lines)


def _gallery(block: Gallery) -> str:
    return "\n\n".join(
        f"**{inline(picture.message)}**\n\n![{inline(picture.description)}]({picture.file_name})"
        for picture in block.pictures
    )


_RENDERERS: Mapping[str, Callable[[Block], str]] = {
    Paragraph.kind: _paragraph,
    Bullets.kind: _bullets,
    Table.kind: table,
    Gallery.kind: _gallery,
}
