"""Labeled sentences for text classification, and how they reach the device batch by batch.

The synthetic sentences combine five templates with five topics. The held-out ones use the same
templates with topics that are never trained on, so that their accuracy says something about
sentiment and not about remembered sentences. Whatever a file of one's own holds is used or refused
by its line: an accuracy over rows misread would be worse than none.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common import torch
from workloads.common.device import ComputeDevice
from workloads.common.engine import Batches
from workloads.common.errors import UsageError, first_line
from workloads.common.files import cache_folder, written_whole
from workloads.common.hub import hub_answers, hub_endpoint, require_hub_cache
from workloads.training.csv_texts import Row, read_csv

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BertTokenizerFast

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
HELD_OUT_SAMPLES = 100
# A user's rows: at most this share is held out, however few there are.
LARGEST_HELD_OUT_SHARE = 0.2
TEXT_COLUMNS = ("text", "sentence", "content", "review")
LABEL_COLUMNS = ("label", "labels", "sentiment")
# Older ones run a script that lies in a dataset's folder.
OLDEST_DATASETS_LIBRARY = 4


@dataclass(frozen=True)
class TextSplit:
    """Texts and their labels; a label is an index into ``TextDataset.label_names``."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextDataset:
    """Two splits over the same labels; ``notes`` are what a reader of the summary must know."""

    name: str
    train: TextSplit
    held_out: TextSplit
    label_names: Sequence[str]
    notes: Sequence[str] = ()


def load_texts(
    dataset: str, data: Path | None, train_samples: int, held_out_samples: int | None, seed: int
) -> TextDataset:
    """Load at most ``train_samples`` texts and on top at most ``held_out_samples`` to test on.

    Without rows marked as test, some are held out of the others.

    Args:
        dataset: ``synthetic``, or what ``datasets.load_dataset`` understands (a name or a folder).
        data: A CSV file with the columns text and label, which then takes the dataset's place.
        train_samples: The seed says which, where there are more.
        held_out_samples: None: 100, and no more than are trained on.
        seed: Of the choice.

    Raises:
        UsageError: The data is not available or cannot be read; the message names the fix.
    """
    if data is None and dataset == "synthetic":
        if held_out_samples is None:
            held_out_samples = min(HELD_OUT_SAMPLES, train_samples)
        return synthetic_texts(train_samples, held_out_samples)
    rows, notes = read_csv(data) if data is not None else _load_named(dataset)
    name = (data or Path(dataset)).name
    label_names = _label_names(name, rows)
    # Files are often sorted by label, so the first rows would not do.
    shuffled = random.Random(seed).sample(rows, len(rows))
    test_rows = [row for row in shuffled if row.is_test]
    train_rows = [row for row in shuffled if not row.is_test]
    most = HELD_OUT_SAMPLES if held_out_samples is None else held_out_samples
    if not test_rows:
        held_out = min(most, int(len(rows) * LARGEST_HELD_OUT_SHARE))
        test_rows, train_rows = train_rows[:held_out], train_rows[held_out:]
    if not train_rows:
        raise UsageError(
            f"{name} has no row to train on: every one says split=test; mark some train"
        )
    train_rows = train_rows[:train_samples]
    test_rows = test_rows[: most if held_out_samples is not None else min(most, len(train_rows))]
    trained = {row.label for row in train_rows}
    untrained = {row.label for row in test_rows} - trained
    if untrained:
        raise UsageError(
            f"{name}: the label {min(untrained)!r} is tested and never trained on; mark some of "
            "its rows train, or raise --num-samples"
        )
    # Of the chosen rows alone, which are all that a client of `write_csv` sees.
    label_names = [label for label in label_names if label in trained]
    if len(label_names) < 2:
        raise UsageError(
            f"{name}: all texts to train on have the label {label_names[0]!r}; raise --num-samples"
        )
    number = {label: index for index, label in enumerate(label_names)}

    def split(chosen: Sequence[Row]) -> TextSplit:
        return TextSplit([row.text for row in chosen], [number[row.label] for row in chosen])

    return TextDataset(name, split(train_rows), split(test_rows), label_names, notes)


def _label_names(name: str, rows: Sequence[Row]) -> list[str]:
    """Return the distinct labels in order: by number where all are numbers, else by name."""
    first: dict[int | str, Row] = {}
    for row in rows:
        number = _number(row.label)
        # Not what the eye takes for one: accents as letters of their own, blanks, invisible ones.
        letters = unicodedata.normalize("NFC", row.label.casefold())
        words = re.sub("[\u200b-\u200f\u2060\ufeff]", "", letters).split()
        meaning = " ".join(words) if number is None else number
        other = first.setdefault(meaning, row)
        if other.label != row.label:
            raise UsageError(
                f"{name}: the labels {other.label!r} ({other.where}) and {row.label!r} "
                f"({row.where}) look like one; write them alike"
            )
    if len(first) < 2:
        raise UsageError(
            f"{name} has {len(rows)} rows with {len(first)} different labels; at least two "
            "labels are needed"
        )
    are_numbers = all(isinstance(meaning, int) for meaning in first)
    return sorted((row.label for row in first.values()), key=float if are_numbers else None)


def _number(label: str) -> int | None:
    # isdigit would take digits that int refuses, such as a superscript or a circled one; 1.0 is
    # what becomes of a 1 in a column with gaps.
    found = re.fullmatch(r"([+-]?[0-9]{1,18})(\.0*)?", label)
    return int(found[1]) if found else None


def synthetic_texts(train_samples: int, held_out_samples: int) -> TextDataset:
    """Return the guide's sentences: template and topic vary independently of each other."""

    def sentences(count: int, topics: Sequence[str]) -> TextSplit:
        texts, labels = [], []
        for index in range(count):
            # Both by index % 5 would give 5 distinct sentences instead of 25.
            template, label = TEMPLATES[index % len(TEMPLATES)]
            texts.append(template.format(topic=topics[index // len(TEMPLATES) % len(topics)]))
            labels.append(label)
        return TextSplit(texts, labels)

    train, held_out = sentences(train_samples, TOPICS), sentences(held_out_samples, HELD_OUT_TOPICS)
    return TextDataset("synthetic", train, held_out, ("negative", "positive"))


def write_csv(dataset: TextDataset) -> Path:
    """Keep the chosen texts as a CSV file that ``--data`` reads back, and return its path.

    The file lies in the project's cache folder under a name made from its content.
    """
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(("text", "label", "split"))
    for split_name, split in (("train", dataset.train), ("test", dataset.held_out)):
        for text, label in zip(split.texts, split.labels, strict=True):
            writer.writerow((text, dataset.label_names[label], split_name))
    encoded = content.getvalue().encode()
    path = cache_folder() / f"{dataset.name}-{hashlib.sha256(encoded).hexdigest()[:24]}.csv"
    with written_whole(path) as file:
        file.write(encoded)
    return path


# --- datasets of the hub --------------------------------------------------------------------------


def _load_named(name: str) -> tuple[list[Row], list[str]]:
    """Load a dataset through the ``datasets`` library: a folder, the hub's cache, or the hub."""
    require_hub_cache()
    # Asked before the import: the library reads HF_HUB_OFFLINE only then.
    answers = Path(name).is_dir() or hub_answers()
    wanted = f"'pip install \"datasets>={OLDEST_DATASETS_LIBRARY}\"', or use --data FILE.csv"
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"--dataset {name} needs the datasets library; install it with {wanted}"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < OLDEST_DATASETS_LIBRARY:
        raise UsageError(
            f"datasets {datasets.__version__} would run a script of the dataset's; update it with "
            f"{wanted}"
        )
    try:
        loaded = datasets.load_dataset(name)
    # Builders raise what they like: missing names, broken files, lost connections.
    except Exception as error:
        why = first_line(error)
        if not answers:
            why = f"{hub_endpoint()} does not answer and it is not in the local cache: {why}"
        raise UsageError(
            f"cannot load the dataset {name!r} ({why}); check the "
            "name, or use --data FILE.csv or --dataset synthetic"
        ) from error
    if "train" not in loaded:
        raise UsageError(
            f"the dataset {name!r} has the splits {', '.join(loaded)} and no train split; choose "
            "another, or export one to a CSV file for --data"
        )
    rows, used = _split_rows(name, "train", loaded["train"]), ["train"]
    for split in ("test", "validation"):
        # Public test splits often come without labels, marked by -1.
        if split in loaded and any(x != -1 for x in _column(name, loaded[split], LABEL_COLUMNS)[1]):
            rows += _split_rows(name, split, loaded[split])
            used.append(split)
            break
    unused = [split for split in loaded if split not in used]
    return rows, [f"splits of {name} that are not used: {', '.join(unused)}"] if unused else []


def _column(name: str, split: Dataset, wanted: Sequence[str]) -> tuple[str, Sequence]:
    """Return name and content of the first of the ``wanted`` columns that the split has."""
    for column in wanted:
        if column in split.column_names:
            return column, split[column]
    raise UsageError(
        f"the dataset {name!r} has the columns {', '.join(split.column_names)}; one of "
        f"{', '.join(TEXT_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)} are needed, so "
        "export it to a CSV file with text,label for --data"
    )


def _split_rows(name: str, split_name: str, split: Dataset) -> list[Row]:
    _, texts = _column(name, split, TEXT_COLUMNS)
    column, labels = _column(name, split, LABEL_COLUMNS)
    names = getattr(split.features[column], "names", None)
    rows = []
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        is_none = label in (None, -1) or isinstance(label, list | dict) or not str(label).strip()
        if not isinstance(text, str) or not text.strip() or is_none:
            raise UsageError(
                f"row {index} of the {split_name} split of {name!r} lacks its text or its one "
                "label; choose another dataset, or export it to a CSV file for --data"
            )
        label = names[label] if names is not None else label
        rows.append(Row(text, str(label).strip(), split_name != "train", f"{split_name} {index}"))
    return rows


# --- batches on the device ------------------------------------------------------------------------


class TokenBatches(Batches):
    """Texts, tokenized to one fixed length; everything lies on the device, the orders included."""

    def __init__(
        self, device: ComputeDevice, tokenizer: BertTokenizerFast, max_length: int,
        split: TextSplit, batch_size: int, epochs: int = 1, seed: int | None = None,
    ) -> None:  # fmt: skip
        """Tokenize ``split`` to ``max_length`` tokens a text and copy it to the device.

        An order is drawn for each epoch, the same on every device for the same seed; without a
        seed the texts stay as they are.
        """
        super().__init__(device, split.labels, batch_size)
        where = device.torch_device
        encoded = tokenizer(
            list(split.texts), padding="max_length", truncation=True, max_length=max_length,
            return_tensors="pt",
        )  # fmt: skip
        # int32 halves the memory of a large corpus; an embedding accepts it as it is.
        self._tokens = encoded["input_ids"].to(where, torch.int32)
        self._lengths = encoded["attention_mask"].sum(dim=1).to(where)
        orders = [torch.arange(self.samples)]
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            orders = [torch.randperm(self.samples, generator=generator) for _ in range(epochs)]
        self._order = torch.cat(orders).to(where)
        self._offsets = torch.arange(self.batch_size, device=where)
        self._positions = torch.arange(max_length, device=where)
        # What SDPA adds to the scores: in the dtype of the scores, or each layer would convert it.
        # The most negative number instead of -inf, as transformers does.
        self._keep = torch.zeros((), dtype=device.model_dtype, device=where)
        self._drop = torch.full_like(self._keep, torch.finfo(device.model_dtype).min)

    def start_epoch(self, epoch: int = 0) -> None:
        """Go to the first batch of ``epoch`` (from 0)."""
        self.cursor.fill_(epoch * self.samples)

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the next ``count`` samples and move on; device work only.

        Returns:
            Token numbers, int32 of shape (count, length); the attention mask to add to the scores,
            shape (count, 1, 1, length); labels, int64 of shape (count,). The mask has four
            dimensions because transformers passes such a mask on as it is, while it asks a mask of
            two dimensions whether it is all ones, which waits for the device.
        """
        # Warm-up steps may run past the end of a small dataset: start again there.
        positions = (self.cursor + self._offsets[:count]) % len(self._order)
        picked = self._order[positions]
        self.cursor.add_(count)
        is_token = self._positions < self._lengths[picked, None]
        mask = self._keep.where(is_token, self._drop)[:, None, None, :]
        return self._tokens[picked], mask, self._labels[picked]
