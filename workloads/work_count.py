#!/usr/bin/env python3
"""Count the operations and bytes that one step of a job cannot do without, as JSON.

    python3 workloads/work_count.py --job resnet50-training-cifar --batch-size 128

The workload's own model runs one step on PyTorch's meta device, which computes shapes and nothing
else: no GPU is needed and no memory. Counted are the heavy operators (convolution, matrix product,
attention, forward and backward) in bf16, each reading its inputs and writing its outputs once;
operations are those of ``torch.utils.flop_counter`` (a multiplication and an addition are two).
What lies between them is taken as free, fused perfectly into its neighbors. A training step also
reads and writes each parameter and each value of the optimizer once, in fp32, and reads each
gradient once.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workloads.common import cli, torch
from workloads.common.errors import EXIT_OK, UsageError, first_line

ELEMENT_BYTES = 2  # bf16
STATE_ELEMENT_BYTES = 4  # fp32
# What a step reads and writes for each parameter: itself and what its optimizer keeps.
SGD_MOMENTUM_TENSORS = 2
ADAMW_TENSORS = 3

# (operator, operations, bytes) -> how often.
Operators = Counter[tuple[str, int, int]]


def main() -> int:
    """Count one job's step and print it.

    Raises:
        UsageError: The model of the job has no such size.
    """
    args = parse_arguments()
    try:
        work = JOBS[args.job](args)
    # Each layer says in its own way that it cannot be made, or run, at a size.
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"{args.job} cannot be counted at these sizes ({first_line(error)}); give others"
        ) from error
    print(json.dumps({"job": args.job, "batch_size": args.batch_size, **work}))
    return EXIT_OK


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = cli.OneLineParser(
        description="Count the operations and bytes of one step of a job, on no device at all.",
        epilog="What is counted stands at the top of this file.",
    )
    flag = cli.flags(parser, "the job")
    flag("--job", None, "which job", required=True, choices=sorted(JOBS))
    number = functools.partial(flag, type=cli.positive_int, metavar="N")
    number("--batch-size", None, "images or texts a step", required=True)
    number("--image-size", None, "pixels (default: 32 in training, 224 in inference)")
    number("--classes", None, "outputs (default: ResNet50 training 10, BERT 2, inference 1000)")
    number("--max-length", 128, "BERT: tokens a text")
    number("--layers", None, "BERT: layers (default: 12)")
    number("--hidden", None, "BERT: hidden size (default: 768)")
    return parser.parse_args()


def count_resnet_training(args: argparse.Namespace, stem: str) -> dict:
    """Count a training step of ResNet50 with SGD and momentum."""
    from workloads.training.resnet_training import build_resnet50

    size = args.image_size or 32
    with torch.device("meta"):
        model = build_resnet50(args.classes or 10, stem).to(torch.bfloat16)
        images = torch.zeros(args.batch_size, 3, size, size, dtype=torch.bfloat16)
    return training_work(lambda: model(images), model, SGD_MOMENTUM_TENSORS)


def count_bert_training(args: argparse.Namespace) -> dict:
    """Count a training step of BERT with AdamW."""
    from workloads.training.bert_training import build_model

    with torch.device("meta"):
        model = build_model(args.classes or 2, args.max_length, args.layers, args.hidden)
        model = model.to(torch.bfloat16)
        tokens = torch.zeros(args.batch_size, args.max_length, dtype=torch.int64)
        mask = torch.zeros(args.batch_size, 1, 1, args.max_length, dtype=torch.bfloat16)
    return training_work(lambda: model(tokens, attention_mask=mask).logits, model, ADAMW_TENSORS)


def count_inference(args: argparse.Namespace, name: str) -> dict:
    """Count a forward pass of one of torchvision's classifiers, batch norm folded in."""
    import torchvision
    from torch.fx.experimental.optimization import fuse

    size = args.image_size or 224
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=args.classes or 1000)
        images = torch.zeros(args.batch_size, 3, size, size, dtype=torch.bfloat16)
    model = fuse(model.eval()).to(torch.bfloat16)
    with torch.no_grad():
        return _work(count_operators(lambda: model(images)), model, 0)


def training_work(
    forward: Callable[[], torch.Tensor], model: torch.nn.Module, state_tensors: int
) -> dict:
    """Return the work of a training step of ``model``.

    Args:
        forward: Returns the logits of a batch.
        model: Its parameters are all trained.
        state_tensors: Tensors of a parameter's size, itself among them, that the optimizer reads
            and writes once.
    """
    from torch.nn.functional import cross_entropy

    def step() -> None:
        logits = forward()
        cross_entropy(logits, logits.new_zeros(len(logits)).long()).backward()

    model.train()
    # Gradients were written by the operators; the optimizer reads them once.
    bytes_each = 2 * state_tensors * STATE_ELEMENT_BYTES + ELEMENT_BYTES
    return _work(count_operators(step), model, bytes_each)


def _work(found: Operators, model: torch.nn.Module, state_bytes_each: int) -> dict:
    """Return plain data for JSON: the operators (one entry for equal ones) and totals."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    operators: list[dict[str, Any]] = [
        {"operator": name, "operations": operations, "bytes": size, "count": count}
        for (name, operations, size), count in found.items()
    ]
    return {
        "operations": sum(entry["operations"] * entry["count"] for entry in operators),
        "operator_bytes": sum(entry["bytes"] * entry["count"] for entry in operators),
        "state_bytes": parameters * state_bytes_each,
        "parameters": parameters,
        "operators": operators,
    }


def count_operators(work: Callable[[], None]) -> Operators:
    """Run ``work`` once and count its heavy operators: those the flop counter has a formula for."""
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    found: Operators = Counter()

    class CountHeavy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None:
                operations = int(formula(*args, **kwargs, out_val=out))
                name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
                found[name, operations, _tensor_bytes([args, kwargs, out])] += 1
            return out

    class FuseAttention(TorchFunctionMode):
        """The meta device would take attention apart, with every score written and read."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is scaled_dot_product_attention:
                return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
            return func(*args, **(kwargs or {}))

    with CountHeavy(), FuseAttention():
        work()
    return found


def _tensor_bytes(values: Iterable[object]) -> int:
    """Bytes of all tensors in nested arguments; a broadcast one counts as it is stored."""
    from torch.utils._pytree import tree_leaves

    return sum(
        min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    )


JOBS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "resnet50-training-cifar": lambda args: count_resnet_training(args, "cifar"),
    "resnet50-training-imagenet": lambda args: count_resnet_training(args, "imagenet"),
    "bert-training": count_bert_training,
    "resnet50-inference": lambda args: count_inference(args, "resnet50"),
    "resnet18-inference": lambda args: count_inference(args, "resnet18"),
    "vgg16-inference": lambda args: count_inference(args, "vgg16"),
}

if __name__ == "__main__":
    cli.run_main(main)
