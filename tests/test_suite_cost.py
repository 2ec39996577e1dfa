"""The suite's own cost: windows by hand, and the program with scripted clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import program_copy
import pytest

from benchmarking.cost import text as cost_text
from benchmarking.cost import windows as cost_windows
from benchmarking.suite.plan import WORKLOADS

CLIENT = Path(__file__).parent / "fakes" / "scripted_client.py"
SHORT = ("--clients", "2", "--seconds", "0.4", "--repeats", "2")


def units(kind: str, starts: list[float], seconds: float) -> dict[str, Any]:
    return {
        "event": "units", "kind": kind, "latency": True, "start_seconds": starts,
        "duration_seconds": [seconds] * len(starts),
    }  # fmt: skip


def test_a_unit_counts_by_the_part_of_it_that_lies_in_the_window() -> None:
    events = [units("a", [0.0, 1.0, 2.0, 3.0], 1.0), units("b", [4.0], 4.0), {"event": "done"}]
    worth = cost_windows.mean_unit_seconds([events])
    assert worth == {"a": 1.0, "b": 4.0}
    # Half of the second unit, the third, the fourth, and a quarter of the long one, in 3.5 s.
    rate = cost_windows.work_rate(events, worth, 1.5, 5.0)
    assert rate == pytest.approx((0.5 + 1 + 1 + 0.25 * 4) / 3.5)


def test_the_cost_is_the_geometric_mean_over_pairs_whatever_their_order() -> None:
    rates = [(False, 100.0), (True, 99.0), (True, 98.0), (False, 100.0)]
    cost = cost_windows.sampler_cost_percent(rates)
    assert cost.values == pytest.approx((1.0, 2.0))
    assert cost.mean == pytest.approx(100 * (1 - (0.99 * 0.98) ** 0.5))
    assert (cost.low, cost.high) == pytest.approx((1.0, 2.0))
    # A window without its counterpart says nothing.
    assert cost_windows.sampler_cost_percent(rates[:1]) is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.1, 0.4, "under 0.5 %"), (0.6, 0.9, "over 0.5 %"), (0.1, 0.7, "not told apart")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, words: str) -> None:
    cost = {"low": low, "high": high, "is_interval": True}
    assert cost_text.sampler_verdict(cost).startswith(words)
    assert "not judged" in cost_text.sampler_verdict({**cost, "is_interval": False})


class Bench:
    """A copy of `benchmarking/` beside scripted clients, on a scripted card."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "cost"
        program_copy.copy_programs(root, CLIENT, [kind.script for kind in WORKLOADS.values()])
        _, self.environment = program_copy.scripted_card(root, gpm_sm_util=70)
        self.environment["GPU_SHARING_STATE_DIR"] = str(root / "state")

    def start(self, *arguments: str, **behavior: object) -> subprocess.Popen[str]:
        rules = [{"match": "*", "unit_seconds": 0.02, "units": 5, **behavior}]
        return subprocess.Popen(
            [sys.executable, str(self.root / "benchmarking" / "suite_cost.py"),
             "--output-dir", str(self.output), *arguments],
            env={**self.environment, "SCRIPTED_CLIENT": json.dumps(rules)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_windows_with_the_sampler_off_and_on_take_turns_beside_running_clients(
    bench: Bench,
) -> None:
    process = bench.start(*SHORT, "--", "--model", "resnet18")
    output, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = json.loads((bench.output / "suite_cost.json").read_text())
    assert [window["is_sampled"] for window in found["windows"]] == [False, True, True, False]
    assert [window["sampler_cores"] is None for window in found["windows"]] == [
        True, False, False, True,
    ]  # fmt: skip
    assert found["windows"][1]["gpu"]["sm_activity_percent"] == pytest.approx(70.0)
    assert len(found["sampler_cost_percent"]["values"]) == 2
    assert 0 < found["start_skew_ms"] < 1000
    assert found["go_skew_ms"] < found["start_skew_ms"] + 100
    assert [client["client"] for client in found["clients"]] == [0, 1]
    assert all(client["work_rate"] > 0 for client in found["clients"])
    assert all(0 <= client["window_host_cpu_fraction"] < 1 for client in found["clients"])
    for index, client in enumerate(found["clients"]):
        assert f"--model resnet18 --resolved yes --client-index {index}" in " ".join(
            client["command"]
        )
    assert "Sampler   costs" in output and "first units within" in output
    assert program_copy.processes_of(bench.root) == []


def test_a_client_that_fails_ends_the_measuring_with_its_last_words(bench: Bench) -> None:
    process = bench.start(*SHORT, fail="crash", fail_at=0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exit code 7 (scripted failure: crash)" in said.splitlines()[-1]
    assert program_copy.processes_of(bench.root) == []


def test_flags_that_a_client_refuses_are_a_usage_error_with_the_clients_words(
    bench: Bench,
) -> None:
    process = bench.start(*SHORT, resolve_exit=2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.splitlines()[-1] == "suite_cost.py: error: cannot resolve: scripted"


def test_ctrl_c_leaves_no_process(bench: Bench) -> None:
    process = bench.start("--clients", "2", "--seconds", "30", "--repeats", "1")
    while "measuring" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()[-1]) == (130, "suite_cost.py: interrupted")
    assert program_copy.processes_of(bench.root) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--mode", "mps"), 4, "enable_mps.sh"),
        (("--clients", "0"), 2, "'0' is not a whole number of 1 or more"),
        (("--output-dir", os.devnull), 2, "name another folder"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    bench: Bench, arguments: tuple[str, ...], code: int, words: str
) -> None:
    process = bench.start(*arguments)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in said and len(said.splitlines()) == 1
