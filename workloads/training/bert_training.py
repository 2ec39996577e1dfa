#!/usr/bin/env python3
"""Experiment 2: BERT-base-uncased fine-tuned to classify sentences as positive or negative.

The sentences are synthetic by default. The whole step (choosing the batch, forward, backward,
AdamW) is one CUDA graph on a GPU: sequences have one fixed length and lie on the device. Accuracy
is measured on the training sentences and on held-out ones about topics never trained on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, torch
from workloads.common.device import open_device
from workloads.common.engine import EpochTotals, Pacer
from workloads.common.errors import UsageError
from workloads.common.hub import (
    HubUnreachableError,
    hub_model_folder,
    load_from_folder,
    load_pretrained,
)
from workloads.training import texts
from workloads.training.training_job import TrainingJob

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, BertTokenizerFast

TEST_BATCH_SIZE = 100
DEFAULT_MODEL = "bert-base-uncased"
FROM_SCRATCH = "none"
# The published vocabulary's size. From scratch the embedding keeps it although a small corpus
# fills little of it, so that the model has the documented 110 M parameters.
VOCABULARY_SIZE = 30_522
HEAD_SIZE = 64
# What a model pretrained for another task may lack, or have for other labels.
NEW_LAYERS = ("classifier.", "bert.pooler.")
UNUSED_PACKAGES = ("scipy", "sklearn", "torchvision")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

EPILOG = """examples:
  bert_training.py --epochs 3                     the synthetic sentences
  bert_training.py --model FOLDER                 pretrained weights from a local folder
  bert_training.py --model none                   random weights, no question to the hub
  bert_training.py --data FILE.csv                your texts: a CSV file with text,label
  bert_training.py --dataset imdb                 a dataset of the hub (pip install "datasets>=4")
"""


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = cli.workload_parser("Fine-tune BERT for text classification.", EPILOG)
    flag = cli.flags(parser, "the job")
    flag("--batch-size", 16, "texts a step")
    flag("--epochs", 3, "times through the training texts")
    flag("--lr", 2e-5, "learning rate (default: 2e-5)")
    length = "length that every sequence is padded or cut to"
    flag("--max-length", 128, length, metavar="TOKENS")
    flag = cli.flags(parser, "the model")
    flag(
        "--model", DEFAULT_MODEL,
        "folder or hub name (NAME or NAME@COMMIT) of a pretrained BERT; none: random weights "
        f"(default: {DEFAULT_MODEL}, from scratch where it is not available)",
        metavar="FOLDER_OR_NAME",
    )  # fmt: skip
    shape = functools.partial(flag, type=cli.positive_int)
    shape("--layers", None, "layers of a BERT from scratch (default: 12)")
    shape("--hidden", None, "hidden size of a BERT from scratch (default: 768)")
    flag = cli.flags(parser, "the data")
    flag("--num-samples", 1000, "texts to train on, at most", metavar="N")
    flag(
        "--held-out-samples", None,
        "texts to test on, never trained on, besides --num-samples (default: "
        f"{texts.HELD_OUT_SAMPLES}, and no more than are trained on)",
        type=cli.non_negative_int, metavar="N",
    )  # fmt: skip
    dataset = "synthetic, or a name or folder for the datasets library, such as imdb"
    flag("--dataset", "synthetic", dataset, metavar="NAME")
    own = "your texts instead: columns text and label, optionally split (train or test)"
    flag("--data", None, own, type=cli.some_path, metavar="FILE.csv")
    args = parser.parse_args()
    if (args.layers or args.hidden) and args.model != FROM_SCRATCH:
        parser.error("--layers and --hidden shape a BERT from scratch; add --model none")
    if args.hidden and args.hidden % attention_heads(args.hidden):
        parser.error(f"--hidden {args.hidden} is no multiple of {HEAD_SIZE}; give one")
    if args.max_length < 3:
        parser.error("--max-length needs room for [CLS], a word and [SEP]: give 3 or more")
    return args


class BertTraining(TrainingJob):
    """The fine-tuning job: epochs of captured steps, then a pass over the held-out texts."""

    name = "bert_training"
    title = "BERT fine-tuning"
    dataset: texts.TextDataset
    model: BertForSequenceClassification
    samples_name = "texts"
    short_job = "--num-samples 64 --epochs 1"

    def load(self) -> None:
        """Load texts and weights (the hub is asked here, before torch starts), build the model."""
        args = self.args
        self.dataset = self._load_texts()
        self.pretrained = self._find_pretrained()
        self.device = open_device(args)
        where = self.device.torch_device
        labels = len(self.dataset.label_names)
        if self.pretrained is None:
            tokenizer = train_tokenizer(self.dataset.train.texts)
            # Drawing 110 million initial weights takes the CPU two seconds.
            with where:
                model = build_model(labels, args.max_length, args.layers, args.hidden)
        else:
            tokenizer = load_tokenizer(self.pretrained)
            model = load_model(self.pretrained, labels)
        self.vocabulary_size = len(tokenizer)
        if args.max_length > model.config.max_position_embeddings:
            raise UsageError(
                f"--max-length {args.max_length} is more than the model's "
                f"{model.config.max_position_embeddings} positions; lower it"
            )
        self.model = model.to(where)
        make = functools.partial(texts.TokenBatches, self.device, tokenizer, args.max_length)
        self.train_batches = make(self.dataset.train, args.batch_size, args.epochs, self.order_seed)
        if len(self.dataset.held_out):
            self.test_batches = make(self.dataset.held_out, TEST_BATCH_SIZE)
        self.totals = EpochTotals(where)

    def _load_texts(self) -> texts.TextDataset:
        args = self.args
        return texts.load_texts(
            args.dataset, args.data, args.num_samples, args.held_out_samples, args.seed
        )

    def _find_pretrained(self) -> Path | None:
        """Return the folder of the pretrained model, or None after a warning."""
        try:
            return find_pretrained(self.args.model)
        except HubUnreachableError as error:
            if self.args.model != DEFAULT_MODEL:
                raise UsageError(
                    f"cannot get {self.args.model} ({error}); name a local folder with --model, or "
                    f"--model {FROM_SCRATCH} for a BERT from scratch"
                ) from error
            self.warn(
                f"no pretrained {self.args.model} ({error}): training the same architecture from "
                "RANDOM weights, with a vocabulary built from the corpus. Speed and memory are the "
                "same, accuracy is not. For pretrained weights name a local folder with --model."
            )
            return None

    def make_optimizer(self) -> tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]:
        """Return AdamW."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.args.lr, fused=True, capturable=self.device.is_cuda
        )
        return optimizer, ()

    def forward(self, network: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of tokens and their mask, shape (batch, labels)."""
        tokens, mask = inputs
        return network(tokens, attention_mask=mask).logits

    def finish_epoch(self, epoch: dict, pacer: Pacer) -> dict:
        """Return the speed, which the guide wants of each epoch."""
        return {"samples_per_second": self.train_batches.samples / epoch["epoch_seconds"]}

    def finish(self, pacer: Pacer) -> dict:
        """Test on the held-out texts, where there are any."""
        if self.test is None:
            return {}
        self.model.eval()
        loss, accuracy, _ = self.test.run(pacer, self.totals)
        self.check_loss(loss, "the loss on the held-out texts")
        return {"held_out_loss": loss, "held_out_accuracy_percent": accuracy}

    def final_figures(self, last_epoch: dict) -> dict:
        """Return the last epoch's accuracy; no held-out text has been seen yet."""
        return {
            "final_train_accuracy_percent": last_epoch["train_accuracy_percent"],
            "held_out_loss": None,
            "held_out_accuracy_percent": None,
        }

    def describe_epoch(self, epoch: dict) -> str:
        """Return an epoch's figures for people."""
        return (
            f"train loss {epoch['train_loss']:.4f}, {epoch['train_accuracy_percent']:.1f} %; "
            f"{epoch['epoch_seconds']:.2f} s, {epoch['samples_per_second']:.0f} samples/s"
        )

    def settings(self) -> dict:
        """Return what the job was run with."""
        config = self.model.config
        is_random = self.pretrained is None
        return super().settings() | {
            "model": self.args.model,
            "weights": "random" if is_random else "pretrained",
            "weights_source": f"seed {self.args.seed}" if is_random else str(self.pretrained),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "tokenizer_vocabulary_size": self.vocabulary_size,
            "labels": list(self.dataset.label_names),
            "held_out_samples": len(self.dataset.held_out),
            "max_length": self.args.max_length,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the terminal summary."""
        of = self.settings()
        rows = [
            ("Model", f"BERT, {of['parameters'] / 1e6:.1f} M parameters, {of['weights']} weights "
             f"({of['weights_source']})"),
            ("Dataset", f"{of['dataset']}, {of['train_samples']} training and "
             f"{of['held_out_samples']} held-out texts, {of['max_length']} tokens each"),
            *super().summary(figures),
            ("Final accuracy", f"{figures['final_train_accuracy_percent']:.1f} % (training)"),
        ]  # fmt: skip
        if figures["held_out_accuracy_percent"] is not None:
            rows.append(
                ("Held-out accuracy", f"{figures['held_out_accuracy_percent']:.1f} %, loss "
                 f"{figures['held_out_loss']:.4f} (texts never trained on)")
            )  # fmt: skip
        return rows

    def resolve(self) -> list[str]:
        """Download weights and texts once; return flags that find both locally."""
        dataset = self._load_texts()
        arguments = ["--model", str(self._find_pretrained() or FROM_SCRATCH)]
        if self.args.data is not None:
            arguments += ["--data", str(self.args.data.resolve())]
        elif dataset.name != "synthetic":
            arguments += ["--data", str(texts.write_csv(dataset))]
        return arguments


# --- the model ------------------------------------------------------------------------------------


def find_pretrained(model: str) -> Path | None:
    """Return the local folder of a model (``none``: None), downloaded once where it has a name.

    Raises:
        HubUnreachableError: The model is neither here nor can it be downloaded.
        UsageError: There is no such model, or it is no BERT with a tokenizer.
    """
    if model == FROM_SCRATCH:
        return None
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageError(
                f"there is no folder {model}; name an existing folder or a hub model with --model, "
                f"or --model {FROM_SCRATCH} for random weights"
            )
        folder = hub_model_folder(model)
    try:
        model_type = _config(folder).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
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
    return folder.resolve()


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> BertTokenizerFast:
    """Load the WordPiece tokenizer of a pretrained model.

    Raises:
        UsageError: Its files cannot be read, or it does not belong to the model.
    """
    fix = "put the model's own tokenizer.json or vocab.txt there"
    # The mask is made from the lengths alone.
    tokenizer = load_from_folder(
        _transformers().BertTokenizerFast, folder, fix, padding_side="right"
    )
    vocabulary_size = _config(folder).get("vocab_size", VOCABULARY_SIZE)
    # Where its files are unusable, transformers returns a tokenizer of the special tokens alone,
    # without a word; every word is then [UNK]. The model's reader refuses a size that is no number.
    if isinstance(vocabulary_size, int) and not (
        vocabulary_size // 2 < len(tokenizer) <= vocabulary_size
    ):
        raise UsageError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and its model "
            f"{vocabulary_size}; {fix}"
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
        UsageError: The weights cannot be read, or are not all there.
        DamagedFileError: Their file is cut off or altered.
    """
    return load_pretrained(
        _transformers().BertForSequenceClassification, folder,
        f"name another folder with --model, or --model {FROM_SCRATCH} for random weights",
        NEW_LAYERS, num_labels=labels, attn_implementation="sdpa", dtype=torch.float32,
    )  # fmt: skip


def build_model(
    labels: int, max_length: int, layers: int | None = None, hidden_size: int | None = None
) -> BertForSequenceClassification:
    """Build a BERT from random weights (torch's seed) with room for ``max_length`` tokens.

    None stands for BERT-base: 12 layers of 768.
    """
    transformers = _transformers()
    hidden_size = hidden_size or 768
    config = transformers.BertConfig(
        vocab_size=VOCABULARY_SIZE,
        num_labels=labels,
        attn_implementation="sdpa",
        num_hidden_layers=layers or 12,
        hidden_size=hidden_size,
        num_attention_heads=attention_heads(hidden_size),
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max(512, max_length),
    )
    return transformers.BertForSequenceClassification(config).to(torch.float32)


def attention_heads(hidden_size: int) -> int:
    """Return how many heads a BERT of this size has."""
    return max(1, hidden_size // HEAD_SIZE)


@functools.cache
def _transformers() -> ModuleType:
    """Import transformers with what is used of it here, and without what other models need.

    With those packages the first step of a short job comes 1 to 2 s later. ``None`` makes them look
    as if they were not installed (The Python Language Reference, 5.3.1), for as long as this takes.
    """
    hidden: dict[str, Any] = {name: None for name in UNUSED_PACKAGES if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        import transformers

        # Each name is imported when it is first asked for.
        for name in ("BertConfig", "BertForSequenceClassification", "BertTokenizerFast"):
            getattr(transformers, name)
    finally:
        for name in hidden:
            del sys.modules[name]
    return transformers


if __name__ == "__main__":
    cli.run_main(client.main_of(BertTraining, parse_arguments))
