"""A slice of the soak (`soak.py`): a kill of each kind that leaves something to look after."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import soak
from mode_script_runner import open_folder

RUN, SUITE = "run_experiments.sh", "benchmarking/benchmark_suite.py"


@pytest.mark.parametrize(
    ("script", "target", "number", "moment"),
    [
        # While MPS is on, with a suite that has nobody above it any more.
        (RUN, soak.DRIVER, signal.SIGKILL, 7.5),
        (RUN, soak.DRIVER, signal.SIGTERM, 3.0),
        (SUITE, soak.SUITE, signal.SIGKILL, 3.0),
        (SUITE, soak.A_CLIENT, signal.SIGKILL, 2.0),
    ],
)
def test_a_killed_run_leaves_nothing_behind_and_goes_on(
    script: str, target: str, number: signal.Signals, moment: float
) -> None:
    with open_folder() as folder:  # a short path: those of sockets are limited
        soak.Round(folder, script, target, number, moment).go()


def test_rounds_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (
        [str(one) for one in soak.rounds(20, seed, tmp_path, list(soak.COMMANDS))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {word for line in first for word in (soak.DRIVER, soak.SAMPLER) if word in line} == {
        soak.DRIVER, soak.SAMPLER,
    }  # fmt: skip
