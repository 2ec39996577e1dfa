#!/usr/bin/env python3
"""Experiment 2: BERT-base-uncased fine-tuned to classify sentences as positive or negative.

The sentences are synthetic by default. The whole step (choosing the batch, forward, backward,
AdamW) is one CUDA graph on a GPU: sequences have one fixed length and lie on the device. Accuracy
is measured on the training sentences and on held-out ones about topics never trained on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.errors import UsageError
from workloads.training import text_data, text_model

TEST_BATCH_SIZE = 100

EPILOG = """examples:
  bert_training.py --epochs 3                     the synthetic sentences
  bert_training.py --model FOLDER                 pretrained weights from a local folder
  bert_training.py --model none                   random weights, no question to the hub
  bert_training.py --data FILE.csv                your texts: a CSV file with text,label
  bert_training.py --dataset imdb                 a dataset of the hub (pip install datasets)
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
        "--model", default=text_model.DEFAULT_MODEL, metavar="FOLDER_OR_NAME",
        help="folder or hub name of a pretrained BERT; none: random weights "
        f"(default: {text_model.DEFAULT_MODEL}, from scratch where it cannot be had)",
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
        "--held-out-samples", type=cli.non_negative_int, default=100, metavar="N",
        help="texts to test on, never trained on, besides --num-samples (default: 100)",
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
    if text_model.Architecture(args.layers, args.hidden).is_given and args.model != "none":
        parser.error("--layers and --hidden shape a BERT from scratch; add --model none")
    if args.max_length < 3:
        parser.error("--max-length needs room for [CLS], a word and [SEP]: give 3 or more")
    return args


class BertTraining(client.Workload):
    """The fine-tuning job: epochs of captured steps, then a pass over the held-out texts."""

    name = "bert_training"
    title = "BERT fine-tuning"

    def load(self) -> None:
        """Load texts and weights (the hub is asked here, before torch starts), build the model."""
        args = self.args
        self.dataset = self._load_texts()
        pretrained = self._find_pretrained()
        self.weights = "random" if pretrained is None else "pretrained"

        from workloads.common.device import open_device

        self.device = open_device(args)

        from workloads.training.epoch_totals import EpochTotals

        if pretrained is None:
            tokenizer = text_model.train_tokenizer(self.dataset.train.texts)
            architecture = text_model.Architecture(args.layers, args.hidden)
            # Drawing 110 million initial weights takes the CPU two seconds.
            with self.device.torch_device:
                model = text_model.build_model(
                    architecture, len(self.dataset.label_names), args.max_length
                )
        else:
            tokenizer = text_model.load_tokenizer(pretrained)
            model = text_model.load_model(pretrained, len(self.dataset.label_names))
        self.weights_source = f"seed {args.seed}" if pretrained is None else str(pretrained)
        self.vocabulary_size = len(tokenizer)
        if args.max_length > model.config.max_position_embeddings:
            raise UsageError(
                f"--max-length {args.max_length} is more than the model's "
                f"{model.config.max_position_embeddings} positions; lower it"
            )
        where = self.device.torch_device
        self.model = model.to(where)
        self._load_batches(tokenizer)
        self.totals = EpochTotals(where)

    def warm_up(self) -> None:
        """Prepare the training and the test step for the engine."""
        import torch

        from workloads.common.engine import TrainState, compile_module, prepare_step

        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.args.lr, fused=True, capturable=self.device.is_cuda
        )
        cursors = [batches.cursor for batches in (self.train_batches, self.test_batches) if batches]
        self.state = TrainState([self.model], self.optimizer, (*cursors, *self.totals.tensors))
        self.network = compile_module(self.device, self.model)
        if self.test_batches is not None:
            self.model.eval()
            test_size = self.test_batches.batch_size
            self.test_step = prepare_step(
                self.device, lambda: self._test_step(self.network, test_size), self.reset
            )
        self.model.train()
        train_size = self.train_batches.batch_size
        self.train_step = prepare_step(
            self.device, lambda: self._train_step(self.network, train_size), self.reset
        )
        # The last, smaller batch of an epoch; not worth a compilation of its own.
        remainder = self.train_batches.remainder
        if remainder:
            self.remainder_step = prepare_step(
                self.device, lambda: self._train_step(self.model, remainder), self.reset
            )

    def reset(self) -> None:
        """Put weights, optimizer, counters, the place in the data and the random state back."""
        self.state.restore()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Fine-tune for all epochs and return losses, accuracies, durations and throughput."""
        from workloads.common.engine import Pacer

        pacer = Pacer(self.device, recorder)
        batches = self.train_batches
        steps = self.args.epochs * math.ceil(batches.samples / batches.batch_size)
        self.model.train()
        epochs = []
        with console.progress(steps, "training") as progress:
            for epoch in range(self.args.epochs):
                epochs.append(self._run_epoch(epoch, pacer, progress))
        training_seconds = sum(epoch["epoch_seconds"] for epoch in epochs)
        figures = {
            "epochs": epochs,
            "mean_epoch_seconds": training_seconds / len(epochs),
            "samples_per_second": len(epochs) * batches.samples / training_seconds,
            "final_train_loss": epochs[-1]["train_loss"],
            "final_train_accuracy_percent": epochs[-1]["train_accuracy_percent"],
        }
        return figures | self._test(pacer)

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
        for epoch in figures["epochs"]:
            rows.append(
                (f"Epoch {epoch['epoch']}",
                 f"train loss {epoch['train_loss']:.4f}, {epoch['train_accuracy_percent']:.1f} %; "
                 f"{epoch['epoch_seconds']:.2f} s, {epoch['samples_per_second']:.0f} samples/s")
            )  # fmt: skip
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
        arguments = ["--model", text_model.FROM_SCRATCH if pretrained is None else str(pretrained)]
        if self.args.data is not None:
            arguments += ["--data", str(self.args.data.resolve())]
        elif dataset.name != "synthetic":
            arguments += ["--data", str(text_data.write_csv(dataset))]
        return arguments

    def check_unfinished(self) -> None:
        """Look at the losses of the epoch in hand."""
        if hasattr(self, "state"):
            when = "the loss of the epoch that was stopped"
            self.totals.require_finite(when, self.args.lr, self.device.precision)

    def _require_finite(self, loss: float, when: str) -> None:
        from workloads.training.epoch_totals import require_finite_loss

        require_finite_loss(loss, when, self.args.lr, self.device.precision)

    def _load_texts(self) -> text_data.TextDataset:
        args = self.args
        return text_data.load_texts(
            args.dataset, args.data, args.num_samples, args.held_out_samples, args.seed
        )

    def _find_pretrained(self) -> Path | None:
        """Return the folder of the pretrained model, or None after saying so loudly."""
        from workloads.common.hub import HubUnreachableError

        try:
            return text_model.find_pretrained(self.args.model)
        except HubUnreachableError as error:
            if self.args.model != text_model.DEFAULT_MODEL:
                raise UsageError(
                    f"cannot get {self.args.model} ({error}); name a local folder with --model, or "
                    f"--model {text_model.FROM_SCRATCH} for a BERT from scratch"
                ) from error
            self.warn(
                f"no pretrained {self.args.model} ({error}): training the same architecture from "
                "RANDOM weights, with a vocabulary built from the corpus. Speed and memory are the "
                "same, accuracy is not. For pretrained weights name a local folder with --model."
            )
            return None

    def _load_batches(self, tokenizer) -> None:
        import torch

        from workloads.training.text_batches import TokenBatches, epoch_orders

        args, train, held_out = self.args, self.dataset.train, self.dataset.held_out
        self.train_batches = TokenBatches(
            self.device, train, tokenizer, args.max_length, args.batch_size,
            epoch_orders(len(train), args.epochs, self.order_seed),
        )  # fmt: skip
        self.test_batches = None
        if len(held_out):
            self.test_batches = TokenBatches(
                self.device, held_out, tokenizer, args.max_length, TEST_BATCH_SIZE,
                [torch.arange(len(held_out))],
            )  # fmt: skip

    def _run_epoch(self, epoch: int, pacer, progress: console.Progress) -> dict:
        start_seconds = time.monotonic()
        self.train_batches.start_epoch(epoch)
        for _ in range(self.train_batches.full_batches):
            pacer.run("train_step", self.train_step)
            progress.advance(detail=f"epoch {epoch + 1}")
        if self.train_batches.remainder:
            pacer.run("train_step_partial", self.remainder_step)
            progress.advance()
        pacer.drain()
        loss, accuracy = self.totals.take(self.train_batches.samples)
        epoch_seconds = time.monotonic() - start_seconds
        self._require_finite(loss, f"the training loss in epoch {epoch + 1}")
        return {
            "epoch": epoch + 1,
            "train_loss": loss,
            "train_accuracy_percent": accuracy,
            "epoch_seconds": epoch_seconds,
            "samples_per_second": self.train_batches.samples / epoch_seconds,
        }

    def _test(self, pacer) -> dict:
        """Return loss and accuracy on the held-out texts; None where there are none."""
        if self.test_batches is None:
            return {"held_out_loss": None, "held_out_accuracy_percent": None}
        self.model.eval()
        self.test_batches.start_epoch(0)
        for _ in range(self.test_batches.full_batches):
            pacer.run("test_step", self.test_step)
        remainder = self.test_batches.remainder
        if remainder:
            pacer.run("test_step_partial", lambda: self._test_step(self.model, remainder))
        pacer.drain()
        loss, accuracy = self.totals.take(self.test_batches.samples)
        self._require_finite(loss, "the loss on the held-out texts")
        return {"held_out_loss": loss, "held_out_accuracy_percent": accuracy}

    def _train_step(self, network, count: int) -> None:
        import torch.nn.functional as F

        tokens, mask, labels = self.train_batches.take(count)
        # Without gradients the backward pass writes new ones instead of adding to zeros, which
        # saves 1.8 GB of memory traffic a step; in a graph they lie in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        with self.device.autocast():
            logits = network(tokens, attention_mask=mask).logits
            # Outside the model: its own loss first asks labels and configuration what problem
            # this is.
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.totals.add(logits.detach(), labels, loss.detach())

    def _test_step(self, network, count: int) -> None:
        import torch
        import torch.nn.functional as F

        tokens, mask, labels = self.test_batches.take(count)
        with torch.no_grad(), self.device.autocast():
            logits = network(tokens, attention_mask=mask).logits
            loss = F.cross_entropy(logits, labels)
        self.totals.add(logits, labels, loss)


main = client.main_of(BertTraining, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
