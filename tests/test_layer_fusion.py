"""Folded batch norms and fused activations: the same outputs from fewer layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from workloads.inference.layer_fusion import (
    ConvolutionAddReLU,
    ConvolutionReLU,
    fold_batch_norm,
    fuse_activations,
)


def classifier_with_trained_norms(name: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = models.get_model(name, weights=None).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1, 1)
                module.bias.normal_()
    return model.requires_grad_(False)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_batch_norm_changes_no_output(name):
    model = classifier_with_trained_norms(name)
    expected = model(pictures())
    fold_batch_norm(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert (model(pictures()) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "plain", "with_residual"), [("resnet18", 9, 8), ("resnet50", 33, 16), ("vgg16", 13, 0)]
)
def test_every_activation_behind_a_convolution_is_fused_and_no_output_changes(
    monkeypatch, name, plain, with_residual
):
    # cuDNN's fused kernels need a GPU; what they compute is defined by these two lines.
    def convolution_relu(images, weight, bias, *geometry):
        return F.relu(F.conv2d(images, weight, bias, *geometry))

    def convolution_add_relu(images, weight, residual, alpha, bias, *geometry):
        return F.relu(F.conv2d(images, weight, bias, *geometry) + alpha * residual)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    model = classifier_with_trained_norms(name)
    expected = model(pictures())
    fold_batch_norm(model)
    fused = fuse_activations(model)
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(ConvolutionReLU) == plain
    assert kinds.count(ConvolutionAddReLU) == with_residual
    assert (fused(pictures()) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16"])
def test_cudnn_fuses_what_the_layers_compute(name, dtype):
    model = classifier_with_trained_norms(name)
    fold_batch_norm(model)
    model.to("cuda", memory_format=torch.channels_last)
    images = pictures().to("cuda", memory_format=torch.channels_last)
    expected = model(images)
    fused = fuse_activations(copy.deepcopy(model)).to(dtype)
    difference = (fused(images.to(dtype)).float() - expected).abs().max()
    assert difference < (1e-3 if dtype == torch.float32 else 5e-2) * expected.abs().max()
