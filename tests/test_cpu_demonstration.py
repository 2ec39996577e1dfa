"""run_experiments.sh for real: suite, job and analysis on the CPU, a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT_ROOT


def test_the_demonstration_measures_on_the_cpu_and_reports_it_as_such(tmp_path: Path) -> None:
    output, plan = tmp_path / "output", tmp_path / "short.toml"
    flags = ["--model", "resnet18", "--num-batches", "5"]
    plan.write_text(f'[[client]]\nworkload = "batch_inference"\narguments = {flags}\n')
    result = subprocess.run(
        ["./run_experiments.sh", "--device", "cpu", "--workloads", "1", "--plan", str(plan),
         "--modes", "time-slicing,mps", "--output", str(output)],
        cwd=PROJECT_ROOT, env={**os.environ, "PYTHON": sys.executable}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=220, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = (output / "phases.jsonl").read_text().splitlines()
    phases = sorted(map(json.loads, lines), key=lambda phase: phase["phase"])
    assert [(phase["name"], phase["status"]) for phase in phases] == [
        ("baseline", "ok"), ("cpu-demo", "ok"), ("mps", "skipped"), ("mig", "skipped"),
        ("analysis", "ok"),
    ]  # fmt: skip
    manifest = json.loads((output / phases[1]["run_folder"] / "manifest.json").read_text())
    assert manifest["effective_mode"] == "cpu-demo"
    assert manifest["baseline_run_id"] == "baseline"
    report = (output / "report.md").read_text()
    assert "CPU demonstration" in report
    assert "not asked for (--modes time-slicing,mps)" in report
    assert "no NVIDIA GPU" in report
    assert list(output.glob("*.png"))
