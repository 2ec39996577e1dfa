"""Truncated, altered and foreign files, losses that are none: named, each with its exit code.

Each is a real file, broken the way a full disk or a cut line breaks it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bert_training import SCRIPT as BERT
from test_bert_training import TINY as TINY_BERT
from test_resnet_training import (
    TINY,
    cache,
    cifar_server,
    no_warning,
    run_one_layer,
    write_image_folder,
)
from torchvision import models
from torchvision.datasets import CIFAR10
from waiting import wait_until

from workloads.common import weights
from workloads.common.engine import EpochTotals
from workloads.common.errors import (
    EXIT_DAMAGED_FILE,
    EXIT_NOT_FINITE,
    DamagedFileError,
    NotFiniteError,
    UsageError,
)
from workloads.common.files import written_whole
from workloads.common.weights import read_checkpoint
from workloads.inference.batch_inference import BatchInference
from workloads.inference.batch_inference import parse_arguments as inference_arguments
from workloads.training import bert_training, images, resnet_training

__all__ = ["cache", "cifar_server", "run_one_layer"]  # fixtures


def events(log: Path, name: str) -> list[dict]:
    found = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    return [event for event in found if event["event"] == name]


# --- losses and outputs that are none -------------------------------------------------------------


def test_a_training_that_diverges_ends_with_its_epoch_rate_and_way_out(tmp_path, run_one_layer):
    arguments = [value if value != "0.01" else "1e9" for value in TINY]
    done = run_one_layer(*arguments, "--epochs", "9", "--results-dir", str(tmp_path))
    assert done.returncode == EXIT_NOT_FINITE
    *_, sentence = done.stderr.strip().splitlines()  # on a slow machine signs of life come first
    for part in ("diverged", "in epoch ", "learning rate 1e+09", "fp32", "try --lr 1e+08"):
        assert part in sentence
    assert not list(tmp_path.iterdir())


def test_a_diverged_client_that_is_stopped_inside_an_epoch_does_not_end_well(
    tmp_path, monkeypatch, here
):
    log = tmp_path / "events.jsonl"

    def units_done() -> int:
        return sum(len(units["start_seconds"]) for units in events(log, "units"))

    def commands() -> Iterator[str]:
        yield from ("warm\n", "go\n")
        wait_until(lambda: units_done() >= 3, "three steps", seconds=150)
        yield "stop\n"

    monkeypatch.setattr(sys, "stdin", commands())
    flags = ("--lr", "1e9", "--epochs", "1", "--num-samples", "5000")
    done = here.run(BERT, *TINY_BERT, *flags, "--events", str(log), "--hold")
    assert done.returncode == EXIT_NOT_FINITE
    (error,) = events(log, "error")
    assert (error["status"], error["cause"]) == ("failed", "diverged")
    assert not events(log, "done") and not events(log, "job")


def test_one_batch_that_is_no_number_is_seen_in_the_whole_epochs_loss():
    totals = EpochTotals(torch.device("cpu"))
    for loss in (0.5, math.inf, 0.5):
        totals.add(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor(loss))
    assert totals.take(6)[0] == math.inf


def test_outputs_that_are_no_numbers_end_an_inference(tmp_path, monkeypatch):
    model = models.resnet18(weights=None)
    model.fc.bias.data[3] = math.nan
    path = tmp_path / "nan.pt"
    torch.save(model.state_dict(), path)
    flags = ["--model", "resnet18", "--weights", str(path), "--batch-size", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["batch_inference.py", *flags])
    workload = BatchInference(inference_arguments())
    workload.load()
    with pytest.raises(NotFiniteError, match=rf"2 of 2000 outputs.*{path}"):
        workload.warm_up()


def test_no_server_answers_with_what_is_no_number(here, tmp_path):
    model = models.resnet18(weights=None, num_classes=3)
    model.fc.bias.data[1] = math.nan
    path = tmp_path / "nan.pt"
    torch.save(model.state_dict(), path)
    done = here.run(
        "workloads/inference/inference_server.py", "--model", "resnet18", "--weights", path,
        "--device", "cpu", "--host", "127.0.0.1", "--port", "0", "--max-batch", "2",
        "--workers", "1", "--results-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_NOT_FINITE
    assert f"6 of 6 outputs of resnet18 are NaN or infinite (weights {path}, " in done.stderr


# --- weights and models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small file of torch.save's, its middle in the data of a tensor."""
    path = tmp_path_factory.mktemp("saved") / "whole.pt"
    torch.save({"state_dict": {"fc.weight": torch.ones(64, 64)}}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("left", "error"), [(0, DamagedFileError), (1, UsageError), (5000, DamagedFileError)]
)
def test_truncated_weights_are_told_from_foreign_ones(tmp_path, saved, left, error):
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(saved[:left])
    with pytest.raises(error, match=str(truncated)) as raised:
        weights.load_classifier("resnet18", str(truncated))
    assert "PytorchStream" not in str(raised.value) and "--weights" in str(raised.value)


def test_a_flipped_bit_that_pytorch_would_load_is_found_by_the_sums(tmp_path, saved):
    altered, damaged = tmp_path / "altered.pt", bytearray(saved)
    damaged[len(saved) // 2] ^= 1
    altered.write_bytes(damaged)
    loaded = read_checkpoint(altered, "delete it")
    assert not torch.equal(loaded["state_dict"]["fc.weight"], torch.ones(64, 64))
    with pytest.raises(DamagedFileError, match="fails its checksum; delete it"):
        read_checkpoint(altered, "delete it", check_sums=True)


def test_what_evaluate_is_given_is_told_apart(tmp_path, saved):
    network = torch.nn.Linear(2, 2)
    about = {"classes": ["cat", "dog"], "settings": {"stem": "cifar", "image_size": 32}}
    own, other, pickled = (tmp_path / f"{name}.pt" for name in ("own", "other", "pickled"))
    resnet_training.save_model(torch.nn.Linear(3, 3), own, **about)
    other.write_bytes(saved)
    torch.save({"model": np.random.default_rng(0)}, pickled)
    for path, sentence in (
        (own, "holds the weights of another network"), (other, "was not kept by --save-model"),
        (pickled, "holds Python objects"), (tmp_path / "none.pt", "cannot read"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            resnet_training.load_model(network, path, "cifar", about["classes"])
    own.write_bytes(own.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match="cut off or damaged"):
        resnet_training.load_model(network, own, "cifar", about["classes"])


def test_a_truncated_pretrained_bert_is_named_by_its_file(tmp_path):
    bert_training.build_model(2, 16, layers=1, hidden_size=64).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DamagedFileError, match=f"{file} is cut off or damaged"):
        bert_training.load_model(tmp_path, 2)
    file.unlink()
    model = bert_training.build_model(2, 16, layers=1, hidden_size=64)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(DamagedFileError, match=f"{last} is cut off or damaged"):
        bert_training.load_model(tmp_path, 2)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), written_whole(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- datasets -------------------------------------------------------------------------------------


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("broken", ["archive", "batch"])
def test_damaged_cifar10_is_named_and_taken_anew(tmp_path, cifar_server, capsys, broken):
    whole = images.load_dataset("cifar10", tmp_path, None, 0, no_warning)
    truncate(tmp_path / CIFAR10.base_folder / "data_batch_3")
    if broken == "archive":
        truncate(tmp_path / CIFAR10.filename)
    capsys.readouterr()
    again = images.load_dataset("cifar10", tmp_path, None, 0, no_warning)
    said = capsys.readouterr().err
    assert "data_batch_3" in said and "damaged" in said
    assert (CIFAR10.filename in said) == (broken == "archive")
    np.testing.assert_array_equal(again.train.images, whole.train.images)


def test_damaged_cifar10_without_a_network_ends_the_run_instead_of_standing_in(
    tmp_path, cifar_server, monkeypatch
):
    images.load_dataset("cifar10", tmp_path, None, 0, no_warning)
    for name in (f"{CIFAR10.base_folder}/test_batch", CIFAR10.filename):
        truncate(tmp_path / name)
    truncate(tmp_path / "site" / CIFAR10.filename)
    with pytest.raises(UsageError, match="the transfer broke off"):
        images.load_dataset("cifar10", tmp_path / "data", None, 0, no_warning)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing.tar.gz")
    with pytest.raises(DamagedFileError, match=r"tar\.gz and .*test_batch does not fit"):
        images.load_dataset("auto", tmp_path, None, 0, no_warning)


def test_a_truncated_cache_of_decoded_images_is_said_and_made_anew(tmp_path, cache, capsys):
    data = write_image_folder(tmp_path / "images", size=32, per_class=2)
    whole = images.load_dataset("folder", data, None, 0, no_warning).train.images.copy()
    (kept,) = (cache / "gpu-sharing-bench").glob("decoded-*.npy")
    truncate(kept)
    again = images.load_dataset("folder", data, None, 0, no_warning)
    assert f"{kept} is cut off or damaged: it is made anew" in capsys.readouterr().err
    np.testing.assert_array_equal(again.train.images, whole)
    assert list(kept.parent.glob("decoded-*.npy")) == [kept]


def test_a_truncated_image_ends_the_run_from_inside_a_decoding_thread(tmp_path, run_one_layer):
    data = write_image_folder(tmp_path / "images", size=48, per_class=2)
    broken = data / "train" / "dog" / "001.png"
    truncate(broken)
    log = tmp_path / "events.jsonl"
    done = run_one_layer(
        "--dataset", "folder", "--data-dir", str(data), "--stem", "imagenet", "--batch-size", "4",
        "--image-size", "64", "--epochs", "1", "--device", "cpu", "--loader-workers", "1",
        "--events", str(log),
    )  # fmt: skip
    assert done.returncode == EXIT_DAMAGED_FILE
    (error,) = events(log, "error")
    assert error["cause"] == "unreadable_image"
    assert error["message"].startswith(f"{broken} cannot be read as an image (")
    assert "Traceback" not in done.stderr and error["message"] in done.stderr
