"""Batch inference by hand, under the suite, and its figures."""

from __future__ import annotations

import json

import pytest
import torch
from held_client import HeldClient
from torchvision import models
from workload_script import result_reader, runner_of

SCRIPT = "workloads/inference/batch_inference.py"
run_script = runner_of(SCRIPT)
only_result = result_reader(SCRIPT)
SMALL = ("--model", "resnet18", "--batch-size", "2", "--device", "cpu")


def test_a_run_by_hand_writes_every_figure_of_the_guide(tmp_path):
    done = run_script(
        *SMALL, "--num-batches", "8", "--weights", "none", "--results-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    result = only_result(tmp_path)
    figures = result["figures"]
    assert (figures["batches"], figures["batch_size"], figures["images"]) == (8, 2, 16)
    assert (
        0 < figures["latency_min_ms"] <= figures["latency_p50_ms"] <= figures["latency_p95_ms"]
        <= figures["latency_p99_ms"] <= figures["latency_max_ms"]
    )  # fmt: skip
    assert figures["latency_median_ms"] == figures["latency_p50_ms"]
    assert figures["latency_std_ms"] > 0
    assert figures["samples_per_second"] == pytest.approx(2e3 / figures["latency_mean_ms"])
    # What only a GPU can tell is unknown here, not zero.
    assert figures["device_median_ms"] is None and figures["input_copy_median_ms"] is None
    assert result["settings"]["weights"] == "random"
    assert result["identity"]["device"] == "cpu" and result["identity"]["batch_size"] == 2
    for label in ("mean", "Median", "Standard deviation", "Min / max", "P95 / P99", "Throughput"):
        assert label in done.stdout


def test_weights_from_a_file_are_used_and_named(tmp_path):
    path = tmp_path / "own.pth"
    torch.save(models.resnet18(weights=None).state_dict(), path)
    done = run_script(
        *SMALL, "--num-batches", "1", "--weights", str(path), "--results-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    settings = only_result(tmp_path)["settings"]
    assert (settings["weights"], settings["weights_source"]) == ("file", str(path))


def test_resolve_answers_with_flags_that_need_no_network(tmp_path):
    path = tmp_path / "own.pth"
    path.write_bytes(b"not looked into")
    for weights, expected in (("none", "none"), (str(path), str(path))):
        done = run_script(*SMALL, "--weights", weights, "--resolve")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["arguments"] == ["--weights", expected]


def test_on_the_leash_every_batch_is_a_latency_unit(tmp_path):
    with HeldClient(tmp_path, SCRIPT, *SMALL, "--num-batches", "3", "--weights", "none") as client:
        identity = client.start_working()
        assert (identity["batch_size"], identity["engine"]) == (2, "eager")
        jobs = client.wait_for("job", count=2)
        client.say("stop")
        assert client.exit_code() == 0
        units = client.events("units")
        assert client.events("done")[0]["jobs"] >= 2
    assert {(event["kind"], event["latency"]) for event in units} == {("batch", True)}
    for job in jobs:
        inside = [
            duration
            for event in units
            for start, duration in zip(
                event["start_seconds"], event["duration_seconds"], strict=True
            )
            if job["start_seconds"] <= start <= job["end_seconds"]
        ]
        assert len(inside) == 3
        assert max(inside) == pytest.approx(job["figures"]["latency_max_ms"] / 1e3, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--batch-size", "0"), "'0' is not"), (("--num-batches", "-1"), "'-1' is not"),
     (("--model", "lenet"), "resnet50"), (("--weights", "nowhere.pth", "--device", "cpu"),
                                          "no weights file nowhere.pth")],
)  # fmt: skip
def test_wrong_arguments_are_exit_code_2_and_one_sentence(arguments, said):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu_host_device_and_copy_times_are_apart(engine, tmp_path):
    done = run_script(
        "--model", "resnet18", "--batch-size", "4", "--num-batches", "20", "--weights", "none",
        "--device", "cuda", "--engine", engine, "--results-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = only_result(tmp_path)["figures"]
    assert 0 < figures["device_median_ms"] <= figures["latency_median_ms"] * 1.01
    assert figures["input_copy_median_ms"] > 0
