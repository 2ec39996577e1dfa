#!/usr/bin/env python3
"""Experiment 1: ResNet50 trained from scratch on CIFAR-10 or on a folder of images.

The whole step (choosing the batch, crop and flip, forward, backward, optimizer) is one CUDA graph
on a GPU. The learning rate rises linearly to --lr over the first 30 % of the steps and falls
linearly to 0: that shape, with label smoothing, settles what five epochs can reach.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.environment import PROJECT_ROOT, clients_on_gpu, usable_cores
from workloads.common.errors import NotFiniteError, UsageError

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
WARM_UP_FRACTION = 0.3
TEST_BATCH_SIZE = 500
MAX_LOADER_WORKERS = 8

EPILOG = """examples:
  resnet_training.py --epochs 5                          CIFAR-10, downloaded on first use
  resnet_training.py --dataset folder --data-dir PATH    PATH/train/<class>/*.jpg, PATH/test/...
  resnet_training.py --dataset synthetic --epochs 1      no data needed, accuracy means nothing
"""


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = cli.workload_parser("Train ResNet50 for image classification.", EPILOG)
    job = parser.add_argument_group("the job")
    job.add_argument("--batch-size", type=cli.positive_int, default=128, help="(default: 128)")
    job.add_argument("--epochs", type=cli.positive_int, default=5, help="(default: 5)")
    job.add_argument(
        "--lr", type=cli.positive_float, default=0.1, help="highest learning rate (default: 0.1)"
    )
    job.add_argument("--save-model", action="store_true", help="keep the trained model as .pt")
    job.add_argument(
        "--evaluate", type=Path, metavar="FILE", default=None,
        help="test a model kept by --save-model instead of training",
    )  # fmt: skip
    job.add_argument(
        "--stem", choices=("cifar", "imagenet"), default="cifar",
        help="first layers: 3x3 without pooling for small images, or 7x7 with pooling "
        "(default: cifar)",
    )  # fmt: skip
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--dataset", choices=("auto", "cifar10", "folder", "synthetic"), default="auto",
        help="auto takes what --data-dir holds, else downloads CIFAR-10, else synthetic images "
        "(default: auto)",
    )  # fmt: skip
    data.add_argument(
        "--data-dir", type=Path, default=PROJECT_ROOT / "data",
        help="folder of the data (default: data in the project)",
    )  # fmt: skip
    data.add_argument(
        "--train-samples", type=cli.positive_int, default=None, metavar="N",
        help="train on N images (default: all)",
    )  # fmt: skip
    data.add_argument(
        "--test-samples", type=cli.positive_int, default=None, metavar="N",
        help="test on N images (default: all, or as many as keep the ratio to --train-samples)",
    )  # fmt: skip
    data.add_argument(
        "--image-size", type=cli.positive_int, default=None, metavar="PIXELS",
        help="size seen by the network (default: 32 for images of 32x32, else 224)",
    )  # fmt: skip
    data.add_argument(
        "--loader-workers", type=cli.non_negative_int, default=None, metavar="N",
        help="processes that decode images which do not fit the GPU (default: a fair share of "
        "the cores)",
    )  # fmt: skip
    return parser.parse_args()


class ResNetTraining(client.Workload):
    """The training job: epochs of captured steps, a test pass after each."""

    name = "resnet_training"
    title = "ResNet50 training"

    def load(self) -> None:
        """Open the device, load the images, build the model."""
        from workloads.common.device import open_device

        args = self.args
        if args.evaluate is not None and not args.evaluate.is_file():
            raise UsageError(
                f"--evaluate: there is no file {args.evaluate}; name a model kept by --save-model"
            )
        self.device = open_device(args)

        import torch

        from workloads.training import image_data
        from workloads.training.epoch_totals import EpochTotals
        from workloads.training.image_batches import make_batches
        from workloads.training.image_model import build_resnet50, load_model

        dataset = image_data.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )
        dataset = dataset.limited(args.train_samples, args.test_samples, args.seed)
        self.dataset = dataset
        if args.stem == "cifar" and dataset.image_size > image_data.CIFAR_SIZE:
            console.note(
                f"images of {dataset.image_size}x{dataset.image_size} with --stem cifar are slow; "
                "--stem imagenet is meant for them"
            )
        self.train_batch_size = min(args.batch_size, len(dataset.train))
        self.test_batch_size = min(TEST_BATCH_SIZE, len(dataset.test))
        if dataset.image_size > image_data.CIFAR_SIZE:
            self.test_batch_size = min(self.test_batch_size, args.batch_size)
        self._refuse_batch_of_one()
        clients = clients_on_gpu()
        workers = args.loader_workers
        if workers is None:
            workers = max(1, min(MAX_LOADER_WORKERS, usable_cores() // clients - 1))
        shared = {"seed": self.order_seed, "workers": workers, "clients": clients}
        self.train_batches = make_batches(
            self.device, dataset.train, dataset.image_size, augment=True,
            batch_size=self.train_batch_size, **shared,
        )  # fmt: skip
        self.test_batches = make_batches(
            self.device, dataset.test, dataset.image_size, augment=False,
            batch_size=self.test_batch_size, **shared,
        )  # fmt: skip

        where = self.device.torch_device
        # Drawing the initial weights takes the CPU half a second.
        with where:
            model = build_resnet50(len(dataset.class_names), args.stem)
        if args.evaluate is not None:
            load_model(model, args.evaluate, args.stem, len(dataset.class_names))
        self.model = model.to(memory_format=torch.channels_last)
        self.totals = EpochTotals(where)

    def warm_up(self) -> None:
        """Prepare the training and the test step for the engine."""
        import torch

        from workloads.common.engine import TrainState, compile_module, prepare_step

        where = self.device.torch_device
        total_steps = self.args.epochs * math.ceil(len(self.dataset.train) / self.train_batch_size)
        self.lr_table = torch.tensor(
            learning_rates(self.args.lr, total_steps), dtype=torch.float32, device=where
        )
        self.lr = torch.zeros((), device=where)
        self.step_index = torch.zeros((), dtype=torch.int64, device=where)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=MOMENTUM, nesterov=True,
            weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        self.train_batches.start_epoch()
        self.test_batches.start_epoch()
        self.state = TrainState(
            [self.model], self.optimizer, (self.step_index, *self.totals.tensors)
        )
        network = compile_module(self.device, self.model)
        self.model.eval()
        self.test_step = prepare_step(
            self.device, lambda: self._test_step(network, self.test_batch_size), self.reset
        )
        if self.args.evaluate is None:
            self.model.train()
            self.train_step = prepare_step(
                self.device, lambda: self._train_step(network, self.train_batch_size), self.reset
            )
            # The last, smaller batch of an epoch; not worth a compilation of its own.
            remainder = len(self.dataset.train) % self.train_batch_size
            if remainder:
                self.remainder_step = prepare_step(
                    self.device, lambda: self._train_step(self.model, remainder), self.reset
                )

    def reset(self) -> None:
        """Put weights, optimizer, counters and the order of the images back."""
        self.state.restore()
        self.train_batches.restart()
        self.test_batches.restart()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Train for all epochs and return losses, accuracies, durations and throughput."""
        from workloads.common.engine import Pacer

        pacer = Pacer(self.device, recorder)
        if self.args.evaluate is not None:
            loss, accuracy, seconds = self._test(pacer)
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"the test loss of {self.args.evaluate} is {loss}: its weights are of a "
                    "training that diverged; train again with a lower --lr"
                )
            return {"final_test_loss": loss, "test_seconds": seconds} | self._accuracy(accuracy)
        epochs = []
        with console.progress(self._steps_a_job(), "training") as progress:
            for epoch in range(1, self.args.epochs + 1):
                epochs.append(self._run_epoch(epoch, pacer, progress))
        training_seconds = sum(epoch["epoch_seconds"] for epoch in epochs)
        last = epochs[-1]
        if self.args.save_model:
            self._save_model(last)
        return {
            "epochs": epochs,
            "mean_epoch_seconds": training_seconds / len(epochs),
            "samples_per_second": len(epochs) * len(self.dataset.train) / training_seconds,
            "final_train_loss": last["train_loss"],
            "final_test_loss": last["test_loss"],
        } | self._accuracy(last["test_accuracy_percent"])

    def settings(self) -> dict:
        """Return what the job was run with."""
        return {
            "model": "resnet50",
            "stem": self.args.stem,
            "dataset": self.dataset.name,
            "data_placement": self.train_batches.placement,
            "classes": list(self.dataset.class_names),
            "train_samples": len(self.dataset.train),
            "test_samples": len(self.dataset.test),
            "image_size": self.dataset.image_size,
            "batch_size": self.train_batch_size,
            "epochs": self.args.epochs,
            "lr": self.args.lr,
            "seed": self.args.seed,
            "engine": self.device.engine,
            "precision": self.device.precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the terminal summary, an epoch a line."""
        rows = [
            ("Dataset", f"{self.dataset.name}, {len(self.dataset.train)} training and "
             f"{len(self.dataset.test)} test images, {self.train_batches.placement}"),
        ]  # fmt: skip
        for epoch in figures.get("epochs", ()):
            rows.append(
                (f"Epoch {epoch['epoch']}",
                 f"train loss {epoch['train_loss']:.3f}, {epoch['train_accuracy_percent']:.1f} %; "
                 f"test loss {epoch['test_loss']:.3f}, {epoch['test_accuracy_percent']:.1f} %; "
                 f"{epoch['epoch_seconds']:.2f} s + {epoch['test_seconds']:.2f} s test")
            )  # fmt: skip
        if "samples_per_second" in figures:
            rows.append(("Throughput", f"{figures['samples_per_second']:.0f} samples/s"))
        accuracy = figures["final_test_accuracy_percent"]
        claim = "not claimed: synthetic images" if accuracy is None else f"{accuracy:.2f} %"
        rows.append(("Test accuracy", claim))
        if figures.get("peak_memory_mib") is not None:
            rows.append(("Peak memory", f"{figures['peak_memory_mib']:.0f} MiB (PyTorch)"))
        return rows

    def resolve(self) -> list[str]:
        """Download or decode once; return flags that find the data locally."""
        from workloads.training import image_data

        args = self.args
        dataset = image_data.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )
        arguments = ["--dataset", dataset.name]
        if dataset.name != "synthetic":
            arguments += ["--data-dir", str(args.data_dir.resolve())]
        return arguments

    def check_unfinished(self) -> None:
        """Look at the losses of the epoch in hand."""
        if self.args.evaluate is None and hasattr(self, "state"):
            when = "the loss of the epoch that was stopped"
            self.totals.require_finite(when, self.args.lr, self.device.precision)

    def close(self) -> None:
        """End the decoding processes."""
        for name in ("train_batches", "test_batches"):
            if hasattr(self, name):
                getattr(self, name).close()

    def _refuse_batch_of_one(self) -> None:
        """Batch normalization in training needs two values a channel, and the last maps are 1x1."""
        stride = 8 if self.args.stem == "cifar" else 32
        sizes = {self.train_batch_size, len(self.dataset.train) % self.train_batch_size}
        if self.args.evaluate is None and self.dataset.image_size <= stride and 1 in sizes:
            raise UsageError(
                f"with --batch-size {self.args.batch_size} a batch of {len(self.dataset.train)} "
                "images would hold a single one, which batch normalization cannot train on; "
                "choose another --batch-size or --train-samples"
            )

    def _require_finite(self, loss: float, when: str) -> None:
        from workloads.training.epoch_totals import require_finite_loss

        require_finite_loss(loss, when, self.args.lr, self.device.precision)

    def _steps_a_job(self) -> int:
        return self.args.epochs * math.ceil(len(self.dataset.train) / self.train_batch_size)

    def _run_epoch(self, epoch: int, pacer, progress: console.Progress) -> dict:
        """Train one epoch and test; the training part alone is timed as the epoch."""
        self.model.train()
        start_seconds = time.monotonic()
        self.train_batches.start_epoch()
        full_steps, remainder = divmod(len(self.dataset.train), self.train_batch_size)
        for _ in range(full_steps):
            self.train_batches.feed(self.train_batch_size)
            pacer.run("train_step", self.train_step)
            progress.advance(detail=f"epoch {epoch}")
        if remainder:
            self.train_batches.feed(remainder)
            pacer.run("train_step_partial", self.remainder_step)
            progress.advance()
        pacer.drain()
        train_loss, train_accuracy = self.totals.take(len(self.dataset.train))
        epoch_seconds = time.monotonic() - start_seconds
        self._require_finite(train_loss, f"the training loss in epoch {epoch}")
        test_loss, test_accuracy, test_seconds = self._test(pacer)
        # The last step's weights show in the test alone.
        self._require_finite(test_loss, f"the test loss after epoch {epoch}")
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy_percent": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy_percent": test_accuracy,
            "epoch_seconds": epoch_seconds,
            "test_seconds": test_seconds,
        }

    def _test(self, pacer) -> tuple[float, float, float]:
        """Return loss, accuracy in percent and duration in seconds on the test images."""
        self.model.eval()
        start_seconds = time.monotonic()
        self.test_batches.start_epoch()
        full_steps, remainder = divmod(len(self.dataset.test), self.test_batch_size)
        for _ in range(full_steps):
            self.test_batches.feed(self.test_batch_size)
            pacer.run("test_step", self.test_step)
        if remainder:
            self.test_batches.feed(remainder)
            pacer.run("test_step_partial", lambda: self._test_step(self.model, remainder))
        pacer.drain()
        loss, accuracy = self.totals.take(len(self.dataset.test))
        return loss, accuracy, time.monotonic() - start_seconds

    def _train_step(self, network, count: int) -> None:
        import torch.nn.functional as F

        images, labels = self.train_batches.take(count)
        # Without gradients the backward pass writes new ones instead of adding to zeros: 10.9 ms a
        # step instead of 11.3 ms on an H100. In a graph they lie in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        with self.device.autocast():
            logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        # Warm-up steps may run past the end of the table. A plain index by a scalar tensor would
        # read it on the host, which a capture forbids.
        last = len(self.lr_table) - 1
        self.lr.copy_(self.lr_table.take(self.step_index.clamp(max=last)))
        self.optimizer.step()
        self.step_index.add_(1)
        self.totals.add(logits.detach(), labels, loss.detach())

    def _test_step(self, network, count: int) -> None:
        import torch
        import torch.nn.functional as F

        images, labels = self.test_batches.take(count)
        with torch.no_grad(), self.device.autocast():
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
        self.totals.add(logits, labels, loss)

    def _accuracy(self, measured_percent: float) -> dict:
        """Return the final accuracy, or None where the images are synthetic: it means nothing."""
        is_real = self.dataset.name != "synthetic"
        return {"final_test_accuracy_percent": measured_percent if is_real else None}

    def _save_model(self, last_epoch: dict) -> None:
        from workloads.training.image_model import save_model

        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self.args.results_dir / f"resnet50_{self.args.stem}_{stamp}.pt"
        save_model(
            self.model, path, classes=list(self.dataset.class_names), settings=self.settings(),
            test_accuracy_percent=last_epoch["test_accuracy_percent"],
        )  # fmt: skip
        console.note(f"model: {path}")


def learning_rates(highest: float, steps: int) -> list[float]:
    """Return a learning rate for each step: linearly up over the first 30 %, then down to 0."""
    peak = max(1, round(WARM_UP_FRACTION * steps))
    rising = [highest * (step + 1) / peak for step in range(peak)]
    falling = [highest * (steps - step) / (steps - peak + 1) for step in range(peak, steps)]
    return (rising + falling)[:steps]


main = client.main_of(ResNetTraining, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
