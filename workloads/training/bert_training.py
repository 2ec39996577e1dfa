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
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.errors import DamagedFileError, UsageError, first_line
from workloads.common.weights import HubUnreachableError, hub_model_folder, packages_hidden
from workloads.training import texts

if TYPE_CHECKING:
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
        "--layers", type=cli.positive_int, default=None,
        help="layers of a BERT from scratch (default: 12)",
    )  # fmt: skip
    model.add_argument(
        "--hidden", type=cli.positive_int, default=None,
        help="hidden size of a BERT from scratch (default: 768)",
    )  # fmt: skip
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
    if Architecture(args.layers, args.hidden).is_given and args.model != "none":
        parser.error("--layers and --hidden shape a BERT from scratch; add --model none")
    if args.max_length < 3:
        parser.error("--max-length needs room for [CLS], a word and [SEP]: give 3 or more")
    return args


class BertTraining(client.Workload):
    """The fine-tuning job: epochs of captured steps, then a pass over the held-out texts."""

    name = "bert_training"
    title = "BERT fine-tuning"
    epochs: Sequence[dict] = ()

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
        if pretrained is None:
            tokenizer = train_tokenizer(self.dataset.train.texts)
            architecture = Architecture(args.layers, args.hidden)
            # Drawing 110 million initial weights takes the CPU two seconds.
            with where:
                model = build_model(architecture, len(self.dataset.label_names), args.max_length)
        else:
            tokenizer = load_tokenizer(pretrained)
            model = load_model(pretrained, len(self.dataset.label_names))
        self.vocabulary_size = len(tokenizer)
        if args.max_length > model.config.max_position_embeddings:
            raise UsageError(
                f"--max-length {args.max_length} is more than the model's "
                f"{model.config.max_position_embeddings} positions; lower it"
            )
        self.model = model.to(where)
        self._load_batches(tokenizer)
        self.totals = EpochTotals(where)

    def warm_up(self) -> None:
        """Prepare training and test for the engine, and go once through all that a job does."""
        import torch

        from workloads.common.engine import Pacer, Pass, TrainState, compile_module, step_pool

        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.args.lr, fused=True, capturable=self.device.is_cuda
        )
        cursors = [batches.cursor for batches in (self.train_batches, self.test_batches) if batches]
        self.state = TrainState([self.model], self.optimizer, (*cursors, *self.totals.tensors))
        self.network = compile_module(self.device, self.model)
        shared = (self.reset, step_pool(self.device))
        self.test = None
        if self.test_batches is not None:
            self.model.eval()
            self.test = Pass(self.device, "test_step", self.test_batches, self._test_step, *shared)
        self.model.train()
        self.train = Pass(self.device, "train_step", self.train_batches, self._train_step, *shared)
        pacer = Pacer(self.device, client.Recorder(client.EventLog(None)))
        self.train.rehearse(pacer, self.totals)
        if self.test is not None:
            self.model.eval()
            self.test.rehearse(pacer, self.totals)
        self.reset()
        self.device.synchronize()

    def reset(self) -> None:
        """Put weights, optimizer, counters, the place in the data and the random state back."""
        self.state.restore()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Fine-tune for all epochs and return losses, accuracies, durations and throughput."""
        from workloads.common.engine import Pacer

        pacer = Pacer(self.device, recorder)
        self.epochs = []
        steps = self.args.epochs * -(-self.train_batches.samples // self.train_batches.batch_size)
        advice = None if self.device.is_cuda else "--num-samples 64 --epochs 1"
        with console.progress(steps, "training", advice) as progress:
            for epoch in range(1, self.args.epochs + 1):
                self._run_epoch(epoch, pacer, progress)
        return self.partial_figures() | self._test_figures(pacer)

    def partial_figures(self) -> dict | None:
        """Return the figures of the finished epochs; the held-out texts come after the last."""
        if not self.epochs:
            return None
        training_seconds = sum(epoch["epoch_seconds"] for epoch in self.epochs)
        return {
            "epochs": self.epochs,
            "mean_epoch_seconds": training_seconds / len(self.epochs),
            "samples_per_second": len(self.epochs) * self.train_batches.samples / training_seconds,
            "final_train_loss": self.epochs[-1]["train_loss"],
            "final_train_accuracy_percent": self.epochs[-1]["train_accuracy_percent"],
            "held_out_loss": None,
            "held_out_accuracy_percent": None,
        }

    def settings(self) -> dict:
        """Return what the job was run with."""
        config = self.model.config
        return {
            "model": self.args.model,
            "weights": self.weights,
            "weights_source": self.weights_source,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "tokenizer_vocabulary_size": self.vocabulary_size,
            "dataset": self.dataset.name,
            "labels": list(self.dataset.label_names),
            "train_samples": len(self.dataset.train),
            "held_out_samples": len(self.dataset.held_out),
            "max_length": self.args.max_length,
            "batch_size": self.train_batches.batch_size,
            "epochs": self.args.epochs,
            "lr": self.args.lr,
            "seed": self.args.seed,
            "engine": self.device.engine,
            "precision": self.device.precision,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the terminal summary, an epoch a line."""
        rows = [
            ("Model", f"BERT, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M "
             f"parameters, {self.weights} weights ({self.weights_source})"),
            ("Dataset", f"{self.dataset.name}, {len(self.dataset.train)} training and "
             f"{len(self.dataset.held_out)} held-out texts, {self.args.max_length} tokens each"),
        ]  # fmt: skip
        rows += [("", note) for note in self.dataset.notes]
        rows += [(f"Epoch {e['epoch']}", _describe_epoch(e)) for e in figures["epochs"]]
        rows.append(("Throughput", f"{figures['samples_per_second']:.1f} samples/s"))
        final_accuracy = figures["final_train_accuracy_percent"]
        rows.append(("Final accuracy", f"{final_accuracy:.1f} % (training)"))
        if figures["held_out_accuracy_percent"] is not None:
            rows.append(
                ("Held-out accuracy", f"{figures['held_out_accuracy_percent']:.1f} %, loss "
                 f"{figures['held_out_loss']:.4f} (texts never trained on)")
            )  # fmt: skip
        if figures.get("peak_memory_mib") is not None:
            rows.append(("Peak memory", f"{figures['peak_memory_mib']:.0f} MiB (PyTorch)"))
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

    def check_unfinished(self) -> None:
        """Look at the losses of the epoch in hand."""
        if hasattr(self, "state"):
            loss = self.totals.loss_sum.item() / self.train_batches.samples
            self._check(loss, "the loss of the epoch that was stopped")

    def _check(self, loss: float, when: str) -> None:
        from workloads.common.engine import check_loss

        what = f"{len(self.dataset.train)} texts"
        warning = check_loss(loss, when, self.args.lr, self.device.precision, what)
        if warning is not None:
            self.warn(warning)

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

    def _load_batches(self, tokenizer: BertTokenizerFast) -> None:
        import torch

        args, train, held_out = self.args, self.dataset.train, self.dataset.held_out
        self.train_batches = texts.TokenBatches(
            self.device, train, tokenizer, args.max_length, args.batch_size,
            texts.epoch_orders(len(train), args.epochs, self.order_seed),
        )  # fmt: skip
        self.test_batches = None
        if len(held_out):
            self.test_batches = texts.TokenBatches(
                self.device, held_out, tokenizer, args.max_length, TEST_BATCH_SIZE,
                [torch.arange(len(held_out))],
            )  # fmt: skip

    def _run_epoch(self, number: int, pacer: Pacer, progress: console.Progress) -> None:
        self.model.train()
        loss, accuracy, epoch_seconds = self.train.run(
            pacer, self.totals, number - 1, lambda: progress.advance(detail=f"epoch {number}")
        )
        self._check(loss, f"the training loss in epoch {number}")
        self.epochs.append(
            {
                "epoch": number,
                "train_loss": loss,
                "train_accuracy_percent": accuracy,
                "epoch_seconds": epoch_seconds,
                "samples_per_second": self.train_batches.samples / epoch_seconds,
            }
        )
        self.tell(f"epoch {number}/{self.args.epochs}: {_describe_epoch(self.epochs[-1])}")

    def _test_figures(self, pacer: Pacer) -> dict:
        """Return loss and accuracy on the held-out texts; nothing where there are none."""
        if self.test is None:
            return {}
        self.model.eval()
        loss, accuracy, _ = self.test.run(pacer, self.totals)
        self._check(loss, "the loss on the held-out texts")
        return {"held_out_loss": loss, "held_out_accuracy_percent": accuracy}

    def _train_step(self, count: int) -> None:
        import torch.nn.functional as F

        tokens, mask, labels = self.train_batches.take(count)
        # Without gradients the backward pass writes new ones instead of adding to zeros, which
        # saves 1.8 GB of memory traffic a step; in a graph they lie in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        with self.device.autocast():
            logits = self._network_for(count, self.train_batches)(
                tokens, attention_mask=mask
            ).logits
            # Outside the model: its own loss first asks labels and configuration what problem
            # this is.
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.totals.add(logits.detach(), labels, loss.detach())

    def _test_step(self, count: int) -> None:
        import torch
        import torch.nn.functional as F

        tokens, mask, labels = self.test_batches.take(count)
        with torch.no_grad(), self.device.autocast():
            logits = self._network_for(count, self.test_batches)(tokens, attention_mask=mask).logits
            loss = F.cross_entropy(logits, labels)
        self.totals.add(logits, labels, loss)

    def _network_for(self, count: int, batches: texts.TokenBatches):
        """Return the model; the last, smaller batch is not worth a compilation of its own."""
        return self.network if count == batches.batch_size else self.model


def _describe_epoch(epoch: dict) -> str:
    return (
        f"train loss {epoch['train_loss']:.4f}, {epoch['train_accuracy_percent']:.1f} %; "
        f"{epoch['epoch_seconds']:.2f} s, {epoch['samples_per_second']:.0f} samples/s"
    )


# --- the model ------------------------------------------------------------------------------------


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
        folder = hub_model_folder(model)
    _check_folder(folder)
    return folder.resolve()


def _check_folder(folder: Path) -> None:
    config_path = folder / "config.json"
    try:
        model_type = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
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
    vocabulary_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
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


main = client.main_of(BertTraining, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
