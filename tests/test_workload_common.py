"""What the workloads share: errors and exit codes, latency figures, engine, ends by a signal."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT_ROOT

from workloads.common import cli, client, device, engine
from workloads.common.device import open_device
from workloads.common.engine import (
    Pacer,
    capture_forward,
    prepare_step,
    step_pool,
)
from workloads.common.errors import (
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    CannotWriteError,
    GpuUnavailableError,
    JobFailedError,
    UsageError,
    printable,
)
from workloads.common.results import summarize_latency_ms


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("name a folder"), 2, "name a folder"),
        (GpuUnavailableError("no driver"), 3, "no driver"),
        (JobFailedError("the loss became nan"), 1, "the loss became nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "cannot use /root/x (Permission"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
         EXIT_OUT_OF_MEMORY, "out of GPU memory: tried 2.00 GiB"),
    ],
)  # fmt: skip
def test_known_errors_become_one_sentence_and_their_exit_code(error, code, said, capsys):
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run_main(main)
    assert ended.value.code == code
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f": error: {said}" in sentence


def test_latency_figures_match_values_worked_out_by_hand():
    figures = summarize_latency_ms([0.001, 0.002, 0.003, 0.004, 0.010])
    assert figures["mean_ms"] == pytest.approx(4.0)
    assert figures["median_ms"] == figures["p50_ms"] == pytest.approx(3.0)
    assert figures["std_ms"] == pytest.approx(3.5355339, rel=1e-6)  # sqrt(50 / 4)
    assert (figures["min_ms"], figures["max_ms"]) == (pytest.approx(1), pytest.approx(10))
    assert figures["p95_ms"] == pytest.approx(8.8)  # 4 + 0.8 * (10 - 4)
    assert figures["p99_ms"] == pytest.approx(9.76)
    # None gives unknown figures, not zero.
    assert set(summarize_latency_ms([]).values()) == {None}


def test_a_command_that_came_early_is_not_lost_and_the_end_of_the_file_is_a_stop():
    for said in (b"warm\ngo\nstop\n", b"warm\n", b"warm\n\xff\ngo\n"):
        commands = io.TextIOWrapper(io.BytesIO(said), "utf-8")
        assert client.Recorder(commands=commands).wait_for_stop(5)


@pytest.mark.parametrize("before", [None, b"", b'{"event": "units"}\n', b'{"event": "un'])
def test_the_event_log_of_a_run_that_was_cut_off_goes_on_in_a_line_of_its_own(tmp_path, before):
    log = tmp_path / "events.jsonl"
    if before is not None:
        log.write_bytes(before)
    client.Recorder(log).write("loaded")
    *others, last = log.read_bytes().splitlines()
    assert json.loads(last)["event"] == "loaded"
    assert others == (before or b"").splitlines()


# --- the engine -----------------------------------------------------------------------------------


class ListRecorder:
    """Keeps units and is never told to stop."""

    stop_requested = False

    def __init__(self) -> None:
        self.units: list[tuple[str, float, float]] = []

    def check_stop(self) -> None:
        """Go on."""

    def unit(self, kind: str, start_seconds: float, end_seconds: float) -> None:
        self.units.append((kind, start_seconds, end_seconds))


def test_consecutive_steps_are_recorded_back_to_back_and_a_pause_belongs_to_none():
    recorder = ListRecorder()
    pacer = Pacer(SimpleNamespace(is_cuda=False), recorder)
    pacer.run("step", lambda: None)
    pacer.run("step", lambda: None)
    pacer.drain()
    time.sleep(0.05)
    pacer.run("step", lambda: None)
    (_, _, end_1), (_, start_2, end_2), (_, start_3, _) = recorder.units
    assert start_2 == end_1
    assert start_3 >= end_2 + 0.05


class PretendedEvent:
    """A CUDA event on a GPU that needs ``WORK`` seconds a step, in a time of its own."""

    WORK = 1.0
    now = gpu_free = 0.0

    def __init__(self, **how: object) -> None:
        assert how == {"blocking": True, "enable_timing": True}

    def record(self) -> None:
        self.end = max(PretendedEvent.now, PretendedEvent.gpu_free)

    def query(self) -> bool:
        return PretendedEvent.now >= self.end

    def synchronize(self) -> None:
        PretendedEvent.now = max(PretendedEvent.now, self.end)

    def elapsed_time(self, other: PretendedEvent) -> float:
        return 1e3 * (other.end - self.end)


@pytest.mark.parametrize(
    ("launch_seconds", "durations"),
    [
        # The GPU is the slower one: each step lasts as long as it works.
        ({"step": 0.1, "last": 0.1}, [1.1, 1, 1, 1, 1, 1]),
        # The host is: a step lasts as long as its launch and its own work, the last one too.
        ({"step": 3.0, "last": 5.0}, [4, 3, 3, 3, 3, 5]),
    ],
)
def test_the_time_of_a_launch_is_that_of_the_step_launched(monkeypatch, launch_seconds, durations):
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(engine.time, "monotonic", lambda: PretendedEvent.now)
    monkeypatch.setattr(PretendedEvent, "now", 10.0)
    monkeypatch.setattr(PretendedEvent, "gpu_free", 0.0)

    def launch(kind: str) -> None:
        PretendedEvent.now += launch_seconds[kind]
        begins = max(PretendedEvent.now, PretendedEvent.gpu_free)
        PretendedEvent.gpu_free = begins + PretendedEvent.WORK

    recorder = ListRecorder()
    pacer = engine.Pacer(SimpleNamespace(is_cuda=True), recorder)
    for kind in ["step"] * 5 + ["last"]:
        pacer.run(kind, lambda kind=kind: launch(kind))
    pacer.drain()
    assert [kind for kind, _, _ in recorder.units] == ["step"] * 5 + ["last"]
    assert [end - start for _, start, end in recorder.units] == pytest.approx(durations)


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("/dev/shm/torch_1", "--shm-size"),
        ("/home/me/.cache/gpu-sharing-bench/a.npy", "XDG_CACHE_HOME"),
        ("results/a.json", "--results-dir"),
    ],
)
def test_what_helps_against_a_full_disk_depends_on_which_it_is(path, fix):
    assert fix in str(CannotWriteError(path, OSError(errno.ENOSPC, "No space left on device")))


def test_names_of_any_bytes_can_be_printed_and_move_no_cursor():
    assert printable("caf\udce9 \x1b[2J é\tz") == "caf\\udce9 \\x1b[2J é\tz"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("NoDevFiles", False), ("none", False), ("-1,0", False), ("", False), (" 1", True),
     ("GPU-5555", True), (None, True)],
)  # fmt: skip
def test_a_gpu_is_expected_unless_it_is_hidden_as_cuda_hides_it(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(device, "driver_listing", lambda: "NVIDIA H200, 580.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device._gpu_expected() == expected


@pytest.mark.parametrize(
    ("said", "code", "seen"),
    [
        (rb"NVIDIA \370\225 H200, 580.65.06\n", 0, "NVIDIA \ufffd\ufffd H200, 580.65.06"),
        (rb"WARNING: infoROM is corrupted\nNVIDIA H200, 580.65.06\n", 14, "NVIDIA H200, 580.65.06"),
        (rb"Unable to determine the device handle: GPU is lost\nNVIDIA H200, 580.65.06\n", 15,
         "NVIDIA H200, 580.65.06"),
        (rb"No devices were found\n", 6, None),
        (rb"NVIDIA-SMI has failed because it could not communicate with the driver.\n", 9, None),
    ],
)  # fmt: skip
def test_a_gpu_that_the_driver_names_is_told_from_none_whatever_else_is_said(
    tmp_path, monkeypatch, said, code, seen
):
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"#!/bin/sh\nprintf '%%b' '%s'; exit %d\n" % (said, code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(device="auto", engine=None, precision=None, seed=1, gpu=None)
    if seen is None:
        assert device.open_device(args).precision == "fp32"
    else:
        with pytest.raises(GpuUnavailableError, match=f"the driver sees {seen}, but PyTorch"):
            device.open_device(args)


def test_variables_that_would_change_what_is_measured_are_told_and_not_used(monkeypatch, capsys):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    args = argparse.Namespace(device="cpu", engine=None, precision=None, seed=1, gpu=None)
    opened = device.open_device(args)
    assert opened.precision == "fp32"
    assert not {"NVIDIA_TF32_OVERRIDE", "TORCHDYNAMO_DISABLE"} & os.environ.keys()
    said = capsys.readouterr().err
    assert "NVIDIA_TF32_OVERRIDE=1 would" in said and "TORCHDYNAMO_DISABLE=1 would" in said


def test_compiled_code_is_kept_where_nobody_else_may_write(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device._protect_compiler()
    made = tmp_path / "gpu-sharing-bench" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(made)
    assert made.stat().st_mode & 0o777 == 0o700
    assert os.environ["PYTHONSAFEPATH"] == "1"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(made)
    made.chmod(0o777)
    foreign = tmp_path / "foreign" / "inductor"
    foreign.mkdir(0o700, parents=True)
    shared = tmp_path / "shared" / "inductor"
    shared.mkdir(0o700, parents=True)
    shared.parent.chmod(0o777)
    stat = Path.stat

    def of_another(path: Path, **how: bool) -> object:
        return SimpleNamespace(st_uid=1) if path == foreign.parent else stat(path, **how)

    monkeypatch.setattr(Path, "stat", of_another)
    for folder in (made, elsewhere, foreign, shared):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        with pytest.raises(UsageError, match="is not yours alone"):
            device._protect_compiler()


# --- interruptions and signs of life --------------------------------------------------------------

# A job of many pieces, loaded for some seconds; its flags are those of a held client or none.
JOB = """
import sys, time
from pathlib import Path
from pathlib import Path
from types import SimpleNamespace
from workloads.common import cli, client, console

class Device(SimpleNamespace):
    engine = precision = None
    def identity(self, size=None): return {"gpu_uuid": None, "gpu_name": None, "host_threads": 1}
    def peak_memory_mib(self): return None
    def synchronize(self): print("synchronized", flush=True)

class Job(client.Workload):
    name = title = "job"
    device = Device()
    def load(self): time.sleep(float(sys.argv[2]))
    def run_job(self, recorder):
        self.done = []
        print("working", flush=True)
        with console.progress(1000, "pieces", "--epochs 1") as progress:
            for piece in range(1000):
                time.sleep(0.8)
                now = time.monotonic()
                recorder.unit("piece", now - 0.8, now)
                recorder.unit("half a piece", now - 0.4, now)  # waits for the next to be written
                self.done.append(piece)
                progress.advance()
                self.tell(f"piece {piece} is done")
    def partial_figures(self): return {"pieces": self.done} if self.done else None
    def close(self): print("closed", flush=True)
    def settings(self): return {}
    def summary(self, figures): return [("Pieces", str(len(figures["pieces"])))]

folder, hold = Path(sys.argv[1]), len(sys.argv) > 3
flags = SimpleNamespace(resolve=False, hold=hold, events=folder / "events", results_dir=folder)
cli.run_main(lambda: client.run(Job(flags)))
"""


def start_job(*arguments: object, job: str = JOB, **pipes: object) -> subprocess.Popen:
    return subprocess.Popen(
        (sys.executable, "-c", job, *map(str, arguments)), cwd=PROJECT_ROOT, text=True, **pipes
    )


def test_a_client_told_to_end_waits_for_its_device_before_it_lets_go(tmp_path):
    # Work left in flight by one client may harm the others of an MPS server.
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start_job(tmp_path, 0, "hold", **pipes) as process:
        process.stdin.write("warm\ngo\n")
        process.stdin.flush()
        assert process.stdout.readline() == "working\n"
        process.terminate()
        said, complaint = process.communicate(timeout=30)
    assert said.split() == ["synchronized", "closed"]
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in complaint


@pytest.mark.parametrize(
    ("number", "finished"),
    [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGHUP, True)],
)
def test_an_interrupted_job_keeps_what_is_finished(tmp_path, number, finished):
    with start_job(tmp_path, 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "working\n"
        if finished:
            assert process.stderr.readline() == "piece 0 is done\n"
        process.send_signal(number)
        said, complaint = process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in complaint
    results_written = [json.loads(path.read_text()) for path in tmp_path.glob("job_*.json")]
    if finished:
        (result,) = results_written
        assert result["interrupted"] is True and result["figures"]["pieces"][0] == 0
        assert "job (interrupted: what was finished)" in said and "result: " in said
        events = map(json.loads, (tmp_path / "events").read_text().splitlines())
        units = [event for event in events if event["event"] == "units"]
        halves = [one["start_seconds"] for one in units if one["kind"] == "half a piece"]
        assert sum(map(len, halves)) == len(result["figures"]["pieces"])
    else:
        assert results_written == []


def test_ctrl_c_that_an_import_swallows_ends_the_job_all_the_same(tmp_path):
    swallowing = """print("loading", flush=True)
        try: time.sleep(60)
        except KeyboardInterrupt: pass"""
    job = JOB.replace("time.sleep(float(sys.argv[2]))", f"\n        {swallowing}")
    with start_job(tmp_path, job=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        said, complaint = process.communicate(timeout=30)
    assert (said.split(), process.returncode) == (["closed"], EXIT_INTERRUPTED), complaint


def test_a_terminal_shows_from_the_first_second_what_goes_on_and_how_long_it_will_take(tmp_path):
    control, terminal = pty.openpty()
    begin = time.monotonic()
    with start_job(tmp_path, 3, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        text, loading_seconds = "", None
        while "on this CPU" not in text and time.monotonic() < begin + 60:
            text += os.read(control, 4096).decode()
            if loading_seconds is None and "loading" in text:
                loading_seconds = time.monotonic() - begin
                assert "pieces" not in text
        process.kill()
    os.close(control)
    assert loading_seconds is not None
    for word in ("pieces", "piece 0 is done", "on this CPU; try --epochs 1"):
        assert word in text
    # 1,000 pieces of what takes 0.8 s at least
    assert int(re.search(r"about (\d+) min", text)[1]) >= 13


@pytest.mark.gpu
def test_a_captured_forward_follows_its_input():
    device = SimpleNamespace(engine="graph", synchronize=torch.cuda.synchronize)
    static = torch.zeros(4, device="cuda")
    replay = capture_forward(device, lambda: static * 2)
    static.fill_(3)
    assert replay().tolist() == [6, 6, 6, 6]


@pytest.mark.gpu
def test_a_second_job_is_captured_after_the_first_is_gone_and_draws_its_own_numbers():
    device = SimpleNamespace(engine="graph", synchronize=torch.cuda.synchronize)
    drawn = []
    for _ in range(3):
        torch.cuda.manual_seed(7)
        values = torch.rand(8, device="cuda")
        pool, kept = step_pool(device), []

        def step(values=values) -> None:
            values.copy_(torch.nn.functional.dropout(torch.ones_like(values) + values, 0.5))

        for _ in range(2):
            # A cycle, as between a workload and its steps: only the collector frees the graph.
            kept.append([prepare_step(device, step, pool=pool), kept])
        kept[0][0]()
        drawn.append(values.tolist())
        del values, step, kept, pool
        gc.collect()
        torch.cuda.empty_cache()
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.gpu
def test_the_gpus_own_clock_ends_steps_that_nobody_waited_for():
    recorder = ListRecorder()
    pacer = Pacer(SimpleNamespace(is_cuda=True), recorder)
    matrix = torch.ones(64, 64, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()

    def slow_launch() -> None:
        time.sleep(0.05)
        matrix @ matrix

    start_seconds = time.monotonic()
    for _ in range(8):
        pacer.run("step", slow_launch)
    pacer.drain()
    durations = [end - start for _, start, end in recorder.units]
    assert durations == pytest.approx([0.05] * 8, rel=0.2)
    assert recorder.units[-1][2] - start_seconds == pytest.approx(sum(durations), abs=0.01)


@pytest.mark.gpu
def test_fp32_turns_tf32_off_and_the_identity_names_the_card():
    args = argparse.Namespace(device="cuda", engine=None, precision="fp32", seed=1, gpu=None)
    device = open_device(args)
    assert device.engine == "graph"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    a = torch.randn(512, 512, device="cuda")
    exact = (a.double() @ a.double()).float()
    assert torch.linalg.norm(a @ a - exact) / torch.linalg.norm(exact) < 1e-5
    identity = device.identity()
    assert identity["gpu_uuid"].startswith("GPU-")
    assert identity["multiprocessor_count"] > 0
