"""Data of one's own: used whole, or refused by its file or line before anything is trained."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_resnet_training import cache, no_warning, streamed, write_image_folder

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


def link_to_nowhere(data: Path) -> None:
    (data / "train/dog/link.png").symlink_to("/nowhere.png")


def link_in_a_circle(data: Path) -> None:
    (data / "train/dog/link.png").symlink_to("link.png")


def link_class_above(data: Path) -> None:
    (data / "train/dog/all").symlink_to("..")


def link_test_to_train(data: Path) -> None:
    shutil.rmtree(data / "test")
    (data / "test").symlink_to("train")


def make_pipe(data: Path) -> None:
    os.mkfifo(data / "train/dog/pipe.png")


def save_programmable(data: Path) -> None:
    Image.new("RGB", (32, 32)).save(data / "train/cat/000.png", format="EPS")


def write(*files: str):
    """Add files that are no images, or folders where a name has no ending."""

    def change(data: Path) -> None:
        for file in files:
            (data / file).parent.mkdir(exist_ok=True, parents=True)
            (data / file).write_text("no image") if "." in file else (data / file).mkdir()

    return change


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (write("train/horse", "test/horse"), UsageError, "train/horse holds no images"),
        (write("test/horse/1.png"), UsageError, "train has no folder for the class 'horse'"),
        (write("train/horse/1.png"), UsageError, "test has no folder for the class 'horse'"),
        (write("train/stray.png"), UsageError, "train/stray.png lies in no class folder"),
        (write("train/cat/notes.txt"), UnreadableImageError, "cat/notes.txt cannot be read"),
        (write("test/dog/0.ppm"), UnreadableImageError, "dog/0.ppm cannot be read"),
        (link_to_nowhere, UnreadableImageError, "dog/link.png cannot be read .*No such file"),
        (link_in_a_circle, UsageError, "dog/link.png .Too many levels"),
        (link_class_above, UsageError, "cat/000.png are one file"),
        (link_test_to_train, UsageError, "train/cat/000.png are one file"),
        (make_pipe, UnreadableImageError, "dog/pipe.png cannot be read .*no regular file"),
        # A format that can run code.
        (save_programmable, UnreadableImageError, r"000\.png cannot be read .*not one of JPEG"),
    ],
)  # fmt: skip
def test_what_a_folder_cannot_use_is_refused_by_name(tmp_path, cache, change, error, named):
    data = write_image_folder(tmp_path / "images", size=32, per_class=2)
    change(data)
    with pytest.raises(error, match=named):
        load(data)


@pytest.mark.parametrize(
    ("kind", "train", "named", "size", "sentence"),
    [
        ("auto", "Train", ".", None, "has no train/"),
        ("auto", "training", ".", None, "has no train/"),
        ("auto", "train", "train", None, "has no train/"),  # folders of classes alone
        ("synthetic", "train", ".", 64, "--image-size 64 is for folders"),
    ],
)
def test_what_would_train_on_other_images_than_meant_is_refused(
    tmp_path, kind, train, named, size, sentence
):
    data = write_image_folder(tmp_path / "images", size=32, per_class=1)
    (data / "train").rename(data / train)
    with pytest.raises(UsageError, match=sentence):
        images.load_dataset(kind, data / named, size, 0, no_warning)


@pytest.mark.parametrize("size", [20, 64])
def test_pictures_of_other_sizes_are_resized_and_a_second_test_folder_is_said_not_to_be_used(
    tmp_path, cache, size
):
    data = write_image_folder(tmp_path / "images", size=size, per_class=1)
    shutil.copytree(data / "test", data / "val")
    dataset = load(data, 32)
    assert dataset.train.images.shape == (3, 3, 32, 32)
    assert sorted(dataset.notes) == [
        f"{data}/val is not used: the test is on {data}/test",
        f"images of {size}x{size} are resized to 32x32",
    ]


def test_a_file_of_cifar10_cannot_run_anything(tmp_path):
    hostile = b"cposix\nsystem\n(S'touch /tmp/never'\ntR."
    with pytest.raises(DamagedFileError, match=r"data_batch_1 is none .*it holds posix\.system"):
        images._unpickle(hostile, tmp_path / "data_batch_1")


def test_images_are_decoded_to_their_pixels_without_processes_or_shared_memory(
    tmp_path, monkeypatch
):
    import multiprocessing

    def none(*arguments: object, **more: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", none)
    data = write_image_folder(tmp_path / "images", size=48, per_class=4)
    split = load(data, 40).train
    batches = streamed(split, 40, batch_size=5, augments=False)
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


# --- texts ----------------------------------------------------------------------------------------


def test_sentences_combine_five_templates_with_topics_that_only_one_split_has():
    made = texts.synthetic_texts(1000, 100)
    assert set(Counter(made.train.texts).values()) == {40}
    assert len(set(made.train.texts)) == 25 and len(set(made.held_out.texts)) == 100
    assert made.train.texts[0] == "I really enjoyed the movie experience."
    labels = dict(zip(made.train.texts, made.train.labels, strict=True))
    assert labels["This is a positive sentence about movie."] == texts.POSITIVE
    assert labels["Not satisfied with the movie at all."] == texts.NEGATIVE
    assert sum(made.train.labels) == 600
    trained_on = " ".join(made.train.texts)
    assert not [topic for topic in texts.HELD_OUT_TOPICS if topic in trained_on]
    assert all(any(topic in t for topic in texts.HELD_OUT_TOPICS) for t in made.held_out.texts)


GOOD = '"good number 0",positive\n"bad number 0",negative\n'
SORTED = "text,label\n" + "".join(
    f'"Seen {index} times, ""{word}""",{label}\n'
    for word, label, first in (("lovely", "good", 0), ("dreadful", "bad", 15))
    for index in range(first, first + 15)
)


def read(tmp_path: Path, content: str | bytes, *samples: int | None, seed: int = 0):
    """The data set that the CSV file makes, of at most so many texts to train and to test on."""
    path = tmp_path / "reviews.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return texts.load_texts("synthetic", path, *(samples or (100, 100)), seed)


def test_rows_of_a_sorted_file_are_mixed_by_the_seed_and_held_out_ones_are_never_trained_on(
    tmp_path, monkeypatch
):
    made, again, other = (read(tmp_path, SORTED, 20, 100, seed=seed) for seed in (3, 3, 4))
    assert (len(made.train), len(made.held_out)) == (20, 6)
    assert made == again and made != other
    assert not set(made.train.texts) & set(made.held_out.texts)
    assert set(made.train.labels) == {0, 1}
    assert list(made.label_names) == ["bad", "good"]
    for text, label in zip(made.train.texts, made.train.labels, strict=True):
        assert ("lovely" in text) == (label == 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = texts.load_texts("synthetic", texts.write_csv(made), 20, 100, seed=1)
    assert sorted(kept.train.texts) == sorted(made.train.texts)
    assert sorted(kept.held_out.texts) == sorted(made.held_out.texts)
    assert kept.label_names == made.label_names


def test_the_kept_choice_of_many_labels_trains_the_classes_that_were_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = "\n".join(f"text {index},{index % 20}" for index in range(200))
    made = read(tmp_path, f"text,label\n{rows}", 6, 0)
    kept = texts.load_texts("synthetic", texts.write_csv(made), 6, 0, seed=0)
    assert list(kept.label_names) == list(made.label_names)
    with pytest.raises(UsageError, match="raise --num-samples"):
        read(tmp_path, f"text,label\n{rows}", 1, 0)


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
        ("text,label\na,1\nb,1.0\nc,2\n", "'1' .line 2. and '1.0' .line 3. look like one"),
        ("text,label\na,+1\nb,-1\nc,1\n", "'.1' .line 2. and '1' .line 4. look like one"),
        ("text,label\na,caf\u00e9\nb,cafe\u0301\nc,2\n", "line 2.* .line 3. look like one"),
        ("text,label\na,so so\nb,so  so\nc,so so\u200b\n", "line 2.* .line 3. look like one"),
        ("text,label\na,x\nb,x\u200b\nc,2\n", "line 2.* .line 3. look like one"),
        ("text,label,fold\na,1,train\nb,0,Train\nc,0,dev\n", "column 'fold' .* name it split"),
        ("text,label,split\na,0,train\nb,1,train\nc,2,test\n", "'2' is tested and never trained"),
        ("text,text,label\na,b,0\n", "each column once"),
        ("sentence,stars\nfine,5\n", "'text,label'"),
        ("text,label\nfine,1\n,0\n", "line 3: text or label is empty"),
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
        f'"text";"label"\n{GOOD}'.replace(",", ";"),
    ],
)
def test_usual_ways_to_write_a_csv_file_are_read_alike(tmp_path, content):
    made = read(tmp_path, content)
    assert sorted(made.train.texts) == ["bad number 0", "good number 0"]
    assert made.label_names == ["negative", "positive"]


def test_quotes_delimiters_and_line_ends_inside_of_quotes_are_text(tmp_path):
    made = read(tmp_path, 'text,label\n"say ""no"", then\nyes",0\nplain,1\n"",\n')
    assert sorted(made.train.texts) == ["plain", 'say "no", then\nyes']


@pytest.mark.parametrize("word", ["TEST", " Test ", "validation", "Dev", "held-out", "held_out"])
def test_rows_held_out_under_any_usual_word_are_never_trained_on(tmp_path, word):
    content = f"text,label,split\na,0,train\nb,1,Training\nc,1,{word}\nd,0,{word}\n"
    made = read(tmp_path, content)
    assert sorted(made.train.texts) == ["a", "b"]
    assert sorted(made.held_out.texts) == ["c", "d"]


@pytest.mark.parametrize(
    "order", ["①⑤", "1²", ("--1", "1"), ("-1", "9", "10"), ("1", "9" * 5000)], ids=range(5)
)
def test_labels_are_sorted_as_numbers_where_all_are_and_else_as_text(tmp_path, order):
    rows = "".join(f"x,{label}\n" for label in reversed(order))
    assert list(read(tmp_path, f"text,label\n{rows}").label_names) == list(order)


def test_other_columns_are_said_not_to_be_used(tmp_path):
    made = read(tmp_path, "id,text,label,set\n1,a,0,x\n2,b,1,y\n")
    assert made.notes == ["columns of reviews.csv that are not used: id, set"]


def test_a_small_training_set_is_tested_on_no_more_texts_than_it_has(tmp_path):
    for train, test, held_out in ((32, None, 32), (1000, None, 100), (32, 96, 96)):
        assert len(texts.load_texts("synthetic", None, train, test, 0).held_out) == held_out
    rows = "".join(f"t{i},{i % 2},{'train' if i < 4 else 'test'}\n" for i in range(40))
    assert len(read(tmp_path, f"text,label,split\n{rows}", 9, None).held_out) == 4


@pytest.mark.parametrize(
    ("library", "said"),
    [(None, r"pip install .datasets>=4"),
     (SimpleNamespace(__version__="2.18.0"), r"2\.18\.0 would run a script .*datasets>=4")],
)  # fmt: skip
def test_without_a_datasets_library_or_with_one_that_runs_scripts_the_fix_is_given(
    tmp_path, monkeypatch, library, said
):
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UsageError, match=said):
        texts.load_texts(str(tmp_path), None, 10, 10, seed=0)


def test_rows_of_a_named_dataset_without_text_or_label_are_refused():
    class Split(dict):
        column_names = ("text", "label")
        features = {"label": SimpleNamespace(names=["bad", "good"])}  # noqa: RUF012

    rows = texts._split_rows("reviews", "train", Split(text=["a", "b"], label=[0, 1]))
    assert [(row.text, row.label) for row in rows] == [("a", "bad"), ("b", "good")]
    for pairs in ({"text": ["a", None]}, {"label": [0, -1]}, {"label": [0, [0, 1]]}):
        broken = Split({"text": ["a", "b"], "label": [0, 1]} | pairs)
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
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        texts.load_texts(str(tmp_path), None, 10, 10, seed=0)
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
