"""The tool that measures the suite's own cost, with scripted clients on a scripted card."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import PROJECT_ROOT
from program_copy import processes_of
from suite_bench import Bench


def start(bench: Bench, *arguments: str, **behavior: object) -> subprocess.Popen[str]:
    """Start a copy of the tool, with a script for its clients."""
    bench.script({"match": "*", "units": 5, **behavior})
    bench.add_card(gpm_sm_util=70)
    tool = bench.root / "tests" / "tools" / "suite_cost.py"
    tool.parent.mkdir(parents=True)
    text = (PROJECT_ROOT / "tests" / "tools" / "suite_cost.py").read_text()
    assert "SETTLE_SECONDS = 1.0" in text
    tool.write_text(text.replace("SETTLE_SECONDS = 1.0", "SETTLE_SECONDS = 0.2"))
    return subprocess.Popen(
        [sys.executable, str(tool), "--output-dir", str(bench.root / "cost"), "--clients", "2",
         *arguments],
        env=bench.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_windows_with_the_sampler_off_and_on_take_turns_next_to_running_clients(
    bench: Bench,
) -> None:
    process = start(bench, "--seconds", "0.4", "--repeats", "2", "--", "--model", "resnet18")
    output, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = json.loads((bench.root / "cost" / "suite_cost.json").read_text())
    assert [window["is_sampled"] for window in found["windows"]] == [False, True, True, False]
    assert [window["sampler_cores"] is None for window in found["windows"]] == [
        True, False, False, True,
    ]  # fmt: skip
    assert found["windows"][1]["gpu"]["sm_activity_percent"] == pytest.approx(70.0)
    # Clients that never pause do nearly a second of work a second, and what costs is the sampler.
    rates = [window["work_rates"] for window in found["windows"]]
    assert all(0.5 < rate < 1.1 for both in rates for rate in both)
    off, on, other_on, other_off = map(sum, rates)
    costs = [100 * (1 - on / off), 100 * (1 - other_on / other_off)]
    assert sorted(found["sampler_cost_percent"]["values"]) == pytest.approx(sorted(costs))
    assert 0 < found["start_skew_ms"] < 1000
    assert 0 <= found["client_cores"] < 1
    assert "--model resnet18 --resolved yes" in " ".join(found["client_command"])
    assert "sampler costs" in output and "first units within" in output
    assert processes_of(bench.root) == []


def test_a_client_that_fails_ends_the_measuring_with_its_last_words(bench: Bench) -> None:
    process = start(bench, fail="crash", fail_at=0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exit code 7 (scripted failure: crash)" in said.splitlines()[-1]
    assert processes_of(bench.root) == []
