"""A slice of the soak (`soak.py`): a kill of each kind that leaves something to look after."""

from __future__ import annotations

import signal

import pytest
import soak
from mode_script_runner import open_folder

RUN, SUITE = "run_experiments.sh", "benchmarking/benchmark_suite.py"


@pytest.mark.parametrize(
    ("script", "target", "number", "not_before"),
    [
        # While MPS is on.
        (RUN, soak.DRIVER, signal.SIGKILL, soak.DAEMON),
        (RUN, soak.DRIVER, signal.SIGTERM, soak.A_CLIENT),
        (SUITE, soak.SAMPLER, signal.SIGINT, soak.SAMPLER),
        (SUITE, soak.A_CLIENT, signal.SIGKILL, soak.A_CLIENT),
        ("stress_test.sh", soak.DAEMON, signal.SIGKILL, soak.A_CLIENT),
    ],
)
def test_a_killed_run_leaves_nothing_behind_and_goes_on(
    script: str, target: str, number: signal.Signals, not_before: str
) -> None:
    for _ in range(3):  # whoever was there may end in the moment of the kill: that is another round
        with open_folder() as folder:  # a short path: those of sockets are limited
            one = soak.Round(folder, script, target, number, moment=0.0, not_before=not_before)
            one.go()
        if one.was_hit:
            return
    pytest.fail(f"{one}: nobody was there any more")
