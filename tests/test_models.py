"""Classifiers made ready for inference: folded, fused, batched; the same outputs as before."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse
from torchvision import models

from workloads.common.device import ComputeDevice
from workloads.common.errors import UsageError
from workloads.inference.models import (
    Classifier,
    fuse_activations,
    load_inference_model,
    require_model,
)

CPU = ComputeDevice(torch.device("cpu"), "fp32", "eager")


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


@pytest.mark.parametrize(
    ("name", "plain", "with_residual"),
    [("resnet18", 9, 8), ("mobilenet_v3_small", 14, 0)],
)
def test_every_relu_behind_a_convolution_is_fused_and_no_output_changes(
    monkeypatch, name, plain, with_residual
):
    calls = []

    # cuDNN's fused kernels need a GPU; what they compute is defined by these lines.
    def convolution_relu(images, weight, bias, *geometry):
        calls.append("plain")
        return F.relu(F.conv2d(images, weight, bias, *geometry))

    def convolution_add_relu(images, weight, residual, alpha, bias, *geometry):
        calls.append("with residual")
        return F.relu(F.conv2d(images, weight, bias, *geometry) + alpha * residual)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    model = classifier_with_trained_norms(name)
    expected = model(pictures())
    fused = fuse(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    fuse_activations(fused)
    assert (fused(pictures()) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (calls.count("plain"), calls.count("with residual")) == (plain, with_residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16", "regnet_y_400mf"])
def test_cudnn_fuses_what_the_layers_compute(name, dtype):
    model = fuse(classifier_with_trained_norms(name))
    model.to("cuda", memory_format=torch.channels_last)
    images = pictures().to("cuda", memory_format=torch.channels_last)
    expected = model(images)
    fused = copy.deepcopy(model)
    fuse_activations(fused)
    difference = (fused.to(dtype)(images.to(dtype)).float() - expected).abs().max()
    assert difference < (1e-3 if dtype == torch.float32 else 5e-2) * expected.abs().max()


@pytest.mark.parametrize("name", ["vit_b_16", "shufflenet_v2_x0_5"])
def test_any_classifier_of_torchvision_is_served(name):
    model, weights = load_inference_model(CPU, name, "none", seed=1)
    assert weights.kind == "random"
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit_b_16", "mobilenet_v3_small", "googlenet", "swin_t"])
def test_any_classifier_of_torchvision_is_served_from_a_graph(name):
    device = ComputeDevice(torch.device("cuda:0"), "bf16", "graph")
    classifier = Classifier(device, name, "none", seed=1, max_batch=2)
    classifier.warm_up()
    rows = classifier.finish(classifier.start([np.zeros((1, 224, 224, 3), np.uint8)]))
    assert rows.shape == (1, 10) and np.isfinite(rows).all()


def test_a_model_that_cannot_be_traced_runs_as_it_is(monkeypatch):
    class Undecided(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) if images.sum() > 0 else -images.mean((2, 3))

    loaded = SimpleNamespace(kind="random", class_names=("a", "b", "c"))
    monkeypatch.setattr(
        "workloads.inference.models.load_classifier", lambda *_: (Undecided(), loaded)
    )
    model, _ = load_inference_model(CPU, "resnet18", "none", seed=1)
    assert model(-torch.ones(1, 3, 8, 8)).tolist() == [[1.0] * 3]


@pytest.mark.parametrize(
    ("name", "said"),
    [("vitb16", "vit_b_16"), ("?", "resnet50"), ("fasterrcnn_resnet50_fpn", "no classifier")],
)
def test_what_is_no_classifier_is_refused_with_the_nearest(name, said):
    with pytest.raises(UsageError, match=said):
        require_model(name)


def by_hand(pictures: np.ndarray) -> list[list[float]]:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    model, _ = load_inference_model(CPU, "resnet18", "none", seed=1)
    values, indices = model((pixels - mean) / std).softmax(1).topk(5)
    return torch.cat((values, indices), 1).tolist()


def test_a_batch_is_classified_as_its_pictures_are_and_outlives_the_next_one():
    classifier = Classifier(CPU, "resnet18", "none", seed=1, max_batch=4)
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 256, (n, 224, 224, 3), dtype=np.uint8) for n in (1, 2))
    rows = classifier.finish(classifier.start([second, first]))
    classifier.finish(classifier.start([np.zeros_like(second)]))
    for row, expected in zip(rows, by_hand(np.concatenate((second, first))), strict=True):
        assert row.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
def test_batches_of_changing_size_on_a_gpu_keep_their_answers_apart():
    device = ComputeDevice(torch.device("cuda:0"), "bf16", "graph")
    classifier = Classifier(device, "resnet18", "none", seed=1, max_batch=8)
    classifier.warm_up()
    random = np.random.default_rng(0)
    known = random.integers(0, 256, (8, 1, 224, 224, 3), dtype=np.uint8)
    alone = [classifier.finish(classifier.start([picture]))[0] for picture in known]
    for turn in range(200):
        order = random.permutation(8)[: 1 + turn % 8]
        rows = classifier.finish(classifier.start([known[index] for index in order]))
        best = [alone[index][5] for index in order]
        assert rows[:, 5].tolist() == best
