"""ResNet50 for images of any size, and the files that keep a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common.checkpoints import read_checkpoint
from workloads.common.errors import UsageError
from workloads.common.whole_files import written_whole

if TYPE_CHECKING:
    from torch import nn

FIX = "name a model kept by --save-model with --evaluate"


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
