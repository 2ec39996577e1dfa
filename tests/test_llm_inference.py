"""llm_inference.py: the right tokens and the figures of a run.

A Llama of two layers with random weights stands for a pretrained one. Flags and the held client:
test_client_contract.py.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from test_client_contract import LLM as SCRIPT
from test_client_contract import SMALL_LLM
from workload_script import Here, assert_refused, only_result, run_script

from workloads.common.errors import EXIT_NOT_FINITE, EXIT_USAGE


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a tiny Llama and a tokenizer that knows a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "once", "upon", "a", "time", "there", "was", "model", "that", "shared",
             "its", "card"]  # fmt: skip
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
    here: Here, model_folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "once upon a time there was a model"
    shared = ("--model", model_folder, "--device", "cpu")
    ended = here.run(SCRIPT, *shared, "--prompt", prompt, "--output-tokens", 12, "--requests", 2,
                     "--batch-size", 3, "--results-dir", tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(wanted[0, tokens.shape[1] :], skip_special_tokens=True)
    assert len(set(text.split())) >= 3  # else a wrong cache would hardly show
    assert text in ended.stdout
    assert only_result(SCRIPT, tmp_path)["settings"]["weights"] == "pretrained"
    assert_refused(here.run(SCRIPT, *shared, "--prompt", " "), "give a word")
    too_long = here.run(SCRIPT, *shared, "--prompt-tokens", 60, "--output-tokens", 10)
    assert_refused(too_long, "reads 64 tokens at most")


@pytest.mark.parametrize(
    ("name", "about"),
    [
        # The window is shorter than prompt and answer, and two requests share one cache.
        ("Mistral", {"sliding_window": 6}),
        ("Gemma2", {"sliding_window": 6, "head_dim": 8}),  # bounds its scores
        ("GptOss", {"sliding_window": 6, "head_dim": 8, "num_local_experts": 4}),  # has sinks
        ("Llama4Text", {"attention_chunk_size": 8, "head_dim": 8, "num_local_experts": 2,
                        "intermediate_size_mlp": 64}),
        ("Falcon", {"multi_query": True, "new_decoder_architecture": False}),  # one head of keys
    ],
)  # fmt: skip
def test_other_architectures_answer_what_transformers_generates(
    here: Here, model_folder: Path, tmp_path: Path, name: str, about: dict
) -> None:
    import torch
    import transformers

    prompt = "once upon a time there was a model that shared its card"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False, **about,
    )  # fmt: skip
    torch.manual_seed(7)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    ended = here.run(SCRIPT, "--model", folder, "--device", "cpu", "--prompt", prompt, "--requests",
                     2, "--output-tokens", 20, "--results-dir", tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
    assert len(set(wanted.tolist())) >= 3
    assert tokenizer.decode(wanted, skip_special_tokens=True) in ended.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [("Mamba", "cache of fixed length"), ("GPTNeo", "cache of fixed length"),
     ("Bert", "is an encoder")],
)  # fmt: skip
def test_a_model_that_reads_both_ways_or_without_a_cache_of_fixed_length_is_refused(
    here: Here, model_folder: Path, tmp_path: Path, name: str, said: str
) -> None:
    import transformers

    about = {"attention_types": [[["global", "local"], 1]]} if name == "GPTNeo" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=12, hidden_size=32, num_hidden_layers=2,
        **({"num_attention_heads": 4} if name == "Bert" else about),
    )  # fmt: skip
    folder = shutil.copytree(model_folder, tmp_path / "model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    small = ("--prompt-tokens", 4, "--output-tokens", 2, "--results-dir", tmp_path)
    assert_refused(here.run(SCRIPT, "--model", folder, "--device", "cpu", *small), said)


@pytest.mark.parametrize(
    ("vocabulary", "weight", "said", "code"),
    [(5, 0.0, "the tokenizer in", EXIT_USAGE),
     (12, float("nan"), "are NaN or infinite", EXIT_NOT_FINITE)],
)  # fmt: skip
def test_a_foreign_tokenizer_and_weights_that_are_no_numbers_are_refused(
    here: Here, model_folder: Path, tmp_path: Path, vocabulary: int, weight: float, said: str,
    code: int,
) -> None:  # fmt: skip
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = AutoConfig.from_pretrained(folder, vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.constant_(model.lm_head.weight, weight)
    model.save_pretrained(folder)
    ended = here.run(SCRIPT, "--model", folder, "--device", "cpu", "--prompt", "a model",
                     "--output-tokens", 2, "--results-dir", tmp_path)  # fmt: skip
    assert_refused(ended, said, code)


def test_a_folder_runs_no_code_asks_nothing_and_has_all_weights_of_its_config(
    here: Here, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for name, about, said in (
        ("more", {"num_hidden_layers": 3}, "not those of its config.json: model.layers.2"),
        ("wide", {"intermediate_size": 80}, "mlp.down_proj.weight and 5 more are missing or of"),
        ("code", {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "custom code"),
    ):
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | about))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass")
        assert_refused(here.run(SCRIPT, "--model", folder, "--device", "cpu"), said)
    (tmp_path / "code" / "tokenizer.json").write_text("{")
    assert_refused(here.run(SCRIPT, "--model", folder, "--device", "cpu"), "cannot read what lies")
    assert not (tmp_path / "ran").exists()


def test_a_run_by_hand_says_the_times_what_fits_and_that_the_weights_are_random(
    here: Here, tmp_path: Path
) -> None:
    ended = here.run(SCRIPT, *SMALL_LLM, "--results-dir", tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = only_result(SCRIPT, tmp_path)
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


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_captured_steps_generate_what_eager_steps_generate(
    engine: str, model_folder: Path, tmp_path: Path
) -> None:
    answers = []
    for name in ("eager", engine):
        ended = run_script(
            SCRIPT, "--model", model_folder, "--prompt", "once upon a time", "--output-tokens", 12,
            "--requests", 2, "--batch-size", 3, "--precision", "fp32", "--engine", name,
            "--results-dir", tmp_path / name,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        answers += [line for line in ended.stdout.splitlines() if line.startswith("Answer")]
    assert answers[0] == answers[1]
