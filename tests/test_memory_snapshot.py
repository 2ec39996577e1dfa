"""Out of memory: the snapshot of who held what, its sentence, and that the event log has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import PROJECT_ROOT

from workloads.common.errors import EXIT_OUT_OF_MEMORY, MPS_LIMIT_VARIABLE, as_out_of_memory

# As PyTorch 2.x words it, with a limit of its own (set_per_process_memory_fraction).
PYTORCH_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.00 GiB is free. 4.00 GiB allowed; Including non-PyTorch memory, this process has "
    "3.11 GiB memory in use. Of the allocated memory 2.00 GiB is allocated by PyTorch, and 512.00 "
    "MiB is reserved by PyTorch but unallocated.\nIf reserved but unallocated memory is large try "
    "setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)
GIB = 2**30


@pytest.fixture
def card(monkeypatch) -> None:
    """A card of 80 GiB with 1 GiB free, as the driver and PyTorch would say it."""
    answers = {
        "is_initialized": True, "mem_get_info": (1 * GIB, 80 * GIB), "memory_allocated": 2 * GIB,
        "memory_reserved": 2.5 * GIB, "max_memory_allocated": 2.25 * GIB,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)


def test_the_snapshot_says_what_was_tried_and_who_holds_the_card(card):
    found = as_out_of_memory(torch.OutOfMemoryError(PYTORCH_TEXT))
    assert found.memory == {
        "where": "gpu", "tried_mib": 2560.0, "free_mib": 1024.0, "total_mib": 81920.0,
        "allowed_mib": 4096.0, "mps_limit_mib": None, "process_mib": pytest.approx(3184.64),
        "others_mib": pytest.approx(81920 - 1024 - 3184.64), "allocated_mib": 2048.0,
        "reserved_mib": 2560.0, "peak_allocated_mib": 2304.0,
    }  # fmt: skip
    assert str(found).startswith(
        "out of GPU memory: tried 2.50 GiB with 1.00 GiB of 80.00 GiB free; 4.00 GiB allowed; "
        "this process holds 3.11 GiB; others on the card hold 75.89 GiB"
    )


@pytest.mark.parametrize("value", ["0=8G", "0=8192M", "1=2G,0=8G"])
def test_what_is_free_within_an_mps_limit_is_not_taken_from_the_others(card, monkeypatch, value):
    monkeypatch.setenv(MPS_LIMIT_VARIABLE, value)
    found = as_out_of_memory(torch.OutOfMemoryError(PYTORCH_TEXT))
    assert found.memory["mps_limit_mib"] == 8192.0 and found.memory["others_mib"] is None
    assert str(found).startswith(
        "out of GPU memory: tried 2.50 GiB with 1.00 GiB free within the MPS memory limit of "
        "8.00 GiB; 4.00 GiB allowed; this process holds 3.11 GiB; run fewer clients"
    )


def test_a_driver_that_answers_no_more_leaves_unknown_figures_and_still_a_sentence(monkeypatch):
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    found = as_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"))
    assert found.memory["free_mib"] is None and found.memory["others_mib"] is None
    assert str(found).startswith("out of GPU memory: CUDA error: out of memory; run fewer")
    for other in (RuntimeError("CUDA error: misaligned"), ValueError("CUDA out of memory")):
        assert as_out_of_memory(other) is None


def test_a_client_out_of_memory_leaves_the_snapshot_and_its_exit_code(tmp_path, here):
    # 10^8 images of 602 kB: more than any machine has, refused by the allocator at once.
    log = tmp_path / "events.jsonl"
    done = here.run(
        "workloads/inference/batch_inference.py", "--model", "resnet18", "--weights", "none",
        "--batch-size", "100000000", "--device", "cpu", "--events", str(log),
    )  # fmt: skip
    assert done.returncode == EXIT_OUT_OF_MEMORY
    events = {event["event"]: event for event in map(json.loads, log.read_text().splitlines())}
    error = events["error"]
    assert (error["status"], error["cause"]) == ("oom", "out_of_memory")
    assert error["memory"]["where"] == "host"
    assert error["memory"]["tried_mib"] == pytest.approx(1e8 * 3 * 224 * 224 * 4 / 2**20)
    assert 0 < error["memory"]["free_mib"] < error["memory"]["total_mib"]
    assert error["message"] in done.stderr and "Traceback" not in done.stderr
    assert "done" not in events


# Answers each line with what a product on the card comes to; it must be the same every time.
NEIGHBOR = """
import sys, torch
values = torch.arange(1024.0 * 1024, device="cuda").view(1024, 1024) % 7
for _ in sys.stdin:
    print(float((values @ values).sum()), flush=True)
"""


@pytest.fixture
def neighbor() -> Iterator[Callable[[], str]]:
    """Another process that works on the card whenever it is asked to."""
    with subprocess.Popen((sys.executable, "-c", NEIGHBOR), text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip

        def work() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline()

        yield work
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.gpu
def test_a_capped_process_on_a_real_card_tells_its_limit_and_harms_nobody(neighbor):
    script = (
        "import torch; from workloads.common.errors import as_out_of_memory\n"
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "torch.cuda.set_per_process_memory_fraction(256 * 2**20 / total)\n"
        "kept = torch.zeros(64 * 2**20, dtype=torch.uint8, device='cuda')\n"
        "try: torch.zeros(512 * 2**20, dtype=torch.uint8, device='cuda')\n"
        "except Exception as error: found = as_out_of_memory(error)\n"
        "assert found.memory['tried_mib'] == 512 and found.memory['allocated_mib'] >= 64, found\n"
        "assert 0 < found.memory['free_mib'] <= found.memory['total_mib'], found.memory\n"
        "assert found.memory['reserved_mib'] <= 256, found.memory\n"
        "print(found)\n"
    )
    before = neighbor()
    assert float(before) > 0
    done = subprocess.run(
        (sys.executable, "-c", script), cwd=PROJECT_ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "out of GPU memory: tried 512 MiB with " in done.stdout
    assert neighbor() == before
