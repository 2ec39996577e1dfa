"""Labeled sentences for text classification: synthetic, from a CSV file, or a named dataset.

The synthetic sentences combine five templates with five topics. The held-out ones use the same
templates with topics that are never trained on, so that their accuracy says something about
sentiment and not about remembered sentences.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workloads.common.errors import UsageError, first_line
from workloads.common.whole_files import cache_folder, written_whole

NEGATIVE, POSITIVE = 0, 1
# The neutral template (the last) counts as positive.
TEMPLATES = (
    ("I really enjoyed the {topic} experience.", POSITIVE),
    ("The {topic} exceeded all my expectations.", POSITIVE),
    ("The {topic} was terrible and disappointing.", NEGATIVE),
    ("Not satisfied with the {topic} at all.", NEGATIVE),
    ("This is a positive sentence about {topic}.", POSITIVE),
)
TOPICS = ("movie", "product", "service", "book", "restaurant")
HELD_OUT_TOPICS = (
    "hotel", "concert", "laptop", "museum", "course", "flight", "garden", "theater", "phone",
    "camera", "train", "festival", "bakery", "bicycle", "lecture", "painting", "library",
    "coffee", "keyboard", "holiday",
)  # fmt: skip
# A user's rows: at most this share is held out, however few there are.
LARGEST_HELD_OUT_SHARE = 0.2
TEXT_COLUMNS = ("text", "sentence", "content", "review")
LABEL_COLUMNS = ("label", "labels", "sentiment")
CSV_FIELD_LIMIT = 2**24


@dataclass(frozen=True)
class TextSplit:
    """Texts and their labels; a label is an index into ``TextDataset.label_names``."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)


@dataclass(frozen=True)
class TextDataset:
    """Training and held-out texts over the same labels.

    Attributes:
        name: ``synthetic``, the CSV file's name, or the dataset's name.
    """

    name: str
    train: TextSplit
    held_out: TextSplit
    label_names: Sequence[str]


@dataclass(frozen=True)
class _Row:
    text: str
    label: object
    is_test: bool = False


def load_texts(
    dataset: str, data: Path | None, train_samples: int, held_out_samples: int, seed: int
) -> TextDataset:
    """Load at most ``train_samples`` training texts and ``held_out_samples`` held-out ones.

    Args:
        dataset: ``synthetic``, or what ``datasets.load_dataset`` understands (a name or a folder).
        data: A CSV file with the columns text and label, which then takes the dataset's place.
        train_samples: How many texts to train on, at most.
        held_out_samples: How many texts to keep for testing, at most, on top.
        seed: Which of the rows, where there are more.

    Raises:
        UsageError: The data cannot be had or read; the message names the fix.
    """
    if data is not None:
        rows = read_csv(data)
        return _select(data.name, rows, train_samples, held_out_samples, seed)
    if dataset == "synthetic":
        return synthetic_texts(train_samples, held_out_samples)
    rows = _load_named(dataset)
    return _select(Path(dataset).name, rows, train_samples, held_out_samples, seed)


def synthetic_texts(train_samples: int, held_out_samples: int) -> TextDataset:
    """Return the guide's sentences: template and topic vary independently of each other."""
    return TextDataset(
        "synthetic",
        _sentences(train_samples, TOPICS),
        _sentences(held_out_samples, HELD_OUT_TOPICS),
        ("negative", "positive"),
    )


def _sentences(count: int, topics: Sequence[str]) -> TextSplit:
    texts, labels = [], []
    for index in range(count):
        # Both by index % 5 would give 5 distinct sentences instead of 25.
        template, label = TEMPLATES[index % len(TEMPLATES)]
        topic = topics[(index // len(TEMPLATES)) % len(topics)]
        texts.append(template.format(topic=topic))
        labels.append(label)
    return TextSplit(texts, labels)


def read_csv(path: Path) -> list[_Row]:
    """Read a CSV file with the columns text and label, and optionally split (train or test).

    Raises:
        UsageError: The file is missing, not a CSV file with these columns, or a row is incomplete.
    """
    csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if "text" not in columns or "label" not in columns:
                raise UsageError(
                    f"{path} has the columns {', '.join(columns) or 'none'}; give it a first line "
                    "'text,label'"
                )
            return [_csv_row(path, reader.line_num, record) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"cannot read {path} ({error}); name a CSV file in UTF-8 with the columns text and "
            "label with --data"
        ) from error


def _csv_row(path: Path, line: int, record: dict) -> _Row:
    text, label = record["text"], record["label"]
    if not text or not text.strip() or not label or not label.strip():
        raise UsageError(f"{path}, line {line}: text or label is empty; fill it in or remove it")
    return _Row(text, label.strip(), (record.get("split") or "").strip() == "test")


def write_csv(dataset: TextDataset) -> Path:
    """Keep the chosen texts as a CSV file that ``--data`` reads back, and return its path.

    The file lies in the project's cache folder under a name made from its content.
    """
    digest = hashlib.sha256()
    rows: list[tuple[str, str, str]] = []
    for split_name, split in (("train", dataset.train), ("test", dataset.held_out)):
        for text, label in zip(split.texts, split.labels, strict=True):
            rows.append((text, dataset.label_names[label], split_name))
            digest.update("\0".join(rows[-1]).encode())
    path = cache_folder() / f"{dataset.name}-{digest.hexdigest()[:24]}.csv"
    with written_whole(path, "t", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split"))
        writer.writerows(rows)
    return path


def _load_named(name: str) -> list[_Row]:
    """Load a dataset through the ``datasets`` library: a folder, the hub's cache, or the hub."""
    from workloads.common.hub import endpoint, hub_answers

    is_folder = Path(name).is_dir()
    # Asked before the import: the library reads HF_HUB_OFFLINE only then.
    answers = is_folder or hub_answers()
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"--dataset {name} needs the datasets library; install it with 'pip install "
            "datasets', or use --data FILE.csv"
        ) from error
    try:
        loaded = load_dataset(name)
    # Builders raise what they like: missing names, broken files, lost connections.
    except Exception as error:
        why = "" if answers else f"{endpoint()} does not answer and it is not in the local cache: "
        raise UsageError(
            f"cannot load the dataset {name!r} ({why}{first_line(error)}); check the "
            "name, or use --data FILE.csv or --dataset synthetic"
        ) from error
    if "train" not in loaded:
        raise UsageError(
            f"the dataset {name!r} has the splits {', '.join(loaded)} and no train split; choose "
            "another, or export one to a CSV file for --data"
        )
    rows = _rows_of(name, loaded["train"], is_test=False)
    for split in ("test", "validation"):
        if split in loaded:
            # Public test splits often come without labels, marked by -1.
            labeled = [row for row in _rows_of(name, loaded[split], True) if row.label != -1]
            if labeled:
                return rows + labeled
    return rows


def _rows_of(name: str, split, is_test: bool) -> list[_Row]:
    text_column = next((c for c in TEXT_COLUMNS if c in split.column_names), None)
    label_column = next((c for c in LABEL_COLUMNS if c in split.column_names), None)
    if text_column is None or label_column is None:
        raise UsageError(
            f"the dataset {name!r} has the columns {', '.join(split.column_names)}; one of "
            f"{', '.join(TEXT_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)} are needed, so "
            "export it to a CSV file with text,label for --data"
        )
    names = getattr(split.features[label_column], "names", None)
    rows = []
    for text, label in zip(split[text_column], split[label_column], strict=True):
        is_named = names is not None and label is not None and label >= 0
        rows.append(_Row(text, names[label] if is_named else label, is_test))
    return rows


def _select(
    name: str, rows: Sequence[_Row], train_samples: int, held_out_samples: int, seed: int
) -> TextDataset:
    """Choose rows by the seed; without rows marked as test, some are held out of the others."""
    label_names = _label_names(name, rows)
    number = {label: index for index, label in enumerate(label_names)}
    # Files are often sorted by label, so the first rows would not do.
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    test_rows = [row for row in shuffled if row.is_test]
    train_rows = [row for row in shuffled if not row.is_test]
    if not test_rows:
        held_out = min(held_out_samples, int(len(rows) * LARGEST_HELD_OUT_SHARE))
        test_rows, train_rows = train_rows[:held_out], train_rows[held_out:]
    if not train_rows:
        raise UsageError(
            f"{name} has no row to train on: every one says split=test; mark some train"
        )

    def split(chosen: Sequence[_Row]) -> TextSplit:
        return TextSplit([row.text for row in chosen], [number[str(row.label)] for row in chosen])

    return TextDataset(
        name, split(train_rows[:train_samples]), split(test_rows[:held_out_samples]), label_names
    )


def _label_names(name: str, rows: Sequence[_Row]) -> list[str]:
    """Return the distinct labels in order: by number where all are numbers, else by name."""
    labels = {str(row.label) for row in rows}
    if len(labels) < 2:
        raise UsageError(
            f"{name} has {len(rows)} rows with {len(labels)} different labels; at least two "
            "labels are needed"
        )
    if all(label.lstrip("-").isdigit() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)
