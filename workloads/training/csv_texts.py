"""Texts of a CSV file of one's own: each row is used as it stands, or refused by its line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from workloads.common.errors import UsageError

TEST_WORDS = frozenset(
    ("test", "testing", "val", "valid", "validation", "dev", "development", "eval", "evaluation",
     "heldout", "holdout")
)  # fmt: skip
SPLIT_WORDS = TEST_WORDS | {"train", "training"}


class Row(NamedTuple):
    """A text with its label, and where it comes from: ``line 3`` of a file, or a row of a split."""

    text: str
    label: str
    is_test: bool
    where: str


def read_csv(path: Path) -> tuple[list[Row], list[str]]:
    """Read a CSV file with the columns text and label, and optionally split; return rows, notes.

    Raises:
        UsageError: The file is missing, not a CSV file with these columns, or a line is not as it
            should be.
    """
    where = str(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            line = content.count(b"\n", 0, error.start) + 1
            where += f", line {line}"
        raise UsageError(
            f"cannot read {where} ({error}); name a CSV file in UTF-8 with the columns text and "
            "label with --data"
        ) from error
    lines = list(io.StringIO(text, newline=""))
    delimiter, columns = _columns(path, lines)
    rows = []
    unused: dict[str, bool] = {}  # whether all values of another column are those of a split
    for line, fields in list(_records(path, lines, delimiter))[1:]:
        if not any(value.strip() for value in fields):
            continue
        where = f"{path}, line {line}"
        if len(fields) != len(columns):
            raise UsageError(
                f"{where}: {len(fields)} fields where the first line has {len(columns)}; put a "
                "text that holds a comma between double quotes"
            )
        record = dict(zip(columns, fields, strict=True))
        said, label, split = (record.pop(name, "train") for name in ("text", "label", "split"))
        if not said.strip() or not label.strip():
            raise UsageError(f"{where}: text or label is empty; fill it in or remove it")
        word = _split_word(split)
        if word not in SPLIT_WORDS:
            raise UsageError(
                f"{where}: split is {split!r}; write train or test (validation and the like count "
                "as test)"
            )
        rows.append(Row(said, label.strip(), word in TEST_WORDS, f"line {line}"))
        for name, value in record.items():
            unused[name] = unused.get(name, True) and _split_word(value) in SPLIT_WORDS
    for name, is_split in unused.items():
        if is_split and "split" not in columns:
            raise UsageError(
                f"{path}: the column {name!r} marks train and test; name it split, or remove it"
            )
    notes = [f"columns of {path.name} that are not used: {', '.join(unused)}"] if unused else []
    return rows, notes


def _split_word(value: str) -> str:
    return re.sub("[-_ ]", "", value.strip().lower())


def _columns(path: Path, lines: Sequence[str]) -> tuple[str, list[str]]:
    """Return the delimiter (comma, semicolon or tab) and the names of the columns."""
    columns: list[str] = []
    misread: UsageError | None = None
    for delimiter in (",", ";", "\t"):
        try:
            _, fields = next(_records(path, lines, delimiter), (1, []))
        except UsageError as error:  # quotes around names that another delimiter parts
            misread = error
            continue
        names = [name.strip().lower() for name in fields]
        if names.count("text") == names.count("label") == 1 and names.count("split") <= 1:
            return delimiter, names
        columns = max(columns, names, key=len)
    raise misread or UsageError(
        f"{path} has the columns {', '.join(columns).strip() or 'none'}; give it a first line "
        "'text,label', each column once"
    )


def _records(path: Path, lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record (RFC 4180) with the number of its first line.

    The csv module takes a double quote in the middle of a field as it comes, so that a forgotten
    one joins or shifts rows in silence: a field that holds one must stand in the text as it is
    written between quotes.

    Raises:
        UsageError: A double quote stands where none may.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    first = 1
    try:
        for fields in reader:
            for field in filter(lambda field: '"' in field, fields):
                record = "".join(lines[first - 1 : reader.line_num])
                if field.replace('"', '""').join('""') not in record:
                    raise csv.Error
            yield first, fields
            first = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{path}, line {first}: a double quote stands alone; put the field between double "
            'quotes and write "" for one inside'
        ) from error
