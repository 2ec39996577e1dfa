"""The tool that measures the suite's own cost, with scripted clients on a scripted card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import program_copy
import pytest

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
    assert program_copy.processes_of(tmp_path) == []


def test_a_client_that_fails_ends_the_measuring_with_its_last_words(tmp_path: Path) -> None:
    process = start(tmp_path, fail="crash", fail_at=0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exit code 7 (scripted failure: crash)" in said.splitlines()[-1]
    assert program_copy.processes_of(tmp_path) == []
