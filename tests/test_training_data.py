"""Data of one's own: used whole, or refused by its file or line before anything is trained."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_resnet_training import cache, cpu_device, no_warning, write_image_folder

from workloads.common import files, results, weights
from workloads.common.errors import (
    DamagedFileError,
    UnreadableImageError,
    UsageError,
)
from workloads.training import image_batches, images, texts

__all__ = ["cache"]  # a fixture


# --- folders of images ----------------------------------------------------------------------------


def load(data: Path, size: int | None = None) -> images.ImageDataset:
    return images.load_dataset("folder", data, size, 0, no_warning)


def add_litter(data: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(data / "train" / "cat", data / "train" / name)
    for name in (".DS_Store", "Thumbs.db", "._000.png"):
        (data / "train" / "cat" / name).write_text("litter")


def add_jpegs_of_other_names(data: Path) -> None:
    for split in ("train", "test"):
        (data / split / "horse" / "deep").mkdir(parents=True)
        picture = Image.new("RGB", (32, 32), (10, 20, 30))
        for name in ("a.jfif", "b.JPE", "deep/c"):
            picture.save(data / split / "horse" / name, format="JPEG")


def add_name_of_other_bytes(data: Path) -> None:
    shutil.copy(data / "train/cat/000.png", os.fsencode(data / "train/cat") + b"/caf\xe9.png")


@pytest.mark.parametrize(
    ("change", "train_samples"),
    [
        (add_litter, {"cat": 2, "dog": 2, "frog": 2}),
        (add_jpegs_of_other_names, {"cat": 2, "dog": 2, "frog": 2, "horse": 3}),
        (add_name_of_other_bytes, {"cat": 3, "dog": 2, "frog": 2}),
    ],
)
def test_what_a_folder_holds_is_used(tmp_path, cache, change, train_samples):
    data = write_image_folder(tmp_path / "images", size=32, per_class=2)
    change(data)
    dataset = load(data)
    found = Counter(dataset.class_names[label] for label in dataset.train.labels)
    assert found == train_samples
    assert dataset.class_names == list(train_samples)


def dangle(data: Path) -> None:
    (data / "train/dog/link.png").symlink_to("/nowhere.png")


def write_class(*files: str):
    def write(data: Path) -> None:
        for file in files:
            (data / file).parent.mkdir(exist_ok=True, parents=True)
            (data / file).write_text("no image") if "." in file else (data / file).mkdir()

    return write


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (write_class("train/horse", "test/horse"), UsageError, "train/horse holds no images"),
        (write_class("test/horse/1.png"), UsageError, "train has no folder for the class 'horse'"),
        (write_class("train/horse/1.png"), UsageError, "test has no folder for the class 'horse'"),
        (write_class("train/stray.png"), UsageError, "train/stray.png lies in no class folder"),
        (write_class("train/cat/notes.txt"), UnreadableImageError, "cat/notes.txt cannot be read"),
        (write_class("test/dog/0.ppm"), UnreadableImageError, "dog/0.ppm cannot be read"),
        (dangle, UnreadableImageError, "dog/link.png cannot be read .*No such file"),
    ],
)  # fmt: skip
def test_what_a_folder_cannot_use_is_refused_by_name(tmp_path, cache, change, error, named):
    data = write_image_folder(tmp_path / "images", size=48, per_class=70)
    change(data)
    with pytest.raises(error, match=named):
        load(data)


def test_a_picture_is_read_as_the_server_reads_it(tmp_path, cache):
    data = write_image_folder(tmp_path / "images", size=32, per_class=1)
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16)
    Image.fromarray(np.tile(ramp, (32, 1))).save(data / "train/cat/000.png")
    turned = Image.new("RGB", (32, 32))
    turned.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(data / "train/dog/000.png", exif=exif)
    cat, dog, _ = load(data).train.images
    assert cat.mean() == pytest.approx(127, abs=1)
    assert (dog[:, :16].max(), dog[:, 16:].min()) == (0, 255)


def test_a_picture_in_a_format_that_can_run_code_is_not_opened(tmp_path, cache):
    data = write_image_folder(tmp_path / "images", size=32, per_class=1)
    Image.new("RGB", (32, 32)).save(data / "train/cat/000.png", format="EPS")
    with pytest.raises(UnreadableImageError, match=r"000\.png cannot be read .*not one of JPEG"):
        load(data)


@pytest.mark.parametrize("size", [20, 64])
def test_pictures_of_other_sizes_are_resized_to_32_and_the_summary_says_so(tmp_path, cache, size):
    data = write_image_folder(tmp_path / "images", size=size, per_class=1)
    dataset = load(data, 32)
    assert dataset.train.images.shape == (3, 3, 32, 32)
    assert dataset.notes == [f"images of {size}x{size} are resized to 32x32"]


def test_a_second_test_folder_is_said_not_to_be_used(tmp_path, cache):
    data = write_image_folder(tmp_path / "images", size=32, per_class=1)
    shutil.copytree(data / "test", data / "val")
    assert load(data).notes == [f"{data}/val is not used: the test is on {data}/test"]


def test_a_file_of_cifar10_cannot_run_anything(tmp_path):
    hostile = b"cposix\nsystem\n(S'touch /tmp/never'\ntR."
    with pytest.raises(DamagedFileError, match=r"data_batch_1 is none .*it holds posix\.system"):
        images._unpickle(hostile, tmp_path / "data_batch_1")


def test_images_are_decoded_without_processes_or_shared_memory(tmp_path, monkeypatch):
    import multiprocessing

    def none(*arguments: object, **more: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.Process, "start", none)
    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", none)
    data = write_image_folder(tmp_path / "images", size=48, per_class=4)
    split = load(data, 40).train
    batches = image_batches.StreamedBatches(
        cpu_device(), split, 40, False, 5, batch_size=5, workers=3
    )
    before = set(Path("/dev/shm").iterdir())
    batches.start_epoch()
    for first, count in ((0, 5), (5, 5), (10, 2)):
        batches.feed(count)
        taken, labels = batches.take(count)
        assert labels.tolist() == split.labels[first : first + count].tolist()
        expected = np.asarray(image_batches.central_crop(images.open_rgb(split.images[first]), 40))
        pixels = taken[0] * batches._std[:, None, None] + batches._mean[:, None, None]
        np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=0.01)
    batches.close()
    assert set(Path("/dev/shm").iterdir()) == before


def test_random_crops_cover_the_picture_mirror_half_and_repeat_themselves():
    ramp = np.zeros((60, 90, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(90)
    ramp[..., 1] = np.arange(60)[:, None]
    picture = Image.fromarray(ramp)
    crops = [np.asarray(image_batches.random_crop(picture, 32, seed)) for seed in range(200)]
    mirrored = sum(int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops)
    assert 70 < mirrored < 130
    assert min(crop[..., 0].min() for crop in crops) < 5
    assert max(crop[..., 0].max() for crop in crops) > 84
    assert max(crop[..., 1].max() for crop in crops) > 54
    assert len({crop.tobytes() for crop in crops}) > 190
    again = np.asarray(image_batches.random_crop(picture, 32, 7))
    np.testing.assert_array_equal(again, crops[7])
    wide = Image.fromarray(np.zeros((1, 5000, 3), dtype=np.uint8))
    assert image_batches.random_crop(wide, 32, 1).size == (32, 32)


def test_a_rehearsal_takes_one_full_batch_and_the_smaller_rest():
    split = images.synthetic_dataset(3, train_samples=11, test_samples=4).train
    batches = image_batches.StreamedBatches(
        cpu_device(), split, 32, True, 5, batch_size=4, workers=1
    )
    batches.start_rehearsal()
    for count in (4, 3):
        batches.feed(count)
        assert batches.take(count)[0].shape == (count, 3, 32, 32)
    with pytest.raises(IndexError):
        batches.feed(4)
    batches.restart()
    assert torch.equal(batches.cursor, torch.tensor(0))


# --- CSV files ------------------------------------------------------------------------------------

GOOD = '"good number 0",positive\n"bad number 0",negative\n'


def read(tmp_path: Path, content: str | bytes) -> texts.TextDataset:
    path = tmp_path / "reviews.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return texts.load_texts("synthetic", path, 100, 100, seed=0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (f"text,label\n{GOOD}Great film, loved it,positive\n", "line 4: 3 fields .* has 2"),
        (f'text,label\n5" screen is good,positive\n{GOOD}', "line 2: a double quote stands alone"),
        (f'text,label\n{GOOD}"no end,positive\n{GOOD}', "line 4: a double quote stands alone"),
        (f'text,label\n{GOOD}"two\nlines",positive\nx" y,negative\n', "line 6: a double quote"),
        (f"text,label\n{GOOD}only a text\n", "line 4: 1 fields"),
        ("text,label,split\na,0,train\nb,1,train\nc,1,tset\n", "line 4: split is 'tset'"),
        ("text,label,split\na,0,train\nb,1,\n", "line 3: split is ''"),
        ("text,label\na,Positive\nb,negative\nc,positive\n", r"\(line 2\).*\(line 4\) look like"),
        ("text,label\na,1\nb,01\nc,2\n", "'1' .line 2. and '01' .line 3. look like one"),
        ("text,label,split\na,0,train\nb,1,train\nc,2,test\n", "'2' is tested and never trained"),
        ("text,text,label\na,b,0\n", "each column once"),
        ("sentence,stars\nfine,5\n", "'text,label'"),
        ("text,label\nfine,1\n,0\n", "line 3: text or label is empty"),
        ("text,label\nfine,1\nbetter,1\n", "two labels"),
        ("text,label\n", "two labels"),
        ("", "has the columns none"),
        ("text,label,split\nfine,1,test\nbad,0,test\n", "mark some train"),
        (b"text,label\ngood,1\nbad,0\ncaf\xe9,1\n", "line 4.*UTF-8"),
        ("text,label\ngood,1\nbad,0\n".encode("utf-16"), "line 1.*UTF-8"),
    ],
)  # fmt: skip
def test_a_row_that_would_be_misread_is_refused_with_its_line(tmp_path, content, sentence):
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        f"text,label\n{GOOD}",
        f"text,label\r\n{GOOD}".replace("\n", "\r"),
        f"\ufeffText, Label\n{GOOD},\n,\n\n",
        f"text;label\n{GOOD}".replace(",", ";"),
        f"text\tlabel\n{GOOD}".replace(",", "\t"),
    ],
)
def test_usual_ways_to_write_a_csv_file_are_read_alike(tmp_path, content):
    made = read(tmp_path, content)
    assert sorted(made.train.texts) == ["bad number 0", "good number 0"]
    assert made.label_names == ["negative", "positive"]


def test_quotes_delimiters_and_line_ends_inside_of_quotes_are_text(tmp_path):
    made = read(tmp_path, 'text,label\n"say ""no"", then\nyes",0\nplain,1\n"",\n')
    assert sorted(made.train.texts) == ["plain", 'say "no", then\nyes']


@pytest.mark.parametrize(
    "word", ["test", "TEST", " Test ", "validation", "val", "Dev", "held-out", "held_out", "eval"]
)
def test_rows_held_out_under_any_usual_word_are_never_trained_on(tmp_path, word):
    content = f"text,label,split\na,0,train\nb,1,Training\nc,1,{word}\nd,0,{word}\n"
    made = read(tmp_path, content)
    assert sorted(made.train.texts) == ["a", "b"]
    assert sorted(made.held_out.texts) == ["c", "d"]


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ("①⑤", "①⑤"),
        ("²1", "1²"),
        (("--1", "1"), ("--1", "1")),
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("9" * 5000, "1"), ("1", "9" * 5000)),
    ],
)
def test_labels_that_are_no_numbers_are_sorted_as_text(tmp_path, labels, order):
    made = read(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    assert list(made.label_names) == list(order)


def test_other_columns_are_said_not_to_be_used(tmp_path):
    made = read(tmp_path, "id,text,label,set\n1,a,0,x\n2,b,1,y\n")
    assert made.notes == ["columns of reviews.csv that are not used: id, set"]


def test_a_small_training_set_is_tested_on_no_more_texts_than_it_has(tmp_path):
    assert len(texts.load_texts("synthetic", None, 32, None, 0).held_out) == 32
    assert len(texts.load_texts("synthetic", None, 1000, None, 0).held_out) == 100
    assert len(texts.load_texts("synthetic", None, 32, 96, 0).held_out) == 96
    rows = "".join(f"t{i},{i % 2},{'train' if i < 4 else 'test'}\n" for i in range(40))
    assert len(texts.load_texts("synthetic", _write(tmp_path, rows), 9, None, 0).held_out) == 4


def _write(tmp_path: Path, rows: str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label,split\n{rows}")
    return path


def test_an_old_datasets_library_is_refused_since_it_runs_scripts(tmp_path, monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "datasets", SimpleNamespace(__version__="2.18.0")
    )
    with pytest.raises(UsageError, match=r"2\.18\.0 would run a script .*datasets>=4"):
        texts.load_texts(str(tmp_path), None, 10, 10, seed=0)


def test_rows_of_a_named_dataset_without_text_or_label_are_refused():
    class Split(dict):
        column_names = ("text", "label")

        @property
        def features(self):
            return {"label": SimpleNamespace(names=["bad", "good"])}

    good = Split(text=["a", "b"], label=[0, 1])
    rows = texts._split_rows("reviews", "train", good)
    assert [(row.text, row.label) for row in rows] == [("a", "bad"), ("b", "good")]
    for broken in (Split(text=["a", None], label=[0, 1]), Split(text=["a", "b"], label=[0, -1])):
        with pytest.raises(UsageError, match="row 1 of the train split of 'reviews' lacks"):
            texts._split_rows("reviews", "train", broken)


# --- where things are kept ------------------------------------------------------------------------


def test_without_a_folder_to_keep_things_in_the_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        files.cache_folder()
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        files.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "gpu-sharing-bench"


def test_a_download_without_a_home_folder_makes_none_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(weights.DownloadError, match="set XDG_CACHE_HOME"):
        weights.download("http://127.0.0.1:9/a.pth", Path("~/.cache/torch/a.pth"))
    assert not list(tmp_path.iterdir())


def test_the_revision_is_the_projects_own_whatever_git_was_told(tmp_path, monkeypatch):
    expected = results.source_revision()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert results.source_revision() == expected
    assert expected[0] is not None
    monkeypatch.setattr(results, "PROJECT_ROOT", results.PROJECT_ROOT / "tests")
    assert results.source_revision() == (None, None)
