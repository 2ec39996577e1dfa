"""Batch inference by hand and its figures; flags and the held client: test_client_contract.py."""

from __future__ import annotations

import pytest
import torch
from test_client_contract import BATCH as SCRIPT
from test_client_contract import SMALL_BATCH
from torchvision import models
from workload_script import only_result, run_script


def test_a_run_by_hand_writes_every_figure_of_the_guide(here, tmp_path):
    done = here.run(SCRIPT, *SMALL_BATCH, "--num-batches", "8", "--results-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    result = only_result(SCRIPT, tmp_path)
    figures = result["figures"]
    assert (figures["batches"], figures["batch_size"], figures["images"]) == (8, 2, 16)
    ordered = [figures[f"latency_{name}_ms"] for name in ("min", "p50", "p95", "p99", "max")]
    assert ordered[0] > 0 and ordered == sorted(ordered)
    assert figures["latency_median_ms"] == figures["latency_p50_ms"]
    assert figures["latency_std_ms"] > 0
    assert figures["samples_per_second"] == pytest.approx(2e3 / figures["latency_mean_ms"])
    # What only a GPU can tell is unknown here, not zero.
    assert figures["device_median_ms"] is None and figures["input_copy_median_ms"] is None
    assert result["settings"]["weights"] == "random"
    assert (result["identity"]["device"], result["identity"]["batch_size"]) == ("cpu", 2)
    for label in ("mean", "Median", "Standard deviation", "Min / max", "P95 / P99", "Throughput"):
        assert label in done.stdout


def test_weights_from_a_file_are_used_and_named(here, tmp_path):
    path = tmp_path / "own.pth"
    torch.save(models.resnet18(weights=None).state_dict(), path)
    done = here.run(SCRIPT, *SMALL_BATCH, "--num-batches", "1", "--weights", path,
                    "--results-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = only_result(SCRIPT, tmp_path)["settings"]
    assert (settings["weights"], settings["weights_source"]) == ("file", str(path))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu_host_device_and_copy_times_are_apart(engine, tmp_path):
    done = run_script(
        SCRIPT, "--model", "resnet18", "--batch-size", "4", "--num-batches", "20", "--weights",
        "none", "--device", "cuda", "--engine", engine, "--results-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = only_result(SCRIPT, tmp_path)["figures"]
    assert 0 < figures["device_median_ms"] <= figures["latency_median_ms"] * 1.01
    assert figures["input_copy_median_ms"] > 0
