"""The jobs of the speed table: what is run, with which flags, and what their floor is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RESNET = "workloads/training/resnet_training.py"
EPOCH, BATCH = "epoch", "batch"


@dataclass(frozen=True)
class SpeedJob:
    """One job of the table; its figure is the length of its repeated part: an epoch, or a batch.

    `guide` are its flags; `quick` and `cpu` make a smaller size of it and `prewarm` the shortest
    job with all its shapes, to fill torch.compile's cache: flags that come after the guide's.
    `work` is what `work_count.py` calls the job, and `counted` the settings of a result that its
    count depends on, with that program's flags.
    """

    name: str
    title: str
    script: str
    unit: str
    guide: str
    quick: str
    cpu: str
    prewarm: str
    work: str
    counted: Mapping[str, str]

    def seconds_of(self, figures: Mapping[str, Any]) -> float:
        """Return the job's figure from those of one run.

        Of an epoch: the median over the epochs, without the first where there are others, since
        what a process does once (growing its memory, raising the clock) falls there.
        """
        if self.unit == BATCH:
            return figures["latency_median_ms"] / 1e3
        seconds = [epoch["epoch_seconds"] for epoch in figures["epochs"]]
        return statistics.median(seconds[1:] or seconds)

    def work_flags(self, settings: Mapping[str, Any]) -> list[str]:
        """Return the flags that make `work_count.py` count what this run did."""
        flags = ["--job", self.work]
        for key, flag in self.counted.items():
            value = settings[key]
            flags += [flag, str(len(value) if isinstance(value, list) else value)]
        return flags


# Random weights: as fast as trained ones, and nothing is downloaded.
JOBS = [
    *(
        SpeedJob(
            name=f"resnet50-training-{stem}",
            title=f"ResNet50 training, {title} stem",
            script=RESNET,
            unit=EPOCH,
            guide=f"--stem {stem} --batch-size 128 --epochs 2",
            quick="--train-samples 12800",
            cpu="--batch-size 4 --epochs 1 --train-samples 8 --test-samples 4",
            prewarm="--epochs 1 --train-samples 128 --test-samples 500",
            work=f"resnet50-training-{stem}",
            counted={
                "batch_size": "--batch-size", "image_size": "--image-size", "classes": "--classes",
            },
        )
        for stem, title in (("cifar", "CIFAR"), ("imagenet", "ImageNet"))
    ),
    SpeedJob(
        name="bert-training",
        title="BERT-base training",
        script="workloads/training/bert_training.py",
        unit=EPOCH,
        guide="--model none --batch-size 16 --epochs 3",
        quick="--epochs 2",
        cpu="--layers 2 --hidden 64 --max-length 32 --batch-size 4 --epochs 1 --num-samples 8 "
        "--held-out-samples 4",
        prewarm="--epochs 1 --num-samples 16",
        work="bert-training",
        counted={
            "batch_size": "--batch-size", "max_length": "--max-length", "layers": "--layers",
            "hidden_size": "--hidden", "labels": "--classes",
        },
    ),
    *(
        SpeedJob(
            name=f"{model}-batch{size}",
            title=f"{title} inference",
            script="workloads/inference/batch_inference.py",
            unit=BATCH,
            guide=f"--model {model} --weights none --batch-size {size} --num-batches 300",
            quick="--num-batches 100",
            cpu="--batch-size 1 --num-batches 3",
            prewarm="--num-batches 1",
            work=f"{model}-inference",
            counted={"batch_size": "--batch-size"},
        )
        for model, title, size in (
            ("resnet50", "ResNet50", 1),
            ("resnet50", "ResNet50", 32),
            ("resnet50", "ResNet50", 64),
            ("resnet18", "ResNet18", 32),
            ("vgg16", "VGG16", 32),
        )
    ),
]  # fmt: skip


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
