"""BERT and its WordPiece tokenizer: from a local folder, or from scratch."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from workloads.common import hub
from workloads.common.errors import DamagedFileError, UsageError, first_line
from workloads.common.lean_imports import packages_hidden

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, BertTokenizerFast

DEFAULT_MODEL = "bert-base-uncased"
FROM_SCRATCH = "none"
# The published vocabulary's size. From scratch the embedding keeps it although a small corpus
# fills little of it, so that the model has the documented 110 M parameters.
VOCABULARY_SIZE = 30_522
HEAD_SIZE = 64
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Architecture:
    """A BERT from scratch; None stands for BERT-base (12 layers of 768)."""

    layers: int | None = None
    hidden_size: int | None = None

    @property
    def is_given(self) -> bool:
        """Whether something else than BERT-base was asked for."""
        return self.layers is not None or self.hidden_size is not None


def find_pretrained(model: str) -> Path | None:
    """Return the local folder of a pretrained model, or None for ``none``.

    May download once, into the hub's cache.

    Args:
        model: ``none``, a folder, or a model's name on the hub.

    Raises:
        HubUnreachableError: The model is neither here nor can it be downloaded.
        UsageError: There is no such model, or it is no BERT with a tokenizer.
    """
    if model == FROM_SCRATCH:
        return None
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageError(
                f"there is no folder {model}; name an existing folder or a hub model with --model, "
                f"or --model {FROM_SCRATCH} for random weights"
            )
        folder = hub.model_folder(model)
    _check_folder(folder)
    return folder.resolve()


def _check_folder(folder: Path) -> None:
    config_path = folder / "config.json"
    try:
        model_type = json.loads(config_path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{folder} holds no readable config.json ({error}); name a folder saved by "
            "save_pretrained with --model"
        ) from error
    if model_type != "bert":
        raise UsageError(
            f"the model in {folder} is of type {model_type!r}; name a BERT with --model"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UsageError(
            f"{folder} has neither tokenizer.json nor vocab.txt; save the model's tokenizer there"
        )


def load_tokenizer(folder: Path) -> BertTokenizerFast:
    """Load the WordPiece tokenizer of a pretrained model.

    Raises:
        UsageError: It does not belong to the model.
    """
    tokenizer = _transformers().BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    vocabulary_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    # Where its files are unusable, transformers returns a tokenizer of the special tokens alone,
    # without a word; every word is then [UNK].
    if not vocabulary_size // 2 < len(tokenizer) <= vocabulary_size:
        raise UsageError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and its model "
            f"{vocabulary_size}; put the model's own tokenizer.json or vocab.txt there"
        )
    return tokenizer


def train_tokenizer(texts: Sequence[str]) -> BertTokenizerFast:
    """Build a WordPiece vocabulary from ``texts`` (lower-cased, at most 30,522 tokens)."""
    from tokenizers import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        texts, vocab_size=VOCABULARY_SIZE, min_frequency=1, show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
    )  # fmt: skip
    # A vocab_file argument would be ignored silently.
    return _transformers().BertTokenizerFast(vocab=trainer.get_vocab(), do_lower_case=True)


def load_model(folder: Path, labels: int) -> BertForSequenceClassification:
    """Load a pretrained BERT in fp32 with a new classification head of ``labels`` outputs.

    Raises:
        UsageError: The weights cannot be read.
        DamagedFileError: Their file is cut off or altered.
    """
    import torch

    transformers = _transformers()
    logging = transformers.utils.logging
    # The new head is reported as missing keys, and loading as a progress bar; both are expected.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return transformers.BertForSequenceClassification.from_pretrained(
            folder, num_labels=labels, attn_implementation="sdpa", dtype=torch.float32,
            local_files_only=True,
        )  # fmt: skip
    # A missing file is an OSError; a torn one raises what its reader (safetensors, pickle) likes.
    except Exception as error:
        fix = f"name another folder with --model, or --model {FROM_SCRATCH} for random weights"
        if type(error).__name__ == "SafetensorError":
            raise DamagedFileError(
                f"{folder / 'model.safetensors'} is cut off or damaged; save it again, or {fix}"
            ) from error
        raise UsageError(
            f"the weights in {folder} cannot be loaded ({first_line(error)}); {fix}"
        ) from error


def build_model(
    architecture: Architecture, labels: int, max_length: int
) -> BertForSequenceClassification:
    """Build a BERT from random weights (torch's seed) with room for ``max_length`` tokens."""
    import torch

    transformers = _transformers()
    shape = {}
    if architecture.layers is not None:
        shape["num_hidden_layers"] = architecture.layers
    if architecture.hidden_size is not None:
        hidden = architecture.hidden_size
        shape |= {
            "hidden_size": hidden,
            "num_attention_heads": max(1, hidden // HEAD_SIZE),
            "intermediate_size": 4 * hidden,
        }
    config = transformers.BertConfig(
        vocab_size=VOCABULARY_SIZE, num_labels=labels, attn_implementation="sdpa", **shape
    )
    config.max_position_embeddings = max(config.max_position_embeddings, max_length)
    return transformers.BertForSequenceClassification(config).to(torch.float32)


@functools.cache
def _transformers() -> ModuleType:
    """Import transformers with what is used of it here.

    Without these packages, which it imports for other models where they are installed: with them
    the first step of a short job comes 1 to 2 s later.
    """
    with packages_hidden("scipy", "sklearn", "torchvision"):
        import transformers

        # Each name is imported when it is first asked for.
        for name in ("BertConfig", "BertForSequenceClassification", "BertTokenizerFast"):
            getattr(transformers, name)
    return transformers
