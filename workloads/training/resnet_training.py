#!/usr/bin/env python3
"""Experiment 1: ResNet50 trained from scratch on CIFAR-10 or on a folder of images.

The whole step (choosing the batch, crop and flip, forward, backward, optimizer) is one CUDA graph
on a GPU. The learning rate rises linearly to --lr over the first 30 % of the steps and falls
linearly to 0: that shape, with label smoothing, settles what five epochs can reach.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console, torch
from workloads.common.device import clients_on_gpu, open_device
from workloads.common.engine import Batches, EpochTotals, Pacer, Pass
from workloads.common.errors import NotFiniteError, UsageError
from workloads.common.files import written_whole
from workloads.common.results import PROJECT_ROOT
from workloads.common.weights import read_checkpoint
from workloads.training.training_job import TrainingJob

if TYPE_CHECKING:
    from workloads.training.images import ImageDataset

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
    flag = cli.flags(parser, "the job")
    flag("--batch-size", 128, "images a step")
    flag("--epochs", 5, "times through the training images")
    flag("--lr", 0.1, "highest learning rate")
    flag("--save-model", False, "keep the trained model as .pt")
    evaluate = "test a model kept by --save-model instead of training"
    flag("--evaluate", None, evaluate, type=cli.some_path, metavar="FILE")
    stem = "first layers: 3x3 without pooling for small images, or 7x7 with pooling"
    flag("--stem", "cifar", stem, choices=("cifar", "imagenet"))
    flag = cli.flags(parser, "the data")
    flag(
        "--dataset", "auto",
        "auto takes what --data-dir holds, else downloads CIFAR-10, else synthetic images",
        choices=("auto", "cifar10", "folder", "synthetic"),
    )  # fmt: skip
    flag("--data-dir", PROJECT_ROOT / "data", "folder (default: data in the project)")
    flag = functools.partial(flag, type=cli.positive_int, metavar="N")
    flag("--train-samples", None, "train on N images (default: all)")
    test = "test on N images (default: all, or as many as keep the ratio to --train-samples)"
    flag("--test-samples", None, test)
    flag("--image-size", None, "pixels seen by the network (default: 32 for 32x32, else 224)")
    workers = "threads that decode what does not fit the GPU (default: a fair share of the cores)"
    flag("--loader-workers", None, workers, type=cli.non_negative_int)
    return parser.parse_args()


class ResNetTraining(TrainingJob):
    """The training job: epochs of captured steps, a test pass after each."""

    name = "resnet_training"
    title = "ResNet50 training"
    dataset: ImageDataset
    test_batches: Batches
    test: Pass
    samples_name = "images"
    short_job = "--train-samples 256 --epochs 1"
    label_smoothing = LABEL_SMOOTHING

    def load(self) -> None:
        """Open the device, load the images, build the model."""
        args = self.args
        self.is_training = args.evaluate is None
        if not self.is_training and not args.evaluate.is_file():
            raise UsageError(f"--evaluate: there is no file {args.evaluate}; {FIX}")
        self.device = open_device(args)
        dataset = self._load_dataset()
        self.dataset = dataset.limited(args.train_samples, args.test_samples, args.seed)
        self._load_batches()
        # Drawing the initial weights takes the CPU half a second.
        with self.device.torch_device:
            model = build_resnet50(len(dataset.class_names), args.stem)
        if not self.is_training:
            size = load_model(model, args.evaluate, args.stem, list(dataset.class_names))
            if size != dataset.image_size:
                self.warn(
                    f"{args.evaluate} was trained on images of {size}x{size} and is tested on "
                    f"{dataset.image_size}x{dataset.image_size}; --image-size {size} tests it alike"
                )
        self.model = model.to(memory_format=torch.channels_last)
        self.totals = EpochTotals(self.device.torch_device)

    def _load_dataset(self) -> ImageDataset:
        from workloads.training import images

        args = self.args
        return images.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )

    def _load_batches(self) -> None:
        from workloads.training.image_batches import make_batches
        from workloads.training.images import CIFAR_SIZE

        args, dataset, size = self.args, self.dataset, self.dataset.image_size
        test_batch_size = TEST_BATCH_SIZE
        if size > CIFAR_SIZE:
            test_batch_size = min(TEST_BATCH_SIZE, args.batch_size)
            if args.stem == "cifar":
                console.note(
                    f"images of {size}x{size} with --stem cifar are slow; --stem imagenet is meant "
                    "for them"
                )
        # Batch normalization in training needs two values a channel, and the last maps may be 1x1.
        samples = len(dataset.train)
        train_batch_size = min(args.batch_size, samples)
        has_single = 1 in (train_batch_size, samples % train_batch_size)
        if self.is_training and size <= (8 if args.stem == "cifar" else 32) and has_single:
            raise UsageError(
                f"with --batch-size {args.batch_size} a batch of {samples} images would hold a "
                "single one, which batch normalization cannot train on; choose another "
                "--batch-size or --train-samples"
            )
        make = functools.partial(
            make_batches, self.device, image_size=size, seed=self.order_seed,
            workers=args.loader_workers, clients=clients_on_gpu(),
        )  # fmt: skip
        self.train_batches = make(dataset.train, augment=True, batch_size=train_batch_size)
        self.test_batches = make(dataset.test, augment=False, batch_size=test_batch_size)

    def make_optimizer(self) -> tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]:
        """Return SGD whose learning rate is a tensor on the device, and the step's number."""
        where = self.device.torch_device
        self.lr_table = torch.tensor(
            learning_rates(self.args.lr, self.steps), dtype=torch.float32, device=where
        )
        self.lr = torch.zeros((), device=where)
        self.step_index = torch.zeros((), dtype=torch.int64, device=where)
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=MOMENTUM, nesterov=True,
            weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        return optimizer, (self.step_index,)

    def update(self) -> None:
        """Update the weights at the learning rate of this step."""
        # Warm-up steps may run past the end of the table. A plain index by a scalar tensor would
        # read it on the host, which a capture forbids.
        last = len(self.lr_table) - 1
        self.lr.copy_(self.lr_table.take(self.step_index.clamp(max=last)))
        super().update()
        self.step_index.add_(1)

    def finish_epoch(self, epoch: dict, pacer: Pacer) -> dict:
        """Test after each epoch."""
        figures = self._test(pacer)
        self.check_loss(figures["test_loss"], f"the test loss after epoch {epoch['epoch']}")
        return figures

    def _test(self, pacer: Pacer) -> dict:
        self.model.eval()
        loss, accuracy, seconds = self.test.run(pacer, self.totals)
        return {"test_loss": loss, "test_accuracy_percent": accuracy, "test_seconds": seconds}

    def finish(self, pacer: Pacer) -> dict:
        """Keep the model of a training; test the one that --evaluate names."""
        if self.is_training:
            if self.args.save_model:
                self._save_model()
            return {}
        tested = self._test(pacer)
        if not math.isfinite(tested["test_loss"]):
            raise NotFiniteError(
                f"the test loss of {self.args.evaluate} is {tested['test_loss']}: its weights are "
                "of a training that diverged; train again with a lower --lr"
            )
        return {"test_seconds": tested["test_seconds"], **self.final_figures(tested)}

    def _save_model(self) -> None:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"
        name = f"resnet50_{self.args.stem}_{stamp}.pt"
        path = self.args.results_dir / name
        save_model(
            self.model, path, classes=list(self.dataset.class_names), settings=self.settings(),
            test_accuracy_percent=self.epochs[-1]["test_accuracy_percent"],
        )  # fmt: skip
        console.note(f"model: {path}")

    def final_figures(self, last_epoch: dict) -> dict:
        """Return the last test's figures; of synthetic images no accuracy is claimed."""
        is_real = self.dataset.name != "synthetic"
        return {
            "final_test_loss": last_epoch["test_loss"],
            "final_test_accuracy_percent": last_epoch["test_accuracy_percent"] if is_real else None,
        }

    def describe_epoch(self, epoch: dict) -> str:
        """Return an epoch's figures for people."""
        return (
            f"train loss {epoch['train_loss']:.3f}, {epoch['train_accuracy_percent']:.1f} %; "
            f"test loss {epoch['test_loss']:.3f}, {epoch['test_accuracy_percent']:.1f} %; "
            f"{epoch['epoch_seconds']:.2f} s + {epoch['test_seconds']:.2f} s test"
        )

    def settings(self) -> dict:
        """Return what the job was run with."""
        return super().settings() | {
            "model": "resnet50",
            "stem": self.args.stem,
            "data_placement": self.train_batches.placement,
            "classes": list(self.dataset.class_names),
            "test_samples": len(self.dataset.test),
            "image_size": self.dataset.image_size,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the terminal summary."""
        dataset = self.dataset
        data = (
            f"{dataset.name}, {len(dataset.train)} training and {len(dataset.test)} test images, "
            f"{self.train_batches.placement}"
        )
        accuracy = figures["final_test_accuracy_percent"]
        claim = "not claimed: synthetic images" if accuracy is None else f"{accuracy:.2f} %"
        return [("Dataset", data), *super().summary(figures), ("Test accuracy", claim)]

    def resolve(self) -> list[str]:
        """Download or decode once; return flags that find the data locally."""
        dataset = self._load_dataset()
        if dataset.name == "synthetic":
            return ["--dataset", "synthetic"]
        return ["--dataset", dataset.name, "--data-dir", str(self.args.data_dir.resolve())]


def learning_rates(highest: float, steps: int) -> list[float]:
    """Return a learning rate for each step: linearly up over the first 30 %, then down to 0."""
    peak = max(1, round(WARM_UP_FRACTION * steps))
    rising = [highest * (step + 1) / peak for step in range(peak)]
    falling = [highest * (steps - step) / (steps - peak + 1) for step in range(peak, steps)]
    return (rising + falling)[:steps]


def build_resnet50(classes: int, stem: str) -> torch.nn.Module:
    """Return torchvision's ResNet50, randomly initialized.

    Args:
        classes: Output classes.
        stem: ``imagenet`` as published (He et al., 2016), ``cifar`` with a 3x3 first convolution of
            stride 1 and no pooling, as is customary for images of 32x32.
    """
    from torchvision.models import resnet50

    model = resnet50(weights=None, num_classes=classes)
    if stem == "cifar":
        model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = torch.nn.Identity()
    return model


def save_model(model: torch.nn.Module, path: Path, **about: object) -> None:
    """Keep the weights of ``model`` and what is said ``about`` them; whole or not at all."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with written_whole(path) as file:
        torch.save({"state_dict": weights, **about}, file)


def load_model(model: torch.nn.Module, path: Path, stem: str, classes: list[str]) -> int:
    """Load weights kept by ``save_model`` into ``model``; return the image size of its training.

    Raises:
        DamagedFileError: The file is empty, cut off or altered.
        UsageError: It is no such model, or of another stem or other classes.
    """
    saved = read_checkpoint(path, FIX, check_sums=True)
    try:
        settings, kept_classes = saved["settings"], list(saved["classes"])
        kept_stem, image_size = settings["stem"], settings["image_size"]
        weights = saved["state_dict"]
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{path} was not kept by --save-model; {FIX}") from error
    if (kept_stem, kept_classes) != (stem, classes):
        raise UsageError(
            f"{path} was trained with --stem {kept_stem} on {len(kept_classes)} classes "
            f"({', '.join(map(str, kept_classes[:3]))} ...), and the data has {len(classes)} "
            f"({', '.join(classes[:3])} ...); evaluate it with the same stem and dataset"
        )
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds the weights of another network; {FIX}") from error
    return image_size


if __name__ == "__main__":
    cli.run_main(client.main_of(ResNetTraining, parse_arguments))
