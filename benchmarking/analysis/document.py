"""What a report is made of: chapters of blocks, written once and rendered as Markdown and HTML.

Texts may hold `code`, **strong** and *emphasis*, as Markdown writes them, and no other markup:
everything else in them is plain text, whatever characters it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

UNKNOWN = "–"

_INLINE = re.compile(
    r"`([^`]+)`"
    r"|\*\*(\S(?:.*?\S)?)\*\*"
    r"|(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"
)
_KINDS = ("code", "strong", "emphasis")
_NUMBER = re.compile(r"[-+\d.,\s\[\]/%–]*|–")


@dataclass(frozen=True)
class Span:
    """A piece of text of one kind: `text`, `code`, `strong` or `emphasis`."""

    kind: str
    text: str

    @property
    def may_nest(self) -> bool:
        """Whether the text inside may hold markup itself."""
        return self.kind in ("strong", "emphasis")


def spans(text: str) -> list[Span]:
    """Split a text at its markup."""
    found: list[Span] = []
    position = 0
    for match in _INLINE.finditer(text):
        if match.start() > position:
            found.append(Span("text", text[position : match.start()]))
        kind = _KINDS[match.lastindex - 1]
        found.append(Span(kind, match.group(match.lastindex)))
        position = match.end()
    if position < len(text):
        found.append(Span("text", text[position:]))
    return found


def plain(text: str) -> str:
    """The text without its markup, for a terminal."""
    return "".join(plain(span.text) if span.may_nest else span.text for span in spans(text))


def code(text: str) -> str:
    """A text from a record as code, whatever it holds."""
    return f"`{text.replace('`', chr(0x2019))}`" if text else UNKNOWN


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a notice is one that must not be overlooked."""

    text: str
    is_notice: bool = False
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Item:
    """An entry of a list, with entries below it."""

    text: str
    children: Sequence[str] = ()


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Item]
    kind: ClassVar[str] = "bullets"

    @classmethod
    def of(cls, texts: Iterable[str]) -> Bullets:
        """A list without a second level."""
        return cls([Item(text) for text in texts])


@dataclass(frozen=True)
class Table:
    """A table; the first `keys` columns say what a row is about."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    kind: ClassVar[str] = "table"

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds nothing but numbers, so that it is aligned to the right."""
        return all(_NUMBER.fullmatch(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A chart: its message, what it shows for who cannot see it, its PNG's name and its SVG."""

    message: str
    description: str
    file_name: str
    svg: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Gallery:
    """Charts that stand beside each other where there is room."""

    pictures: Sequence[Picture]
    kind: ClassVar[str] = "gallery"


Block = Paragraph | Bullets | Table | Gallery


@dataclass
class Chapter:
    """Blocks under a title; `level` 2 or 3. `is_folded` chapters open on demand where they can."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 3
    is_folded: bool = False
    is_decision: bool = False


@dataclass
class Document:
    """The whole report."""

    title: str
    chapters: list[Chapter]
