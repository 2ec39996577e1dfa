"""What a job cannot do without, counted from its model, against counts made by hand."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F
from workload_script import assert_refused

from workloads import work_count


def zeros(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="meta", requires_grad=requires_grad)


def test_a_convolution_reads_and_writes_each_tensor_once() -> None:
    layer = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False, dtype=torch.bfloat16, device="meta")
    images = zeros(2, 3, 8, 8)
    images_bytes, weight_bytes, out_bytes = 2 * 2 * 3 * 64, 2 * 4 * 27, 2 * 2 * 4 * 64
    operations = 2 * (2 * 4 * 64) * 27
    found = work_count.count_operators(lambda: layer(images).backward(zeros(2, 4, 8, 8)))
    assert found == {
        ("convolution", operations, images_bytes + weight_bytes + out_bytes): 1,
        # No gradient of the images is wanted: only that of the weight.
        ("convolution_backward", operations,
         out_bytes + images_bytes + weight_bytes + weight_bytes): 1,
    }  # fmt: skip


def test_a_training_step_adds_parameters_optimizer_and_gradients() -> None:
    layer = torch.nn.Linear(7, 3, dtype=torch.bfloat16, device="meta")
    rows = zeros(5, 7)
    work = work_count.training_work(lambda: layer(rows), layer, work_count.ADAMW_TENSORS)
    forward, weight_gradient = 2 * (35 + 21 + 3 + 15), 2 * (15 + 35 + 21)
    assert [tuple(operator.values()) for operator in work["operators"]] == [
        ("addmm", 210, forward, 1), ("mm", 210, weight_gradient, 1)
    ]  # fmt: skip
    # 24 parameters; weight, first and second moment are read and written in fp32, a gradient read.
    assert (work["parameters"], work["state_bytes"]) == (24, 24 * (3 * 2 * 4 + 2))
    assert work["operations"] == 420


def test_attention_counts_as_one_operator_that_keeps_its_scores_to_itself() -> None:
    query, key, value = (zeros(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    found = work_count.count_operators(
        lambda: F.scaled_dot_product_attention(query, key, value).backward(zeros(2, 3, 16, 8))
    )
    product = 2 * (2 * 3) * 16 * 16 * 8
    tensor = 2 * 2 * 3 * 16 * 8
    sizes = {name: (operations, size) for name, operations, size in found}
    operations, size = sizes["_scaled_dot_product_flash_attention"]
    # Four tensors, one number a row of scores in fp32, and the random state's few bytes.
    assert operations == 2 * product
    assert 4 * tensor + 4 * 2 * 3 * 16 <= size <= 4 * tensor + 4 * 2 * 3 * 16 + 64
    # The backward pass makes the scores anew: five products.
    assert sizes["_scaled_dot_product_flash_attention_backward"][0] == 5 * product


@pytest.mark.parametrize(
    ("job", "operations_an_image"),
    # The published counts of multiplications and additions, times two.
    [("resnet50-inference", 2 * 4.09e9), ("resnet18-inference", 2 * 1.81e9)],
)
def test_a_forward_pass_has_the_published_number_of_operations(
    job: str, operations_an_image: float
) -> None:
    work = work_count.JOBS[job](argparse.Namespace(batch_size=2, image_size=None, classes=None))
    assert work["operations"] == pytest.approx(2 * operations_an_image, rel=0.01)


@pytest.mark.parametrize(
    ("job", "flags"),
    [("bert-training", ("--hidden", "200")), ("vgg16-inference", ("--image-size", "5"))],
)
def test_a_size_that_no_model_has_is_one_sentence(here, job: str, flags: tuple[str, str]) -> None:
    done = here.run("workloads/work_count.py", "--job", job, "--batch-size", "1", *flags)
    assert_refused(done, f"{job} cannot be counted at these sizes (")


def test_bert_is_counted_with_fused_attention_and_adamw() -> None:
    work = work_count.JOBS["bert-training"](
        argparse.Namespace(batch_size=4, classes=2, max_length=32, layers=2, hidden=64)
    )
    counts = {}
    for entry in work["operators"]:
        counts[entry["operator"]] = counts.get(entry["operator"], 0) + entry["count"]
    assert counts["_scaled_dot_product_flash_attention"] == 2
    # Six products a layer (query, key, value, output, two of the feed-forward part), pooler, head.
    assert counts["addmm"] == 2 * 6 + 2
    assert work["state_bytes"] == work["parameters"] * 26
