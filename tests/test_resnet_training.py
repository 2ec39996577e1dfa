"""ResNet50 training: data, augmentation, result file, saved model, the step.

Folders of one's own: test_training_data.py; flags and the held client: test_client_contract.py.
"""

from __future__ import annotations

import http.server
import os
import pickle
import tarfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import workload_script
from no_sync import forbid_host_reads
from PIL import Image
from test_client_contract import RESNET as SCRIPT
from test_client_contract import TINY_RESNET as TINY
from workload_script import only_result, run_script

from workloads.common import client
from workloads.common.errors import DivergedError
from workloads.training import image_batches, images, resnet_training
from workloads.training.resnet_training import learning_rates


def write_image_folder(root: Path, size: int, per_class: int, test_name: str = "test") -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", test_name):
        for class_name in ("cat", "dog", "frog"):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


def no_warning(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class OneLayer(torch.nn.Module):
    """In ResNet50's place, where what is tested is the way to it and around it."""

    # How it was called: whether in training, with how many images.
    seen: ClassVar[Counter] = Counter()

    def __init__(self, classes: int, stem: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, classes)
        self.seen.clear()

    def forward(self, pixels):
        self.seen[self.training, len(pixels)] += 1
        return self.layer(pixels.mean(dim=(2, 3)))


@pytest.fixture
def run_one_layer(monkeypatch, here):
    """Run the script in this process with a network of one layer."""
    monkeypatch.setattr(resnet_training, "build_resnet50", OneLayer)
    main = client.main_of(resnet_training.ResNetTraining, resnet_training.parse_arguments)
    return lambda *arguments: here.run(main, *arguments)


def loaded(monkeypatch, *flags: object) -> resnet_training.ResNetTraining:
    kind, parse = resnet_training.ResNetTraining, resnet_training.parse_arguments
    return workload_script.loaded(monkeypatch, kind, parse, *flags)


def cpu_device() -> SimpleNamespace:
    return SimpleNamespace(torch_device=torch.device("cpu"), is_cuda=False, engine="eager")


# --- by hand --------------------------------------------------------------------------------------


def test_a_run_by_hand_writes_every_figure_and_a_model_that_loads_back_as_accurate(
    tmp_path, cache, here
):
    data = write_image_folder(tmp_path / "images", size=32, per_class=4)
    shared = ("--dataset", "folder", "--data-dir", data, "--batch-size", "8", "--device", "cpu",
              "--lr", "0.01")  # fmt: skip
    small = ("--stem", "imagenet")
    trained = here.run(SCRIPT, *shared, *small, "--epochs", "2", "--save-model", "--results-dir",
                       tmp_path)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    result = only_result(SCRIPT, tmp_path)
    figures = result["figures"]
    assert [e["epoch"] for e in figures["epochs"]] == [1, 2]
    names = ("train_loss", "train_accuracy_percent", "test_loss", "test_accuracy_percent",
             "epoch_seconds", "test_seconds")  # fmt: skip
    assert all(epoch[name] >= 0 for epoch in figures["epochs"] for name in names)
    assert figures["samples_per_second"] == pytest.approx(
        2 * 12 / sum(e["epoch_seconds"] for e in figures["epochs"])
    )
    assert result["settings"]["data_placement"] == "resident"
    assert result["identity"]["engine"] == "eager"
    assert result["environment"]["versions"]["torch"]
    (model,) = tmp_path.glob("resnet50_imagenet_*.pt")
    # As a result's name: two trainings may end in the same second.
    assert model.stem.endswith(f"_{os.getpid()}")
    tested = here.run(SCRIPT, *shared, *small, "--evaluate", model, "--results-dir",
                      tmp_path / "again")  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    again = only_result(SCRIPT, tmp_path / "again")["figures"]
    assert again["final_test_loss"] == pytest.approx(figures["final_test_loss"], rel=1e-5)
    assert again["final_test_accuracy_percent"] == figures["final_test_accuracy_percent"]
    wrong_stem = here.run(SCRIPT, *shared, "--evaluate", model)
    assert (wrong_stem.returncode, "same stem" in wrong_stem.stderr) == (2, True)
    larger = here.run(SCRIPT, *shared, *small, "--evaluate", model, "--image-size", "48",
                      "--results-dir", tmp_path / "larger")  # fmt: skip
    assert (larger.returncode, "--image-size 32 tests it alike" in larger.stdout) == (0, True)
    # As many classes of other names: their numbers mean something else.
    for split in ("train", "test"):
        (first, *_) = sorted((data / split).iterdir())
        first.rename(data / split / "zebra")
    other = here.run(SCRIPT, *shared, *small, "--evaluate", model)
    assert (other.returncode, "zebra" in other.stderr) == (2, True)


def test_synthetic_images_are_announced_and_claim_no_accuracy(tmp_path, monkeypatch, run_one_layer):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    done = run_one_layer(*TINY[2:], "--epochs", "1", "--data-dir", tmp_path / "none",
                         "--results-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stderr and "not claimed" in done.stdout
    result = only_result(SCRIPT, tmp_path)
    assert result["settings"]["dataset"] == "synthetic"
    assert result["figures"]["final_test_accuracy_percent"] is None
    assert not (tmp_path / "none").exists()


def test_larger_images_are_streamed_resized_and_val_stands_for_test(tmp_path, run_one_layer):
    data = write_image_folder(tmp_path / "images", size=48, per_class=3, test_name="val")
    done = run_one_layer(
        "--dataset", "folder", "--data-dir", data, "--stem", "imagenet", "--batch-size", "4",
        "--image-size", "64", "--epochs", "1", "--lr", "0.01", "--device", "cpu",
        "--loader-workers", "1", "--results-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = only_result(SCRIPT, tmp_path)["settings"]
    assert (settings["data_placement"], settings["image_size"]) == ("streamed", 64)
    assert settings["train_samples"] == settings["test_samples"] == 9


# --- data -----------------------------------------------------------------------------------------


def test_folders_of_small_images_are_decoded_once_and_then_mapped(tmp_path, cache, capsys):
    data = write_image_folder(tmp_path / "images", size=32, per_class=4)
    first = images.load_dataset("folder", data, None, 0, no_warning)
    assert "decoding 24 images" in capsys.readouterr().err
    second = images.load_dataset("folder", data, None, 0, no_warning)
    assert "decoding" not in capsys.readouterr().err
    np.testing.assert_array_equal(first.train.images, second.train.images)
    with Image.open(data / "train" / "dog" / "001.png") as image:
        np.testing.assert_array_equal(second.train.images[5], np.asarray(image).transpose(2, 0, 1))
    assert second.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def make_cifar_archive(folder: Path) -> None:
    """Write a tiny archive laid out like cifar-10-python.tar.gz."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": data, "labels": [0, 1, 2, 3]}
        (batches / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": list(images.CIFAR_CLASSES)}
    (batches / "batches.meta").write_bytes(pickle.dumps(meta))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches, batches.name)


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local web server in place of CIFAR-10's, with checksums that fit its archive."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    site = tmp_path / "site"
    make_cifar_archive(site)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    batches = site / CIFAR10.base_folder

    def with_md5(names):
        return [[name, calculate_md5(str(batches / name))] for name in names]

    monkeypatch.setattr(
        CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    )
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(str(site / "cifar-10-python.tar.gz")))
    monkeypatch.setattr(CIFAR10, "train_list", with_md5(n for n, _ in CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", with_md5(n for n, _ in CIFAR10.test_list))
    meta_md5 = calculate_md5(str(batches / "batches.meta"))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta_md5})
    yield server
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once_and_then_found_locally(tmp_path, cifar_server):
    data_dir = tmp_path / "data"
    first = images.load_dataset("auto", data_dir, None, 0, no_warning)
    assert first.name == "cifar10"
    assert first.train.images.shape == (20, 3, 32, 32)
    assert first.test.labels.tolist() == [0, 1, 2, 3]
    assert tuple(first.class_names) == images.CIFAR_CLASSES
    cifar_server.shutdown()
    again = images.load_dataset("cifar10", data_dir, None, 0, no_warning)
    np.testing.assert_array_equal(first.train.images, again.train.images)


def test_crop_and_flip_is_a_window_of_the_black_padded_image():
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    shift = torch.tensor([[0, 0], [8, 8], [4, 4], [2, 7], [4, 4]])
    flip = torch.tensor([False, False, False, True, True])
    cropped = image_batches.crop_and_flip(pixels, shift, flip)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for i, ((row, column), mirrored) in enumerate(zip(shift.tolist(), flip.tolist(), strict=True)):
        window = padded[i, :, row : row + 32, column : column + 32].transpose(1, 2, 0)
        expected = window[:, ::-1] if mirrored else window
        np.testing.assert_array_equal(cropped[i].numpy(), expected)


def streamed(
    split: images.Split, size: int, batch_size: int, augments: bool = True
) -> image_batches.StreamedBatches:
    return image_batches.StreamedBatches(
        cpu_device(), split, size, augments, 5, batch_size=batch_size, workers=2
    )


def test_resident_and_streamed_images_give_the_same_batches_every_image_once_an_epoch():
    split = images.synthetic_dataset(3, train_samples=10, test_samples=4).train
    resident = image_batches.ImageBatches(cpu_device(), split, 32, True, seed=5, batch_size=4)
    other = streamed(split, 32, batch_size=4)
    orders = []
    for _ in range(2):
        resident.start_epoch()
        other.start_epoch()
        orders.append(resident.order.tolist())
        for count in (4, 4, 2):
            other.feed(count)
            for mine, theirs in zip(other.take(count), resident.take(count), strict=True):
                torch.testing.assert_close(mine, theirs)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    resident.restart()
    resident.start_epoch()
    assert resident.order.tolist() == orders[0]


# --- the step -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_height_and_falls_to_zero():
    rates = learning_rates(0.1, 100)
    assert len(rates) == 100
    assert max(rates) == pytest.approx(0.1) and rates.index(max(rates)) == 29
    assert rates[:30] == sorted(rates[:30]) and rates[29:] == sorted(rates[29:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rates(0.1, 1) == [0.1]


@pytest.fixture
def one_layer(monkeypatch) -> Counter:
    """A network of one layer; returns how it is called."""
    monkeypatch.setattr(resnet_training, "build_resnet50", OneLayer)
    return OneLayer.seen


def test_the_warm_up_has_gone_through_every_path_of_the_job(
    monkeypatch, tmp_path, cache, one_layer
):
    data = write_image_folder(tmp_path / "images", size=32, per_class=7)
    flags = ("--dataset", "folder", "--data-dir", str(data), "--batch-size", "8", "--epochs", "2")
    monkeypatch.setattr(resnet_training, "TEST_BATCH_SIZE", 9)
    workload = loaded(monkeypatch, *flags, "--device", "cpu", "--lr", "0.01")
    workload.warm_up()
    warmed = set(one_layer)
    assert warmed == {(True, 8), (True, 5), (False, 9), (False, 3)}
    weights = [parameter.clone() for parameter in workload.model.parameters()]
    recorder = client.Recorder()
    first = workload.run_job(recorder)
    assert set(one_layer) == warmed
    workload.reset()
    for parameter, begun_with in zip(workload.model.parameters(), weights, strict=True):
        assert parameter.equal(begun_with)
    again = workload.run_job(recorder)
    assert again["final_train_loss"] == pytest.approx(first["final_train_loss"], rel=1e-6)


def test_a_mean_loss_that_blows_up_is_a_warning_and_one_that_is_no_number_an_error(
    monkeypatch, one_layer
):
    workload = loaded(monkeypatch, *TINY, "--epochs", "1")
    workload.warm_up()
    for loss_sum, warnings in ((24 * 5000.0, 0), (24 * 50_000.0, 1)):
        workload.totals.loss_sum.fill_(loss_sum)
        workload.check_unfinished()
        assert len(workload.warnings) == warnings
    assert workload.warnings[0].startswith("the learning rate is too high for 24 images: the loss")
    assert workload.warnings[0].endswith("try --lr 0.001")
    workload.totals.loss_sum.fill_(float("nan"))
    with pytest.raises(DivergedError, match="became nan"):
        workload.check_unfinished()


def test_another_client_takes_the_same_images_in_another_order(monkeypatch, one_layer):
    orders, settings = [], []
    for index in ("0", "0", "1"):
        workload = loaded(monkeypatch, *TINY, "--client-index", index)
        workload.train_batches.start_epoch()
        orders.append(workload.train_batches.order.tolist())
        settings.append(workload.settings())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert settings[0] == settings[1] == settings[2]


def test_no_step_makes_the_host_wait_since_that_could_not_be_captured(monkeypatch):
    workload = loaded(monkeypatch, *TINY, "--train-samples", "16", "--epochs", "1")
    workload.warm_up()
    with forbid_host_reads():
        workload.train.full_step()
        workload.test.full_step()
    assert workload.step_index.item() == 1
    assert workload.totals.loss_sum.item() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_captured_steps_learn_what_ten_eager_steps_learn(monkeypatch, precision):
    def ten_losses(engine: str) -> list[float]:
        workload = loaded(
            monkeypatch, "--dataset", "synthetic", "--train-samples", "640", "--batch-size", "64",
            "--engine", engine, "--precision", precision, "--lr", "0.001", "--epochs", "1",
        )  # fmt: skip
        workload.warm_up()
        workload.train_batches.start_epoch()
        workload.model.train()
        losses = []
        for _ in range(10):
            workload.train.full_step()
            losses.append(workload.totals.take(64)[0])
        torch.cuda.synchronize()
        return losses

    eager, captured = ten_losses("eager"), ten_losses("graph")
    # The first step sees the same state; later ones differ by the order of atomic additions.
    assert captured[0] == pytest.approx(eager[0], rel=1e-3)
    assert captured == pytest.approx(eager, rel=0.05)


@pytest.mark.gpu
def test_streamed_images_feed_a_captured_step(tmp_path):
    data = write_image_folder(tmp_path / "images", size=48, per_class=8)
    done = run_script(
        SCRIPT, "--dataset", "folder", "--data-dir", data, "--stem", "imagenet", "--batch-size",
        "8", "--image-size", "64", "--epochs", "2", "--lr", "0.01", "--engine", "graph",
        "--loader-workers", "2", "--results-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert only_result(SCRIPT, tmp_path)["settings"]["data_placement"] == "streamed"
