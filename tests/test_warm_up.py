"""On a GPU: units right after `go` last as long as later ones, so nothing is left to warm up."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from held_client import HeldClient

FIRST_SECONDS, REST_SECONDS = 3.0, 9.0
FEWEST_UNITS = 5
ATTEMPTS = 3
CLIENTS = {
    "workloads/training/resnet_training.py": ("--dataset", "synthetic", "--epochs", "5"),
    "workloads/training/bert_training.py": ("--model", "none"),
    "workloads/inference/batch_inference.py": ("--weights", "none"),
    "workloads/interactive/jupyter_simulation.py": (
        "--weights", "none", "--burst-seconds", "0.1", "--idle-min", "0", "--idle-max", "0.01",
    ),
}  # fmt: skip


def units_by_kind(folder: Path, script: str) -> list[tuple[str, list[float], list[float]]]:
    """Return (kind, seconds of its first units, of its later ones) where there are enough."""
    with HeldClient(folder, script, *CLIENTS[script]) as held:
        held.wait_for("loaded")
        held.say("warm")
        held.wait_for("ready")
        go_seconds = time.monotonic()
        held.say("go")
        time.sleep(FIRST_SECONDS + REST_SECONDS)
        held.say("stop")
        assert held.exit_code() == 0
    first, rest = defaultdict(list), defaultdict(list)
    for units in held.events("units"):
        for start, seconds in zip(units["start_seconds"], units["duration_seconds"], strict=True):
            (first if start < go_seconds + FIRST_SECONDS else rest)[units["kind"]].append(seconds)
    enough = [kind for kind in first if min(len(first[kind]), len(rest[kind])) >= FEWEST_UNITS]
    return [(kind, first[kind], rest[kind]) for kind in enough]


@pytest.mark.gpu
@pytest.mark.parametrize("script", CLIENTS)
def test_units_of_the_first_seconds_last_as_long_as_later_ones(tmp_path: Path, script: str) -> None:
    # What was left to warm up shows every time; a host that others disturb does not.
    for attempt in range(ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        compared = units_by_kind(folder, script)
        assert compared
        ratios = {kind: fmean(first) / fmean(rest) for kind, first, rest in compared}
        if ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.02):
            return
    pytest.fail(f"first seconds over later ones: {ratios}")
