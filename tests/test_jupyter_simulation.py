"""The notebook session: its plan, calibration, fixed work and figures.

Flags and the held client: test_client_contract.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT_ROOT
from no_sync import forbid_host_reads
from test_client_contract import SESSION as SCRIPT
from test_client_contract import TINY_SESSION as TINY
from workload_script import only_result, run_script

from workloads.common.device import open_device
from workloads.interactive import jupyter_simulation as session
from workloads.interactive import notebook_operations as operations
from workloads.interactive.notebook_operations import draw_sizes

# --- the plan -------------------------------------------------------------------------------------


def test_eleven_cells_follow_the_guides_order_with_ten_pauses_of_2_to_5_seconds():
    cells = session.plan_session(11, 2.0, 5.0, seed=42)
    assert [c.kind for c in cells] == [session.WORKFLOW[i % 4] for i in range(11)]
    *pauses, last = (cell.idle_after_seconds for cell in cells)
    assert all(2 <= pause <= 5 for pause in pauses)
    assert last == 0 and len(set(pauses)) == 10
    # With the default burst the session has the documented shape.
    active_seconds, idle_seconds = 11 * session.GPU_BURST_SECONDS, sum(pauses)
    assert 30 <= active_seconds <= 50 and 20 <= idle_seconds <= 40
    assert 60 <= active_seconds + idle_seconds <= 120
    assert 0.4 <= active_seconds / (active_seconds + idle_seconds) <= 0.6


def test_each_client_does_the_same_work_and_pauses_as_long_but_not_in_lockstep():
    first = session.plan_session(11, 2, 5, seed=42)
    assert first != session.plan_session(11, 2, 5, seed=43)
    plans = [session.plan_session(11, 2, 5, seed=42, client_index=index) for index in range(6)]
    assert plans[0] == first
    for plan in plans:
        assert Counter(cell.kind for cell in plan) == Counter(cell.kind for cell in first)
        assert sorted(cell.idle_after_seconds for cell in plan) == sorted(
            cell.idle_after_seconds for cell in first
        )
        assert plan[-1].idle_after_seconds == 0
    assert len({tuple(plan) for plan in plans}) == len(plans)
    delays = [session.start_delay(2, 5, 42, index) for index in range(6)]
    assert delays[0] == 0 and len(set(delays)) == 6 and max(delays) <= 3


def test_drawn_sizes_lie_in_the_guides_ranges_and_given_ones_win():
    for seed in range(50):
        sizes = draw_sizes(seed)
        assert sizes == draw_sizes(seed) != draw_sizes(seed + 1)
        assert 1000 <= sizes.matrix_size <= 2000
        assert sizes.matrix_iterations == 100
        assert 30 <= sizes.preprocess_iterations <= 50
        assert 5 <= sizes.train_epochs <= 10
        assert 50 <= sizes.inference_images <= 100
    given = draw_sizes(7, matrix_size=64, train_epochs=None)
    assert given.matrix_size == 64
    assert given.train_epochs == draw_sizes(7).train_epochs


# --- the operations -------------------------------------------------------------------------------


@pytest.fixture
def cpu_device() -> SimpleNamespace:
    return SimpleNamespace(
        torch_device=torch.device("cpu"), is_cuda=False, engine="eager", precision="fp32",
        model_dtype=torch.float32, synchronize=lambda: None, autocast=contextlib.nullcontext,
    )  # fmt: skip


@pytest.fixture
def small_sizes():
    return draw_sizes(
        0, matrix_size=16, matrix_iterations=2, preprocess_iterations=2, train_epochs=3,
        inference_images=2, image_size=32,
    )  # fmt: skip


def test_a_training_burst_learns_and_starts_from_its_beginning_each_time(
    cpu_device, small_sizes, monkeypatch
):
    network = operations.small_network(cpu_device, seed=1)
    monkeypatch.setattr(operations, "small_network", lambda device, seed: network)
    inputs, labels = operations.synthetic_digits(cpu_device, seed=1)
    untrained = F.cross_entropy(network(inputs), labels).item()
    burst = operations.train_operation(cpu_device, small_sizes, seed=1)
    burst()
    once = [parameter.detach().clone() for parameter in network.parameters()]
    assert F.cross_entropy(network(inputs), labels).item() < 0.7 * untrained
    burst()
    for parameter, expected in zip(network.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_no_operation_makes_the_host_wait_since_that_could_not_be_captured(cpu_device, small_sizes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
    prepared = [
        operations.matrix_operation(cpu_device, small_sizes, 0),
        operations.preprocess_operation(cpu_device, small_sizes, 0),
        operations.train_operation(cpu_device, small_sizes, 0),
        operations.inference_operation(cpu_device, small_sizes, 0, model),
    ]
    with forbid_host_reads():
        results = [operation() for operation in prepared]
    assert results[3].shape == (2, 10)


# --- by hand --------------------------------------------------------------------------------------


def test_a_run_by_hand_reports_every_figure_of_the_guide(here, tmp_path):
    done = here.run(SCRIPT, *TINY, "--num-operations", "6", "--burst-seconds", "0.1",
                    "--results-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = only_result(SCRIPT, tmp_path)
    figures = result["figures"]
    cells = figures["operations"]
    assert [cell["kind"] for cell in cells] == [
        "matrix", "preprocess", "train", "inference", "matrix", "preprocess",
    ]  # fmt: skip
    offsets = [cell["start_offset_seconds"] for cell in cells]
    assert offsets == sorted(offsets)
    times = [datetime.fromisoformat(cell["started_at"]) for cell in cells]
    assert (times[-1] - times[0]).total_seconds() == pytest.approx(offsets[-1], abs=0.1)
    assert figures["active_seconds"] == pytest.approx(sum(c["duration_seconds"] for c in cells))
    assert figures["idle_seconds"] == pytest.approx(sum(c["idle_after_seconds"] for c in cells))
    assert 5 * 0.01 <= figures["idle_seconds"] < 5 * 0.3 + 1
    assert figures["active_percent"] + figures["idle_percent"] == pytest.approx(100, abs=10)
    assert figures["session_seconds"] >= figures["active_seconds"] + figures["idle_seconds"]
    assert figures["gpu_active_seconds"] is None
    repeats = session.cell_repeats(figures["cell_repeats"])
    assert repeats == result["settings"]["cell_repeats"]
    for kind, cells_of_kind in (("matrix", 2), ("preprocess", 2), ("train", 1), ("inference", 1)):
        seconds = figures["operation_seconds"][kind]
        assert seconds["count"] == cells_of_kind * repeats[kind]
        assert 0 < seconds["p50_seconds"] <= seconds["p95_seconds"]
        assert seconds["mean_seconds"] > 0
    # Calibrated to 0.1 s: a tiny matrix operation must be repeated to last that long.
    assert repeats["matrix"] > 1
    assert f"--cell-repeats {figures['cell_repeats']}" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu_cells_last_as_long_as_asked_and_captured_operations_are_faster(tmp_path):
    sizes = (
        "--matrix-size", "1024", "--train-epochs", "5", "--inference-images", "50",
        "--preprocess-iterations", "30", "--weights", "none", "--num-operations", "4",
        "--idle-min", "0", "--idle-max", "0", "--burst-seconds", "1",
    )  # fmt: skip
    figures = {}
    for engine in ("graph", "eager"):
        folder = tmp_path / engine
        done = run_script(SCRIPT, *sizes, "--engine", engine, "--results-dir", folder)
        assert done.returncode == 0, done.stderr
        figures[engine] = only_result(SCRIPT, folder)["figures"]
    for cell in figures["graph"]["operations"]:
        assert cell["duration_seconds"] == pytest.approx(1.0, rel=0.3)
    assert figures["graph"]["gpu_active_seconds"] == pytest.approx(
        figures["graph"]["active_seconds"]
    )
    train = {name: f["operation_seconds"]["train"]["p50_seconds"] for name, f in figures.items()}
    assert train["graph"] < train["eager"]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu_operations_keep_their_tensors_and_their_results(engine, small_sizes):
    args = argparse.Namespace(device="cuda", engine=engine, precision="fp32", seed=1, gpu=None)
    device = open_device(args)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    model = model.eval().to(device.torch_device)
    classify = operations.inference_operation(device, small_sizes, 0, model)
    first = classify().clone()
    # Whatever an operation let go of would be overwritten by these.
    filler = [torch.full((2**16,), 7.0, device="cuda") for _ in range(256)]
    assert len(filler) == 256
    torch.testing.assert_close(classify(), first)


def test_a_session_that_is_interrupted_in_a_pause_was_idle_until_then(tmp_path):
    process = subprocess.Popen(
        (sys.executable, PROJECT_ROOT / SCRIPT, *TINY, "--num-operations", "2", "--idle-min", "60",
         "--idle-max", "60", "--results-dir", tmp_path),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with process:
        assert any("cell 1/2" in line for line in process.stderr)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        process.stderr.read()
    figures = only_result(SCRIPT, tmp_path)["figures"]
    paused = figures["operations"][0]["idle_after_seconds"]
    assert paused >= 0.4
    assert figures["idle_percent"] == pytest.approx(100 * paused / figures["session_seconds"])
