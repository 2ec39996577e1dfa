"""The tool that measures the suite's own cost, with scripted clients on a scripted card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import program_copy
import pytest
from tools.suite_cost import sampler_cost_percent, work_rates

from benchmarking.planning.workloads import WORKLOADS

TESTS = Path(__file__).parent


def start(root: Path, *arguments: str, **behavior: object) -> subprocess.Popen[str]:
    """Start a copy of the tool, with a copy of what it needs, and a script for its clients."""
    scripts = [kind.script for kind in WORKLOADS.values()]
    program_copy.copy_programs(root, TESTS / "fakes" / "scripted_client.py", scripts)
    tool = root / "tests" / "tools" / "suite_cost.py"
    tool.parent.mkdir(parents=True)
    text = (TESTS / "tools" / "suite_cost.py").read_text()
    assert "SETTLE_SECONDS = 1.0" in text
    tool.write_text(text.replace("SETTLE_SECONDS = 1.0", "SETTLE_SECONDS = 0.2"))
    _, environment = program_copy.scripted_card(root, gpm_sm_util=70)
    rules = [{"match": "*", "unit_seconds": 0.02, "units": 5, **behavior}]
    return subprocess.Popen(
        [sys.executable, str(tool), "--output-dir", str(root / "cost"), "--clients", "2",
         *arguments],
        env={**environment, "GPU_SHARING_STATE_DIR": str(root / "state"),
             "SCRIPTED_CLIENT": json.dumps(rules)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_unit_counts_by_the_part_of_it_that_lies_in_the_window() -> None:
    def units(kind: str, starts: list[float], seconds: float) -> dict[str, Any]:
        durations = [seconds] * len(starts)
        return {"event": "units", "kind": kind, "start_seconds": starts,
                "duration_seconds": durations}  # fmt: skip

    events = [units("a", [0.0, 1.0, 2.0, 3.0], 1.0), units("b", [4.0], 4.0), {"event": "done"}]
    seen = SimpleNamespace(clients=[SimpleNamespace(events=events)])
    window = {"start_seconds": 1.5, "end_seconds": 5.0}
    # Half of the second unit, the third, the fourth, and a quarter of the long one, in 3.5 s.
    assert work_rates(seen, [window]) == [[pytest.approx((0.5 + 1 + 1 + 0.25 * 4) / 3.5)]]


def test_the_cost_is_the_geometric_mean_over_pairs_whatever_their_order() -> None:
    rates = [(False, 100.0), (True, 99.0), (True, 98.0), (False, 100.0)]
    windows = [{"is_sampled": is_on, "work_rates": [rate / 2] * 2} for is_on, rate in rates]
    cost = sampler_cost_percent(windows)
    assert cost.values == pytest.approx((1.0, 2.0))
    assert cost.mean == pytest.approx(100 * (1 - (0.99 * 0.98) ** 0.5))
    assert (cost.low, cost.high) == pytest.approx((1.0, 2.0))


def test_windows_with_the_sampler_off_and_on_take_turns_next_to_running_clients(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "--seconds", "0.4", "--repeats", "2", "--", "--model", "resnet18")
    output, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "cost" / "suite_cost.json").read_text())
    assert [window["is_sampled"] for window in found["windows"]] == [False, True, True, False]
    assert [window["sampler_cores"] is None for window in found["windows"]] == [
        True, False, False, True,
    ]  # fmt: skip
    assert found["windows"][1]["gpu"]["sm_activity_percent"] == pytest.approx(70.0)
    assert len(found["sampler_cost_percent"]["values"]) == 2
    assert 0 < found["start_skew_ms"] < 1000
    assert all(rate > 0 for window in found["windows"] for rate in window["work_rates"])
    assert 0 <= found["client_cores"] < 1
    assert "--model resnet18 --resolved yes" in " ".join(found["client_command"])
    assert "sampler costs" in output and "first units within" in output
    assert program_copy.processes_of(tmp_path) == []


def test_a_client_that_fails_ends_the_measuring_with_its_last_words(tmp_path: Path) -> None:
    process = start(tmp_path, fail="crash", fail_at=0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exit code 7 (scripted failure: crash)" in said.splitlines()[-1]
    assert program_copy.processes_of(tmp_path) == []
