"""llm_inference.py: the right tokens, the figures of a run, and what is refused.

A Llama of two layers with random weights stands for a pretrained one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from held_client import HeldClient

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "llm_inference.py"
SMALL = ("--shape", "smollm2", "--layers", "2", "--batch-size", "2", "--prompt-tokens", "16",
         "--output-tokens", "6", "--requests", "3", "--device", "cpu")  # fmt: skip


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--results-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def result_in(folder: Path) -> dict:
    """Return the one result that was written."""
    [path] = folder.glob("llm_inference_*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a tiny Llama and a tokenizer that knows a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = [
        "<unk>",
        "once",
        "upon",
        "a",
        "time",
        "there",
        "was",
        "model",
        "that",
        "shared",
        "its",
        "card",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=96, vocab_size=len(words), max_position_embeddings=64,
        initializer_range=0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_answer_is_the_one_that_transformers_generates(
    model_folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "once upon a time there was a model"
    ended = run("--model", model_folder, "--prompt", prompt, "--output-tokens", 12, "--requests", 2,
                "--batch-size", 3, "--device", "cpu", folder=tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(wanted[0, tokens.shape[1] :], skip_special_tokens=True)
    assert len(set(text.split())) >= 3  # else a wrong cache would hardly show
    assert text in ended.stdout
    assert result_in(tmp_path)["settings"]["weights"] == "pretrained"


def test_a_run_by_hand_says_the_times_what_fits_and_that_the_weights_are_random(
    tmp_path: Path,
) -> None:
    ended = run(*SMALL, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = result_in(tmp_path)
    figures = result["figures"]
    assert figures["output_steps"] == 3 * 5
    assert figures["tpot_p50_ms"] > 0 and figures["ttft_p50_ms"] > 0
    # 2 (keys, values) x 2 layers x 3 heads x 64 wide x 4 bytes
    assert figures["kv_bytes_per_token"] == 3072
    tokens = 3 * 2 * 6
    assert figures["output_tokens_per_second"] == pytest.approx(
        tokens / figures["elapsed_seconds"], rel=1e-6
    )
    assert result["settings"]["weights"] == "random"
    assert "random weights" in ended.stdout


def test_a_client_reports_first_tokens_and_further_ones_with_their_response_times(
    tmp_path: Path,
) -> None:
    with HeldClient(tmp_path, "workloads/inference/llm_inference.py", *SMALL) as held:
        held.start_working()
        held.wait_for("job")
        held.say("stop")
        assert held.exit_code() == 0
        units = held.events("units")
    assert {(line["kind"], line["latency"]) for line in units} == {
        ("ttft", "apart"),
        ("tpot", True),
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompt", "hello"), 2, "--prompt needs a --model"),
        (("--output-tokens", 1), 2, "needs 2 or more"),
        (("--shape", "1b", "--model", "x"), 2, "not allowed with"),
        ((*SMALL, "--cache-tokens", 21), 2, "give 22 or more"),
        (("--model", "no/such@model!", "--device", "cpu"), 2, "--model"),
        ((*SMALL, "--batch-size", 4_000_000, "--cache-tokens", 9000), 12, "sequences would fit"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: tuple, code: int, said: str, tmp_path: Path
) -> None:
    ended = run(*arguments, folder=tmp_path)
    assert (ended.returncode, said in ended.stderr) == (code, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_prompt_longer_than_the_model_reads_is_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    ended = run("--model", model_folder, "--prompt-tokens", 60, "--output-tokens", 10,
                "--device", "cpu", folder=tmp_path)  # fmt: skip
    assert ended.returncode == 2
    assert "reads 64 tokens at most" in ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_captured_steps_generate_what_eager_steps_generate(
    engine: str, model_folder: Path, tmp_path: Path
) -> None:
    answers = []
    for name in ("eager", engine):
        ended = run("--model", model_folder, "--prompt", "once upon a time", "--output-tokens", 12,
                    "--requests", 2, "--batch-size", 3, "--precision", "fp32", "--engine", name,
                    folder=tmp_path / name)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        answers += [line for line in ended.stdout.splitlines() if line.startswith("Answer")]
    assert answers[0] == answers[1]
