"""CUDA_VISIBLE_DEVICES as CUDA reads it, and what suite, drivers and monitor make of it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import nvml_stub
import pynvml
import pytest
from conftest import PROJECT_ROOT
from driver_runner import DriverRunner, driver_runner

from benchmarking.hardware import nvml, nvml_calls
from benchmarking.hardware import visible_devices as reader
from benchmarking.hardware.host_cpu import read_process_trees
from benchmarking.hardware.visible_devices import Card, names_none, visible_devices

FIRST, SECOND = (
    "GPU-00000000-1111-2222-3333-444444444444", "GPU-55555555-6666-7777-8888-999999999999",
)  # fmt: skip
MIG = ("MIG-aaaaaaaa-1", "MIG-aaaaaaaa-2", "MIG-bbbbbbbb-1")
T4 = Card(FIRST, "Tesla T4", speed=(7.5, 15360))
H100 = Card(SECOND, "NVIDIA H100", MIG, speed=(9.0, 81559))
TWINS = [Card(FIRST, "NVIDIA H100"), Card(SECOND, "NVIDIA H100", MIG)]
NOTHING: list[str] = []


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, [FIRST, SECOND]), ("0,1", [FIRST, SECOND]), ("1,0", [SECOND, FIRST]),
        ("\t1 ", [SECOND]), ("+1", [SECOND]), ("01", [SECOND]), ("1gpu", [SECOND]),
        ("0x1", [FIRST]),
        # a list ends at the first entry that is none
        ("1,-1,0", [SECOND]), ("1,7,0", [SECOND]), ("1,,0", [SECOND]), (f"1,{FIRST}", [SECOND]),
        ("1;0", [SECOND]), ("", NOTHING), (" ", NOTHING), ("-1,0", NOTHING), ("none", NOTHING),
        (",0", NOTHING), ("2", NOTHING), ("9" * 5000, NOTHING), ("gpu-5555", NOTHING),
        ("\u0661", NOTHING), ("\u20071", NOTHING),
        # named twice hides all
        ("0,1,0", NOTHING), (f"{FIRST},{FIRST}", NOTHING),
        # UUIDs, as short as one GPU alone begins so
        (SECOND, [SECOND]), ("GPU-5,GPU-0", [SECOND, FIRST]), ("GPU-", NOTHING),
        ("GPU-7", NOTHING), ("GPU-5,0", [SECOND]), (f"{SECOND}0", NOTHING),
        ("GPU-5,MIG-b", [SECOND]),
        # a MIG device is that device, one at most, and never the whole card
        (f"{MIG[2]},{MIG[0]}", [MIG[2]]), ("MIG-b,0", [MIG[2]]), ("MIG-a", NOTHING),
        (f"MIG-{SECOND}", NOTHING),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_the_variable_means_what_cuda_makes_of_it(value: str | None, seen: list[str]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible_devices(environment, TWINS) == seen


@pytest.mark.parametrize(
    ("value", "hides"),
    [("", True), ("-1,0", True), ("NoDevFiles", True), (",", True),
     ("7", False), (" 1", False), ("GPU-nothing", False), (None, False)],
)  # fmt: skip
def test_some_values_hide_every_gpu_of_any_machine(value: str | None, hides: bool) -> None:
    assert names_none(value) is hides


@pytest.mark.parametrize(
    ("order", "cuda_says", "first"),
    [("PCI_BUS_ID", [SECOND], FIRST), (None, [], SECOND), ("FASTEST_FIRST", [], SECOND),
     (None, [FIRST, SECOND], FIRST), (None, [SECOND], SECOND)],
)  # fmt: skip
def test_an_index_counts_in_cudas_own_order_where_cards_are_unlike(
    monkeypatch: pytest.MonkeyPatch, order: str | None, cuda_says: list[str], first: str
) -> None:
    monkeypatch.setattr(reader, "ask_cuda_for_order", lambda: cuda_says)
    environment = {"CUDA_VISIBLE_DEVICES": "0", **({"CUDA_DEVICE_ORDER": order} if order else {})}
    assert visible_devices(environment, [T4, H100]) == [first]


def test_cards_of_one_model_need_no_answer_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ask_cuda_for_order", lambda: pytest.fail("CUDA was asked"))
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "1"}, TWINS) == [SECOND]


# --- the drivers ----------------------------------------------------------------------------------


# An instance on GPU 1, and GPU 0 off the bus.
SLICED = (1, {"instances": [{"gi": 7, "ci": 0, "profile": "1g.10gb", "profile_id": 19, "start": 0,
                             "size": 1, "uuid": "MIG-aaaa"}]})  # fmt: skip
LOST = (0, {"lost": True})
HIDDEN = "CUDA_VISIBLE_DEVICES hides every GPU"


@pytest.mark.parametrize(
    ("kind", "change", "variables", "flags", "code", "said"),
    [
        *(("h100x2", SLICED, {"CUDA_VISIBLE_DEVICES": value}, flags, code, said)
          for value, flags, code, said in (
            (" 1", (), 0, f"GPU 1 (NVIDIA H100 80GB HBM3, {SECOND})"),
            ("1", ("--gpu", "0"), 0, "GPU 0 ("), ("-1,0", (), 0, HIDDEN), ("7", (), 0, HIDDEN),
            ("none", ("--device", "cuda"), 3,
             "CUDA_VISIBLE_DEVICES='none' hides every GPU; unset it, name a GPU by --gpu"),
            ("MIG-aa", (), 2, "names the MIG device MIG-aaaa, which is not"))),
        # unlike cards are counted as CUDA does
        *(("t4-h100", None, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": order}, (), 0, said)
          for order, said in (("PCI_BUS_ID", "GPU 0 (Tesla T4"),
                              ("FASTEST_FIRST", "GPU 1 (NVIDIA H100"))),
        *(("h100x2", LOST, {}, flags, 0, said) for flags, said in (
            ((), "GPU 1 ("), (("--gpu", "1"), "GPU is lost"))),
    ],
)  # fmt: skip
def test_a_driver_takes_the_gpu_that_cuda_would_see_first(
    kind: str, change: tuple | None, variables: dict, flags: tuple, code: int, said: str
) -> None:
    with driver_runner(kind) as runner:
        if change is not None:
            runner.machine.change_gpu(change[0], **change[1])
        result = runner.drive("run_experiments.sh", "--dry-run", *flags, **variables)
        assert result.returncode == code, result.stderr
        assert said in result.stderr
        assert runner.machine.changing_calls() == []


INHERITED = {"CDPATH": "..:/tmp", "POSIXLY_CORRECT": "1", "SHELLOPTS": "noclobber:noglob",
             "BASHOPTS": "failglob", "TMOUT": "1"}  # fmt: skip


@pytest.mark.parametrize("name", INHERITED)
def test_a_driver_works_whatever_its_shell_inherits(asked: DriverRunner, name: str) -> None:
    result = subprocess.run(
        [f"{asked.project.name}/run_experiments.sh", "--dry-run", "--modes", "mps"],
        cwd=asked.project.parent, env={**asked.environment, name: INHERITED[name]},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "enable_mps.sh --gpu" in result.stdout


# --- NVML -----------------------------------------------------------------------------------------

ASK = """
import json, os, sys
from benchmarking.planning.request import Request
from benchmarking.cli import (SuiteError)
from benchmarking.measuring.card import find_gpu
try:
    facts, notes = find_gpu(Request(device=sys.argv[1]), os.environ)
    print(json.dumps([facts and facts["uuid"], facts and facts["name"], notes]))
except SuiteError as error:
    print(json.dumps([error.exit_code, str(error), []]))
"""


def find_gpu(card: Path, library: Path, device: str = "auto", **environment: str) -> list:
    answer = subprocess.run(
        [sys.executable, "-c", ASK, device], cwd=PROJECT_ROOT, capture_output=True, check=True,
        env={**nvml_stub.stub_environment(library, card), **environment}, text=True,
    ).stdout  # fmt: skip
    return json.loads(answer)


@pytest.mark.parametrize(
    ("device", "variables", "found"),
    [
        ("auto", {"CUDA_VISIBLE_DEVICES": "GPU-5555"}, SECOND),
        ("auto", {"CUDA_VISIBLE_DEVICES": "2"}, None),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "-1,0"}, 3),
        ("auto", {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, FIRST),
        ("auto", {"CUDA_VISIBLE_DEVICES": "0"}, SECOND),
        ("auto", {"CUDA_VISIBLE_DEVICES": MIG[0]}, 2),
    ],
)  # fmt: skip
def test_the_suite_takes_the_gpu_that_cuda_would_see_first(
    tmp_path: Path, device: str, variables: dict[str, str], found: str | int | None
) -> None:
    card = nvml_stub.write_state(
        tmp_path / "card", count=2, uuid_0=FIRST, uuid_1=SECOND, name_0="Tesla T4",
        compute_capability_0="7.5", mig_mode_current_1=1, mig_devices_1=[(MIG[0], 7, 16, 9984, 0)],
    )  # fmt: skip
    library = nvml_stub.build_nvml_stub(tmp_path)
    answer = find_gpu(card, library, device, **variables)
    assert answer[0] == found
    if found is None:
        assert answer[2] == ["CUDA_VISIBLE_DEVICES hides every GPU: CPU demonstration"]
    if found == 2:
        assert "is a MIG instance: name the card with --gpu" in answer[1]


def test_a_lost_gpu_is_named_and_the_other_one_is_used(tmp_path: Path) -> None:
    card = nvml_stub.write_state(tmp_path / "card", count=2, lost_0=1, uuid_0=FIRST, uuid_1=SECOND)
    uuid, _, notes = find_gpu(card, nvml_stub.build_nvml_stub(tmp_path))
    assert uuid == SECOND
    (note,) = notes
    assert note.startswith("GPU 0 cannot be used: NVML says: ")
    assert "has left the bus" in note


def test_an_only_gpu_that_gives_no_handle_is_there_but_unusable(tmp_path: Path) -> None:
    fails = {"nvmlDeviceGetHandleByIndex_v2": 999}
    card = nvml_stub.write_state(tmp_path / "card", fail=fails)
    code, sentence, _ = find_gpu(card, nvml_stub.build_nvml_stub(tmp_path))
    assert (code, "NVML says: Unknown Error; --device cpu" in sentence) == (3, True), sentence


def test_a_name_that_is_no_utf_8_is_unknown_and_the_work_goes_on(tmp_path: Path) -> None:
    card = nvml_stub.write_state(tmp_path / "card", name=os.fsdecode(b"\xf8\x95\xa0\x81"))
    library = nvml_stub.build_nvml_stub(tmp_path)
    assert find_gpu(card, library)[:2] == [FIRST, None]
    sampled = subprocess.run(
        [sys.executable, "benchmarking/gpu_monitor.py", "--duration", "0.3", "--output", "-"],
        cwd=PROJECT_ROOT, env=nvml_stub.stub_environment(library, card), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    assert '"name": null' in sampled.stdout
    assert "Traceback" not in sampled.stderr


class UnreadableError(Exception):
    """An error whose message the driver gives in no UTF-8."""

    def __str__(self) -> str:
        return b"\xf8".decode()


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xf8\x95\xa0\x81", 0, 1, "invalid start byte"),
        ctypes.ArgumentError("argument 1: wrong type"), OSError("cannot open"),
        pynvml.NVMLLibraryMismatchError("versions"), pynvml.NVMLError(999),
        pynvml.NVMLError(12345), UnreadableError(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_pynvml_raises_is_null_or_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    for name in [name for name in vars(pynvml) if name.startswith("nvml")]:
        monkeypatch.setattr(pynvml, name, fail)
    nvml_calls.failures.clear()
    handle = object()
    gpu = nvml.Gpu(handle)
    facts, state = gpu.describe(), gpu.read_state()
    assert {key: value for key, value in facts.items() if value is not None} == {
        "mig_devices": [], "mig_mode": {"current": None, "pending": None},
    }  # fmt: skip
    assert set(state.values()) == {None}
    assert (gpu.compute_processes(), gpu.mps_processes()) == (None, None)
    failed = {"nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetPowerUsage"}
    assert failed <= set(nvml_calls.failures)
    monkeypatch.setattr(nvml, "_initialized", nvml._initialized.__wrapped__)
    with pytest.raises(nvml.GpuUnusableError, match=r"^NVML says: ."):
        nvml.open_gpu()


def test_a_process_may_call_itself_anything(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xf8\x95) x"
    os.symlink(sys.executable, odd)
    process = subprocess.Popen([odd, "-c", "import time; print(flush=True); time.sleep(60)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        process.stdout.readline()
        (reading,) = read_process_trees([process.pid])
        assert reading is not None
    finally:
        process.kill()
        process.communicate()
