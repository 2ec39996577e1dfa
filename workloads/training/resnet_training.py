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
from workloads.training.training_job import TrainingJob

if TYPE_CHECKING:
    import torch
    from torch import nn

    from workloads.common.engine import Pacer
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
    job = parser.add_argument_group("the job")
    job.add_argument("--batch-size", type=cli.positive_int, default=128, help="(default: 128)")
    job.add_argument("--epochs", type=cli.positive_int, default=5, help="(default: 5)")
    job.add_argument(
        "--lr", type=cli.positive_float, default=0.1, help="highest learning rate (default: 0.1)"
    )
    job.add_argument("--save-model", action="store_true", help="keep the trained model as .pt")
    job.add_argument(
        "--evaluate", type=Path, metavar="FILE",
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


class ResNetTraining(TrainingJob):
    """The training job: epochs of captured steps, a test pass after each."""

    name = "resnet_training"
    title = "ResNet50 training"
    samples_name = "images"
    short_job = "--train-samples 256 --epochs 1"
    label_smoothing = LABEL_SMOOTHING

    def load(self) -> None:
        """Open the device, load the images, build the model."""
        from workloads.common.device import open_device

        args = self.args
        self.is_training = args.evaluate is None
        if not self.is_training and not args.evaluate.is_file():
            raise UsageError(f"--evaluate: there is no file {args.evaluate}; {FIX}")
        self.device = open_device(args)

        import torch

        from workloads.common.engine import EpochTotals
        from workloads.training import images

        dataset = self._load_dataset()
        self.dataset = dataset.limited(args.train_samples, args.test_samples, args.seed)
        if args.stem == "cifar" and dataset.image_size > images.CIFAR_SIZE:
            console.note(
                f"images of {dataset.image_size}x{dataset.image_size} with --stem cifar are slow; "
                "--stem imagenet is meant for them"
            )
        self._load_batches()
        # Drawing the initial weights takes the CPU half a second.
        with self.device.torch_device:
            model = build_resnet50(len(dataset.class_names), args.stem)
        if not self.is_training:
            load_model(model, args.evaluate, args.stem, len(dataset.class_names))
        self.model = model.to(memory_format=torch.channels_last)
        self.totals = EpochTotals(self.device.torch_device)

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]:
        import torch

        where = self.device.torch_device
        self.lr_table = torch.tensor(
            learning_rates(self.args.lr, self._steps), dtype=torch.float32, device=where
        )
        self.lr = torch.zeros((), device=where)
        self.step_index = torch.zeros((), dtype=torch.int64, device=where)
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.lr, momentum=MOMENTUM, nesterov=True,
            weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        return optimizer, (self.step_index,)

    def _update(self) -> None:
        # Warm-up steps may run past the end of the table. A plain index by a scalar tensor would
        # read it on the host, which a capture forbids.
        last = len(self.lr_table) - 1
        self.lr.copy_(self.lr_table.take(self.step_index.clamp(max=last)))
        super()._update()
        self.step_index.add_(1)

    def _epoch_figures(self, epoch: dict, pacer: Pacer) -> dict:
        loss, accuracy, seconds = self._run_test(pacer)
        self._check(loss, f"the test loss after epoch {epoch['epoch']}")
        return {"test_loss": loss, "test_accuracy_percent": accuracy, "test_seconds": seconds}

    def _describe_epoch(self, epoch: dict) -> str:
        return (
            f"train loss {epoch['train_loss']:.3f}, {epoch['train_accuracy_percent']:.1f} %; "
            f"test loss {epoch['test_loss']:.3f}, {epoch['test_accuracy_percent']:.1f} %; "
            f"{epoch['epoch_seconds']:.2f} s + {epoch['test_seconds']:.2f} s test"
        )

    def _final_figures(self, last_epoch: dict) -> dict:
        is_real = self.dataset.name != "synthetic"
        return {
            "final_test_loss": last_epoch["test_loss"],
            "final_test_accuracy_percent": last_epoch["test_accuracy_percent"] if is_real else None,
        }

    def _finish(self, pacer: Pacer) -> dict:
        if self.is_training:
            if self.args.save_model:
                self._save_model()
            return {}
        loss, accuracy, seconds = self._run_test(pacer)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the test loss of {self.args.evaluate} is {loss}: its weights are of a "
                "training that diverged; train again with a lower --lr"
            )
        figures = self._final_figures({"test_loss": loss, "test_accuracy_percent": accuracy})
        return {"test_seconds": seconds} | figures

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

    def _describe_input(self) -> list[tuple[str, str]]:
        dataset = self.dataset
        return [
            ("Dataset", f"{dataset.name}, {len(dataset.train)} training and "
             f"{len(dataset.test)} test images, {self.train_batches.placement}"),
        ]  # fmt: skip

    def _describe_outcome(self, figures: dict) -> list[tuple[str, str]]:
        accuracy = figures["final_test_accuracy_percent"]
        claim = "not claimed: synthetic images" if accuracy is None else f"{accuracy:.2f} %"
        return [("Test accuracy", claim)]

    def resolve(self) -> list[str]:
        """Download or decode once; return flags that find the data locally."""
        dataset = self._load_dataset()
        arguments = ["--dataset", dataset.name]
        if dataset.name != "synthetic":
            arguments += ["--data-dir", str(self.args.data_dir.resolve())]
        return arguments

    def close(self) -> None:
        """End the decoding threads."""
        for batches in filter(None, (self.train_batches, self.test_batches)):
            batches.close()

    def _load_dataset(self) -> ImageDataset:
        from workloads.training import images

        args = self.args
        return images.load_dataset(
            args.dataset, args.data_dir, args.image_size, args.seed, self.warn
        )

    def _load_batches(self) -> None:
        from workloads.training import images

        args, dataset = self.args, self.dataset
        train_batch_size = min(args.batch_size, len(dataset.train))
        test_batch_size = min(TEST_BATCH_SIZE, len(dataset.test))
        if dataset.image_size > images.CIFAR_SIZE:
            test_batch_size = min(test_batch_size, args.batch_size)
        self._refuse_batch_of_one(train_batch_size)
        make_batches = functools.partial(
            images.make_batches, self.device, image_size=dataset.image_size,
            seed=self.order_seed, workers=args.loader_workers, clients=clients_on_gpu(),
        )  # fmt: skip
        self.train_batches = make_batches(dataset.train, augment=True, batch_size=train_batch_size)
        self.test_batches = make_batches(dataset.test, augment=False, batch_size=test_batch_size)

    def _refuse_batch_of_one(self, batch_size: int) -> None:
        """Batch normalization in training needs two values a channel, and the last maps are 1x1."""
        stride = 8 if self.args.stem == "cifar" else 32
        sizes = {batch_size, len(self.dataset.train) % batch_size}
        if self.is_training and self.dataset.image_size <= stride and 1 in sizes:
            raise UsageError(
                f"with --batch-size {self.args.batch_size} a batch of {len(self.dataset.train)} "
                "images would hold a single one, which batch normalization cannot train on; "
                "choose another --batch-size or --train-samples"
            )

    def _save_model(self) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self.args.results_dir / f"resnet50_{self.args.stem}_{stamp}.pt"
        save_model(
            self.model, path, classes=list(self.dataset.class_names), settings=self.settings(),
            test_accuracy_percent=self.epochs[-1]["test_accuracy_percent"],
        )  # fmt: skip
        console.note(f"model: {path}")


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
