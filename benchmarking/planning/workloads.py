"""The jobs that there are, and the mixes and pairs that are made of them: every experiment.

Plain data, for whoever adds one; `plan` lays out what runs with what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SIZE_GUIDE, SIZE_QUICK, SIZE_CPU = "guide", "quick", "cpu"


@dataclass(frozen=True)
class WorkloadKind:
    """One of the project's workloads: how it is called, its script, its flags by job size.

    `has_latency` says whether durations of its units are response times. `job_seconds` is about how
    long a job takes alone, by size; `memory_mib` what a client of it takes of a card, its CUDA
    context included, at the sizes for GPUs (`None`: never measured).
    """

    label: str
    script: str
    arguments: Mapping[str, tuple[str, ...]]
    job_seconds: Mapping[str, float]
    memory_mib: float | None = None
    has_latency: bool = False


# The guide's sizes are each script's defaults, spelled out so that the record shows them. The CPU
# sizes are for two cores: one thread takes about 15 s for a BERT job, 6 s for a ResNet50 job and
# 3 to 6 s for the two others. Seconds and memory on a GPU are those of an H100: the table of
# docs/experiments.md, and memory_used_mib_max of each job alone.
WORKLOADS: Mapping[str, WorkloadKind] = {
    "resnet_training": WorkloadKind(
        "ResNet50 training",
        "workloads/training/resnet_training.py",
        {
            SIZE_GUIDE: ("--batch-size", "128", "--epochs", "5"),
            SIZE_QUICK: ("--batch-size", "128", "--epochs", "1", "--train-samples", "12800"),
            SIZE_CPU: ("--stem", "imagenet", "--batch-size", "16", "--epochs", "1",
                       "--train-samples", "320"),
        },
        {SIZE_GUIDE: 22, SIZE_QUICK: 1.2, SIZE_CPU: 6},
        memory_mib=3450,
    ),
    "batch_inference": WorkloadKind(
        "Batch inference",
        "workloads/inference/batch_inference.py",
        {
            SIZE_GUIDE: ("--model", "resnet50", "--batch-size", "32", "--num-batches", "100"),
            SIZE_QUICK: ("--model", "resnet50", "--batch-size", "32", "--num-batches", "100"),
            SIZE_CPU: ("--model", "resnet18", "--batch-size", "1", "--num-batches", "60"),
        },
        {SIZE_GUIDE: 0.2, SIZE_QUICK: 0.2, SIZE_CPU: 5},
        memory_mib=1070,
        has_latency=True,
    ),
    "jupyter_simulation": WorkloadKind(
        "Jupyter session",
        "workloads/interactive/jupyter_simulation.py",
        {
            SIZE_GUIDE: ("--num-operations", "11"),
            # The guide's session in an eighth of its time: as much idle, each kind of cell twice.
            SIZE_QUICK: ("--num-operations", "8", "--burst-seconds", "0.4", "--idle-min", "0.25",
                         "--idle-max", "0.625"),
            SIZE_CPU: ("--num-operations", "4", "--burst-seconds", "1", "--idle-min", "0.3",
                       "--idle-max", "0.8", "--matrix-size", "1000", "--matrix-iterations", "20",
                       "--preprocess-iterations", "4", "--train-epochs", "2",
                       "--inference-images", "8"),
        },
        {SIZE_GUIDE: 67, SIZE_QUICK: 6.3, SIZE_CPU: 6},
        memory_mib=1590,
        has_latency=True,
    ),
    "bert_training": WorkloadKind(
        "BERT fine-tuning",
        "workloads/training/bert_training.py",
        {
            SIZE_GUIDE: ("--batch-size", "16", "--epochs", "3", "--num-samples", "1000"),
            SIZE_QUICK: ("--batch-size", "16", "--epochs", "1", "--num-samples", "1000"),
            SIZE_CPU: ("--batch-size", "4", "--epochs", "1", "--num-samples", "40",
                       "--max-length", "32", "--held-out-samples", "8"),
        },
        {SIZE_GUIDE: 1.6, SIZE_QUICK: 0.6, SIZE_CPU: 15},
        memory_mib=4800,
    ),
    # A server and its users. What they offer is half of what the server delivers alone, measured
    # in the baseline (see CARRIED_FIGURES); --rate fixes it by hand.
    "serving": WorkloadKind(
        "Inference service",
        "workloads/inference/serving_client.py",
        {
            SIZE_GUIDE: ("--model", "resnet50", "--duration", "30"),
            SIZE_QUICK: ("--model", "resnet50", "--duration", "10"),
            SIZE_CPU: ("--model", "resnet18", "--max-batch", "4", "--duration", "5"),
        },
        {SIZE_GUIDE: 30, SIZE_QUICK: 10, SIZE_CPU: 5},
        has_latency=True,
    ),
    "llm_inference": WorkloadKind(
        "Token generation",
        "workloads/inference/llm_inference.py",
        {
            SIZE_GUIDE: ("--shape", "1b", "--batch-size", "8", "--prompt-tokens", "512",
                         "--output-tokens", "128", "--requests", "8"),
            SIZE_QUICK: ("--shape", "1b", "--batch-size", "8", "--prompt-tokens", "512",
                         "--output-tokens", "128", "--requests", "2"),
            SIZE_CPU: ("--shape", "smollm2", "--layers", "2", "--batch-size", "1",
                       "--prompt-tokens", "16", "--output-tokens", "16", "--requests", "10"),
        },
        {SIZE_GUIDE: 3, SIZE_QUICK: 0.8, SIZE_CPU: 3},
        memory_mib=3500,  # seen on an H200
        has_latency=True,
    ),
    # What presses one resource of the card: which, and for which share of the time, its flags say.
    "antagonist": WorkloadKind(
        "Antagonist",
        "workloads/custom/antagonist.py",
        dict.fromkeys((SIZE_GUIDE, SIZE_QUICK, SIZE_CPU), ("--duration", "2")),
        dict.fromkeys((SIZE_GUIDE, SIZE_QUICK, SIZE_CPU), 2.0),
        memory_mib=4600,  # two buffers of 2 GiB and a context
    ),
}  # fmt: skip

ANTAGONIST = "antagonist"

# What a client of a plan file is called that runs a command of the user's own.
COMMAND_WORKLOAD = "command"
COMMAND_SCRIPT = "workloads/custom/command_client.py"

# Client i of a co-run runs workload i of its mix, starting over after the last.
MIXES: Mapping[str, tuple[str, ...]] = {
    "mixed": ("resnet_training", "batch_inference", "jupyter_simulation", "bert_training"),
    "training": ("resnet_training",),
    "inference": ("batch_inference",),
    "interactive": ("jupyter_simulation",),
    "serving": ("serving", "resnet_training", "resnet_training", "resnet_training"),
    "llm": ("llm_inference", "resnet_training", "batch_inference", "jupyter_simulation"),
}

# Every job of the mixed mix with each other one and with itself; a pair gives both directions.
PAIRS_MIX = "pairs"
PAIR_CLIENTS = 2
# Long enough for ten units of every quick job next to another, the notebook's cells (0.4 s alone)
# among them.
PAIR_WINDOW_SECONDS = 10.0
# Without a GPU two jobs are enough to show the flow: one that is all throughput, one with latency.
PAIRS_ON_CPU = ("resnet_training", "batch_inference")

# Every job next to a neighbor that presses one resource of the card all the time, and with
# `duty_steps` token generation next to one that presses its memory for a part of it.
NOISY_MIX = "noisy"
NOISY_JOBS, NOISY_JOBS_QUICK = (*MIXES["mixed"], "llm_inference"), (
    "llm_inference", "resnet_training",
)  # fmt: skip
PRESSED, PRESSED_QUICK = ("hbm", "sm", "pcie"), ("hbm", "sm")
DUTY_STEPS = ("0.25", "0.5", "0.75")
PAIRED_MIXES = (PAIRS_MIX, NOISY_MIX)
