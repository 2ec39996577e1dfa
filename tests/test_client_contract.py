"""What every job promises the suite: its flags, its events while it is held, and its end.

The server and its load test: test_serving_client.py, test_inference_server.py, test_load_test.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from held_client import HeldClient
from PIL import Image
from workload_script import Here, assert_refused

RESNET = "workloads/training/resnet_training.py"
BERT = "workloads/training/bert_training.py"
BATCH = "workloads/inference/batch_inference.py"
LLM = "workloads/inference/llm_inference.py"
SESSION = "workloads/interactive/jupyter_simulation.py"
ANTAGONIST = "workloads/custom/antagonist.py"
SERVER = "workloads/inference/inference_server.py"

TINY_RESNET = (
    "--dataset", "synthetic", "--train-samples", "24", "--batch-size", "16", "--stem", "imagenet",
    "--lr", "0.01", "--device", "cpu",
)  # fmt: skip
TINY_BERT = (
    "--model", "none", "--layers", "1", "--hidden", "32", "--max-length", "16",
    "--num-samples", "40", "--held-out-samples", "20", "--device", "cpu",
)  # fmt: skip
SMALL_BATCH = ("--model", "resnet18", "--batch-size", "2", "--device", "cpu", "--weights", "none")
SMALL_LLM = ("--shape", "smollm2", "--layers", "2", "--batch-size", "2", "--prompt-tokens", "16",
             "--output-tokens", "6", "--requests", "3", "--device", "cpu")  # fmt: skip
TINY_SESSION = (
    "--device", "cpu", "--weights", "none", "--matrix-size", "32", "--matrix-iterations", "3",
    "--preprocess-iterations", "2", "--train-epochs", "1", "--inference-images", "2",
    "--image-size", "32", "--idle-min", "0.01", "--idle-max", "0.3",
)  # fmt: skip
REPEATS = "matrix=3,preprocess=2,train=1,inference=2"
PRESS = ("--kind", "hbm", "--device", "cpu")


@pytest.mark.parametrize(
    ("script", "flags", "units_of_a_job", "same_figures"),
    [
        (RESNET, (*TINY_RESNET, "--epochs", "1"),
         {"train_step": 1, "train_step_partial": 1, "test_step": 1},
         lambda figures: [epoch["train_loss"] for epoch in figures["epochs"]]),
        # 40 texts in batches of 16, twice; 20 held-out texts in one batch.
        (BERT, (*TINY_BERT, "--lr", "1e-3", "--epochs", "2"),
         {"train_step": 4, "train_step_partial": 2, "test_step": 1},
         lambda figures: [epoch["train_loss"] for epoch in figures["epochs"]]),
        (BATCH, (*SMALL_BATCH, "--num-batches", "3"), {"batch": 3}, None),
        (LLM, SMALL_LLM, {"ttft": 3, "tpot": 15}, None),
        # Drawn anew, the pauses would differ by a tenth of a second on average.
        (SESSION, (*TINY_SESSION, "--num-operations", "4", "--cell-repeats", REPEATS),
         dict.fromkeys(("matrix", "preprocess", "train", "inference"), 1),
         lambda figures: [round(cell["idle_after_seconds"], 1) for cell in figures["operations"]]),
    ],
    ids=["ResNet50", "BERT", "batches", "tokens", "session"],
)  # fmt: skip
def test_a_held_client_repeats_its_job_and_tells_every_unit_until_stopped(
    tmp_path: Path, script: str, flags: tuple, units_of_a_job: dict, same_figures
) -> None:
    with HeldClient(tmp_path, script, *flags) as held:
        identity = held.start_working()
        jobs = held.wait_for("job", count=2)
        if script == RESNET:
            held.process.stdin.close()  # as when the launcher dies, which is a stop
        else:
            held.say("stop")
        assert held.exit_code() == 0
        events = held.events()
    assert (identity["pid"], identity["device"]) == (held.process.pid, "cpu")
    assert [job["index"] for job in jobs[:2]] == [0, 1]
    if same_figures is not None:
        first, second = (same_figures(job["figures"]) for job in jobs[:2])
        assert first == pytest.approx(second, rel=1e-5, abs=0.05 * (script == SESSION))
    units = [event for event in events if event["event"] == "units"]
    is_latency = script in (BATCH, LLM, SESSION)
    assert {(event["kind"], event["latency"]) for event in units} == {
        (kind, "apart" if kind == "ttft" else is_latency) for kind in units_of_a_job
    }
    in_first_job = Counter(
        event["kind"]
        for event in units
        for start, seconds in zip(event["start_seconds"], event["duration_seconds"], strict=True)
        if start >= jobs[0]["start_seconds"] and start + seconds <= jobs[0]["end_seconds"] + 1e-5
    )
    assert in_first_job == units_of_a_job
    *_, done = [event for event in events if event["event"] != "units"]
    assert (done["event"], done["jobs"] >= 2) == ("done", True)


@pytest.mark.parametrize(
    ("script", "flags", "units", "unfinished"),
    [
        (SESSION, (*TINY_SESSION[:-4], "--idle-min", "60", "--idle-max", "60", "--num-operations",
                   "2", "--cell-repeats", REPEATS), 1, []),
        # A cell that was cut short is no unit, and counts by its share.
        (SESSION, (*TINY_SESSION[:-4], "--idle-min", "0", "--idle-max", "0", "--num-operations",
                   "2", "--cell-repeats", "matrix=1,preprocess=100000000"), 1, ["preprocess"]),
        (ANTAGONIST, (*PRESS, "--duty", "0.001", "--duration", "600"), None, []),
    ],
    ids=["pause", "cell", "idle neighbor"],
)  # fmt: skip
def test_a_stop_ends_a_long_pause_and_a_long_cell_at_once(
    tmp_path: Path, script: str, flags: tuple, units: int | None, unfinished: list[str]
) -> None:
    with HeldClient(tmp_path, script, *flags) as held:
        held.start_working()
        if units:
            held.wait_for("units")
        held.say("stop")
        assert held.exit_code(timeout_seconds=40) == 0
        assert held.events("done")[0]["jobs"] == 0
        assert units in (None, len(held.events("units")))
        assert [one["kind"] for one in held.events("unfinished")] == unfinished


@pytest.mark.parametrize(
    ("script", "arguments", "fix"),
    [
        (RESNET, (*TINY_RESNET, "--batch-size", "0"), "1 or more"),
        (RESNET, (*TINY_RESNET, "--lr", "nan"), "above 0"),
        (RESNET, (*TINY_RESNET, "--batch-size", "99999999999999999999"), "at most"),
        (RESNET, (*TINY_RESNET, "--dataset", "folder", "--data-dir", "/nowhere"), "--data-dir"),
        (RESNET, (*TINY_RESNET, "--evaluate", "/nowhere.pt"), "--save-model"),
        (RESNET, (*TINY_RESNET, "--precision", "tf32"), "fp32"),
        (RESNET, (*TINY_RESNET, "--results-dir", "/proc/nowhere"), "--results-dir"),
        (RESNET, (*TINY_RESNET, "--seed", "99999999999999999999999"), "2^63"),
        (RESNET, (*TINY_RESNET, "--client-index", "-1"), "--client-index"),
        (RESNET, (*TINY_RESNET, "--gpu", "99", "--device", "auto"), "--gpu"),
        (RESNET, (*TINY_RESNET, "--train-samples", "17"), "--batch-size"),
        (BERT, ("--num-samples", "many"), "1 or more"),
        (BERT, ("--max-length", "2"), "3 or more"),
        (BERT, ("--layers", "2"), "--model none"),
        (BERT, ("--model", "none", "--hidden", "200"), "no multiple of 64"),
        (BERT, ("--data", "x" * 300), "--data"),
        (BERT, ("--model", "/nowhere"), "--model"),
        (BERT, ("--data", "/nowhere.csv"), "--data"),
        (BATCH, ("--num-batches", "-1"), "'-1' is not"),
        (BATCH, ("--model", "lenet"), "resnet50"),
        (BATCH, ("--weights", "nowhere.pth", "--device", "cpu"), "no weights file nowhere.pth"),
        (BATCH, ("--weights", "x" * 300, "--device", "cpu"), "name another path"),
        (BATCH, ("--weights", "none", "--device", "cpu", "--batch-size", "9" * 9),
         "by --batch-size"),
        (SERVER, ("--port", "0", "--max-batch", "9" * 9), "--max-batch or"),
        (SESSION, ("--idle-min", "3", "--idle-max", "2"), "--idle-min"),
        (SESSION, ("--idle-max", "-1"), "0 or more"),
        (SESSION, ("--cell-repeats", "matrix=2,train=3"), "lacks inference, preprocess"),
        (SESSION, ("--cell-repeats", "matrix=2.5"), "1 or more"),
        (SESSION, ("--cell-repeats", "plot=3"), "plot"),
        (SESSION, ("--cell-repeats", "matrix=3,matrix=4"), "each once"),
        (ANTAGONIST, ("--kind", "hbm", "--duty", "1.5"), "not a number from 0 to 1"),
        (ANTAGONIST, ("--kind", "disk"), "invalid choice"),
        (ANTAGONIST, ("--kind", "pcie", "--device", "cpu"), "needs a GPU"),
        ("workloads/work_count.py", ("--job", "nothing", "--batch-size", "4"), "invalid choice"),
        (BATCH, ("--events", "/missing/events.jsonl"), "--events"),
        (LLM, ("--prompt", "hello"), "--prompt needs a --model"),
        (LLM, ("--output-tokens", "1"), "needs 2 or more"),
        (LLM, ("--shape", "smollm2", "--model", "x"), "not allowed with"),
        (LLM, (*SMALL_LLM, "--cache-tokens", "21"), "give 22 or more"),
        (LLM, ("--model", "no/such@model!", "--device", "cpu"), "--model"),
        (LLM, (*SMALL_LLM, "--batch-size", "4000000", "--cache-tokens", "9000"),
         "sequences would fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_that_names_the_fix_and_a_code(
    here: Here, script: str, arguments: tuple, fix: str
) -> None:
    memory = ("sequences would fit", "by --batch-size", "--max-batch or")
    code = 3 if fix == "--gpu" else 12 if fix in memory else 2
    assert_refused(here.run(script, *arguments), fix, code)


@pytest.mark.parametrize(
    ("script", "given", "resolved"),
    [
        (BATCH, ("--weights", "none"), ["--weights", "none"]),
        (BATCH, ("--model", "resnet18", "--weights", "{folder}/own.pth"),
         ["--weights", "{folder}/own.pth"]),
        (SESSION, ("--weights", "none"), ["--weights", "none"]),
        (RESNET, ("--data-dir", "{folder}/images"),
         ["--dataset", "folder", "--data-dir", "{folder}/images"]),
    ],
)  # fmt: skip
def test_resolve_answers_with_flags_that_clients_need_no_network_for(
    here: Here, tmp_path: Path, script: str, given: tuple, resolved: list
) -> None:
    (tmp_path / "own.pth").write_bytes(b"not looked into")
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / folder / "1.png")
    done = here.run(script, "--resolve", *(word.format(folder=tmp_path) for word in given))
    answer = json.loads(done.stdout)
    assert answer["arguments"] == [word.format(folder=tmp_path) for word in resolved]
    assert answer["environment"]["host_cores"] >= 1
