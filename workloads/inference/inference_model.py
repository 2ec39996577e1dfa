"""A classifier made ready for fast inference: layers fused, cast once, channels last."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from workloads.common.device import ComputeDevice
from workloads.common.engine import compile_module
from workloads.common.weights import LoadedWeights, load_classifier, resolve_weights

if TYPE_CHECKING:
    from torch import nn

MODELS = ("resnet50", "resnet18", "vgg16")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--weights``."""
    parser.add_argument(
        "--model", choices=MODELS, default="resnet50", help="architecture (default: resnet50)"
    )
    parser.add_argument(
        "--weights", default="auto", metavar="auto|imagenet|none|FILE",
        help="auto: torchvision's ImageNet weights, else random ones with a warning; imagenet: an "
        "error without them; none: random; FILE: a saved state dict (default: auto)",
    )  # fmt: skip


def resolve_model_flags(model: str, weights: str) -> tuple[list[str], list[str]]:
    """Find or download the weights once; return (flags that need no network, notes)."""
    path, kind = resolve_weights(model, weights)
    arguments = ["--weights", "none" if path is None else str(path)]
    return arguments, weights_notes(model, weights, kind)


def weights_notes(model: str, asked: str, kind: str) -> list[str]:
    """Return what a reader of the result must know about the weights."""
    if asked == "auto" and kind == "random":
        return [f"no pretrained weights for {model} could be had: its weights are random"]
    return []


def load_inference_model(
    device: ComputeDevice, name: str, weights: str, seed: int
) -> tuple[nn.Module, LoadedWeights]:
    """Load ``name`` onto ``device``; its inputs are (n, 3, 224, 224) in ``device.model_dtype``.

    The model is cast once: autocast would convert the weights in every forward pass, and at batch
    size 1 that costs more than bf16 saves. Batch norms are folded in; except under the eager
    engine, which is the reference, activations are fused into the convolutions as well.

    Raises:
        UsageError: The weights cannot be had or do not fit.
    """
    import torch

    from workloads.inference.layer_fusion import fold_batch_norm, fuse_activations

    model, loaded = load_classifier(name, weights, seed)
    fold_batch_norm(model)
    if device.is_cuda and device.engine != "eager":
        model = fuse_activations(model)
    model.to(device.torch_device, device.model_dtype, memory_format=torch.channels_last)
    return compile_module(device, model), loaded
