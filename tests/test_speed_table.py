"""The speed table as a program, with scripted workloads on a scripted card, and once for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml_stub
import program_copy
import pytest
from waiting import wait_until

from benchmarking import speed_jobs

PROJECT_ROOT = Path(__file__).resolve().parents[1]
FAKE = Path(__file__).parent / "fakes" / "scripted_speed.py"


class Bench:
    """A copy of `benchmarking/` beside stand-ins for the programs that the table runs."""

    def __init__(self, root: Path) -> None:
        self.output = root / "speed"
        self.calls_path = root / "calls"
        self.script = root / "benchmarking" / "speed_table.py"
        stand_ins = {job.script for job in speed_jobs.JOBS}
        names = {"benchmarking/hardware/card_rates.py", "workloads/work_count.py", *stand_ins}
        program_copy.copy_programs(root, FAKE, names)
        self.card, self.environment = program_copy.scripted_card(root)
        self.environment["SPEED_CALLS"] = str(self.calls_path)

    def start(self, *arguments: str, **script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.script), "--output-dir", str(self.output), *arguments],
            env={**self.environment, "SPEED_SCRIPT": json.dumps(script)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, **script: str) -> tuple[int, str]:
        process = self.start(*arguments, **script)
        output, complaint = process.communicate(timeout=100)
        return process.returncode, output if process.returncode != 2 else complaint

    def table(self) -> dict[str, Any]:
        return json.loads((self.output / "speed_table.json").read_text())

    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_each_engine_stands_against_eager_fp32_and_the_floor(bench: Bench) -> None:
    code, output = bench.run("--only", "resnet50-batch32,resnet50-training-cifar")
    assert code == 0
    table = bench.table()
    rows = table["rows"]
    assert [(row["name"], row["engine"], row["precision"]) for row in rows] == [
        (name, engine, "fp32" if engine == "eager" else "bf16")
        for name in ("resnet50-training-cifar", "resnet50-batch32")
        for engine in ("eager", "graph", "compile")
    ]
    # The epoch after the first counts; 1280 images in batches of 128 are ten steps of 1 ms.
    assert [row["seconds"] for row in rows] == [8.0, 2.0, 1.0, 0.008, 0.002, 0.001]
    assert [row["speedup"] for row in rows] == [1.0, 4.0, 8.0, 1.0, 4.0, 8.0]
    assert rows[1]["floor_seconds"] == pytest.approx(0.010)
    assert [row["floor_fraction"] for row in rows[3:]] == pytest.approx([0.125, 0.5, 1.0])
    assert (table["outcome"], table["versions"]) == (
        "complete", {"torch": "scripted", "cuda": "13.0"},
    )  # fmt: skip
    text = (bench.output / "speed_table.md").read_text()
    assert text in output
    line = "| ResNet50 inference | graph, bf16 | 32 | 2.00 ms a batch (16,000 samples/s) | 4.00 x |"
    assert f"{line} 50 % (floor 1.00 ms) | 5.0 s |" in text
    assert "NVIDIA H100 80GB HBM3, driver 580.159.04, torch scripted" in text
    assert "1.00 TB/s" in text and "100 TFLOP/s" in text


def test_compile_starts_from_one_cache_that_a_short_run_filled(bench: Bench) -> None:
    assert bench.run("--only", "resnet50-batch1,vgg16-batch32", "--engines", "compile")[0] == 0
    compiled = [call for call in bench.calls() if "--engine compile" in call]
    caches = {call.partition("cache=")[2] for call in compiled}
    assert len(compiled) == 4 and len(caches) == 1 and caches != {"-"}
    assert not Path(caches.pop()).exists()
    assert compiled[0].count("--num-batches 1 ") == 1  # the short run comes first
    row = bench.table()["rows"][1]
    assert (row["startup_seconds"], row["cold_startup_seconds"]) == (5.0, 40.0)
    others = [call for call in bench.calls() if "--engine compile" not in call]
    assert all(call.endswith("cache=-") for call in others)


def test_a_cache_filled_before_says_nothing_of_a_cold_start(bench: Bench, tmp_path: Path) -> None:
    cache = tmp_path / "filled"
    cache.mkdir()
    (cache / "kernel").touch()
    bench.environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    assert bench.run("--only", "resnet50-batch1", "--engines", "compile")[0] == 0
    compiled = [call for call in bench.calls() if "--engine compile" in call]
    assert len(compiled) == 1 and compiled[0].endswith(f"cache={cache}")
    row = bench.table()["rows"][1]
    assert (row["startup_seconds"], row["cold_startup_seconds"]) == (5.0, None)


def test_a_failure_is_a_row_with_its_reason(bench: Bench) -> None:
    code, _ = bench.run("--only", "resnet18-batch32", "--engines", "graph", fail="eager")
    assert code == 1
    reference, graph = bench.table()["rows"]
    assert (reference["status"], graph["status"]) == ("failed", "ok")
    assert reference["reason"] == "batch_inference.py: error: scripted | failure"
    assert (graph["speedup"], graph["floor_fraction"]) == (None, pytest.approx(0.5))
    assert (
        "failed: batch_inference.py: error: scripted \\| failure"
        in (bench.output / "speed_table.md").read_text()
    )


def test_ctrl_c_leaves_the_finished_rows_and_no_process(bench: Bench) -> None:
    process = bench.start("--only", "resnet50-batch1", hang="graph")
    wait_until(
        lambda: bench.calls_path.exists() and "--engine graph" in bench.calls_path.read_text(),
        "the call with --engine graph",
    )
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    table = bench.table()
    assert [row["engine"] for row in table["rows"]] == ["eager"]
    assert table["outcome"] == "interrupted"
    assert "**Interrupted: rows are missing.**" in output
    assert program_copy.processes_of(bench.script.parents[1]) == []


def test_what_else_was_on_the_card_is_noted(bench: Bench) -> None:
    nvml_stub.write_state(bench.card, pids={os.getpid(): 400})
    bench.run("--only", "resnet50-batch1", "--engines", "graph")
    table = bench.table()
    assert table["rows"][0]["neighbors"] == [{"pid": os.getpid(), "used_memory_mib": 400.0}]
    (note,) = (note for note in table["notes"] if "other processes" in note)
    assert f"other processes were on the GPU: pid {os.getpid()} (" in note
    nvml_stub.write_state(bench.card, pids=None, mps_pids=None)
    bench.run("--only", "resnet50-batch1", "--engines", "graph")
    unknown = bench.table()
    assert unknown["rows"][0]["neighbors"] is None
    assert sum("on the GPU could not be asked" in note for note in unknown["notes"]) == 1
    code, said = bench.run("--gpu", "7")
    assert (code, "GPU 7 cannot be found" in said) == (2, True)
    code, said = bench.run("--data-dir", "x" * 300)
    assert (code, "is no folder: name one that is there" in said) == (2, True)
    bench.environment["TORCHINDUCTOR_CACHE_DIR"] = str(bench.card)
    code, said = bench.run("--only", "resnet50-batch1")
    assert (code, "TORCHINDUCTOR_CACHE_DIR" in said) == (2, True)


def test_an_operator_is_bound_by_its_operations_or_its_bytes() -> None:
    work = {
        "operators": [
            {"operations": 100, "bytes": 1, "count": 3},  # 1 s at 100 operations/s
            {"operations": 1, "bytes": 20, "count": 1},  # 2 s at 10 bytes/s
        ],
        "state_bytes": 5,
    }
    rates = {"copy_bytes_per_second": 10.0, "matrix_operations_per_second": 100.0}
    assert speed_jobs.floor_seconds(work, rates, steps=2) == pytest.approx(2 * (3 + 2 + 0.5))
    assert speed_jobs.floor_seconds(work, None, steps=2) is None


def test_without_a_gpu_the_real_workloads_run_tiny_and_eager(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "benchmarking/speed_table.py", "--only", "bert-training",
         "--output-dir", str(tmp_path)],
        cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "speed_table.json").read_text())
    assert [(row["engine"], row["precision"], row["floor_fraction"]) for row in table["rows"]] == [
        ("eager", "fp32", None),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in table["rows"])
    assert all(row["work"]["operations"] > 0 for row in table["rows"])
    assert "Tiny sizes" in done.stdout
