"""The jobs of the speed table: what is run, with which flags, and what their floor is.

A job's figure is the length of its repeated part in seconds: an epoch, or a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNIT_EPOCH, UNIT_BATCH = "epoch", "batch"
SIZE_GUIDE, SIZE_QUICK, SIZE_CPU = "guide", "quick", "cpu"

# Random weights: as fast as trained ones, and nothing is downloaded.
_RESNET = "workloads/training/resnet_training.py"
_BERT = "workloads/training/bert_training.py"
_INFERENCE = "workloads/inference/batch_inference.py"


@dataclass(frozen=True)
class SpeedJob:
    """One job of the table.

    `arguments` are the flags of each size; `prewarm` makes the job as short as may be while every
    shape stays, to fill torch.compile's cache. `settings_flags` says which settings of a result
    the count of its work depends on, and under which flag of `work_count.py`.
    """

    name: str
    title: str
    script: str
    unit: str
    work: str
    arguments: Mapping[str, tuple[str, ...]]
    prewarm: tuple[str, ...]
    settings_flags: Mapping[str, str]

    @property
    def takes_images(self) -> bool:
        """Whether the job is told which images to train on."""
        return self.script == _RESNET

    def measure(self, figures: Mapping[str, Any]) -> float:
        """Return the job's figure in seconds from the figures of one run.

        Of an epoch: the median over the epochs, without the first where there are others, since
        what a process does once (growing its memory, raising the clock) falls there.
        """
        if self.unit == UNIT_BATCH:
            return figures["latency_median_ms"] / 1e3
        seconds = [epoch["epoch_seconds"] for epoch in figures["epochs"]]
        return statistics.median(seconds[1:] or seconds)

    def steps(self, settings: Mapping[str, Any]) -> float:
        """Return how many full steps' work one unit is; an epoch's last batch may be a part."""
        if self.unit == UNIT_BATCH:
            return 1.0
        return settings["train_samples"] / settings["batch_size"]

    def work_flags(self, settings: Mapping[str, Any]) -> list[str]:
        """Return the flags that make `work_count.py` count what this run did."""
        flags = ["--job", self.work]
        for key, flag in self.settings_flags.items():
            value = settings[key]
            flags += [flag, str(len(value) if isinstance(value, list) else value)]
        return flags


def _resnet_training(stem: str, stem_title: str) -> SpeedJob:
    job = ("--stem", stem, "--batch-size", "128")
    tiny = ("--stem", stem, "--batch-size", "4", "--epochs", "1", "--train-samples", "8",
            "--test-samples", "4")  # fmt: skip
    return SpeedJob(
        name=f"resnet50-training-{stem}",
        title=f"ResNet50 training, {stem_title}",
        script=_RESNET,
        unit=UNIT_EPOCH,
        work=f"resnet50-training-{stem}",
        arguments={
            SIZE_GUIDE: (*job, "--epochs", "2"),
            SIZE_QUICK: (*job, "--epochs", "2", "--train-samples", "12800"),
            SIZE_CPU: tiny,
        },
        prewarm=("--epochs", "1", "--train-samples", "128", "--test-samples", "500"),
        settings_flags={
            "batch_size": "--batch-size", "image_size": "--image-size", "classes": "--classes",
        },
    )  # fmt: skip


def _bert_training() -> SpeedJob:
    job = ("--model", "none", "--batch-size", "16")
    return SpeedJob(
        name="bert-training",
        title="BERT-base training",
        script=_BERT,
        unit=UNIT_EPOCH,
        work="bert-training",
        arguments={
            SIZE_GUIDE: (*job, "--epochs", "3"),
            SIZE_QUICK: (*job, "--epochs", "2"),
            SIZE_CPU: ("--model", "none", "--layers", "2", "--hidden", "64", "--max-length", "32",
                       "--batch-size", "4", "--epochs", "1", "--num-samples", "8",
                       "--held-out-samples", "4"),
        },
        prewarm=("--epochs", "1", "--num-samples", "16"),
        settings_flags={
            "batch_size": "--batch-size", "max_length": "--max-length", "layers": "--layers",
            "hidden_size": "--hidden", "labels": "--classes",
        },
    )  # fmt: skip


def _batch_inference(model: str, title: str, batch_size: int) -> SpeedJob:
    def job(batches: int) -> tuple[str, ...]:
        return ("--model", model, "--weights", "none", "--batch-size", str(batch_size),
                "--num-batches", str(batches))  # fmt: skip

    return SpeedJob(
        name=f"{model}-batch{batch_size}",
        title=f"{title} inference",
        script=_INFERENCE,
        unit=UNIT_BATCH,
        work=f"{model}-inference",
        arguments={
            SIZE_GUIDE: job(300),
            SIZE_QUICK: job(100),
            SIZE_CPU: ("--model", model, "--weights", "none", "--batch-size", "1",
                       "--num-batches", "3"),
        },
        prewarm=("--num-batches", "1"),
        settings_flags={"batch_size": "--batch-size"},
    )  # fmt: skip


JOBS: Sequence[SpeedJob] = (
    _resnet_training("cifar", "CIFAR stem"),
    _resnet_training("imagenet", "ImageNet stem"),
    _bert_training(),
    *(_batch_inference("resnet50", "ResNet50", batch_size) for batch_size in (1, 32, 64)),
    _batch_inference("resnet18", "ResNet18", 32),
    _batch_inference("vgg16", "VGG16", 32),
)


def floor_seconds(
    work: Mapping[str, Any], rates: Mapping[str, Any] | None, steps: float
) -> float | None:
    """Return the least seconds that `steps` steps can take on a card of these rates.

    Each operator takes at least as long as its operations at the card's matrix rate, and as its
    bytes at the card's copy bandwidth, whichever is longer; they run one after the other, and the
    bytes of parameters and optimizer come on top.

    Args:
        work: The answer of `work_count.py` for one step.
        rates: The answer of `card_rates.py`; None where there is no card.
        steps: How many steps, in full batches.
    """
    if rates is None:
        return None
    bandwidth = rates["copy_bytes_per_second"]
    matrix_rate = rates["matrix_operations_per_second"]
    operators = sum(
        entry["count"] * max(entry["operations"] / matrix_rate, entry["bytes"] / bandwidth)
        for entry in work["operators"]
    )
    return steps * (operators + work["state_bytes"] / bandwidth)
