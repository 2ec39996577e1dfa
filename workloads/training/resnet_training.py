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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console
from workloads.common.device import clients_on_gpu
from workloads.common.errors import NotFiniteError, UsageError
from workloads.common.results import PROJECT_ROOT, written_whole
from workloads.common.weights import read_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from workloads.common.engine import Pacer

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
WARM_UP_FRACTION = 0.3
TEST_BATCH_SIZE = 500
FIX = "name a model kept by --save-model with --evaluate"

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
        help="threads that decode images which do not fit the GPU (default: a fair share of the "
        "cores)",
    )  # fmt: skip
    return parser.parse_args()


class ResNetTraining(client.Workload):
    """The training job: epochs of captured steps, a test pass after each."""

    name = "resnet_training"
    title = "ResNet50 training"
    epochs: Sequence[dict] = ()

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

        from workloads.common.engine import EpochTotals
        from workloads.training import images

        dataset = images.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )
        self.dataset = dataset.limited(args.train_samples, args.test_samples, args.seed)
        if args.stem == "cifar" and dataset.image_size > images.CIFAR_SIZE:
            console.note(
                f"images of {dataset.image_size}x{dataset.image_size} with --stem cifar are slow; "
                "--stem imagenet is meant for them"
            )
        self._load_batches()
        where = self.device.torch_device
        # Drawing the initial weights takes the CPU half a second.
        with where:
            model = build_resnet50(len(dataset.class_names), args.stem)
        if args.evaluate is not None:
            load_model(model, args.evaluate, args.stem, len(dataset.class_names))
        self.model = model.to(memory_format=torch.channels_last)
        self.totals = EpochTotals(where)

    def warm_up(self) -> None:
        """Prepare training and test for the engine, and go once through all that a job does."""
        import torch

        from workloads.common.engine import Pacer, Pass, TrainState, compile_module, step_pool

        where = self.device.torch_device
        self.lr_table = torch.tensor(
            learning_rates(self.args.lr, self._steps_a_job()), dtype=torch.float32, device=where
        )
        self.lr = torch.zeros((), device=where)
        self.step_index = torch.zeros((), dtype=torch.int64, device=where)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=MOMENTUM, nesterov=True,
            weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        self.state = TrainState(
            [self.model], self.optimizer, (self.step_index, *self.totals.tensors)
        )
        self.network = compile_module(self.device, self.model)
        shared = (self.reset, step_pool(self.device))
        self.model.eval()
        self.test = Pass(self.device, "test_step", self.test_batches, self._test_step, *shared)
        pacer = Pacer(self.device, client.Recorder(client.EventLog(None)))
        if self.args.evaluate is None:
            self.model.train()
            self.train = Pass(
                self.device, "train_step", self.train_batches, self._train_step, *shared
            )
            self.train.rehearse(pacer, self.totals)
        self.model.eval()
        self.test.rehearse(pacer, self.totals)
        self.reset()
        self.device.synchronize()

    def reset(self) -> None:
        """Put weights, optimizer, counters and the order of the images back."""
        self.state.restore()
        self.train_batches.restart()
        self.test_batches.restart()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Train for all epochs and return losses, accuracies, durations and throughput."""
        from workloads.common.engine import Pacer

        pacer = Pacer(self.device, recorder)
        self.epochs = []
        if self.args.evaluate is not None:
            return self._evaluate(pacer)
        advice = None if self.device.is_cuda else "--train-samples 256 --epochs 1"
        with console.progress(self._steps_a_job(), "training", advice) as progress:
            for epoch in range(1, self.args.epochs + 1):
                self._run_epoch(epoch, pacer, progress)
        if self.args.save_model:
            self._save_model()
        return self.partial_figures()

    def partial_figures(self) -> dict | None:
        """Return the figures of the finished epochs."""
        if not self.epochs:
            return None
        training_seconds = sum(epoch["epoch_seconds"] for epoch in self.epochs)
        last = self.epochs[-1]
        return {
            "epochs": self.epochs,
            "mean_epoch_seconds": training_seconds / len(self.epochs),
            "samples_per_second": len(self.epochs) * len(self.dataset.train) / training_seconds,
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
            "batch_size": self.train_batches.batch_size,
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
        rows += [("", note) for note in self.dataset.notes]
        rows += [(f"Epoch {e['epoch']}", _describe_epoch(e)) for e in figures.get("epochs", ())]
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
        from workloads.training import images

        args = self.args
        dataset = images.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )
        arguments = ["--dataset", dataset.name]
        if dataset.name != "synthetic":
            arguments += ["--data-dir", str(args.data_dir.resolve())]
        return arguments

    def check_unfinished(self) -> None:
        """Look at the losses of the epoch in hand."""
        if self.args.evaluate is None and hasattr(self, "state"):
            loss = self.totals.loss_sum.item() / self.train_batches.samples
            self._check(loss, "the loss of the epoch that was stopped")

    def close(self) -> None:
        """End the decoding threads."""
        for name in ("train_batches", "test_batches"):
            if hasattr(self, name):
                getattr(self, name).close()

    def _load_batches(self) -> None:
        from workloads.training import images

        args, dataset = self.args, self.dataset
        train_batch_size = min(args.batch_size, len(dataset.train))
        test_batch_size = min(TEST_BATCH_SIZE, len(dataset.test))
        if dataset.image_size > images.CIFAR_SIZE:
            test_batch_size = min(test_batch_size, args.batch_size)
        self._refuse_batch_of_one(train_batch_size)
        shared = {
            "seed": self.order_seed,
            "workers": args.loader_workers,
            "clients": clients_on_gpu(),
        }
        self.train_batches = images.make_batches(
            self.device, dataset.train, dataset.image_size, augment=True,
            batch_size=train_batch_size, **shared,
        )  # fmt: skip
        self.test_batches = images.make_batches(
            self.device, dataset.test, dataset.image_size, augment=False,
            batch_size=test_batch_size, **shared,
        )  # fmt: skip

    def _refuse_batch_of_one(self, batch_size: int) -> None:
        """Batch normalization in training needs two values a channel, and the last maps are 1x1."""
        stride = 8 if self.args.stem == "cifar" else 32
        sizes = {batch_size, len(self.dataset.train) % batch_size}
        if self.args.evaluate is None and self.dataset.image_size <= stride and 1 in sizes:
            raise UsageError(
                f"with --batch-size {self.args.batch_size} a batch of {len(self.dataset.train)} "
                "images would hold a single one, which batch normalization cannot train on; "
                "choose another --batch-size or --train-samples"
            )

    def _check(self, loss: float, when: str) -> None:
        from workloads.common.engine import check_loss

        what = f"{len(self.dataset.train)} images"
        warning = check_loss(loss, when, self.args.lr, self.device.precision, what)
        if warning is not None:
            self.warn(warning)

    def _steps_a_job(self) -> int:
        return self.args.epochs * math.ceil(
            self.train_batches.samples / self.train_batches.batch_size
        )

    def _run_epoch(self, number: int, pacer: Pacer, progress: console.Progress) -> None:
        """Train one epoch and test; the training part alone is timed as the epoch."""
        self.model.train()
        train_loss, train_accuracy, epoch_seconds = self.train.run(
            pacer, self.totals, number - 1, lambda: progress.advance(detail=f"epoch {number}")
        )
        self._check(train_loss, f"the training loss in epoch {number}")
        self.model.eval()
        test_loss, test_accuracy, test_seconds = self.test.run(pacer, self.totals)
        # The last step's weights show in the test alone.
        self._check(test_loss, f"the test loss after epoch {number}")
        self.epochs.append(
            {
                "epoch": number,
                "train_loss": train_loss,
                "train_accuracy_percent": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy_percent": test_accuracy,
                "epoch_seconds": epoch_seconds,
                "test_seconds": test_seconds,
            }
        )
        self.tell(f"epoch {number}/{self.args.epochs}: {_describe_epoch(self.epochs[-1])}")

    def _evaluate(self, pacer: Pacer) -> dict:
        self.model.eval()
        loss, accuracy, seconds = self.test.run(pacer, self.totals)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the test loss of {self.args.evaluate} is {loss}: its weights are of a "
                "training that diverged; train again with a lower --lr"
            )
        return {"final_test_loss": loss, "test_seconds": seconds} | self._accuracy(accuracy)

    def _train_step(self, count: int) -> None:
        import torch.nn.functional as F

        images, labels = self.train_batches.take(count)
        # Without gradients the backward pass writes new ones instead of adding to zeros: 10.9 ms a
        # step instead of 11.3 ms on an H100. In a graph they lie in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        with self.device.autocast():
            logits = self._network_for(count, self.train_batches.batch_size)(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        # Warm-up steps may run past the end of the table. A plain index by a scalar tensor would
        # read it on the host, which a capture forbids.
        last = len(self.lr_table) - 1
        self.lr.copy_(self.lr_table.take(self.step_index.clamp(max=last)))
        self.optimizer.step()
        self.step_index.add_(1)
        self.totals.add(logits.detach(), labels, loss.detach())

    def _test_step(self, count: int) -> None:
        import torch
        import torch.nn.functional as F

        images, labels = self.test_batches.take(count)
        with torch.no_grad(), self.device.autocast():
            logits = self._network_for(count, self.test_batches.batch_size)(images)
            loss = F.cross_entropy(logits, labels)
        self.totals.add(logits, labels, loss)

    def _network_for(self, count: int, batch_size: int) -> nn.Module:
        """Return the model; the last, smaller batch is not worth a compilation of its own."""
        return self.network if count == batch_size else self.model

    def _accuracy(self, measured_percent: float) -> dict:
        """Return the final accuracy, or None where the images are synthetic: it means nothing."""
        is_real = self.dataset.name != "synthetic"
        return {"final_test_accuracy_percent": measured_percent if is_real else None}

    def _save_model(self) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self.args.results_dir / f"resnet50_{self.args.stem}_{stamp}.pt"
        save_model(
            self.model, path, classes=list(self.dataset.class_names), settings=self.settings(),
            test_accuracy_percent=self.epochs[-1]["test_accuracy_percent"],
        )  # fmt: skip
        console.note(f"model: {path}")


def _describe_epoch(epoch: dict) -> str:
    return (
        f"train loss {epoch['train_loss']:.3f}, {epoch['train_accuracy_percent']:.1f} %; "
        f"test loss {epoch['test_loss']:.3f}, {epoch['test_accuracy_percent']:.1f} %; "
        f"{epoch['epoch_seconds']:.2f} s + {epoch['test_seconds']:.2f} s test"
    )


def learning_rates(highest: float, steps: int) -> list[float]:
    """Return a learning rate for each step: linearly up over the first 30 %, then down to 0."""
    peak = max(1, round(WARM_UP_FRACTION * steps))
    rising = [highest * (step + 1) / peak for step in range(peak)]
    falling = [highest * (steps - step) / (steps - peak + 1) for step in range(peak, steps)]
    return (rising + falling)[:steps]


def build_resnet50(classes: int, stem: str) -> nn.Module:
    """Return torchvision's ResNet50, randomly initialized.

    Args:
        classes: Output classes.
        stem: ``imagenet`` as published (He et al., 2016), ``cifar`` with a 3x3 first convolution of
            stride 1 and no pooling, as is customary for images of 32x32.
    """
    import torch
    from torchvision.models import resnet50

    model = resnet50(weights=None, num_classes=classes)
    if stem == "cifar":
        model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = torch.nn.Identity()
    return model


def save_model(model: nn.Module, path: Path, **about: object) -> None:
    """Keep the weights of ``model`` and what is said ``about`` them; whole or not at all."""
    import torch

    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with written_whole(path) as file:
        torch.save({"state_dict": weights, **about}, file)


def load_model(model: nn.Module, path: Path, stem: str, classes: int) -> None:
    """Load weights kept by ``save_model`` into ``model``.

    Raises:
        DamagedFileError: The file is empty, cut off or altered.
        UsageError: It is no such model, or of another stem or other classes.
    """
    saved = read_checkpoint(path, FIX, check_sums=True)
    try:
        kept_stem, kept_classes = saved["settings"]["stem"], len(saved["classes"])
        weights = saved["state_dict"]
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{path} was not kept by --save-model; {FIX}") from error
    if (kept_stem, kept_classes) != (stem, classes):
        raise UsageError(
            f"{path} was trained with --stem {kept_stem} on {kept_classes} classes; "
            "evaluate it with the same stem and dataset"
        )
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds the weights of another network; {FIX}") from error


main = client.main_of(ResNetTraining, parse_arguments)

if __name__ == "__main__":
    cli.run_main(main)
