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
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client
from workloads.common.errors import DamagedFileError, UsageError, first_line
from workloads.common.weights import HubUnreachableError, hub_model_folder, packages_hidden
from workloads.training import texts
from workloads.training.training_job import TrainingJob

if TYPE_CHECKING:
    import torch
    from transformers import BertForSequenceClassification, BertTokenizerFast

    from workloads.common.engine import Pacer

TEST_BATCH_SIZE = 100
DEFAULT_MODEL = "bert-base-uncased"
FROM_SCRATCH = "none"
# The published vocabulary's size. From scratch the embedding keeps it although a small corpus
# fills little of it, so that the model has the documented 110 M parameters.
VOCABULARY_SIZE = 30_522
HEAD_SIZE = 64
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
    job = parser.add_argument_group("the job")
    job.add_argument("--batch-size", type=cli.positive_int, default=16, help="(default: 16)")
    job.add_argument("--epochs", type=cli.positive_int, default=3, help="(default: 3)")
    job.add_argument(
        "--lr", type=cli.positive_float, default=2e-5, help="learning rate (default: 2e-5)"
    )
    job.add_argument(
        "--max-length", type=cli.positive_int, default=128, metavar="TOKENS",
        help="length that every sequence is padded or cut to (default: 128)",
    )  # fmt: skip
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="FOLDER_OR_NAME",
        help="folder or hub name (NAME or NAME@COMMIT) of a pretrained BERT; none: random weights "
        f"(default: {DEFAULT_MODEL}, from scratch where it is not available)",
    )  # fmt: skip
    model.add_argument(
        "--layers", type=cli.positive_int, help="layers of a BERT from scratch (default: 12)"
    )
    model.add_argument(
        "--hidden", type=cli.positive_int, help="hidden size of a BERT from scratch (default: 768)"
    )
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--num-samples", type=cli.positive_int, default=1000, metavar="N",
        help="texts to train on, at most (default: 1000)",
    )  # fmt: skip
    data.add_argument(
        "--held-out-samples", type=cli.non_negative_int, default=None, metavar="N",
        help="texts to test on, never trained on, besides --num-samples (default: "
        f"{texts.HELD_OUT_SAMPLES}, and no more than are trained on)",
    )  # fmt: skip
    data.add_argument(
        "--dataset", default="synthetic", metavar="NAME",
        help="synthetic, or a name or folder for the datasets library, such as imdb "
        "(default: synthetic)",
    )  # fmt: skip
    data.add_argument(
        "--data", type=Path, default=None, metavar="FILE.csv",
        help="your texts instead: columns text and label, optionally split (train or test)",
    )  # fmt: skip
    args = parser.parse_args()
    if (args.layers or args.hidden) and args.model != FROM_SCRATCH:
        parser.error("--layers and --hidden shape a BERT from scratch; add --model none")
    if args.max_length < 3:
        parser.error("--max-length needs room for [CLS], a word and [SEP]: give 3 or more")
    return args


class BertTraining(TrainingJob):
    """The fine-tuning job: epochs of captured steps, then a pass over the held-out texts."""

    name = "bert_training"
    title = "BERT fine-tuning"
    samples_name = "texts"
    short_job = "--num-samples 64 --epochs 1"

    def load(self) -> None:
        """Load texts and weights (the hub is asked here, before torch starts), build the model."""
        args = self.args
        self.dataset = self._load_texts()
        pretrained = self._find_pretrained()
        self.weights = "random" if pretrained is None else "pretrained"
        self.weights_source = f"seed {args.seed}" if pretrained is None else str(pretrained)

        from workloads.common.device import open_device
        from workloads.common.engine import EpochTotals

        self.device = open_device(args)
        where = self.device.torch_device
        labels = len(self.dataset.label_names)
        if pretrained is None:
            tokenizer = train_tokenizer(self.dataset.train.texts)
            # Drawing 110 million initial weights takes the CPU two seconds.
            with where:
                model = build_model(labels, args.max_length, args.layers, args.hidden)
        else:
            tokenizer = load_tokenizer(pretrained)
            model = load_model(pretrained, labels)
        self.vocabulary_size = len(tokenizer)
        if args.max_length > model.config.max_position_embeddings:
            raise UsageError(
                f"--max-length {args.max_length} is more than the model's "
                f"{model.config.max_position_embeddings} positions; lower it"
            )
        self.model = model.to(where)
        make_batches = functools.partial(
            texts.TokenBatches, self.device, tokenizer, args.max_length
        )
        self.train_batches = make_batches(
            self.dataset.train, args.batch_size, args.epochs, self.order_seed
        )
        if len(self.dataset.held_out):
            self.test_batches = make_batches(self.dataset.held_out, TEST_BATCH_SIZE)
        self.totals = EpochTotals(where)

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]:
        import torch

        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.args.lr, fused=True, capturable=self.device.is_cuda
        )
        return optimizer, ()

    def _forward(self, network: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        tokens, mask = inputs
        return network(tokens, attention_mask=mask).logits

    def _epoch_figures(self, epoch: dict, pacer: Pacer) -> dict:
        return {"samples_per_second": self.train_batches.samples / epoch["epoch_seconds"]}

    def _describe_epoch(self, epoch: dict) -> str:
        return (
            f"train loss {epoch['train_loss']:.4f}, {epoch['train_accuracy_percent']:.1f} %; "
            f"{epoch['epoch_seconds']:.2f} s, {epoch['samples_per_second']:.0f} samples/s"
        )

    def _final_figures(self, last_epoch: dict) -> dict:
        return {
            "final_train_accuracy_percent": last_epoch["train_accuracy_percent"],
            "held_out_loss": None,
            "held_out_accuracy_percent": None,
        }

    def _finish(self, pacer: Pacer) -> dict:
        if self.test is None:
            return {}
        loss, accuracy, _ = self._run_test(pacer)
        self._check(loss, "the loss on the held-out texts")
        return {"held_out_loss": loss, "held_out_accuracy_percent": accuracy}

    def settings(self) -> dict:
        """Return what the job was run with."""
        config = self.model.config
        return super().settings() | {
            "model": self.args.model,
            "weights": self.weights,
            "weights_source": self.weights_source,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "tokenizer_vocabulary_size": self.vocabulary_size,
            "labels": list(self.dataset.label_names),
            "held_out_samples": len(self.dataset.held_out),
            "max_length": self.args.max_length,
        }

    def _describe_input(self) -> list[tuple[str, str]]:
        return [
            ("Model", f"BERT, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M "
             f"parameters, {self.weights} weights ({self.weights_source})"),
            ("Dataset", f"{self.dataset.name}, {len(self.dataset.train)} training and "
             f"{len(self.dataset.held_out)} held-out texts, {self.args.max_length} tokens each"),
        ]  # fmt: skip

    def _describe_outcome(self, figures: dict) -> list[tuple[str, str]]:
        rows = [("Final accuracy", f"{figures['final_train_accuracy_percent']:.1f} % (training)")]
        if figures["held_out_accuracy_percent"] is not None:
            rows.append(
                ("Held-out accuracy", f"{figures['held_out_accuracy_percent']:.1f} %, loss "
                 f"{figures['held_out_loss']:.4f} (texts never trained on)")
            )  # fmt: skip
        return rows

    def resolve(self) -> list[str]:
        """Download weights and texts once; return flags that find both locally."""
        dataset = self._load_texts()
        pretrained = self._find_pretrained()
        arguments = ["--model", FROM_SCRATCH if pretrained is None else str(pretrained)]
        if self.args.data is not None:
            arguments += ["--data", str(self.args.data.resolve())]
        elif dataset.name != "synthetic":
            arguments += ["--data", str(texts.write_csv(dataset))]
        return arguments

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


# --- the model ------------------------------------------------------------------------------------


def find_pretrained(model: str) -> Path | None:
    """Return the local folder of a model (``none``: None), downloaded once where it has a name.

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
        folder = hub_model_folder(model)
    try:
        model_type = _config(folder).get("model_type")
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
    return folder.resolve()


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> BertTokenizerFast:
    """Load the WordPiece tokenizer of a pretrained model.

    Raises:
        UsageError: It does not belong to the model.
    """
    tokenizer = _transformers().BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    vocabulary_size = _config(folder)["vocab_size"]
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
    # A missing file is an OSError; a truncated one raises what safetensors or pickle like.
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
    labels: int, max_length: int, layers: int | None = None, hidden_size: int | None = None
) -> BertForSequenceClassification:
    """Build a BERT from random weights (torch's seed) with room for ``max_length`` tokens.

    None stands for BERT-base: 12 layers of 768.
    """
    import torch

    transformers = _transformers()
    shape = {}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    if hidden_size is not None:
        shape |= {
            "hidden_size": hidden_size,
            "num_attention_heads": max(1, hidden_size // HEAD_SIZE),
            "intermediate_size": 4 * hidden_size,
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


main = client.main_of(BertTraining, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
